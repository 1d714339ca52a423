"""The typed client: against a service in a process of its own, through a network that fails as told."""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import onnx
import pytest
from pydantic import SecretStr
from service_helpers import Server

from rewriter import ErrorCode, QatError, Recipe
from service.client import (
    ApiError,
    Client,
    DownloadError,
    Job,
    JobFailed,
    JobState,
    StoredFile,
    UnreachableError,
    Webhook,
    WebhookEvent,
)
from service.client import connection as connection_module
from service.client.connection import asked_pause
from service.webhooks.signing import new_secret

Answer = Callable[[httpx.Request], httpx.Response | None]


class Network(httpx.BaseTransport):
    """The way to the service. It records requests, and lets a test interfere with each."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.interfere: Answer = lambda request: None
        self._way = httpx.HTTPTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.interfere(request) or self.deliver(request)

    def deliver(self, request: httpx.Request) -> httpx.Response:
        return self._way.handle_request(request)

    def close(self) -> None:
        self._way.close()

    def sent(self, method: str, end: str = "") -> list[httpx.Request]:
        return [r for r in self.requests if r.method == method and r.url.path.endswith(end)]


class Cut(httpx.SyncByteStream):
    """An answer that breaks off after some bytes, or some pieces as the service sent them."""

    def __init__(self, stream: Any, length: int, pieces: int | None = None) -> None:
        self._stream = stream
        self._length = length
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        left = self._length
        for piece in itertools.islice(self._stream, self._pieces):
            yield piece[:left]
            left -= len(piece)
            if left <= 0:
                break
        raise httpx.ReadError("the connection broke off")

    def close(self) -> None:
        self._stream.close()


class Pieces(httpx.SyncByteStream):
    """The body of an answer, as it comes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces


def once(answer: Answer, matches: Callable[[httpx.Request], bool]) -> Answer:
    """Interferes with the first request that matches."""
    done = threading.Event()

    def interfere(request: httpx.Request) -> httpx.Response | None:
        if done.is_set() or not matches(request):
            return None
        done.set()
        return answer(request)

    return interfere


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("refused")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("service") / "data", ONNX_QAT_WORKERS="2")
    yield server
    server.stop()


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def client(server: Server, network: Network, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(connection_module, "_FIRST_PAUSE_SECONDS", 0.01)
    with Client(server.url, transport=network) as client:
        yield client


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Makes a "model" that tells the fake worker what to do; each is another one."""

    def make(**script: Any) -> Path:
        path = tmp_path / "model.onnx"
        path.write_text(json.dumps({**script, "nonce": os.urandom(8).hex()}))
        return path

    return make


def test_it_needs_neither_the_web_framework_nor_the_database_nor_onnxruntime() -> None:
    heavy = {"fastapi", "starlette", "sqlalchemy", "uvicorn", "onnxruntime", "onnx", "numpy"}
    code = f"import sys, service.client, service.client_cli; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_model_is_prepared_and_its_bundle_downloaded(client: Client, model, tmp_path: Path) -> None:
    samples = tmp_path / "samples.npz"
    samples.write_bytes(b"samples")
    script = {"files": {"manifest.json": "{}", "checkpoint": "c" * 1000}}
    job = client.prepare(model(**script), recipe=Recipe(weight_bits=4), calibration=samples)
    assert job.kind == "prepare"
    done = client.wait(job.id)
    assert (done.state, done.failure) == (JobState.SUCCEEDED, None)

    folder = client.download_bundle(job.id, tmp_path / "bundle")
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint", "manifest.json", "seen.json"]
    seen = json.loads((folder / "seen.json").read_text())
    assert seen["recipe"] == Recipe(weight_bits=4).model_dump(mode="json")
    assert seen["calibration"] == "samples"
    archive = client.download_bundle(job.id, tmp_path / "bundle.zip")
    with zipfile.ZipFile(archive) as files:
        assert {name: files.read(name) for name in files.namelist()} == {
            path.name: path.read_bytes() for path in folder.iterdir()
        }
    one = client.download_file(job.id, "checkpoint", tmp_path / "one")
    assert one.read_text() == "c" * 1000
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_checkpoint_is_finalized(client: Client, model, tmp_path: Path) -> None:
    prepared = client.wait(client.prepare(model()).id)
    (tmp_path / "trained").write_bytes(b"trained")
    (tmp_path / "test.npz").write_bytes(b"test")
    job = client.finalize(prepared.id, checkpoint=tmp_path / "trained", verify=tmp_path / "test.npz")
    client.wait(job.id)
    client.download_files(job.id, tmp_path / "out")
    received = json.loads((tmp_path / "out/model.int8.onnx").read_text())
    assert received == [["manifest.json", "seen.json"], "trained", "test"]


def test_a_failed_job_is_retried_and_both_are_deleted(client: Client, model, network: Network) -> None:
    failed = client.prepare(model(do="fail"))
    with pytest.raises(JobFailed):
        client.wait(failed.id)
    # Its answer is lost: the call is repeated, and is still one retry.
    network.interfere = once(lose_the_answer(network), lambda request: request.url.path.endswith("/retry"))
    again = client.retry(failed.id)
    assert again.retry_of == failed.id
    assert [job.id for job in client.jobs()][:2] == [again.id, failed.id]
    with pytest.raises(JobFailed):
        client.wait(again.id)
    network.interfere = once(lose_the_answer(network), lambda request: request.method == "DELETE")
    client.delete_job(failed.id)
    with pytest.raises(ApiError, match="job_not_found"):
        client.delete_job(failed.id)
    client.delete_job(again.id)


def lose_the_answer(network: Network) -> Callable[[httpx.Request], httpx.Response]:
    def deliver(request: httpx.Request) -> httpx.Response:
        network.deliver(request).read()
        raise httpx.ReadError("lost", request=request)

    return deliver


def test_uploads_are_deleted(client: Client, tmp_path: Path) -> None:
    for upload, delete in (
        (client.upload_model, client.delete_model),
        (client.upload_dataset, client.delete_dataset),
        (client.upload_checkpoint, client.delete_checkpoint),
    ):
        path = tmp_path / "file"
        path.write_bytes(os.urandom(8))
        identifier = upload(path).id
        delete(identifier)
        with pytest.raises(ApiError, match="not_found"):
            delete(identifier)


def test_a_webhook_is_told_and_its_deliveries_are_seen(client: Client, model) -> None:
    webhook = Webhook(
        url="https://receiver.invalid/", secret=SecretStr(new_secret()), events=(WebhookEvent.SUCCEEDED,)
    )
    prepared = client.wait(client.prepare(model(), webhook=webhook).id)
    (delivery,) = client.deliveries(prepared.id)
    assert (delivery.event, delivery.url) == (WebhookEvent.SUCCEEDED, webhook.url)
    assert client.redeliver(prepared.id, delivery.id).id == delivery.id
    finalized = client.wait(client.finalize(prepared.id, webhook=webhook).id)
    assert len(client.deliveries(finalized.id)) == 1


def test_a_client_knows_its_tenant(client: Client) -> None:
    tenant = client.tenant()
    assert (tenant.id, tenant.key, tenant.unfinished_jobs.limit) == ("default", None, None)


# Uploads.


def external_model(folder: Path, *locations: str) -> Path:
    """A model with one initializer in each of the files, the last one in a subgraph."""

    def graph(name: str, locations: tuple[str, ...], nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        graph = onnx.helper.make_graph(nodes, name, [], [])
        for location in locations:
            tensor = graph.initializer.add()
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(4, np.float32), f"w {location}"))
            onnx.external_data_helper.set_external_data(tensor, location=location)
            tensor.ClearField("raw_data")
        return graph

    inner = graph("inner", locations[-1:], [])
    branch = onnx.helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner)
    path = folder / "float.onnx"
    path.write_bytes(onnx.helper.make_model(graph("outer", locations[:-1], [branch])).SerializeToString())
    return path


def test_external_data_is_found_and_uploaded_with_the_model(
    client: Client, network: Network, tmp_path: Path
) -> None:
    path = external_model(tmp_path, "a.bin", "./b.bin")
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(name.encode() * 4 + os.urandom(8))
    upload = client.upload_model(path)
    assert {file.name: file.sha256 for file in upload.files} == {
        "model.onnx": hashlib.sha256(path.read_bytes()).hexdigest(),
        "a.bin": hashlib.sha256((tmp_path / "a.bin").read_bytes()).hexdigest(),
        "b.bin": hashlib.sha256((tmp_path / "b.bin").read_bytes()).hexdigest(),
    }
    assert client.upload_model(path).id == upload.id
    assert len(network.sent("POST")) == 1


def test_external_data_that_is_not_there_is_named(client: Client, network: Network, tmp_path: Path) -> None:
    with pytest.raises(QatError) as raised:
        client.upload_model(external_model(tmp_path, "a.bin"))
    assert (raised.value.code, raised.value.file) == (ErrorCode.EXTERNAL_DATA_MISSING, "a.bin")
    with pytest.raises(QatError) as raised:
        client.upload_model(external_model(tmp_path, "../../etc/passwd"))
    assert (raised.value.code, raised.value.file) == (ErrorCode.EXTERNAL_DATA_OUTSIDE, "../../etc/passwd")
    assert network.requests == []


def test_a_file_that_is_not_there_is_named(client: Client, tmp_path: Path) -> None:
    for upload, code in (
        (client.upload_model, "model_not_found"),
        (client.upload_dataset, "data_not_found"),
        (client.upload_checkpoint, "checkpoint_invalid"),
    ):
        with pytest.raises(QatError) as raised:
            upload(tmp_path / "missing")
        assert (raised.value.code, raised.value.file) == (code, "missing")


def test_what_the_service_has_is_not_sent_again(client: Client, network: Network, model) -> None:
    path = model()
    first = client.upload_model(path)
    assert first.id == hashlib.sha256(path.read_bytes()).hexdigest()
    assert client.upload_model(path) == first
    assert len(network.sent("POST", "/v1/models")) == 1


def test_a_file_is_streamed_and_its_progress_told(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    with path.open("wb") as file:
        file.write(os.urandom(16))
        file.truncate(48 << 20)
    told: list[tuple[str, float]] = []
    tracemalloc.start()
    upload = client.upload_dataset(path, progress=lambda stage, fraction: told.append((stage, fraction)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert upload.bytes == 48 << 20
    assert peak < 4 << 20
    assert {stage for stage, _ in told} == {"upload large.npz"}
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.0, 1.0)


def test_an_upload_that_breaks_off_is_sent_again_from_its_beginning(
    client: Client, network: Network, model
) -> None:
    def break_off(request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.SyncByteStream)
        next(iter(request.stream))
        raise httpx.WriteError("the connection broke off")

    network.interfere = once(break_off, lambda request: request.method == "POST")
    path = model()
    assert client.upload_model(path).files[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(network.sent("POST")) == 2


# Calls that fail.


def test_a_refusal_has_all_its_parts(client: Client, network: Network, model) -> None:
    with pytest.raises(ApiError) as raised:
        client.prepare(model(), recipe={"weight_bits": 1})
    error = raised.value
    assert (error.status, error.code, error.field) == (422, "recipe_invalid", "weight_bits")
    assert error.request_id
    assert str(error) == f"{error.detail} [recipe_invalid, field 'weight_bits']"
    assert len(network.sent("POST", "/v1/jobs")) == 1  # it would be refused again


def test_a_submission_whose_answer_is_lost_is_one_job(client: Client, network: Network, model) -> None:
    def lose(request: httpx.Request) -> httpx.Response:
        job = json.loads(network.deliver(request).read())
        with Client(str(request.url.copy_with(path="/"))) as other, pytest.raises(JobFailed):
            other.wait(job["id"])
        raise httpx.ReadError("the answer is lost")

    network.interfere = once(lose, lambda request: request.url.path == "/v1/jobs")
    path = model(do="fail")
    # Without a key the repeated request would be a second job, for the first has failed by then.
    job = client.prepare(path)
    assert job.state is JobState.FAILED
    keys = {request.headers["Idempotency-Key"] for request in network.sent("POST", "/v1/jobs")}
    assert (len(network.sent("POST", "/v1/jobs")), len(keys)) == (2, 1)
    assert client.prepare(path).id != job.id


def test_a_passing_fault_is_waited_for(client: Client, network: Network) -> None:
    faults = iter(
        [
            httpx.Response(503, json={"code": "not_ready", "detail": "Not now."}),
            httpx.Response(429, headers={"Retry-After": "0"}),
            httpx.Response(502, text="<html>Bad gateway</html>"),
        ]
    )
    network.interfere = lambda request: next(faults, None)
    assert isinstance(list(client.jobs()), list)
    assert len(network.requests) == 4


def test_a_fault_that_stays_is_raised(client: Client, network: Network) -> None:
    network.interfere = lambda request: httpx.Response(502, text="<html>Bad gateway</html>")
    with pytest.raises(ApiError, match="answered 502") as raised:
        client.job("0" * 32)
    assert (raised.value.code, raised.value.status) == (None, 502)
    network.interfere = refuse
    with pytest.raises(UnreachableError, match="does not answer: refused"):
        client.job("0" * 32)
    assert len(network.requests) == 10


def test_a_call_that_cannot_be_made_is_not_repeated(server: Server, network: Network) -> None:
    with (
        Client("127.0.0.1:8000", transport=network) as client,
        pytest.raises(UnreachableError, match="http://"),
    ):
        client.job("0" * 32)
    with (
        Client(server.url, api_key="two\nlines", transport=network) as client,
        pytest.raises(UnreachableError, match="header"),
    ):
        client.job("0" * 32)
    assert len(network.requests) == 2


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            {"status_code": 301, "headers": {"Location": "https://example.com/v1"}},
            r"answered 301 Moved Permanently, which leads to https://example\.com/v1",
        ),
        ({"status_code": 304}, "answered 304 Not Modified"),
        ({"status_code": 200, "html": "<html>sign in</html>"}, r"answered 200 OK with text/html"),
        ({"status_code": 200, "json": []}, r"answered 200 OK with application/json"),
        ({"status_code": 200, "headers": {"Content-Encoding": "gzip"}, "content": b"no"}, "does not answer"),
    ],
    ids=["redirect", "not_modified", "html", "other_json", "not_compressed"],
)
def test_an_answer_that_is_not_the_services_is_said_to_be_so(
    client: Client, network: Network, tmp_path: Path, answer: dict[str, Any], said: str
) -> None:
    (tmp_path / "samples.npz").write_bytes(b"samples")
    network.interfere = lambda request: httpx.Response(**answer)
    for call in (
        lambda: client.job("0" * 32),
        lambda: next(client.jobs()),
        lambda: next(client.watch("0" * 32)),
        lambda: client.wait("0" * 32),
        lambda: client.upload_dataset(tmp_path / "samples.npz"),
        lambda: client.finalize("0" * 32),
        lambda: client.cancel("0" * 32),
        lambda: client.retry("0" * 32),
        lambda: client.delete_job("0" * 32),
        lambda: client.delete_model("0" * 64),
        lambda: client.deliveries("0" * 32),
        lambda: client.redeliver("0" * 32, "0" * 32),
        lambda: client.download_bundle("0" * 32, tmp_path / "bundle"),
        client.tenant,
    ):
        network.requests.clear()
        with pytest.raises(UnreachableError, match=said) as raised:
            call()
        assert "\n" not in str(raised.value)
        asked = [request for request in network.requests if request.url.host == "127.0.0.1"]
        assert len(asked) <= 2  # events, and the job; nothing is repeated


@pytest.mark.parametrize("url", ["http://a\nb", "http://xn--ü.."])
def test_an_address_that_is_none_is_said_to_be_so(url: str) -> None:
    with pytest.raises(UnreachableError, match="is no address of a service"):
        Client(url)


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("100000", 30, 30),
        ("-1", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
        ("9" * 5000, 30, 30),
        ("Fri, 01 Jan 2100 00:00:00 -0000", 30, 30),
        (
            email.utils.format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)),
            30,
            30,
        ),
        (
            email.utils.format_datetime(datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)),
            0,
            0,
        ),
    ],
    ids=[
        "seconds",
        "none",
        "too_long",
        "negative",
        "no_time",
        "no_number",
        "endless",
        "no_zone",
        "in_an_hour",
        "an_hour_ago",
    ],
)
def test_the_pause_is_the_one_that_is_asked_for(given: str, least: float, most: float) -> None:
    request = httpx.Request("GET", "http://service/")
    error = ApiError(httpx.Response(429, headers={"Retry-After": given}, request=request))
    assert least <= asked_pause(error) <= most


def test_the_api_key_is_sent(server: Server, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, environment, sent in (
        ({}, None, None),
        ({"api_key": "given\n"}, None, "Bearer given"),
        ({}, "of the environment", "Bearer of the environment"),
        ({"api_key": "given"}, "of the environment", "Bearer given"),
    ):
        monkeypatch.delenv("ONNX_QAT_API_KEY", raising=False)
        if environment is not None:
            monkeypatch.setenv("ONNX_QAT_API_KEY", environment)
        next(Client(server.url, transport=network, **arguments).jobs(), None)
        assert network.requests[-1].headers.get("Authorization") == sent


def test_what_a_newer_service_sends_is_left_as_it_came() -> None:
    job = Job.model_validate(
        {
            "id": "0" * 32,
            "kind": "distil",
            "state": "failed",
            "progress": {"stage": None, "fraction": 0.0, "new": 1},
            "failure": {"code": "new_code", "detail": "New."},
            "request": {"kind": "prepare", "model": "0" * 64, "recipe": {"new_field": 1}},
            "files": [],
            "bundle": None,
            "revision": 1,
            "attempt": 1,
            "created_at": "2030-01-01T00:00:00Z",
            "started_at": None,
            "finished_at": None,
            "retry_of": None,
            "expires_at": None,
            "new": {},
        }
    )
    assert job.kind == "distil"
    assert job.failure is not None
    assert job.failure.code == "new_code"
    assert str(JobFailed(job)) == "New. [new_code]"


# Jobs.


def test_a_watch_sees_a_job_through_its_states(client: Client, model) -> None:
    job = client.prepare(model(seconds=0.3))
    seen = list(client.watch(job.id))
    assert seen[-1].state is JobState.SUCCEEDED
    revisions = [job.revision for job in seen]
    assert revisions == sorted(set(revisions))
    assert any(job.state is JobState.RUNNING for job in seen)


def test_a_stream_that_breaks_off_goes_on_after_what_was_seen(
    client: Client, network: Network, model
) -> None:
    first = client.prepare(model(seconds=2))

    def cut_after_an_event(request: httpx.Request) -> httpx.Response:
        answer = network.deliver(request)
        answer.stream = Cut(answer.stream, 1 << 20, pieces=1)
        return answer

    network.interfere = once(cut_after_an_event, lambda request: request.url.path.endswith("/events"))
    seen = list(client.watch(first.id))
    assert seen[-1].state is JobState.SUCCEEDED
    revisions = [job.revision for job in seen]
    assert revisions == sorted(set(revisions))
    begun, resumed, *_ = network.sent("GET", "/events")
    assert "Last-Event-ID" not in begun.headers
    assert int(resumed.headers["Last-Event-ID"]) in revisions


def test_an_event_that_arrives_in_part_ends_the_stream_which_is_followed_again(
    client: Client, network: Network, model
) -> None:
    """A proxy that is stopped ends the answer in the midst of a line, in good order."""

    def end_within_an_event(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text='id: 1\nevent: job\ndata: {"id": "87ce2')

    network.interfere = once(end_within_an_event, lambda request: request.url.path.endswith("/events"))
    job = client.prepare(model(seconds=2))
    assert client.wait(job.id).state is JobState.SUCCEEDED
    assert len(network.sent("GET", "/events")) > 1


def test_where_events_do_not_come_through_the_job_is_asked_for(
    client: Client, network: Network, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.client._POLL_SECONDS", 0.02)

    def hold_back(request: httpx.Request) -> httpx.Response | None:
        return httpx.Response(200, text="<html></html>") if request.url.path.endswith("/events") else None

    network.interfere = hold_back
    job = client.prepare(model(seconds=3))
    assert client.wait(job.id).state is JobState.SUCCEEDED
    assert len(network.sent("GET", "/events")) == 3  # then it is given up


def test_a_watch_outlives_a_restart_of_the_service(start_server, model) -> None:
    server: Server = start_server()
    with Client(server.url, retries=1) as client:
        job = client.prepare(model(seconds=1))
        seen = []
        for change in client.watch(job.id):
            if not seen:
                server.stop(signal.SIGKILL)
                threading.Timer(1, server.start).start()
            seen.append(change)
    assert seen[-1].state is JobState.SUCCEEDED


def test_who_waits_for_a_job_that_fails_is_told_why(client: Client, model) -> None:
    with pytest.raises(JobFailed) as raised:
        client.wait(client.prepare(model(do="fail")).id)
    assert raised.value.code == "model_domain_unknown"
    assert str(raised.value) == "Unknown domain. [model_domain_unknown, node 'n1']"


def test_who_waits_too_long_is_told_so(client: Client, model) -> None:
    job = client.prepare(model(seconds=60))
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=job.id):
        client.wait(job.id, timeout=0.5)
    assert time.monotonic() - started < 10
    client.cancel(job.id)


def test_comments_in_a_quiet_stream_do_not_put_the_end_of_the_waiting_off(
    client: Client, network: Network, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.client.client._COMMENT_SECONDS", 0.2)
    job = client.prepare(model(seconds=60))

    def comments() -> Iterator[bytes]:
        for _ in range(600):
            time.sleep(0.1)
            yield b": still here\n\n"

    def quiet(request: httpx.Request) -> httpx.Response | None:
        is_stream = request.url.path.endswith("/events")
        return httpx.Response(200, stream=Pieces(comments())) if is_stream else None

    network.interfere = quiet
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=job.id):
        client.wait(job.id, timeout=1)
    assert time.monotonic() - started < 30
    client.cancel(job.id)


def test_patience_begins_when_the_service_goes_away(
    client: Client, server: Server, network: Network, model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not when the job last changed, which may be long ago."""
    passed = 0.0
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + passed, sleep=time.sleep)
    monkeypatch.setattr("service.client.client.time", clock)
    monkeypatch.setattr("service.client.client._POLL_SECONDS", 0.02)
    monkeypatch.setattr("service.client.client._SILENT_STREAMS", 0)
    job = client.prepare(model(seconds=60))
    answers = iter([True] * 10 + [False] * 10)

    def away(request: httpx.Request) -> httpx.Response | None:
        nonlocal passed
        answers_now = next(answers, None)
        if answers_now is None:  # it was away, and is asked again
            httpx.post(f"{server.url}/v1/jobs/{job.id}/cancel", timeout=60).raise_for_status()
            network.interfere = lambda request: None
        elif not answers_now:
            passed = 3600
            raise httpx.ConnectError("nobody is there")
        return None

    network.interfere = away
    assert [*client.watch(job.id, patience=60)][-1].state is JobState.CANCELLED
    assert passed


def test_a_cancelled_job_is_cancelled_however_often_one_asks(client: Client, model) -> None:
    job = client.prepare(model(seconds=60))
    assert client.cancel(job.id).state is JobState.CANCELLED
    assert client.cancel(job.id).state is JobState.CANCELLED
    with pytest.raises(JobFailed, match="cancelled"):
        client.wait(job.id)
    done = client.wait(client.prepare(model()).id)
    with pytest.raises(ApiError, match="job_finished"):
        client.cancel(done.id)


def test_all_pages_of_jobs_are_read(client: Client, network: Network, model) -> None:
    ids = [client.prepare(model(do="fail")).id for _ in range(3)]

    def shorten(request: httpx.Request) -> httpx.Response | None:
        if request.method != "GET" or request.url.path != "/v1/jobs":
            return None
        request.url = request.url.copy_merge_params({"limit": "2"})
        return network.deliver(request)

    network.interfere = shorten
    assert [job.id for job in client.jobs()][:3] == ids[::-1]
    assert len(network.sent("GET", "/v1/jobs")) >= 2


# Downloads.


BIG = b"0123456789" * 30_000


@pytest.fixture(scope="module")
def result(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """A job that made a file of 300 kB."""
    model = tmp_path_factory.mktemp("model") / "model.onnx"
    model.write_text(json.dumps({"files": {"big": BIG.decode()}}))
    with Client(server.url) as client:
        return client.wait(client.prepare(model).id)


def cut_downloads(network: Network, length: int) -> Answer:
    def cut(request: httpx.Request) -> httpx.Response | None:
        if not request.url.path.endswith("/files/big"):
            return None
        answer = network.deliver(request)
        answer.stream = Cut(answer.stream, length)
        return answer

    return cut


def test_a_download_goes_on_where_it_broke_off(
    client: Client, network: Network, result: Job, tmp_path: Path
) -> None:
    # It breaks off more often than a call is repeated, and gets further each time.
    network.interfere = cut_downloads(network, 40_000)
    client.download_file(result.id, "big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    ranges = [request.headers.get("Range") for request in network.sent("GET", "/files/big")]
    assert ranges[0] is None
    starts = [int(given.removeprefix("bytes=").removesuffix("-")) for given in ranges[1:] if given]
    assert len(starts) == len(ranges) - 1
    assert starts == sorted(set(starts))


def test_a_download_goes_on_in_another_process(
    client: Client, network: Network, result: Job, tmp_path: Path
) -> None:
    cut = cut_downloads(network, 100_000)

    def interrupt(request: httpx.Request) -> httpx.Response | None:
        if len(network.sent("GET", "/files/big")) > 1:
            raise KeyboardInterrupt
        return cut(request)

    network.interfere = interrupt
    with pytest.raises(KeyboardInterrupt):
        client.download_bundle(result.id, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    network.interfere = lambda request: None
    client.download_bundle(result.id, tmp_path / "bundle")
    assert (tmp_path / "bundle/big").read_bytes() == BIG
    assert network.sent("GET", "/files/big")[-1].headers["Range"].startswith("bytes=")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_what_is_there_of_a_download_is_not_trusted(client: Client, result: Job, tmp_path: Path) -> None:
    sha256 = hashlib.sha256(BIG).hexdigest()
    for left in (b"other", b"x" * len(BIG), BIG + b"more"):
        (tmp_path / f".big.{sha256[:12]}.part").write_bytes(left)
        client.download_file(result.id, "big", tmp_path / "big")
        assert (tmp_path / "big").read_bytes() == BIG


def test_a_file_that_is_not_the_stored_one_is_not_kept(
    client: Client, network: Network, result: Job, tmp_path: Path
) -> None:
    def falsify(request: httpx.Request) -> httpx.Response | None:
        other = httpx.ByteStream(b"x" * len(BIG))
        return httpx.Response(200, stream=other) if request.url.path.endswith("/big") else None

    network.interfere = falsify
    with pytest.raises(DownloadError, match="big did not arrive"):
        client.download_file(result.id, "big", tmp_path / "out" / "big")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_name_cannot_lead_out_of_the_directory(
    client: Client, network: Network, result: Job, tmp_path: Path
) -> None:
    evil = result.model_copy(update={"files": [StoredFile(name="../evil", bytes=1, sha256="0" * 64)]})

    def falsify(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=evil.model_dump_json())

    network.interfere = falsify
    with pytest.raises(DownloadError, match="no plain file name"):
        client.download_files(result.id, tmp_path / "out" / "bundle")
    assert not (tmp_path / "out" / "evil").exists()


def test_nothing_is_replaced_by_a_bundle(client: Client, result: Job, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle/mine").write_text("mine")
    (tmp_path / "bundle.zip").write_text("mine")
    for name in ("bundle", "bundle.zip"):
        with pytest.raises(QatError, match="output_exists"):
            client.download_bundle(result.id, tmp_path / name)
    assert (tmp_path / "bundle/mine").read_text() == (tmp_path / "bundle.zip").read_text() == "mine"


def test_a_result_that_is_not_there_is_refused_in_the_services_words(
    client: Client, model, result: Job, tmp_path: Path
) -> None:
    failed = client.prepare(model(do="fail")).id
    with pytest.raises(JobFailed):
        client.wait(failed)
    for target in ("bundle", "bundle.zip"):
        with pytest.raises(ApiError, match="job_not_succeeded"):
            client.download_bundle(failed, tmp_path / target)
    with pytest.raises(ApiError, match="file_not_found"):
        client.download_file(result.id, "missing", tmp_path / "x")
    finalized = client.wait(client.finalize(result.id).id)
    with pytest.raises(ApiError, match="file_not_found"):
        client.download_bundle(finalized.id, tmp_path / "x.zip")
