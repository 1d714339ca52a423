"""Tenants: making them and their keys, and telling whose request one is."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import structlog
from sqlalchemy.orm import Session

from service.database import Database, now
from service.errors import ServiceError, ServiceErrorCode
from service.tenants import keys, quotas, repository
from service.tenants.models import DEFAULT_TENANT, ApiKeyRow, TenantRow
from service.tenants.schemas import ApiKey, Quotas, TenantDescription, TenantStatus, Usage
from service.unavailable import DATABASE_UNAVAILABLE

log = structlog.get_logger()

_USE_IS_NOTED_EVERY: Final = datetime.timedelta(minutes=1)


@dataclass(frozen=True)
class Caller:
    """In whose name a request is made."""

    tenant: str
    key: str | None
    requests_per_minute: int | None


class TenantService:
    """Safe to use from several threads and processes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    # What the operator does.

    def create(self, identifier: str, name: str, limits: Quotas) -> TenantDescription:
        """Raises: ServiceError: `tenant_exists`."""

        def add(session: Session) -> TenantRow:
            if repository.find(session, identifier) is not None:
                raise ServiceError(ServiceErrorCode.TENANT_EXISTS, f"There is a tenant {identifier} already.")
            row = TenantRow(id=identifier, name=name, **limits.model_dump())
            session.add(row)
            return row

        row = self._database.write(add)
        log.info("tenant created", tenant=identifier)
        return TenantDescription.model_validate(row)

    def tenants(self) -> list[TenantDescription]:
        with self._database.reading() as session:
            return [TenantDescription.model_validate(row) for row in repository.all_tenants(session)]

    def set_quotas(self, identifier: str, changes: Mapping[str, int | None]) -> TenantDescription:
        """Change the quotas that are named as in `Quotas`; the others stay. Raises: `tenant_not_found`."""
        with self._database.writing() as session:
            row = _found(repository.find(session, identifier), identifier)
            for name, value in changes.items():
                setattr(row, name, value)
        log.info("quotas changed", tenant=identifier, **changes)
        return TenantDescription.model_validate(row)

    def create_key(
        self, tenant: str, name: str, lifetime: datetime.timedelta | None
    ) -> tuple[ApiKey, keys.NewKey]:
        """Make a key; its text is not kept and cannot be shown again. Raises: `tenant_not_found`."""
        key = keys.NewKey.random()
        created_at = now()
        row = ApiKeyRow(
            id=key.id,
            tenant=tenant,
            hash=keys.hash_of(key.text),
            name=name,
            created_at=created_at,
            expires_at=None if lifetime is None else created_at + lifetime,
        )
        with self._database.writing() as session:
            _found(repository.find(session, tenant), tenant)
            session.add(row)
        log.info("API key created", key=key.id, tenant=tenant, name=name, expires_at=str(row.expires_at))
        return ApiKey.model_validate(row), key

    def api_keys(self, tenant: str | None = None) -> list[ApiKey]:
        """All keys, or a tenant's, in the order in which they were made."""
        with self._database.reading() as session:
            return [ApiKey.model_validate(row) for row in repository.keys(session, tenant)]

    def revoke(self, key: str) -> ApiKey:
        """End a key at once and for good; again is no error. Raises: `key_not_found`."""
        with self._database.writing() as session:
            row = repository.find_key(session, key)
            if row is None:
                raise ServiceError(ServiceErrorCode.KEY_NOT_FOUND, f"There is no API key with id {key}.")
            row.revoked_at = row.revoked_at or now()
        log.info("API key revoked", key=key, tenant=row.tenant)
        return ApiKey.model_validate(row)

    def has_usable_key(self) -> bool:
        with self._database.reading() as session:
            return repository.usable_keys(session, now()) > 0

    # What requests need.

    def everybody(self) -> Caller:
        """The caller of each request where no keys are asked for."""
        with self._database.reading() as session:
            row = _found(repository.find(session, DEFAULT_TENANT), DEFAULT_TENANT)
        return Caller(row.id, None, row.requests_per_minute)

    def authenticate(self, credential: str | None) -> Caller:
        """The caller whose key that is.

        Raises:
            ServiceError: `unauthorized`, `key_invalid`, `key_expired`, `key_revoked`.
        """
        if not credential:
            raise keys.unauthorized("Send your API key as `Authorization: Bearer KEY`.")
        identifier = keys.id_of(credential)
        with self._database.reading() as session:
            row = None if identifier is None else repository.find_key(session, identifier)
            # Whether there is a key of that id is nobody's business who does not know its secret.
            if row is None or not keys.is_hash_of(row.hash, credential):
                raise keys.refused(ServiceErrorCode.KEY_INVALID, "This is no API key of this service.")
            tenant = _found(repository.find(session, row.tenant), row.tenant)
        if row.revoked_at is not None:
            raise keys.refused(ServiceErrorCode.KEY_REVOKED, "The API key was revoked; ask for another one.")
        if row.expires_at is not None and row.expires_at <= now():
            raise keys.refused(ServiceErrorCode.KEY_EXPIRED, "The API key has expired; ask for another one.")
        self._note_use(row)
        return Caller(tenant.id, row.id, tenant.requests_per_minute)

    def status(self, tenant: str, key: str | None) -> TenantStatus:
        """What a tenant may use, and uses."""
        with self._database.reading() as session:
            row = _found(repository.find(session, tenant), tenant)
            return TenantStatus(
                id=row.id,
                name=row.name,
                key=key,
                stored_bytes=Usage(used=quotas.stored_bytes(session, tenant), limit=row.max_bytes),
                unfinished_jobs=Usage(
                    used=quotas.unfinished_jobs(session, tenant), limit=row.max_queued_jobs
                ),
                requests_per_minute=row.requests_per_minute,
            )

    def _note_use(self, row: ApiKeyRow) -> None:
        at = now()
        before = at - _USE_IS_NOTED_EVERY
        if row.last_used_at is not None and row.last_used_at >= before:
            return
        try:
            with self._database.writing() as session:
                repository.note_use(session, row.id, at, before)
        except DATABASE_UNAVAILABLE as error:
            # Worth knowing, but no reason to refuse the request.
            log.warning("the use of an API key was not recorded", key=row.id, error=str(error))


def _found(row: TenantRow | None, identifier: str) -> TenantRow:
    if row is None:
        raise ServiceError(
            ServiceErrorCode.TENANT_NOT_FOUND,
            f"There is no tenant {identifier}; `tenants create` makes it.",
        )
    return row
