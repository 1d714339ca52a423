"""Whoever asks is told of a job's changes: at least once, signed, whatever dies meanwhile."""

from __future__ import annotations

import datetime
import json
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi.testclient import TestClient
from receivers import Receiver
from servers import postgresql_database, wait_until_one_waits_for_a_lock
from service_helpers import Server, assert_problem, queue, submit, wait_for, wait_until

from service.database import now
from service.errors import Cause, ServiceErrorCode
from service.jobs.leases import Pulse
from service.jobs.models import JobRow
from service.services import Services
from service.settings import Settings
from service.webhooks import outbox, service
from service.webhooks.models import WebhookDeliveryRow
from service.webhooks.schemas import Webhook
from service.webhooks.signing import new_secret

SECRET = new_secret()
ALL_EVENTS = ["job.running", "job.succeeded", "job.failed", "job.cancelled"]
ALLOWED: dict[str, Any] = {"webhook_allow_private": True, "webhook_ports": None}
FAILURE = Cause(code=ServiceErrorCode.WORKER_CRASHED, detail="It crashed.")
UNKNOWN = "0" * 32


def webhook(url: str = "http://127.0.0.1:9/", **more: Any) -> dict[str, Any]:
    return {"url": url, "secret": SECRET, **more}


def form(hook: dict[str, Any]) -> dict[str, Any]:
    return {"data": {"webhook": json.dumps(hook)}}


# Over HTTP, with a receiver.


def test_the_end_of_a_job_is_told_and_signed(start_client) -> None:
    client: TestClient = start_client(**ALLOWED)
    with Receiver() as receiver:
        job = submit(client, {}, **form(webhook(receiver.url + "?token=x")))
        (request,) = receiver.wait(1)
        wait_until(lambda: deliveries(client, job)[0]["state"] == "delivered")
    assert request.is_signed_with(SECRET)
    assert not request.is_signed_with(new_secret())
    assert request.path == "/hook?token=x"
    assert request.headers["content-type"] == "application/json"
    (delivery,) = deliveries(client, job)
    assert request.headers["webhook-id"] == delivery["id"]
    told, known = request.event["data"], client.get(f"/v1/jobs/{job}").json()
    assert request.event["type"] == "job.succeeded"
    assert told == {name: known[name] for name in told}
    assert (told["id"], told["state"]) == (job, "succeeded")
    assert told["bundle"]["sha256"] == known["bundle"]["sha256"]
    assert (delivery["attempts"], delivery["last_status"], delivery["last_error"]) == (1, 204, None)
    assert delivery["next_attempt_at"] is None


def test_the_start_and_the_failure_are_told_to_who_asks_for_them(start_client) -> None:
    client: TestClient = start_client(**ALLOWED)
    with Receiver() as receiver:
        submit(client, {"do": "fail"}, **form(webhook(receiver.url, events=["job.running", "job.failed"])))
        events = [request.event for request in receiver.wait(2)]
    assert {event["type"] for event in events} == {"job.running", "job.failed"}
    failed = max(events, key=lambda event: event["data"]["revision"])
    assert failed["data"]["failure"]["code"] == "model_domain_unknown"


def test_the_same_work_of_several_submissions_is_told_to_each_of_them_once(start_client) -> None:
    client: TestClient = start_client(**ALLOWED)
    script = {"seconds": 1}
    with Receiver() as first, Receiver() as second, Receiver() as late:
        job = submit(client, script, **form(webhook(first.url)))
        assert submit(client, script, **form(webhook(second.url))) == job
        # A request that is sent again, as after a loss of the connection, is no second wish.
        assert submit(client, script, **form(webhook(second.url))) == job
        first.wait(1)
        second.wait(1)
        # Whoever asks for work that is done is told so.
        assert submit(client, script, **form(webhook(late.url))) == job
        assert late.wait(1)[0].event["data"]["state"] == "succeeded"
        wait_until(lambda: {each["state"] for each in deliveries(client, job)} == {"delivered"})
        assert len(deliveries(client, job)) == 3
        assert [len(receiver.requests) for receiver in (first, second, late)] == [1, 1, 1]


def test_a_receiver_that_fails_is_tried_again_with_the_same_message(start_client) -> None:
    client: TestClient = start_client(**ALLOWED, webhook_retry_seconds=(0, 0.01, 0.01))
    with Receiver(500, 503) as receiver:
        job = submit(client, {}, **form(webhook(receiver.url)))
        requests = receiver.wait(3)
        wait_until(lambda: deliveries(client, job)[0]["state"] == "delivered")
    assert len({request.headers["webhook-id"] for request in requests}) == 1
    assert len({request.body for request in requests}) == 1
    assert all(request.is_signed_with(SECRET) for request in requests)
    assert deliveries(client, job)[0]["attempts"] == 3


def test_after_the_last_attempt_it_is_given_up_until_somebody_asks_for_it(start_client) -> None:
    client: TestClient = start_client(**ALLOWED, webhook_retry_seconds=(0.01,))
    with Receiver(500, 500) as receiver:
        job = submit(client, {}, **form(webhook(receiver.url)))
        wait_until(lambda: deliveries(client, job) and deliveries(client, job)[0]["state"] == "failed")
        (delivery,) = deliveries(client, job)
        assert (delivery["attempts"], delivery["last_status"]) == (2, 500)
        assert "500" in delivery["last_error"]
        assert delivery["next_attempt_at"] is None
        answer = client.post(f"/v1/jobs/{job}/deliveries/{delivery['id']}/redeliver")
        assert (answer.status_code, answer.json()["state"]) == (202, "pending")
        wait_until(lambda: deliveries(client, job)[0]["state"] == "delivered")
        assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
        assert len(receiver.requests) == 3


def test_a_receiver_that_is_gone_is_not_tried_again(start_client) -> None:
    client: TestClient = start_client(**ALLOWED, webhook_retry_seconds=(0.01,))
    with Receiver(410) as receiver:
        job = submit(client, {}, **form(webhook(receiver.url)))
        wait_until(lambda: deliveries(client, job) and deliveries(client, job)[0]["state"] == "failed")
        assert len(receiver.requests) == 1


def test_a_private_address_is_refused_unless_allowed(client: TestClient) -> None:
    for url in ("http://127.0.0.1:80/", "http://example.com:22/", "ftp://example.com/", "http://0x7f.1/"):
        answer = client.post("/v1/prepare", files={"model": b"{}"}, **form(webhook(url)))
        assert assert_problem(answer, 422, "webhook_url_refused")["field"] == "webhook.url"
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("hook", "field"),
    [
        ({"secret": SECRET}, "webhook.url"),
        (webhook(events=[]), "webhook.events"),
        (webhook(events=["job.lost"]), "webhook.events.0"),
        (webhook(secret="hunter2"), "webhook.secret"),
        (webhook(secret="whsec_aGk="), "webhook.secret"),
        (webhook(nonsense=1), "webhook.nonsense"),
    ],
)
def test_a_wrong_webhook_is_refused_without_showing_its_secret(
    client: TestClient, hook: dict[str, Any], field: str
) -> None:
    answer = client.post("/v1/prepare", files={"model": b"{}"}, **form(hook))
    problem = assert_problem(answer, 422, "request_invalid")
    assert problem["field"] == field
    assert str(hook["secret"]) not in answer.text
    model = client.post("/v1/models", content=b"{}").json()["id"]
    answer = client.post("/v1/jobs", json={"kind": "prepare", "model": model, "webhook": hook})
    assert assert_problem(answer, 422, "request_invalid")["field"] == field
    assert str(hook["secret"]) not in answer.text


def test_the_tenants_secret_is_shown_once_and_signs_what_has_no_other(start_client) -> None:
    client: TestClient = start_client(**ALLOWED)
    with Receiver() as receiver:
        hook = {"url": receiver.url}
        assert_problem(client.get("/v1/webhook-secret"), 409, "webhook_secret_missing")
        answer = client.post("/v1/prepare", files={"model": b"{}"}, **form(hook))
        assert_problem(answer, 409, "webhook_secret_missing")
        made = client.post("/v1/webhook-secret")
        assert made.headers["cache-control"] == "no-store"
        first = made.json()["secret"]
        assert "secret" not in client.get("/v1/webhook-secret").json()
        submit(client, {}, **form(hook))
        assert receiver.wait(1)[0].is_signed_with(first)

        second = client.post("/v1/webhook-secret").json()["secret"]
        assert second != first
        submit(client, {"do": "fail"}, **form(hook))
        request = receiver.wait(2)[1]
        # For a day a receiver may have the one or the other.
        assert request.is_signed_with(first)
        assert request.is_signed_with(second)
        assert client.get("/v1/webhook-secret").json()["previous_until"] > now().isoformat()


def test_no_answer_and_no_log_shows_a_secret(start_server, tmp_path: Path) -> None:
    log = tmp_path / "log"
    server: Server = start_server(
        log,
        ONNX_QAT_WEBHOOK_ALLOW_PRIVATE="true",
        ONNX_QAT_WEBHOOK_PORTS="null",
        ONNX_QAT_LOG_LEVEL="debug",
    )
    with server.client() as client, Receiver(500) as receiver:
        job = submit(client, {}, **form(webhook(receiver.url + "?token=sesame")))
        receiver.wait(1)
        wait_until(lambda: deliveries(client, job)[0]["last_status"])
        answers = [client.get(path).text for path in ("/v1/jobs", f"/v1/jobs/{job}")]
        answers.append(client.get(f"/v1/jobs/{job}/deliveries").text)
        answers.append(client.get(f"/v1/jobs/{job}/events").text)
    assert not [answer for answer in answers if SECRET in answer]
    server.stop()
    written = log.read_text()
    assert "webhook not delivered" in written
    assert SECRET not in written
    assert "sesame" not in written


def test_unknown_jobs_and_deliveries_are_not_found(client: TestClient) -> None:
    job = submit(client, {})
    assert deliveries(client, job) == []
    assert_problem(client.get(f"/v1/jobs/{UNKNOWN}/deliveries"), 404, "job_not_found")
    for path, code in ((UNKNOWN, "job_not_found"), (job, "delivery_not_found")):
        answer = client.post(f"/v1/jobs/{path}/deliveries/{UNKNOWN}/redeliver")
        assert_problem(answer, 404, code)


def test_an_idempotency_key_does_not_tell_webhooks_apart(start_client) -> None:
    client: TestClient = start_client(**ALLOWED)
    key = {"headers": {"Idempotency-Key": "k"}}
    job = submit(client, {"do": "fail"}, **form(webhook()), **key)
    wait_for(client, job)
    other = webhook("http://127.0.0.1:10/")
    assert submit(client, {"do": "fail"}, **form(other), **key) == job
    assert {each["url"] for each in deliveries(client, job)} == {webhook()["url"], other["url"]}


def test_a_crash_between_the_change_and_its_delivery_loses_nothing(start_server) -> None:
    settings = {
        "ONNX_QAT_WEBHOOK_ALLOW_PRIVATE": "true",
        "ONNX_QAT_WEBHOOK_PORTS": "null",
        "ONNX_QAT_WEBHOOK_TIMEOUT_SECONDS": "1",
    }
    server: Server = start_server(**settings)
    with Receiver(silent=True) as silent, server.client() as client:
        job = submit(client, {}, **form(webhook(silent.url)))
        (first,) = silent.wait(1)  # it is being sent
        server.stop(signal.SIGKILL)
    with Receiver(port=silent.port) as receiver:
        server.start()
        again = receiver.wait(1)[0]
        with server.client() as client:
            wait_until(lambda: deliveries(client, job)[0]["state"] == "delivered")
    assert again.body == first.body
    assert again.headers["webhook-id"] == first.headers["webhook-id"]
    assert again.event["data"]["state"] == "succeeded"


def deliveries(client: httpx.Client, job: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = client.get(f"/v1/jobs/{job}/deliveries").json()["items"]
    return items


# The parts without running workers, on both databases.


@pytest.fixture(params=["sqlite", "postgresql"])
def services(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Services]:
    if request.param == "sqlite":
        services = Services.of(Settings(data_dir=tmp_path, max_attempts=1, **ALLOWED))
        with services.opened():
            yield services
    else:
        with postgresql_database() as url:
            services = Services.of(Settings(data_dir=tmp_path, database_url=url, max_attempts=1, **ALLOWED))
            with services.opened():
                yield services


def queue_with_webhook(services: Services, number: int = 0) -> str:
    job = queue(services, number)
    hook = Webhook.model_validate(webhook(events=ALL_EVENTS))
    services.jobs.submit("default", job.request, webhook=hook)
    return job.id


def claimed(services: Services) -> Any:
    claim = services.leases.claim()
    assert claim is not None
    return claim


def lose(services: Services) -> None:
    (pulse,) = services.leases.pulses()
    services.leases.lose(Pulse(*pulse))


CHANGES = {
    "job.succeeded": lambda services, claim: services.leases.succeed(claim, [], None),
    "job.failed": lambda services, claim: services.leases.fail(claim, FAILURE),
    "job.cancelled": lambda services, claim: services.jobs.cancel("default", claim.job.id),
    "job.failed by losing its worker": lambda services, claim: lose(services),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_state_is_noted_once(services: Services, change: str) -> None:
    job = queue_with_webhook(services)
    claim = claimed(services)
    CHANGES[change](services, claim)
    services.leases.succeed(claim, [], None)  # comes too late, or again
    events = [each.event for each in services.webhooks.deliveries("default", job).items]
    assert sorted(events) == sorted(["job.running", change.partition(" ")[0]])


def test_a_job_that_goes_back_into_the_queue_says_so_by_running_again(services: Services) -> None:
    job = queue_with_webhook(services)
    services.leases.give_back(claimed(services))
    claimed(services)
    events = [each.event for each in services.webhooks.deliveries("default", job).items]
    assert events == ["job.running", "job.running"]


def test_what_cannot_be_noted_does_not_happen(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """The change of state and what is to be told of it are one transaction."""
    job = queue_with_webhook(services)
    claim = claimed(services)
    noted = outbox.announce

    def note_and_die(*arguments: Any) -> None:
        noted(*arguments)
        raise RuntimeError("the process dies here")

    monkeypatch.setattr(outbox, "announce", note_and_die)
    with pytest.raises(RuntimeError):
        services.leases.succeed(claim, [], None)
    assert services.jobs.get("default", job).state == "running"
    assert len(services.webhooks.deliveries("default", job).items) == 1


def test_several_senders_do_not_send_the_same(services: Services) -> None:
    for number in range(12):
        queue_with_webhook(services, number)
        claimed(services)
    taken: list[str] = []

    def take() -> None:
        while sendings := services.webhooks.claim(1):
            taken.extend(sending.id for sending in sendings)

    senders = [threading.Thread(target=take) for _ in range(3)]
    for sender in senders:
        sender.start()
    for sender in senders:
        sender.join()
    # One that found all that was left in the hands of others has gone; what they took is theirs.
    assert len(set(taken)) == len(taken) == 12


def test_a_tenant_with_enough_under_way_waits(services: Services) -> None:
    queue_with_webhook(services)
    claimed(services)
    assert services.webhooks.claim(10, ["default"]) == []
    assert len(services.webhooks.claim(10, ["other"])) == 1


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_jumps_delays_nothing_for_long(
    services: Services, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    queue_with_webhook(services)
    claimed(services)
    (sending,) = services.webhooks.claim(10)
    services.webhooks.failed(sending, "no", 500)
    assert services.webhooks.claim(10) == []
    monkeypatch.setattr(service, "now", lambda: now() + datetime.timedelta(days=days))
    assert len(services.webhooks.claim(10)) == 1


def test_the_schedule_is_about_a_day_and_then_ends(services: Services) -> None:
    job = queue_with_webhook(services)
    claimed(services)
    total = datetime.timedelta()
    attempts = 0
    while True:
        with services.database.writing() as session:
            session.query(WebhookDeliveryRow).update({"next_attempt_at": now()})
        (sending,) = services.webhooks.claim(10)
        attempts += 1
        services.webhooks.failed(sending, "no", None)
        (delivery,) = services.webhooks.deliveries("default", job).items
        if delivery.next_attempt_at is None:
            break
        total += delivery.next_attempt_at - now()
    assert delivery.state == "failed"
    assert attempts == 11
    assert datetime.timedelta(hours=18) < total < datetime.timedelta(hours=30)


def test_a_late_result_does_not_touch_what_was_sent_again(services: Services) -> None:
    job = queue_with_webhook(services)
    claimed(services)
    (sending,) = services.webhooks.claim(10)
    services.webhooks.redeliver("default", job, sending.id)
    services.webhooks.failed(sending, "late", None)
    assert services.webhooks.deliveries("default", job).items[0].last_error is None
    assert len(services.webhooks.claim(10)) == 1


@pytest.mark.parametrize("services", ["postgresql"], indirect=True)
def test_what_is_given_up_while_it_is_asked_for_again_is_sent_again(services: Services) -> None:
    job = queue_with_webhook(services)
    claimed(services)
    (sending,) = services.webhooks.claim(10)
    assert services.settings.database_url is not None
    with ThreadPoolExecutor() as pool, services.database.reading() as session:
        session.query(WebhookDeliveryRow).update({"state": "failed", "next_attempt_at": None})
        redelivery = pool.submit(services.webhooks.redeliver, "default", job, sending.id)
        wait_until_one_waits_for_a_lock(services.settings.database_url)
        session.commit()
        assert redelivery.result(60).state == "pending"
    assert [each.id for each in services.webhooks.claim(10)] == [sending.id]


def test_a_job_takes_so_many_webhooks(services: Services) -> None:
    job = queue(services)
    for number in range(16):
        hook = Webhook.model_validate(webhook(f"http://127.0.0.1:9/{number}"))
        services.jobs.submit("default", job.request, webhook=hook)
    services.jobs.submit("default", job.request, webhook=hook)
    with pytest.raises(service.ServiceError) as error:
        services.jobs.submit(
            "default", job.request, webhook=Webhook.model_validate(webhook("http://127.0.0.1:9/x"))
        )
    assert error.value.cause.code == "webhook_limit_reached"


def test_a_webhook_that_comes_while_the_job_ends_is_told(services: Services) -> None:
    """Either the end sees the webhook, or the webhook sees the end: the job's row is locked by both."""
    job = queue(services)
    claim = claimed(services)
    hook = Webhook.model_validate(webhook())

    async def both() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.to_thread.run_sync, services.leases.fail, claim, FAILURE)
            # The key makes it the same job, ended or not.
            tasks.start_soon(
                anyio.to_thread.run_sync, services.jobs.submit, "default", job.request, "key", hook
            )

    services.jobs.submit("default", job.request, "key")
    anyio.run(both)
    events = [each.event for each in services.webhooks.deliveries("default", job.id).items]
    assert events == ["job.failed"]


def test_deliveries_of_a_deleted_job_are_sent_and_then_forgotten(services: Services) -> None:
    job = queue_with_webhook(services)
    services.leases.fail(claimed(services), FAILURE)
    services.removal.delete_job("default", job)
    services.webhooks.forget_deleted_jobs()
    sendings = services.webhooks.claim(10)
    assert {each.event for each in sendings} == {"job.running", "job.failed"}
    for sending in sendings:
        services.webhooks.delivered(sending, 200)
    services.webhooks.forget_deleted_jobs()
    with services.database.reading() as session:
        assert session.query(WebhookDeliveryRow).count() == 0
        assert session.query(JobRow).count() == 0
