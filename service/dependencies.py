"""What endpoints are given: the parts of the running application, and whose request it is."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from service.services import Services


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


_API_KEY = HTTPBearer(
    scheme_name="ApiKey",
    bearerFormat="oqat_ID_SECRET",
    description="An API key (`onnx-qat keys create`). A service in open mode asks for none.",
    auto_error=False,
)


async def _tenant(
    request: Request, documented: Annotated[HTTPAuthorizationCredentials | None, Depends(_API_KEY)]
) -> str:
    # The key was checked before (service/access/middleware.py). Whoever came past that has no tenant.
    tenant: str = request.state.tenant
    return tenant


InServices = Annotated[Services, Depends(_services)]
Tenant = Annotated[str, Depends(_tenant)]
"""Id of the tenant in whose name the request is made."""
