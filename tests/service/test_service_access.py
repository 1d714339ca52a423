"""Who may use the service: holders of keys, or whoever is on this machine and no web page."""

from __future__ import annotations

import datetime
import json
import logging
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from fastapi.testclient import TestClient
from service_helpers import Server, assert_problem
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner

import service.tenants.service as tenant_service
from service import database
from service.access.binding import check_binding, is_loopback
from service.cli import app as command_line
from service.errors import ServiceError
from service.settings import Settings
from service.tenants.models import ApiKeyRow
from service.tenants.service import TenantService


@pytest.fixture
def locked(start_client: Callable[..., TestClient]) -> TestClient:
    """A service that asks for keys."""
    return start_client(auth="keys")


@pytest.fixture
def tenants(locked: TestClient) -> TenantService:
    service: TenantService = locked.app.state.services.tenants
    return service


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def later(monkeypatch: pytest.MonkeyPatch, **time: float) -> None:
    """From now on it is that much later."""
    at = database.now() + datetime.timedelta(**time)
    monkeypatch.setattr(tenant_service, "now", lambda: at)


# Keys.


def test_a_key_opens_the_service(locked: TestClient, tenants: TenantService) -> None:
    _, key = tenants.create_key("default", "test", None)
    for scheme in ("Bearer", "bearer", "BEARER"):
        answer = locked.get("/v1/jobs", headers={"Authorization": f"{scheme} {key.text}"})
        assert answer.status_code == 200


def test_keys_have_256_random_bits_and_nothing_of_them_is_kept_but_a_hash(
    locked: TestClient, tenants: TenantService, tmp_path: Path
) -> None:
    texts = {tenants.create_key("default", "", None)[1].text for _ in range(20)}
    assert len(texts) == 20
    for text in texts:
        assert re.fullmatch(r"oqat_[0-9a-f]{16}_[A-Za-z0-9_-]{43}", text)
    kept = b"".join(path.read_bytes() for path in (tmp_path / "data").glob("onnx-qat.db*"))
    for text in texts:
        assert text[:21].encode()[5:] in kept
        assert text[22:].encode() not in kept


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "oqat_0123456789abcdef_x"},
        {"X-API-Key": "k"},
    ],
)
def test_without_a_key_one_is_asked_for_it(locked: TestClient, headers: dict[str, str]) -> None:
    answer = locked.get("/v1/jobs", headers=headers)
    assert_problem(answer, 401, "unauthorized")
    # RFC 6750, section 3.1: no error code where no credential came.
    assert answer.headers["www-authenticate"] == 'Bearer realm="onnx-qat"'


def test_what_is_no_key_is_refused(locked: TestClient, tenants: TenantService) -> None:
    _, key = tenants.create_key("default", "", None)
    wrong = [
        key.text[:-1],
        key.text + "A",
        key.text[:-1] + ("A" if key.text[-1] != "A" else "B"),
        key.text.upper(),
        key.text.replace(key.id, "0" * 16),
        key.id,
        "x",
        "a b",
        "oqat__",
        "é" * 64,
        "x" * 10_000,
    ]
    for text in wrong:
        answer = locked.get("/v1/jobs", headers={"Authorization": f"Bearer {text}".encode("latin-1")})
        assert_problem(answer, 401, "key_invalid")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_an_expired_key_says_so(
    locked: TestClient, tenants: TenantService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = tenants.create_key("default", "", datetime.timedelta(days=90))
    later(monkeypatch, days=89)
    assert locked.get("/v1/jobs", headers=bearer(key.text)).status_code == 200
    later(monkeypatch, days=91)
    answer = locked.get("/v1/jobs", headers=bearer(key.text))
    assert_problem(answer, 401, "key_expired")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]


def test_a_revoked_key_ends_at_once_and_the_others_go_on(locked: TestClient, tenants: TenantService) -> None:
    _, key = tenants.create_key("default", "", None)
    _, other = tenants.create_key("default", "", None)
    assert locked.get("/v1/jobs", headers=bearer(key.text)).status_code == 200
    tenants.revoke(key.id)
    assert_problem(locked.get("/v1/jobs", headers=bearer(key.text)), 401, "key_revoked")
    assert locked.get("/v1/jobs", headers=bearer(other.text)).status_code == 200


def test_that_a_key_was_revoked_is_told_only_to_who_knows_its_secret(
    locked: TestClient, tenants: TenantService
) -> None:
    _, key = tenants.create_key("default", "", None)
    tenants.revoke(key.id)
    guess = f"oqat_{key.id}_{'A' * 43}"
    assert_problem(locked.get("/v1/jobs", headers=bearer(guess)), 401, "key_invalid")


def test_the_use_of_a_key_is_recorded_once_a_minute(
    locked: TestClient, tenants: TenantService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = tenants.create_key("default", "", None)

    def last_used() -> datetime.datetime | None:
        return tenants.api_keys()[0].last_used_at

    assert last_used() is None
    locked.get("/v1/jobs", headers=bearer(key.text))
    first = last_used()
    assert first is not None
    later(monkeypatch, seconds=50)
    locked.get("/v1/jobs", headers=bearer(key.text))
    assert last_used() == first
    later(monkeypatch, seconds=70)
    locked.get("/v1/jobs", headers=bearer(key.text))
    second = last_used()
    assert second is not None
    assert second > first


def test_a_use_that_cannot_be_recorded_refuses_nobody(
    locked: TestClient, tenants: TenantService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = tenants.create_key("default", "", None)

    def fail(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("database is locked"))

    monkeypatch.setattr(tenant_service.repository, "note_use", fail)
    assert locked.get("/v1/jobs", headers=bearer(key.text)).status_code == 200
    assert tenants.api_keys()[0].last_used_at is None


@pytest.mark.parametrize("path", ["/v1/models", "/v1/jobs", "/v1/prepare", "/v1/nothing", "/v1"])
def test_nothing_is_read_of_a_request_without_a_key(locked: TestClient, path: str) -> None:
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    request = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost")],
    }
    anyio.run(locked.app, request, receive, send)
    assert sent[0]["status"] == 401


def test_what_belongs_to_nobody_needs_no_key(locked: TestClient) -> None:
    for path in ("/health/live", "/health/ready", "/docs", "/openapi.json"):
        assert locked.get(path).status_code == 200


def test_a_lost_database_is_no_refusal(
    locked: TestClient, tenants: TenantService, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, key = tenants.create_key("default", "", None)

    def fail(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("gone"))

    monkeypatch.setattr(tenant_service.repository, "find_key", fail)
    assert_problem(locked.get("/v1/jobs", headers=bearer(key.text)), 503, "database_unavailable")


def test_metrics_have_a_token_of_their_own(start_client: Callable[..., TestClient]) -> None:
    token = "0123456789abcdef-metrics"
    client = start_client(auth="keys", metrics_token=token)
    _, key = client.app.state.services.tenants.create_key("default", "", None)
    for headers in ({}, bearer(key.text), bearer("x")):
        assert_problem(client.get("/metrics", headers=headers), 401, "unauthorized")
    assert client.get("/metrics", headers=bearer(token)).status_code == 200
    # A key is needed for the rest, as before.
    assert_problem(client.get("/v1/jobs", headers=bearer(token)), 401, "key_invalid")


@pytest.mark.parametrize(("settings", "refused"), [({"auth": "keys"}, True), ({}, False)])
def test_metrics_without_a_token_are_open_where_everything_is(
    start_client: Callable[..., TestClient], settings: dict[str, str], refused: bool
) -> None:
    assert start_client(**settings).get("/metrics").status_code == (401 if refused else 200)


def test_keys_appear_in_the_log_by_their_id_only(
    locked: TestClient, tenants: TenantService, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _, key = tenants.create_key("default", "ci", datetime.timedelta(days=1))
    locked.get("/v1/jobs", headers=bearer(key.text))
    locked.get("/v1/jobs", headers=bearer(key.text[:-1]))
    locked.get("/v1/jobs")
    tenants.revoke(key.id)
    locked.get("/v1/jobs", headers=bearer(key.text))
    # The service's own lines; those of the HTTP client are text.
    logs: list[dict[str, Any]] = [record.msg for record in caplog.records if isinstance(record.msg, dict)]
    audit = [line for line in logs if line["event"] != "request"]
    assert [(line["event"], line.get("code"), line.get("key")) for line in audit] == [
        ("API key created", None, key.id),
        ("access refused", "key_invalid", None),
        ("access refused", "unauthorized", None),
        ("API key revoked", None, key.id),
        ("access refused", "key_revoked", key.id),
    ]
    requests = [line for line in logs if line["event"] == "request"]
    assert [(line["status"], line["tenant"]) for line in requests] == [
        (200, "default"),
        (401, None),
        (401, None),
        (401, None),
    ]
    refused = [line["request"] for line in audit if line["event"] == "access refused"]
    assert refused == [line["request"] for line in requests[1:]]
    secret = key.text.rpartition("_")[2][:20]
    assert secret not in json.dumps(logs, default=str)


# The command line.


def run(data: Path, *arguments: str, status: int = 0) -> str:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    result = CliRunner().invoke(command_line, [*arguments, "--data-dir", str(data)])
    # The command's log went to a standard error that is closed now.
    root.handlers = handlers
    root.setLevel(level)
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.stderr


def test_commands_print_what_they_say_and_nothing_of_libraries(tmp_path: Path) -> None:
    for _ in range(2):
        command = [sys.executable, "-c", "from service.cli import app; app()", "keys", "list"]
        done = subprocess.run(
            [*command, "--data-dir", str(tmp_path)], capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[:2] == ["id", "tenant"]
        assert "Impl" not in done.stderr
    assert done.stderr == "", "the database was up to date"


def test_keys_are_made_and_revoked_while_the_service_runs(start_server, tmp_path: Path) -> None:
    data = tmp_path / "data"
    server: Server = start_server(ONNX_QAT_AUTH="keys")

    def status(key: str) -> int:
        return httpx.get(f"{server.url}/v1/tenant", headers=bearer(key), timeout=60).status_code

    run(data, "tenants", "create", "team-a", "--max-bytes", "1MiB")
    key = run(data, "keys", "create", "--tenant", "team-a", "--name", "CI", "--expires", "90d").strip()
    assert status(key) == 200
    assert status(key[:-1]) == 401
    run(data, "keys", "revoke", key.split("_")[1])
    assert status(key) == 401
    assert server.stop(signal.SIGTERM) in (0, -signal.SIGTERM)


def test_the_commands_show_what_they_made(tmp_path: Path) -> None:
    data = tmp_path / "data"
    quotas = ["--max-bytes", "10GiB", "--max-queued-jobs", "5", "--requests-per-minute", "600"]
    run(data, "tenants", "create", "team-a", "--name", "Team A", *quotas)
    key = run(data, "keys", "create", "--tenant", "team-a", "--name", "CI", "--expires", "12h").strip()
    run(data, "keys", "create", "--tenant", "default")

    listed = [json.loads(line) for line in run(data, "tenants", "list", "--json").splitlines()]
    assert [tenant["id"] for tenant in listed] == ["default", "team-a"]
    expected = {"max_bytes": 10 << 30, "max_queued_jobs": 5, "requests_per_minute": 600, "name": "Team A"}
    assert expected.items() <= listed[1].items()
    assert re.search(r"^team-a +10737418240 +5 +600 +Team A$", run(data, "tenants", "list"), re.M)

    (shown,) = (
        json.loads(line) for line in run(data, "keys", "list", "--tenant", "team-a", "--json").splitlines()
    )
    assert (shown["id"], shown["tenant"], shown["name"]) == (key.split("_")[1], "team-a", "CI")
    lifetime = datetime.datetime.fromisoformat(shown["expires_at"]) - datetime.datetime.fromisoformat(
        shown["created_at"]
    )
    assert lifetime == datetime.timedelta(hours=12)
    table = run(data, "keys", "list")
    assert len(table.splitlines()) == 3
    assert key.split("_")[2] not in table

    run(data, "tenants", "set-quota", "team-a", "--max-bytes", "none", "--max-queued-jobs", "0")
    (changed,) = (
        tenant
        for tenant in map(json.loads, run(data, "tenants", "list", "--json").splitlines())
        if tenant["id"] == "team-a"
    )
    expected = {"max_bytes": None, "max_queued_jobs": 0, "requests_per_minute": 600}
    assert expected.items() <= changed.items()


def test_a_key_is_printed_alone_and_the_log_goes_to_standard_error(tmp_path: Path) -> None:
    printed = run(tmp_path / "data", "keys", "create", "--tenant", "default")
    assert re.fullmatch(r"oqat_[0-9a-f]{16}_[A-Za-z0-9_-]{43}\n", printed)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["keys", "create", "--tenant", "nobody"], 1, "tenant_not_found"),
        (["keys", "revoke", "0123"], 1, "key_not_found"),
        (["tenants", "create", "default"], 1, "tenant_exists"),
        (["tenants", "set-quota", "nobody", "--max-bytes", "1"], 1, "tenant_not_found"),
        (["tenants", "set-quota", "default"], 2, "at least one quota"),
        (["tenants", "set-quota", "default", "--max-bytes", "much"], 2, "--max-bytes"),
        (["tenants", "set-quota", "default", "--max-bytes", "9223372036854775808"], 2, "--max-bytes"),
        (["tenants", "set-quota", "default", "--max-queued-jobs", "-1"], 2, "--max-queued-jobs"),
        (["tenants", "set-quota", "default", "--requests-per-minute", "0"], 2, "--requests-per-minute"),
        (["tenants", "create", "Team A"], 2, "small letters"),
        (["tenants", "create", "a" * 33], 2, "small letters"),
        (["keys", "create", "--tenant", "default", "--expires", "soon"], 2, "90d"),
        (["keys", "create", "--tenant", "default", "--expires", "0d"], 2, "90d"),
        (["keys", "create", "--tenant", "default", "--expires", "999999w"], 2, "expires"),
    ],
)
def test_what_the_commands_refuse(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    assert message in run(tmp_path / "data", *arguments, status=status)


# Where the service listens.


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("", False),
        ("192.168.1.5", False),
        ("no-such-host.invalid", False),
    ],
)
def test_open_by_default_is_open_to_this_machine_only(host: str, loopback: bool) -> None:
    assert is_loopback(host) == loopback
    if loopback:
        check_binding(Settings(), host)
    else:
        with pytest.raises(ServiceError, match=r"ONNX_QAT_AUTH=keys.*127\.0\.0\.1.*ONNX_QAT_AUTH=open"):
            check_binding(Settings(), host)
    for chosen in ("open", "keys"):
        check_binding(Settings(auth=chosen), host)


def test_serve_does_not_start_open_at_an_address_that_others_can_reach(tmp_path: Path) -> None:
    said = run(tmp_path / "data", "serve", "--host", "0.0.0.0", "--port", "0", status=2)
    assert said.startswith("error: auth_not_chosen: Other machines can reach 0.0.0.0")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("choice", [["--auth", "keys"], []])
def test_serve_starts_there_when_somebody_chose(tmp_path: Path, choice: list[str]) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", "from service.cli import app; app()"),
            *("serve", "--host", "0.0.0.0", "--port", "0", *choice),
        ],
        env={
            "PYTHONPATH": ":".join(sys.path),
            "ONNX_QAT_DATA_DIR": str(tmp_path / "data"),
            **({} if choice else {"ONNX_QAT_AUTH": "open"}),
        },
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if "Uvicorn running on" in line:
                break
        else:
            pytest.fail("".join(said))
        expected = "no API key" if choice else "open: whoever reaches the service may use it"
        assert any(expected in line for line in said)
    finally:
        process.terminate()
        process.wait(60)


# Browsers.


@pytest.mark.parametrize(
    ("host", "answered"),
    [
        ("localhost:8000", True),
        ("LOCALHOST", True),
        ("tool.localhost:8000", True),
        ("127.0.0.1:8000", True),
        ("192.168.1.5:8000", True),
        ("[::1]:8000", True),
        ("qat.example.com", True),
        ("QAT.example.com:443", True),
        ("attacker.example", False),
        ("localhost.attacker.example", False),
        ("127.0.0.1.attacker.example", False),
        ("127.0.0.1@attacker.example", False),
        ("sub.qat.example.com", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_open_mode_answers_only_under_names_that_cannot_be_rebound(
    start_client: Callable[..., TestClient], host: str, answered: bool
) -> None:
    client = start_client(allowed_hosts="qat.example.com, other.example.com")
    headers = {"Host": host}
    if answered:
        assert client.get("/v1/jobs", headers=headers).status_code == 200
        return
    assert_problem(client.get("/v1/jobs", headers=headers), 421, "host_unknown")
    assert_problem(client.get("/docs", headers=headers), 421, "host_unknown")
    # A probe may come under any name.
    assert client.get("/health/live", headers=headers).status_code == 200


# Origin of the page, Fetch Metadata of the request; which methods are refused.
PAGES = [
    ({"Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}, {"GET", "POST"}),
    ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, {"GET", "POST"}),
    ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, {"GET", "POST"}),
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, {"GET", "POST"}),
    # Older browsers, and addresses for which browsers send no Fetch Metadata.
    ({"Origin": "http://evil.example"}, {"GET", "POST"}),
    ({"Origin": "null"}, {"GET", "POST"}),
    ({"Origin": "http://localhost.evil.example:8000"}, {"GET", "POST"}),
    ({"Origin": "http://localhost:3000"}, {"GET", "POST"}),
    # Somebody follows a link to the service; a form that is posted is no link.
    ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, {"POST"}),
    # The service's own page, the address bar, and programs.
    ({"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}, set()),
    ({"Origin": "http://LOCALHOST:8000"}, set()),
    ({"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}, set()),
    ({}, set()),
]


@pytest.mark.parametrize(("headers", "refused"), PAGES)
def test_open_mode_takes_nothing_from_other_peoples_pages(
    client: TestClient, headers: dict[str, str], refused: set[str]
) -> None:
    for method in ("GET", "POST"):
        path = "/v1/jobs" if method == "GET" else "/v1/models"
        answer = client.request(
            method,
            path,
            content=b"model" if method == "POST" else None,
            headers={"Host": "localhost:8000", **headers},
        )
        if method in refused:
            assert_problem(answer, 403, "cross_origin")
        else:
            assert answer.status_code in (200, 201)


def test_with_keys_it_does_not_matter_where_a_request_comes_from(
    locked: TestClient, tenants: TenantService
) -> None:
    """A browser sends no key of its own accord, and a page may not send one without CORS."""
    _, key = tenants.create_key("default", "", None)
    headers = {"Host": "qat.example.com", "Origin": "http://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert locked.post("/v1/models", content=b"m", headers=headers).status_code == 401
    assert locked.get("/v1/jobs", headers={**headers, **bearer(key.text)}).status_code == 200
    preflight = locked.options(
        "/v1/jobs", headers={**headers, "Access-Control-Request-Headers": "authorization"}
    )
    assert preflight.status_code == 401
    assert not [name for name in preflight.headers if name.startswith("access-control-")]


def test_refusals_have_request_ids(client: TestClient) -> None:
    answer = client.get("/v1/jobs", headers={"Host": "attacker.example", "X-Request-ID": "r1"})
    assert answer.headers["x-request-id"] == "r1"


def test_a_hash_is_of_the_whole_key(tenants: TenantService, locked: TestClient) -> None:
    """Two keys with each other's halves are no keys."""
    (_, first), (_, second) = (tenants.create_key("default", "", None) for _ in range(2))
    mixed = first.text[:22] + second.text[22:]
    assert_problem(locked.get("/v1/jobs", headers=bearer(mixed)), 401, "key_invalid")
    with locked.app.state.services.database.reading() as session:
        row = session.get_one(ApiKeyRow, first.id)
    assert re.fullmatch("[0-9a-f]{64}", row.hash)
