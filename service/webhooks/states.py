"""Where a delivery stands."""

from __future__ import annotations

import enum


class DeliveryState(enum.StrEnum):
    """How far a delivery got. The last two are final."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"
