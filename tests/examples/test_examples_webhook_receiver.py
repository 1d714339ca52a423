"""The example receiver believes what the service signs, and nothing else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from examples.service.webhook_receiver import BadSignatureError, receiver, verify
from service.webhooks.signing import new_secret, signed_headers

SECRET = new_secret()
BODY = json.dumps({"type": "job.succeeded", "data": {"id": "j"}}).encode()
NOW = 1_700_000_000


def test_a_signed_message_is_read() -> None:
    assert verify(SECRET, signed_headers([SECRET], "m", NOW, BODY), BODY, NOW + 1)["data"] == {"id": "j"}


def test_one_of_two_signatures_is_enough_while_the_secret_is_replaced() -> None:
    headers = signed_headers([new_secret(), SECRET], "m", NOW, BODY)
    assert verify(SECRET, headers, BODY, NOW)["type"] == "job.succeeded"


@pytest.mark.parametrize(
    "change",
    [
        {"webhook-id": "other"},
        {"webhook-timestamp": str(NOW + 1)},
        {"webhook-timestamp": "x"},
        {"webhook-signature": "v1,AAAA"},
        {"webhook-signature": "é"},
        {"webhook-signature": ""},
    ],
)
def test_a_changed_message_is_refused(change: dict[str, str]) -> None:
    headers = {**signed_headers([SECRET], "m", NOW, BODY), **change}
    with pytest.raises(BadSignatureError):
        verify(SECRET, headers, BODY, NOW)


@pytest.mark.parametrize(
    ("secret", "body", "now"),
    [
        (new_secret(), BODY, NOW),
        (SECRET, BODY + b" ", NOW),
        (SECRET, BODY, NOW + 301),
        (SECRET, BODY, NOW - 301),
    ],
    ids=["secret", "body", "late", "early"],
)
def test_another_secret_body_or_time_is_refused(secret: str, body: bytes, now: float) -> None:
    with pytest.raises(BadSignatureError):
        verify(secret, signed_headers([SECRET], "m", NOW, BODY), body, now)


@pytest.fixture
def served() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    events: list[dict[str, Any]] = []
    with receiver(SECRET, 0, events.append) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", events
        server.shutdown()
        thread.join()


def test_each_event_is_handled_once_and_forgeries_never(served: tuple[str, list[dict[str, Any]]]) -> None:
    url, events = served
    headers = signed_headers([SECRET], "m", int(time.time()), BODY)
    assert [httpx.post(url, content=BODY, headers=headers).status_code for _ in range(2)] == [204, 204]
    assert httpx.post(url, content=BODY).status_code == 401
    forged = signed_headers([new_secret()], "n", int(time.time()), BODY)
    assert httpx.post(url, content=BODY, headers=forged).status_code == 401
    assert httpx.post(url, content=b"x" * (1 << 20) + b"x").status_code == 413
    assert [event["data"]["id"] for event in events] == ["j"]
