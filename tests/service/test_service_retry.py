"""What failed or was cancelled can be tried again, once for each wish."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from fastapi.testclient import TestClient
from receivers import Receiver
from service_helpers import assert_problem, submit, wait_for

from service.jobs import repository
from service.services import Services
from service.webhooks.signing import new_secret

UNKNOWN = "0" * 32


def retry(client: TestClient, job: str, **more: Any) -> dict[str, Any]:
    answer = client.post(f"/v1/jobs/{job}/retry", **more)
    assert answer.status_code == 202, answer.text
    new: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    return new


def test_a_failed_job_is_tried_again_as_a_new_one(client: TestClient) -> None:
    failed = submit(client, {"do": "fail"}, data={"recipe": '{"weight_bits": 4}'})
    before = wait_for(client, failed)
    again = retry(client, failed)
    assert again["id"] != failed
    assert again["retry_of"] == failed
    assert again["request"] == before["request"]
    assert wait_for(client, again["id"])["failure"]["code"] == "model_domain_unknown"
    assert wait_for(client, failed) == before


def test_a_cancelled_job_is_tried_again(client: TestClient) -> None:
    running = submit(client, {"seconds": 600})
    queued = submit(client, {})
    assert client.post(f"/v1/jobs/{queued}/cancel").json()["retry_of"] is None
    again = retry(client, queued)
    client.post(f"/v1/jobs/{running}/cancel")
    assert wait_for(client, again["id"])["state"] == "succeeded"


def test_two_retries_are_one_job_until_it_has_failed_too(client: TestClient) -> None:
    running = submit(client, {"seconds": 600})
    wait_for(client, running, "running")
    cancelled = submit(client, {"do": "fail"})
    client.post(f"/v1/jobs/{cancelled}/cancel")
    first = retry(client, cancelled)["id"]
    assert retry(client, cancelled)["id"] == first
    # So is the same work, submitted.
    assert submit(client, {"do": "fail"}) == first
    client.post(f"/v1/jobs/{running}/cancel")
    wait_for(client, first)
    assert retry(client, cancelled)["id"] != first


def test_a_key_stands_for_one_retry(client: TestClient) -> None:
    key = {"headers": {"Idempotency-Key": "k"}}
    failed = submit(client, {"do": "fail"})
    wait_for(client, failed)
    first = retry(client, failed, **key)["id"]
    wait_for(client, first)
    assert retry(client, failed, **key)["id"] == first
    # To submit the work, or to retry another job of it, is another request.
    answer = client.post("/v1/prepare", files={"model": json.dumps({"do": "fail"})}, **key)
    assert_problem(answer, 422, "idempotency_key_reused")
    answer = client.post(f"/v1/jobs/{first}/retry", **key)
    assert_problem(answer, 422, "idempotency_key_reused")


def test_other_jobs_cannot_be_retried(client: TestClient) -> None:
    done = submit(client, {})
    wait_for(client, done)
    running = submit(client, {"seconds": 600})
    queued = submit(client, {"do": "fail"})
    for job in (done, running, queued):
        assert_problem(client.post(f"/v1/jobs/{job}/retry"), 409, "job_not_retryable")
    assert_problem(client.post(f"/v1/jobs/{UNKNOWN}/retry"), 404, "job_not_found")
    assert len(client.get("/v1/jobs").json()["items"]) == 3


def test_a_retry_needs_the_inputs_still_to_be_there(client: TestClient) -> None:
    failed = submit(client, {"do": "fail"})
    model = wait_for(client, failed)["request"]["model"]
    assert client.delete(f"/v1/models/{model}").status_code == 204
    assert_problem(client.post(f"/v1/jobs/{failed}/retry"), 404, "model_not_found")


def test_whoever_was_told_of_the_job_is_told_of_its_retry(start_client) -> None:
    client: TestClient = start_client(webhook_allow_private=True, webhook_ports=None)
    with Receiver() as receiver:
        hook = json.dumps({"url": receiver.url, "secret": new_secret()})
        failed = submit(client, {"do": "fail"}, data={"webhook": hook})
        receiver.wait(1)
        again = retry(client, failed)["id"]
        told = receiver.wait(2)[1].event["data"]
    assert (told["id"], told["retry_of"]) == (again, failed)


@pytest.mark.filterwarnings("error")
def test_a_job_whose_recipe_another_version_took_is_told_and_ended_but_not_done_again(
    start_client: Callable[..., TestClient],
) -> None:
    client = start_client(workers=0)
    job = submit(client, {})
    recipe = {"of_another_version": {"scope": "a\0b"}}
    services: Services = client.app.state.services  # type: ignore[attr-defined]
    with services.database.writing() as session:
        row = repository.get(session, job)
        assert row is not None
        row.request = {**row.request, "recipe": recipe}
    path = f"/v1/jobs/{job}"
    assert client.get(path).json()["request"]["recipe"] == recipe
    assert [each["id"] for each in client.get("/v1/jobs").json()["items"]] == [job]
    cancelled = client.post(f"{path}/cancel").json()
    assert (cancelled["state"], cancelled["request"]["recipe"]) == ("cancelled", recipe)
    problem = assert_problem(client.post(f"{path}/retry"), 422, "recipe_invalid")
    assert problem["field"] == "of_another_version"
    assert client.delete(path).status_code == 204
