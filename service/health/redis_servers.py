"""Whether the Redis servers of the settings answer. The service goes on without them, but not as well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from service.health.probes import Probe
from service.settings import Settings

BROKER: Final = "broker"
RATES: Final = "rate limits"

_TIMEOUT_SECONDS: Final = 1.0


class RedisServers:
    """Those that the settings name, by what they are for."""

    def __init__(self, settings: Settings) -> None:
        urls = {
            BROKER: settings.broker_url if settings.queue == "celery" else None,
            RATES: settings.redis_url,
        }
        self.probes: Final[Mapping[str, Probe[None]]] = {
            name: _probe(name, str(url)) for name, url in urls.items() if url is not None
        }


def _probe(name: str, url: str) -> Probe[None]:
    def ping() -> None:
        import redis  # needs `scale`

        client = redis.Redis.from_url(
            url, socket_timeout=_TIMEOUT_SECONDS, socket_connect_timeout=_TIMEOUT_SECONDS
        )
        try:
            client.ping()
        finally:
            client.close()

    return Probe(f"redis of {name}", ping)
