"""The HTTP server's process, and how it ends.

At SIGTERM (or Ctrl-C) the service is no longer ready, starts no more jobs, and goes on to answer while the
jobs that run here finish. Then it takes no more requests, event streams end, and the requests that are under
way finish. All that has `shutdown_grace_seconds`; jobs that take longer go back into the queue, and requests
that do are broken off. A second signal ends the grace.
"""

from __future__ import annotations

import math
import threading
import time
from types import FrameType
from typing import Any, Final

import structlog
import uvicorn

from service.app import create_app
from service.http_protocol import PunctualH11Protocol
from service.logs import configure_process_logs
from service.services import Services
from service.settings import Settings

log = structlog.get_logger()

# What requests get at least, when jobs have taken all of the grace.
_LEAST_SECONDS: Final = 1


def serve(settings: Settings, **options: Any) -> None:
    """Serve the application until a signal ends it; `options` are uvicorn's."""
    configure_process_logs(settings)
    app = create_app(settings)
    # Of uvicorn's parsers the one that bounds the size of a request's header; and its time, here.
    config = uvicorn.Config(app, http=PunctualH11Protocol, log_config=None, access_log=False, **options)
    _Server(config, app.state.services).run()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self._services = services
        self._is_ending = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called for each signal, in the main thread and thus in the event loop's."""
        if not self._is_ending:
            self._is_ending = True
            threading.Thread(target=self._end, args=(sig,), name="end", daemon=True).start()
            return
        self._services.runner.draining.set()
        self._services.runner.stopping.set()
        self._stop_serving(sig, 0)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    def _end(self, sig: int) -> None:
        grace = self._services.settings.shutdown_grace_seconds
        deadline = time.monotonic() + grace
        log.info("ending; running jobs and requests may finish; a second signal ends at once", seconds=grace)
        self._services.supervisor.drain(grace)
        self._stop_serving(sig, deadline - time.monotonic())

    def _stop_serving(self, sig: int, seconds: float) -> None:
        self._services.closing.set()
        self.config.timeout_graceful_shutdown = max(_LEAST_SECONDS, math.ceil(seconds))
        super().handle_exit(sig, None)
