"""The metrics of a process as Prometheus reads them: at the API's /metrics, or at a port of their own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, start_http_server
from prometheus_client.registry import Collector

from service.metrics.instruments import INSTRUMENTS
from service.settings import Settings

log = structlog.get_logger()


def registry_of(*more: Collector) -> CollectorRegistry:
    """All that this process measures, and more that is collected when somebody looks."""
    registry = CollectorRegistry(auto_describe=False)
    for collector in (*INSTRUMENTS, *more):
        registry.register(collector)
    ProcessCollector(registry=registry)
    GCCollector(registry=registry)
    return registry


@contextmanager
def metrics_served(settings: Settings, registry: CollectorRegistry) -> Iterator[None]:
    """Within the block the metrics are served at the port of the settings, if there is one.

    Raises:
        OSError: the port cannot be had.
    """
    if settings.metrics_port is None:
        yield
        return
    server, thread = start_http_server(settings.metrics_port, settings.metrics_host, registry)
    log.info("metrics are served", host=settings.metrics_host, port=server.server_port)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
