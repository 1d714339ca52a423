"""A process of the service that kills itself (SIGKILL) at a chosen point of its work."""

from __future__ import annotations

import functools
import os
import signal
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from service.jobs.leases import Leases
from service.jobs.service import JobService
from service.services import Services
from service.settings import Settings
from service.storage.local import LocalStore
from service.storage.s3 import S3Store
from service.uploads.service import UploadService
from service.worker import process
from service.worker.isolation import Isolation
from service.worker.process import JobProcess
from service.worker.runner import Runner


class Point(NamedTuple):
    """Before or after a method does its work."""

    owners: tuple[type, ...]
    method: str
    after: bool = True
    applies: Callable[..., bool] = lambda result, *arguments: True
    """Whether this call is the one, by its result (None before) and arguments."""


_STORES = (LocalStore, S3Store)

# In the order in which a job comes by.
SUBMITTING = {
    "the upload is received": Point((UploadService,), "store", after=False),
    "the upload's file is stored": Point(_STORES, "put"),
    "the upload is recorded": Point((UploadService,), "store"),
    "the job is queued and nobody knows": Point((JobService,), "submit"),
}
WORKING = {
    "the job is taken": Point((Leases,), "claim", applies=lambda claim, *_: claim is not None),
    "the inputs are in place": Point((Runner,), "_work_of"),
    "the job's process has started": Point((JobProcess,), "__init__"),
    "progress is recorded": Point((Leases,), "advance"),
    "the job's process has ended": Point((JobProcess,), "__exit__"),
    "a part of the result is stored": Point(
        _STORES, "put", applies=lambda _, store, key, *more: key.startswith("results/")
    ),
    "all of the result is stored": Point((Runner,), "_publish"),
    "the job is about to succeed": Point((Leases,), "succeed", after=False),
    "the job has succeeded": Point((Leases,), "succeed"),
}


def run_until_killed(
    point: str,
    command: tuple[str, ...],
    settings: dict[str, Any],
    environment: dict[str, str],
    submit: Callable[[Services], object] | None,
) -> NoReturn:
    """Submit a job, if so, and work off the queue; the point is sure to come, else the process stays."""
    os.environ.update(environment)
    process.COMMAND = command
    _arm({**SUBMITTING, **WORKING}[point])
    services = Services.of(Settings(**settings))
    with services.opened():
        services.runner.isolation = Isolation()  # known already: it takes a while to find out
        if submit is not None:
            submit(services)
        services.supervisor.start()
        threading.Event().wait()
    raise AssertionError


def _arm(point: Point) -> None:
    for owner in point.owners:
        setattr(owner, point.method, _dying(getattr(owner, point.method), point))


def _dying(method: Callable[..., Any], point: Point) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        result = method(*arguments, **options) if point.after else None
        if point.applies(result, *arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return result if point.after else method(*arguments, **options)

    return call
