"""The exceptions that mean: a server does not answer now, and the same call may succeed later."""

from __future__ import annotations

from typing import Final

from sqlalchemy.exc import InterfaceError, OperationalError, TimeoutError

from service.storage.store import StoreUnavailableError

DATABASE_UNAVAILABLE: Final = (OperationalError, InterfaceError, TimeoutError)
"""Of the database; TimeoutError: all connections are in use for a long time."""
UNAVAILABLE: Final = (*DATABASE_UNAVAILABLE, StoreUnavailableError)
"""Of any server."""
