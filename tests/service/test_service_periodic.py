"""A thread that does the same thing again and again, whatever comes of it."""

from __future__ import annotations

import threading

import pytest
from service_helpers import wait_until
from structlog.testing import CapturingLogger

from service.storage.store import StoreUnavailableError
from service.worker.periodic import Periodic


def test_it_acts_until_it_is_stopped_whatever_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    log = CapturingLogger()
    monkeypatch.setattr("service.worker.periodic.log", log)
    raised = iter([StoreUnavailableError("away"), OSError("a mistake")])
    acts = 0

    def act() -> None:
        nonlocal acts
        acts += 1
        error = next(raised, None)
        if error is not None:
            raise error

    periodic = Periodic("again", 0.01, act, "cannot act, going on")
    periodic.start()
    wait_until(lambda: acts > 3)
    assert periodic.is_alive()
    periodic.stop()
    assert not periodic.is_alive()
    assert [(call.method_name, *call.args) for call in log.calls] == [
        ("warning", "cannot act, going on"),
        ("exception", "cannot act, going on"),
    ]


def test_a_long_pause_does_not_put_the_end_off() -> None:
    acted = threading.Event()
    periodic = Periodic("again", 3600, acted.set, "cannot act, going on")
    periodic.start()
    assert acted.wait(30)
    periodic.stop()
    assert not periodic.is_alive()
