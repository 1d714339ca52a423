"""The caller's tenant over HTTP."""

from __future__ import annotations

from fastapi import APIRouter, Request

from service.dependencies import InServices, Tenant
from service.problems import problem_responses
from service.tenants.schemas import TenantStatus

router = APIRouter(tags=["tenant"])


@router.head("/v1/tenant", include_in_schema=False)
@router.get("/v1/tenant", responses=problem_responses())
def get_tenant(request: Request, services: InServices, tenant: Tenant) -> TenantStatus:
    """Whose API key this is, and what that tenant uses of its quotas."""
    return services.tenants.status(tenant, request.state.key)
