"""Celery: messages that say that a job may be run, and workers that wait for them.

The database stays the truth. A message is a hint: whoever gets it takes the job that it names, or another
one that is queued, or none. Messages may therefore be lost and may come twice. Each process looks now and
then whether there are fewer messages than queued jobs, and sends what is missing.
"""

from __future__ import annotations

import random
import threading
from typing import Any, Final

import structlog
from celery import Celery
from celery.signals import setup_logging, worker_shutting_down
from kombu.exceptions import KombuError
from redis.exceptions import RedisError

from service.jobs.leases import Leases
from service.settings import Settings
from service.unavailable import UNAVAILABLE
from service.worker.runner import Runner

log = structlog.get_logger()

QUEUE: Final = "onnx-qat"
"""Name of the queue in the broker, which may be shared with other applications."""
TASK: Final = "onnx_qat.run_job"

_LOOK_SECONDS: Final = 5.0
# Jobs that are submitted at the same time are announced together.
_GATHER_SECONDS: Final = 0.05
_RETRY_SECONDS: Final = 2.0


def celery_app(settings: Settings) -> Celery:
    """The connection to the broker, and how messages are handled."""
    app = Celery("onnx-qat", broker=str(settings.broker_url), set_as_current=False)
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        # A message is done with when the job is: a worker that dies has its messages delivered again.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # A worker takes no message that it cannot act upon at once.
        worker_prefetch_multiplier=1,
        worker_enable_remote_control=False,
        worker_hijack_root_logger=False,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options={"socket_connect_timeout": 5, "socket_timeout": 30},
    )
    return app


class Dispatcher:
    """Sees to it that there is a message for every queued job."""

    def __init__(self, app: Celery, leases: Leases, queued: threading.Event) -> None:
        self._app = app
        self._leases = leases
        self._queued = queued
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._queued.set()
        self._thread.join()

    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def send_missing(self) -> int:
        """Send messages for queued jobs that have none; their number.

        Raises:
            KombuError, RedisError: the broker does not answer.
        """
        with self._app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, errback=None, timeout=5)
            queued = self._leases.queued()
            missing = queued[_length(connection) :] if queued else []
            with self._app.amqp.Producer(connection) as producer:
                for job in missing:
                    self._app.send_task(TASK, [job], producer=producer, retry=False)
        return len(missing)

    def _run(self) -> None:
        while not self._stopped.is_set():
            # At different times in different processes, so that they do not send the same twice.
            self._queued.wait(_LOOK_SECONDS * random.uniform(0.7, 1.3))
            self._stopped.wait(_GATHER_SECONDS)
            self._queued.clear()
            try:
                self.send_missing()
            except (KombuError, RedisError, *UNAVAILABLE) as error:
                log.warning("cannot announce queued jobs, trying again", error=str(error))
                self._stopped.wait(_RETRY_SECONDS)
            except Exception:
                log.exception("cannot announce queued jobs, trying again")
                self._stopped.wait(_RETRY_SECONDS)


def _length(connection: Any) -> int:
    """Number of messages that no worker has taken yet."""
    with connection.channel() as channel:
        try:
            return int(channel.queue_declare(QUEUE, passive=True).message_count)
        except connection.channel_errors:  # there is no such queue as long as it is empty
            return 0


def _leave_logs_alone(**_: Any) -> None:
    """Celery configures no logs when somebody is there to do it."""


def run_celery_worker(app: Celery, settings: Settings, leases: Leases, runner: Runner) -> int:
    """Run jobs as messages come, until SIGTERM or SIGINT; the exit status, 0 unless Celery failed.

    What runs then may finish within the grace of the settings; the rest goes back into the queue, at a
    second signal at once.
    """
    setup_logging.connect(_leave_logs_alone)

    @app.task(name=TASK)  # type: ignore[untyped-decorator]
    def run_job(job: str) -> None:
        if runner.draining.is_set():
            return
        try:
            claim = leases.claim(job) or leases.claim()
        except UNAVAILABLE as error:
            log.warning("the database does not answer", error=str(error))
            runner.stopping.wait(_RETRY_SECONDS)
            return
        if claim is not None:
            runner.run(claim)

    @worker_shutting_down.connect(weak=False)  # type: ignore[untyped-decorator]
    def stop(**_: Any) -> None:
        if runner.draining.is_set():
            runner.stopping.set()
            return
        runner.draining.set()
        timer = threading.Timer(settings.shutdown_grace_seconds, runner.stopping.set)
        timer.daemon = True
        timer.start()

    worker = app.Worker(
        pool="threads",  # each job is in a process of its own anyway
        concurrency=settings.workers,
        loglevel=settings.log_level.upper(),
        quiet=True,  # no banner past the logs
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    worker.start()
    # Celery calls the end after a second signal a failure; it was asked for.
    return 0 if runner.draining.is_set() else worker.exitcode or 1
