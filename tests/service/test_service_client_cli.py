"""`onnx-qat submit`, `watch`, `download`, ...: what they print, and the status they end with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from service_helpers import Server
from typer.testing import CliRunner, Result

from service.cli import app
from service.client import Client, JobState
from service.client import connection as connection_module

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("service") / "data", ONNX_QAT_WORKERS="2")
    yield server
    server.stop()


@pytest.fixture
def run(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in an empty directory, with the service's address in the environment."""
    monkeypatch.setenv("ONNX_QAT_SERVER", server.url)
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


def write_model(folder: Path, **script: Any) -> Path:
    path = folder / "model.onnx"
    path.write_text(json.dumps({**script, "nonce": os.urandom(8).hex()}))
    return path


def test_a_model_is_submitted_watched_and_its_bundle_downloaded(run: Run, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text('{"weight_bits": 4, "symmetric": true}')
    (tmp_path / "samples.npz").write_bytes(b"samples")
    (tmp_path / "extra.bin").write_bytes(b"weights")
    submitted = run(
        "submit",
        write_model(tmp_path),
        "--recipe=recipe.json",
        "--set=weight_bits=5",
        "--calibration=samples.npz",
        "--external-data=extra.bin",
    )
    assert submitted.exit_code == 0, submitted.stderr
    job, kind, state = submitted.stdout.split()
    assert (kind, state) == ("prepare", "queued")

    assert run("watch", job).stdout == f"{job}  prepare   succeeded\n"
    assert f"{job}  prepare   succeeded\n" in run("jobs").stdout

    downloaded = run("download", job, "-o", "bundle")
    assert (downloaded.exit_code, downloaded.stdout) == (0, "bundle\n")
    seen = json.loads((tmp_path / "bundle/seen.json").read_text())
    assert (seen["recipe"]["weight_bits"], seen["recipe"]["symmetric"]) == (5, True)
    assert (seen["calibration"], seen["beside_model"]) == ("samples", ["extra.bin", "model.onnx"])
    assert run("download", job).exit_code == 0
    assert (tmp_path / job / "manifest.json").is_file()
    again = run("download", job)
    assert (again.exit_code, again.stderr.endswith(f"[output_exists, file '{job}']\n")) == (1, True)


def test_a_checkpoint_is_submitted_to_be_finalized(run: Run, tmp_path: Path) -> None:
    job = run("submit", write_model(tmp_path), "--watch").stdout.split()[0]
    (tmp_path / "trained").write_bytes(b"trained")
    done = run("submit-finalize", job, "--checkpoint=trained", "--verify=trained", "--watch")
    assert (done.exit_code, done.stdout.split()[1:]) == (0, ["finalize", "succeeded"])
    run("download", done.stdout.split()[0], "--output=out")
    assert json.loads((tmp_path / "out/model.int8.onnx").read_text())[1:] == ["trained", "trained"]


def test_json_is_one_object_a_line(run: Run, tmp_path: Path) -> None:
    watched = run("submit", write_model(tmp_path), "--watch", "--json")
    states = [json.loads(line)["state"] for line in watched.stdout.splitlines()]
    assert states[-1] == "succeeded"
    job = json.loads(watched.stdout.splitlines()[0])["id"]
    assert json.loads(run("watch", job, "--json").stdout)["id"] == job
    assert json.loads(run("jobs", "--json", "--limit=1", "--state=succeeded").stdout)["id"] == job
    assert json.loads(run("download", job, "--json", "-o", "x.zip").stdout) == {"job": job, "output": "x.zip"}
    assert json.loads(run("submit", "model.onnx", "--json").stdout)["id"] == job  # the same work again


def test_a_job_that_fails_ends_with_the_code_that_the_local_command_prints(run: Run, tmp_path: Path) -> None:
    failed = run("submit", write_model(tmp_path, do="fail"), "--watch")
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert failed.stderr == "error: Unknown domain. [model_domain_unknown, node 'n1']\n"


def test_a_job_is_cancelled(run: Run, tmp_path: Path) -> None:
    job = run("submit", write_model(tmp_path, seconds=60)).stdout.split()[0]
    assert run("cancel", job).stdout == f"{job}  prepare   cancelled\n"
    watched = run("watch", job)
    assert (watched.exit_code, watched.stderr) == (1, f"error: The job {job} was cancelled. [cancelled]\n")


def test_a_failed_job_is_retried_and_removed(run: Run, tmp_path: Path) -> None:
    failed = run("submit", write_model(tmp_path, do="fail"), "--watch", "--json").stdout.splitlines()
    job = json.loads(failed[-1])["id"]
    retried = run("retry", job)
    assert retried.exit_code == 0, retried.stderr
    assert retried.stdout.split()[0] != job
    assert run("retry", retried.stdout.split()[0], "--watch").exit_code == 1
    assert run("delete", job).stdout == f"{job}  deleted\n"
    gone = run("watch", job)
    assert (gone.exit_code, "[job_not_found]" in gone.stderr) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["submit", "missing.onnx"], 1, "[model_not_found, file 'missing.onnx']"),
        (["submit", "model.onnx", "--set=weight_bits=1"], 2, "[recipe_invalid, field 'weight_bits']"),
        (["submit", "model.onnx", "--set=target=tensorrt"], 2, "[recipe_unsupported, field 'target']"),
        (["submit", "model.onnx", "--recipe=missing.json"], 2, "[recipe_invalid, file 'missing.json']"),
        (["watch", "deadbeef"], 2, "this is no job's id"),
        (["submit-finalize", "../../x"], 2, "this is no job's id"),
        (["retry", "0" * 32], 1, "[job_not_found]"),
        (["delete", "0" * 32], 1, "[job_not_found]"),
        (["watch", "0" * 32], 1, "[job_not_found]"),
        (["download", "0" * 32], 1, "[job_not_found]"),
        (["submit-finalize", "0" * 32], 1, "[job_not_found]"),
        (["jobs", "--state=lost"], 2, "lost"),
        (["jobs", "--server=http://127.0.0.1:1"], 3, "does not answer"),
        (["jobs", "--server=http://a\nb"], 3, "is no address of a service"),
    ],
)
def test_what_goes_wrong_is_one_line_and_a_status(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], status: int, message: str
) -> None:
    monkeypatch.setattr(connection_module, "_FIRST_PAUSE_SECONDS", 0.0)
    write_model(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (status, "")
    assert message in result.stderr
    if "usage" not in result.stderr.lower():
        assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("status", "headers", "message"),
    [
        (301, {"Location": "https://example.com/v1/jobs"}, "answered 301 Moved Permanently, which leads to"),
        (200, {"Content-Type": "text/html"}, "answered 200 OK with text/html,"),
    ],
)
def test_what_answers_in_the_services_place_is_one_line_and_a_status(
    run: Run, status: int, headers: dict[str, str], message: str
) -> None:
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": "2"}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(b"no")

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{proxy.server_port}"
        for arguments in (["jobs"], ["watch", "0" * 32], ["download", "0" * 32]):
            result = run(*arguments, f"--server={url}")
            assert (result.exit_code, result.stdout) == (3, "")
            (line,) = result.stderr.splitlines()
            assert line.startswith(f"error: {url}/v1/jobs")
            assert message in line
        proxy.shutdown()


def test_ctrl_c_leaves_the_job_running_and_says_how_to_watch_it(server: Server, tmp_path: Path) -> None:
    code = "from service.cli import app; app(prog_name='onnx-qat')"
    path = write_model(tmp_path, seconds=60)
    arguments = ["submit", str(path), "--watch", "--json", "--server", server.url]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        job = json.loads(process.stdout.readline())["id"]
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == (f"the job goes on; to watch it again: onnx-qat watch {job} --server {server.url}\n")
    with Client(server.url) as client:
        assert client.job(job).state in (JobState.QUEUED, JobState.RUNNING)
        client.cancel(job)
