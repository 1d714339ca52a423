"""Jobs: submitted once, followed, cancelled, their results downloaded whole or in ranges."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tracemalloc
import zipfile
from typing import Any

import pytest
from fastapi.testclient import TestClient
from service_helpers import Server, assert_problem, is_running, submit, wait_for, wait_for_pid

from rewriter import Recipe

UNKNOWN_UPLOAD = "0" * 64
UNKNOWN_JOB = "0" * 32


def upload(client: TestClient, collection: str, content: bytes | str) -> str:
    identifier: str = client.post(f"/v1/{collection}", content=content).json()["id"]
    return identifier


def prepare_request(client: TestClient, script: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"kind": "prepare", "model": upload(client, "models", json.dumps(script)), **more}


def test_one_request_uploads_and_prepares(client: TestClient) -> None:
    script = {"files": {"manifest.json": "{}", "checkpoint": "c"}}
    files = [
        ("calibration", b"samples"),
        ("recipe", (None, b'{"weight_bits": 4}')),
        ("external_data", ("w.bin", b"weights")),
        ("model", json.dumps(script).encode()),
    ]
    answer = client.post("/v1/prepare", files=files)
    assert answer.status_code == 202
    submitted = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{submitted['id']}"
    assert submitted["kind"] == "prepare"
    assert submitted["request"]["recipe"]["weight_bits"] == 4
    assert submitted["request"]["calibration"] == hashlib.sha256(b"samples").hexdigest()

    job = wait_for(client, submitted["id"])
    assert job["state"] == "succeeded"
    assert job["failure"] is None
    assert [file["name"] for file in job["files"]] == ["checkpoint", "manifest.json", "seen.json"]
    assert job["created_at"] <= job["started_at"] <= job["finished_at"]
    assert job["revision"] > submitted["revision"]

    seen = client.get(f"/v1/jobs/{job['id']}/files/seen.json").json()
    assert seen["recipe"] == Recipe(weight_bits=4).model_dump(mode="json")
    assert seen["calibration"] == "samples"
    assert seen["beside_model"] == ["model.onnx", "w.bin"]


def test_two_jobs_run_one_after_the_other(client: TestClient) -> None:
    first = submit(client, {"files": {"a": "1"}})
    second = submit(client, {"files": {"a": "2"}})
    for job, content in ((first, "1"), (second, "2")):
        assert wait_for(client, job)["state"] == "succeeded"
        assert client.get(f"/v1/jobs/{job}/files/a").text == content
    assert wait_for(client, first)["finished_at"] <= wait_for(client, second)["started_at"]


def test_finalize_gets_the_bundle_and_the_checkpoint(client: TestClient) -> None:
    prepared = submit(client, {})
    wait_for(client, prepared)
    request = {
        "kind": "finalize",
        "prepare_job": prepared,
        "checkpoint": upload(client, "checkpoints", b"trained"),
        "verify": upload(client, "datasets", b"samples"),
    }
    answer = client.post("/v1/jobs", json=request)
    assert answer.status_code == 202
    job = wait_for(client, answer.json()["id"])
    assert job["request"] == request
    assert [file["name"] for file in job["files"]] == ["model.int8.onnx"]
    received = client.get(f"/v1/jobs/{job['id']}/files/model.int8.onnx").json()
    assert received == [["manifest.json", "seen.json"], "trained", "samples"]
    assert_problem(client.get(f"/v1/jobs/{job['id']}/bundle"), 404, "file_not_found")


def test_the_bundle_is_a_zip_of_all_files(client: TestClient) -> None:
    job = submit(client, {"files": {"b": "two", "a": "one"}})
    described = wait_for(client, job)["bundle"]
    answer = client.get(f"/v1/jobs/{job}/bundle")
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert (described["sha256"], described["bytes"]) == (
        hashlib.sha256(answer.content).hexdigest(),
        len(answer.content),
    )
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.namelist() == ["a", "b", "seen.json"]
        assert archive.read("b") == b"two"
        assert all(entry.date_time == (1980, 1, 1, 0, 0, 0) for entry in archive.infolist())


def test_a_download_can_be_resumed_and_revalidated(client: TestClient) -> None:
    job = submit(client, {"files": {"a": "0123456789"}})
    wait_for(client, job)
    for url in (f"/v1/jobs/{job}/files/a", f"/v1/jobs/{job}/bundle"):
        whole = client.get(url)
        assert whole.headers["accept-ranges"] == "bytes"
        etag = whole.headers["etag"]
        rest = client.get(url, headers={"range": "bytes=4-", "if-range": etag})
        assert (rest.status_code, rest.content) == (206, whole.content[4:])
        assert rest.headers["content-range"] == f"bytes 4-{len(whole.content) - 1}/{len(whole.content)}"
        changed = client.get(url, headers={"range": "bytes=4-", "if-range": '"other"'})
        assert (changed.status_code, changed.content) == (200, whole.content)
        same = client.get(url, headers={"if-none-match": f'"x", {etag}'})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
        for bad in ("bytes=100000-", f"bytes={10**30}-", "bytes=-0"):
            answer = client.get(url, headers={"range": bad})
            assert_problem(answer, 416, "range_invalid")
            assert answer.headers["content-range"] == f"bytes */{len(whole.content)}"


@pytest.mark.parametrize(
    ("headers", "status", "content"),
    [
        # RFC 9110: a unit that is not known is ignored (14.2), and units are case-insensitive (14.1).
        ({"range": "items=0-5"}, 200, "0123456789"),
        ({"range": "nonsense"}, 200, "0123456789"),
        # As is what is no range (14.1.1, 14.2); one that the file has not is an error (15.5.17).
        ({"range": "bytes=abc"}, 200, "0123456789"),
        ({"range": "bytes=-"}, 200, "0123456789"),
        ({"range": "bytes=5-2"}, 200, "0123456789"),
        ({"range": "BYTES=2-5"}, 206, "2345"),
        ({"range": "Bytes=-3"}, 206, "789"),
        # 13.2.2: If-Match comes before all else; it compares strongly (13.1.1), If-None-Match weakly.
        ({"if-match": "ETAG"}, 200, "0123456789"),
        ({"if-match": '"other", ETAG'}, 200, "0123456789"),
        ({"if-match": "*", "range": "bytes=0-1"}, 206, "01"),
        ({"if-match": '"other"'}, 412, None),
        ({"if-match": "W/ETAG"}, 412, None),
        ({"if-match": '"other"', "if-none-match": "ETAG"}, 412, None),
        ({"if-match": "ETAG", "if-none-match": "W/ETAG"}, 304, ""),
    ],
)
def test_a_download_is_conditional_and_in_ranges_as_the_rfc_says(
    client: TestClient, headers: dict[str, str], status: int, content: str | None
) -> None:
    job = submit(client, {"files": {"a": "0123456789"}})
    wait_for(client, job)
    etag = f'"{hashlib.sha256(b"0123456789").hexdigest()}"'
    headers = {name: value.replace("ETAG", etag) for name, value in headers.items()}
    answer = client.get(f"/v1/jobs/{job}/files/a", headers=headers)
    if content is None:
        assert assert_problem(answer, status, "precondition_failed")["field"] == "If-Match"
    else:
        assert (answer.status_code, answer.text) == (status, content)


def test_head_is_get_without_the_content(start_server) -> None:
    server: Server = start_server()
    with server.client() as client:
        job = submit(client, {"files": {"a": "0123456789"}})
        model = wait_for(client, job)["request"]["model"]
        of_job = ("", "/bundle", "/files/a", "/files/missing")
        others = ("/v1/jobs", f"/v1/models/{model}", "/v1/tenant", "/health/live", "/", "/page/app.js")
        for path in (*(f"/v1/jobs/{job}{path}" for path in of_job), *others, f"/jobs/{job}", "/health/ready"):
            get, head = (
                client.request(method, path, headers={"X-Request-ID": "r"}) for method in ("GET", "HEAD")
            )
            assert (head.status_code, head.content) == (get.status_code, b""), path
            for answer in (head, get):
                answer.headers.pop("date", None)
            assert head.headers == get.headers, path
        # 14.2: ranges are for GET alone.
        part = client.head(f"/v1/jobs/{job}/files/a", headers={"range": "bytes=0-1"})
        assert (part.status_code, part.headers["content-length"]) == (200, "10")


def test_only_a_succeeded_job_has_files(client: TestClient) -> None:
    failed = submit(client, {"do": "fail"})
    assert wait_for(client, failed)["state"] == "failed"
    running = submit(client, {"seconds": 60})
    for job in (failed, running):
        assert_problem(client.get(f"/v1/jobs/{job}/bundle"), 409, "job_not_succeeded")
        assert_problem(client.get(f"/v1/jobs/{job}/files/a"), 409, "job_not_succeeded")
    request = {"kind": "finalize", "prepare_job": failed}
    assert_problem(client.post("/v1/jobs", json=request), 409, "job_not_succeeded")


@pytest.mark.parametrize("name", ["missing", "%2e%2e%2fbundle.zip", "..%5c..", "%00", "bundle.zip"])
def test_a_file_that_the_job_did_not_make_is_not_found(client: TestClient, name: str) -> None:
    job = submit(client, {})
    wait_for(client, job)
    answer = client.get(f"/v1/jobs/{job}/files/{name}")
    assert (answer.status_code, answer.json()["code"] in ("file_not_found", "not_found")) == (404, True)


def test_the_same_work_is_done_once(client: TestClient) -> None:
    request = prepare_request(client, {"seconds": 0.5}, recipe={"weight_bits": 8})
    first = client.post("/v1/jobs", json=request).json()["id"]
    # Eight bits are the default: the same recipe in other words.
    assert client.post("/v1/jobs", json={**request, "recipe": {}}).json()["id"] == first
    wait_for(client, first)
    again = client.post("/v1/jobs", json=request)
    assert (again.status_code, again.json()["id"], again.json()["state"]) == (202, first, "succeeded")
    other = client.post("/v1/jobs", json={**request, "recipe": {"weight_bits": 4}}).json()["id"]
    assert other != first


def test_work_that_failed_or_was_cancelled_is_tried_again(client: TestClient) -> None:
    for script in ({"do": "fail"}, {"seconds": 60}):
        first = submit(client, script)
        if "seconds" in script:
            client.post(f"/v1/jobs/{first}/cancel")
        assert wait_for(client, first)["state"] in ("failed", "cancelled")
        assert submit(client, script) != first


def test_an_idempotency_key_stands_for_its_first_request(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k1"}
    request = prepare_request(client, {"do": "fail"})
    first = client.post("/v1/jobs", json=request, headers=headers).json()["id"]
    wait_for(client, first)
    # Without the key a failed request is tried again; with it the answer stays the same.
    assert client.post("/v1/jobs", json=request, headers=headers).json()["id"] == first
    assert submit(client, {"do": "fail"}, headers=headers) == first
    different = {**request, "recipe": {"weight_bits": 4}}
    answer = client.post("/v1/jobs", json=different, headers=headers)
    assert_problem(answer, 422, "idempotency_key_reused")
    second = client.post("/v1/jobs", json=different, headers={"Idempotency-Key": "k2"})
    assert second.status_code == 202


def test_there_is_one_idempotency_key(client: TestClient) -> None:
    request = prepare_request(client, {})
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    job = client.post("/v1/jobs", json=request).json()["id"]
    for answer in (
        client.post("/v1/jobs", json=request, headers=headers),
        client.post("/v1/prepare", files={"model": b"{}"}, headers=headers),
        client.post(f"/v1/jobs/{job}/retry", headers=headers),
    ):
        assert assert_problem(answer, 422, "request_invalid")["field"] == "Idempotency-Key"


@pytest.mark.parametrize(
    ("request_body", "status", "code", "field"),
    [
        ({"kind": "train"}, 422, "request_invalid", "kind"),
        ({}, 422, "request_invalid", "kind"),
        ({"kind": "prepare"}, 422, "request_invalid", "model"),
        ({"kind": "prepare", "model": "../x"}, 422, "request_invalid", "model"),
        ({"kind": "prepare", "model": UNKNOWN_UPLOAD, "extra": 1}, 422, "request_invalid", "extra"),
        (
            {"kind": "prepare", "model": UNKNOWN_UPLOAD, "webhook": {"url": 1}},
            422,
            "request_invalid",
            "webhook.url",
        ),
        ({"kind": "finalize", "prepare_job": "x"}, 422, "request_invalid", "prepare_job"),
        ({"kind": "prepare", "model": UNKNOWN_UPLOAD}, 404, "model_not_found", None),
        ({"kind": "finalize", "prepare_job": UNKNOWN_JOB}, 404, "job_not_found", None),
    ],
)
def test_a_wrong_request_is_refused_with_its_reason(
    client: TestClient, request_body: dict[str, Any], status: int, code: str, field: str | None
) -> None:
    problem = assert_problem(client.post("/v1/jobs", json=request_body), status, code)
    assert problem.get("field") == field
    assert client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(
    ("recipe", "code", "field"),
    [
        ({"weight_bits": 1}, "recipe_invalid", "weight_bits"),
        ({"weight_bits": "8"}, "recipe_invalid", "weight_bits"),
        ({"nonsense": 1}, "recipe_invalid", "nonsense"),
        ({"target": "tensorrt"}, "recipe_unsupported", "target"),
        ([], "recipe_invalid", "recipe"),
    ],
)
def test_a_wrong_recipe_is_refused_at_once_with_the_codes_of_the_library(
    client: TestClient, recipe: Any, code: str, field: str
) -> None:
    request = prepare_request(client, {}, recipe=recipe)
    assert assert_problem(client.post("/v1/jobs", json=request), 422, code)["field"] == field
    if isinstance(recipe, dict):
        answer = client.post("/v1/prepare", files={"model": b"{}"}, data={"recipe": json.dumps(recipe)})
        assert assert_problem(answer, 422, code)["field"] == field
    assert client.get("/v1/jobs").json()["items"] == []


def test_the_kinds_of_jobs_are_said_as_they_are_written(client: TestClient) -> None:
    for kind in ("train", "inspect"):
        problem = client.post("/v1/jobs", json={"kind": kind, "model": UNKNOWN_UPLOAD}).json()
        assert problem["detail"] == "Input should be 'prepare' or 'finalize'."
    assert client.post("/v1/jobs", json={}).json()["detail"] == "Field required."


def test_a_recipe_that_is_not_json_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/prepare", files={"model": b"{}"}, data={"recipe": "{"})
    assert_problem(answer, 422, "recipe_invalid")


def test_prepare_takes_forms_only_and_needs_the_model(client: TestClient) -> None:
    assert_problem(client.post("/v1/prepare", content=b"model"), 415, "media_type_unsupported")
    answer = client.post("/v1/prepare", files={"calibration": b"x"})
    assert assert_problem(answer, 422, "request_invalid")["field"] == "model"
    answer = client.post("/v1/prepare", files={"model": b"x", "modle": b"x"})
    assert assert_problem(answer, 422, "request_invalid")["field"] == "modle"


def test_unknown_inputs_of_a_job_are_named_by_their_codes(client: TestClient) -> None:
    request = prepare_request(client, {}, calibration=UNKNOWN_UPLOAD)
    assert_problem(client.post("/v1/jobs", json=request), 404, "data_not_found")
    prepared = submit(client, {})
    wait_for(client, prepared)
    finalize = {"kind": "finalize", "prepare_job": prepared}
    for field, code in (("checkpoint", "checkpoint_not_found"), ("verify", "data_not_found")):
        answer = client.post("/v1/jobs", json={**finalize, field: UNKNOWN_UPLOAD})
        assert_problem(answer, 404, code)
    done = client.post("/v1/jobs", json=finalize).json()["id"]
    wait_for(client, done)
    answer = client.post("/v1/jobs", json={**finalize, "prepare_job": done})
    assert assert_problem(answer, 422, "request_invalid")["field"] == "prepare_job"


def test_a_body_must_be_json_of_bounded_size(start_client) -> None:
    client = start_client(max_request_bytes=1000)
    large = json.dumps({"kind": "prepare", "model": "x" * 1000})
    headers = {"content-type": "application/json"}
    assert_problem(client.post("/v1/jobs", content=large, headers=headers), 413, "request_too_large")
    assert_problem(client.post("/v1/jobs", content="{", headers=headers), 422, "request_invalid")
    assert_problem(client.post("/v1/jobs", content="{}"), 415, "media_type_unsupported")
    files = {"model": b"{}", "recipe": (None, large.encode())}
    assert (
        assert_problem(client.post("/v1/prepare", files=files), 413, "request_too_large")["field"] == "recipe"
    )


def test_an_unknown_or_malformed_job_is_said_to_be_so(client: TestClient) -> None:
    for path in ("", "/events", "/bundle", "/files/a"):
        assert_problem(client.get(f"/v1/jobs/{UNKNOWN_JOB}{path}"), 404, "job_not_found")
        problem = assert_problem(client.get(f"/v1/jobs/x{path}"), 422, "request_invalid")
        assert problem["field"] == "job_id"
    assert_problem(client.post(f"/v1/jobs/{UNKNOWN_JOB}/cancel"), 404, "job_not_found")


def test_unknown_addresses_and_methods_are_problems_too(client: TestClient) -> None:
    assert_problem(client.get("/v1/nothing"), 404, "not_found")
    answer = client.delete("/v1/jobs")
    assert_problem(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, POST"


def test_jobs_are_listed_from_the_newest_in_pages(client: TestClient) -> None:
    jobs = [submit(client, {"files": {"a": str(number)}}) for number in range(5)]
    for job in jobs:
        wait_for(client, job)
    first = client.get("/v1/jobs", params={"limit": 2}).json()
    second = client.get("/v1/jobs", params={"limit": 2, "cursor": first["next"]}).json()
    third = client.get("/v1/jobs", params={"limit": 2, "cursor": second["next"]}).json()
    listed = [item["id"] for page in (first, second, third) for item in page["items"]]
    assert listed == jobs[::-1]
    assert third["next"] is None
    assert len(client.get("/v1/jobs", params={"state": "succeeded"}).json()["items"]) == 5
    assert client.get("/v1/jobs", params={"state": "failed"}).json() == {"items": [], "next": None}
    for wrong in ({"limit": 0}, {"cursor": 0}, {"cursor": 2**63}, {"state": "x"}):
        assert_problem(client.get("/v1/jobs", params=wrong), 422, "request_invalid")


LARGE_RECIPE = {"frozen": ["x" * 1000] * 60}


def test_lists_and_events_leave_recipes_out(start_server) -> None:
    recipe = {"recipe": json.dumps(LARGE_RECIPE)}
    form = {"model": b'{"do": "fail"}', "calibration": b"samples"}
    with start_server().client() as client:
        job = client.post("/v1/prepare", files=form, data=recipe).json()
        failed = wait_for(client, job["id"])
        assert failed["request"]["recipe"]["frozen"] == LARGE_RECIPE["frozen"]
        inputs = {name: job["request"][name] for name in ("kind", "model", "calibration")}
        (listed,) = client.get("/v1/jobs").json()["items"]
        assert listed == {**failed, "request": inputs}
        events = events_of(client.get(f"/v1/jobs/{job['id']}/events").text.splitlines())
        assert events[-1]["request"] == inputs


def test_the_memory_of_a_list_does_not_grow_with_the_recipes(client: TestClient) -> None:
    model = client.post("/v1/models", content=b'{"seconds": 600}').json()["id"]
    for number in range(50):
        recipe = {**LARGE_RECIPE, "quant_delay": number}
        request = {"kind": "prepare", "model": model, "recipe": recipe}
        assert client.post("/v1/jobs", json=request).status_code == 202
    jobs = client.app.state.services.jobs  # type: ignore[attr-defined]
    tracemalloc.start()
    try:
        page = jobs.page("default", state=None, cursor=None, limit=200)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(page.items) == 50
    assert peak < 2 << 20  # the recipes alone are 3 MB


def test_cancelling_a_running_job_kills_its_process(client: TestClient, tmp_path) -> None:
    job = submit(client, {"seconds": 600})
    pid = wait_for_pid(client, job)
    assert is_running(pid)
    answer = client.post(f"/v1/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")
    after = submit(client, {})
    assert wait_for(client, after)["state"] == "succeeded"
    assert not is_running(pid)
    assert wait_for(client, job)["state"] == "cancelled"
    assert not (tmp_path / "data/results" / job).exists()
    assert list((tmp_path / "data/scratch").iterdir()) == []


def test_cancelling_a_queued_job_keeps_it_from_running(client: TestClient) -> None:
    running = submit(client, {"seconds": 600})
    wait_for_pid(client, running)
    queued = submit(client, {})
    assert client.post(f"/v1/jobs/{queued}/cancel").json()["state"] == "cancelled"
    client.post(f"/v1/jobs/{running}/cancel")
    after = submit(client, {"files": {"a": "1"}})
    wait_for(client, after)
    assert wait_for(client, queued)["started_at"] is None


@pytest.mark.parametrize("script", [{}, {"do": "fail"}])
def test_a_finished_job_cannot_be_cancelled(client: TestClient, script: dict[str, Any]) -> None:
    job = submit(client, script)
    state = wait_for(client, job)["state"]
    assert_problem(client.post(f"/v1/jobs/{job}/cancel"), 409, "job_finished")
    assert wait_for(client, job)["state"] == state


def test_the_failure_says_what_the_library_said(client: TestClient) -> None:
    job = submit(client, {"do": "fail"})
    assert wait_for(client, job)["failure"] == {
        "code": "model_domain_unknown",
        "detail": "Unknown domain.",
        "node": "n1",
        "field": None,
        "file": None,
    }


def events_of(lines: list[str]) -> list[dict[str, Any]]:
    """Parse a whole event stream as its specification says."""
    events: list[dict[str, Any]] = []
    for block in "\n".join(lines).strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            assert fields["event"] == "job"
            events.append({"event_id": int(fields["id"]), **json.loads(fields["data"])})
    return events


def test_events_follow_a_job_to_its_end(start_server) -> None:
    server: Server = start_server()
    with server.client() as client:
        job = submit(client, {"seconds": 5})
        with client.stream("GET", f"/v1/jobs/{job}/events") as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            states_seen_while_open = []
            lines = []
            for line in answer.iter_lines():
                lines.append(line)
                if line.startswith("data: "):
                    states_seen_while_open.append(client.get(f"/v1/jobs/{job}").json()["state"])
        events = events_of(lines)
        assert events[-1]["state"] == "succeeded"
        assert [event["event_id"] for event in events] == sorted({event["event_id"] for event in events})
        assert any(
            event["progress"] == {"stage": events[-1]["progress"]["stage"], "fraction": 0.5}
            for event in events
        )
        # The events came while the job ran, not all at its end.
        assert "running" in states_seen_while_open

        again = client.get(f"/v1/jobs/{job}/events")
        assert [event["state"] for event in events_of(again.text.splitlines())] == ["succeeded"]
        seen = client.get(f"/v1/jobs/{job}/events", headers={"Last-Event-ID": str(events[-1]["event_id"])})
        assert seen.text == ""


def test_health_says_that_the_service_can_work(client: TestClient, tmp_path) -> None:
    assert client.get("/health/live").json() == {"status": "ok"}
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (200, "ok")
    assert set(ready.json()["isolation"]) == {"writes", "reads", "network", "processes"}
    os.rename(tmp_path / "data/staging", tmp_path / "data/away")
    assert_problem(client.get("/health/ready"), 503, "not_ready")
    assert client.get("/health/live").status_code == 200


def test_every_answer_has_a_request_id(client: TestClient) -> None:
    given = client.get("/health/live", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = client.get("/nothing", headers={"X-Request-ID": "a b\x07"})
    assert len(made.headers["x-request-id"]) == 32
