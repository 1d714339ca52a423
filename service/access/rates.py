"""Rate limits: one token bucket a tenant, in this process or shared by all through Redis.

A bucket holds as many requests as the tenant may make in a minute and fills up evenly. All that is kept of
it is when it will be full again. No library is used: the maintained ones count in windows by the wall
clock, which lets twice the limit through at an edge, and everybody or nobody after a jump of the clock.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import structlog

log = structlog.get_logger()

_WINDOW_SECONDS: Final = 60.0
# Sums of binary fractions are not exact: the last request of a full bucket is not refused for that.
_TOLERANCE_SECONDS: Final = 1e-5
_REDIS_TIMEOUT_SECONDS: Final = 0.5
_REDIS_PAUSE_SECONDS: Final = 5.0


@dataclass(frozen=True)
class Rate:
    """Whether a request is within the limit, and what is left of it."""

    allowed: bool
    limit: int
    """Requests a minute."""
    remaining: int
    """Requests that may follow at once."""
    next_seconds: int
    """Until there is one more, rounded up; 0 when none is missing."""

    @classmethod
    def of(cls, allowed: bool, limit: int, seconds_to_full: float) -> Rate:
        interval = _WINDOW_SECONDS / limit
        missing = max(seconds_to_full - _TOLERANCE_SECONDS, 0.0) / interval
        spent = math.ceil(missing)
        wait = math.ceil((missing - (spent - 1)) * interval) if spent else 0
        return cls(allowed, limit, limit - spent, wait)

    @property
    def headers(self) -> Mapping[str, str]:
        """Fields of the IETF draft "RateLimit header fields for HTTP" (httpapi-ratelimit-headers-10)."""
        return {
            "RateLimit-Policy": f'"minute";q={self.limit};w={_WINDOW_SECONDS:.0f}',
            "RateLimit": f'"minute";r={self.remaining};t={self.next_seconds}',
        }


class Buckets(Protocol):
    """The buckets of all tenants."""

    def take(self, tenant: str, limit: int) -> Rate:
        """Take one request out of a tenant's bucket of `limit` requests a minute, if there is one."""


class LocalBuckets:
    """Buckets of this process, by its monotonic clock. Safe to use from several threads."""

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def take(self, tenant: str, limit: int) -> Rate:
        interval = _WINDOW_SECONDS / limit
        now = time.monotonic()
        with self._lock:
            seconds = min(max(self._full_at.get(tenant, now) - now, 0.0), _WINDOW_SECONDS)
            allowed = seconds + interval <= _WINDOW_SECONDS + _TOLERANCE_SECONDS
            if allowed:
                seconds += interval
                self._full_at[tenant] = now + seconds
        return Rate.of(allowed, limit, seconds)


# The same as above, atomic, by the clock of the Redis server: one clock for all processes. It can jump;
# a bucket is therefore never taken to be emptier than empty.
_TAKE: Final = """
local window, interval, tolerance = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1e6
local seconds = tonumber(redis.call('GET', KEYS[1]) or now) - now
seconds = math.min(math.max(seconds, 0), window)
local allowed = 0
if seconds + interval <= window + tolerance then
    allowed = 1
    seconds = seconds + interval
    redis.call('SET', KEYS[1], string.format('%.6f', now + seconds), 'PX', math.ceil(seconds * 1000))
end
return {allowed, string.format('%.6f', seconds)}
"""


class RedisBuckets:
    """Buckets in Redis. While Redis does not answer, each process limits by itself."""

    def __init__(self, url: str) -> None:
        import redis

        self._unavailable = redis.RedisError
        client = redis.Redis.from_url(
            url, socket_timeout=_REDIS_TIMEOUT_SECONDS, socket_connect_timeout=_REDIS_TIMEOUT_SECONDS
        )
        self._take = client.register_script(_TAKE)
        self._local = LocalBuckets()
        self._pause_ends = 0.0

    def take(self, tenant: str, limit: int) -> Rate:
        if time.monotonic() < self._pause_ends:
            return self._local.take(tenant, limit)
        try:
            allowed, seconds = self._take(
                keys=[f"onnx-qat:rate:{tenant}"],
                args=[_WINDOW_SECONDS, _WINDOW_SECONDS / limit, _TOLERANCE_SECONDS],
            )
        except self._unavailable as error:
            # Not asked again at once: no request waits for a server that is known not to answer.
            self._pause_ends = time.monotonic() + _REDIS_PAUSE_SECONDS
            log.warning("Redis does not answer: rates are limited in each process", error=str(error))
            return self._local.take(tenant, limit)
        return Rate.of(bool(allowed), limit, float(seconds))
