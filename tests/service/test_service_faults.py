"""A worker, the messages and the database connections are lost: no job is, and none is done twice."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psycopg
from deployments import Deployment, scaled
from servers import PostgresqlServer, s3_client
from service_helpers import Server, Workers, wait_until

JOBS = 24

# The database itself counts how often a job is said to have succeeded.
COUNT_OUTCOMES = """
CREATE TABLE outcomes (job text);
CREATE FUNCTION count_outcome() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN INSERT INTO outcomes VALUES (NEW.id); RETURN NEW; END $$;
CREATE TRIGGER count_outcome AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.state = 'succeeded') EXECUTE FUNCTION count_outcome();
"""


def test_no_job_is_lost_or_done_twice(tmp_path: Path) -> None:
    with scaled() as deployment, contextlib.ExitStack() as stack:
        environment = {**deployment.environment, "ONNX_QAT_LEASE_SECONDS": "6"}

        def start_worker(number: int) -> Workers:
            # On another machine: nothing is shared but the servers.
            worker = Workers(tmp_path / f"worker-{number}", ONNX_QAT_WORKERS="2", **environment)
            stack.callback(worker.stop, signal.SIGKILL)
            return worker

        server = Server(tmp_path / "api", **environment)
        stack.callback(server.stop, signal.SIGKILL)
        database = stack.enter_context(psycopg.connect(deployment.database_url, autocommit=True))
        database.execute(COUNT_OUTCOMES)
        client = stack.enter_context(server.client())
        workers = [start_worker(number) for number in range(2)]

        # Every third is long, so that one runs still when its worker is killed.
        jobs = [
            submit_surely(client, {"seconds": 3 if number % 3 == 0 else 0, "files": {"a": str(number)}})
            for number in range(JOBS - 3)
        ]
        long = jobs[::3]
        wait_until(lambda: in_state(database, "succeeded") >= 2, 120)
        wait_until(lambda: any(kill_while_it_runs(database, worker, long) for worker in workers), 120)
        assert deployment.redis is not None
        deployment.redis.stop()
        end_connections(database)
        jobs += [submit_surely(client, {"files": {"a": f"meanwhile {number}"}}) for number in range(3)]
        deployment.redis.start()
        start_worker(2)
        done = in_state(database, "succeeded")
        wait_until(lambda: in_state(database, "succeeded") >= min(done + 3, JOBS), 120)
        end_connections(database)
        wait_until(lambda: in_state(database, "queued") + in_state(database, "running") == 0, 120)

        assert len(set(jobs)) == JOBS
        listed = get_surely(client, "/v1/jobs", params={"limit": 200}).json()["items"]
        assert {job["id"]: job["state"] for job in listed} == dict.fromkeys(jobs, "succeeded")
        assert any(job["attempt"] > 1 for job in listed), "the fault struck no job"
        outcomes = Counter(row[0] for row in database.execute("SELECT job FROM outcomes"))
        assert outcomes == dict.fromkeys(jobs, 1)
        # Other tests of this process keep theirs in the same bucket.
        made = Counter({key: n for key, n in bundles(deployment).items() if key.split("/")[0] in jobs})
        assert made == {f"{job['id']}/{job['attempt']}": 1 for job in listed}
        for job in listed:
            bundle = get_surely(client, f"/v1/jobs/{job['id']}/bundle").content
            assert hashlib.sha256(bundle).hexdigest() == job["bundle"]["sha256"]


def test_a_restart_of_postgresql_under_load_loses_nothing(tmp_path: Path) -> None:
    """The server dies, stays away for a while, and recovers from its log; API and workers go on."""
    with PostgresqlServer() as postgresql, contextlib.ExitStack() as stack:
        environment = {
            "ONNX_QAT_DATABASE_URL": postgresql.url,
            "ONNX_QAT_LEASE_SECONDS": "6",
            "ONNX_QAT_WORKERS": "2",
        }
        server = Server(tmp_path / "data", **environment)
        stack.callback(server.stop, signal.SIGKILL)
        client = stack.enter_context(server.client())
        jobs = [submit_surely(client, {"files": {"a": str(number)}}) for number in range(6)]
        jobs.append(submit_surely(client, {"seconds": 4, "files": {"a": "long"}}))
        wait_until(lambda: len(listed(client, "succeeded")) >= 1)
        postgresql.kill()
        answer = client.get(f"/v1/jobs/{jobs[0]}")
        assert (answer.status_code, answer.json()["code"]) == (503, "database_unavailable")
        assert client.get("/health/ready").status_code == 503
        postgresql.start()
        jobs.append(submit_surely(client, {"files": {"a": "afterwards"}}))
        wait_until(lambda: not listed(client, "queued") + listed(client, "running"), 120)
        done = listed(client, "succeeded")
        assert {job["id"] for job in done} == set(jobs)
        for job in done:
            bundle = get_surely(client, f"/v1/jobs/{job['id']}/bundle").content
            assert hashlib.sha256(bundle).hexdigest() == job["bundle"]["sha256"]


def listed(client: httpx.Client, state: str) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = get_surely(client, "/v1/jobs", params={"state": state}).json()["items"]
    return jobs


def submit_surely(client: httpx.Client, script: dict[str, Any]) -> str:
    """Submit a job, again under the same key as long as the service says that it cannot."""
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    deadline = time.monotonic() + 60
    while True:
        answer = client.post("/v1/prepare", files={"model": json.dumps(script)}, headers=headers)
        if answer.status_code == 202:
            identifier: str = answer.json()["id"]
            return identifier
        assert answer.status_code == 503, answer.text
        assert time.monotonic() < deadline
        time.sleep(0.1)


def get_surely(client: httpx.Client, url: str, **options: Any) -> httpx.Response:
    deadline = time.monotonic() + 60
    while (answer := client.get(url, **options)).status_code == 503:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert answer.is_success, answer.text
    return answer


def in_state(database: psycopg.Connection, state: str) -> int:
    row = database.execute("SELECT count(*) FROM jobs WHERE state = %s", [state]).fetchone()
    assert row is not None
    return int(row[0])


def runs_on(database: psycopg.Connection, worker: Workers, jobs: list[str]) -> bool:
    """Whether the worker runs one of the jobs."""
    query = "SELECT worker FROM jobs WHERE state = 'running' AND id = ANY(%s)"
    return any(row[0].split(":")[-2] == str(worker.process.pid) for row in database.execute(query, [jobs]))


def kill_while_it_runs(database: psycopg.Connection, worker: Workers, jobs: list[str]) -> bool:
    """Kill the worker if it runs one of the jobs. It is suspended, so that it does not end the job first."""
    if not runs_on(database, worker, jobs):
        return False
    worker.process.send_signal(signal.SIGSTOP)
    if runs_on(database, worker, jobs):
        worker.stop(signal.SIGKILL)
        return True
    worker.process.send_signal(signal.SIGCONT)
    return False


def end_connections(database: psycopg.Connection) -> None:
    """Of all processes but this one."""
    database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid != pg_backend_pid()"
    )


def bundles(deployment: Deployment) -> Counter[str]:
    """JOB/ATTEMPT of every bundle in the store."""
    client = s3_client(deployment.environment["ONNX_QAT_STORE_ENDPOINT"])
    pages = client.get_paginator("list_objects_v2").paginate(Bucket="onnx-qat")
    keys = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return Counter("/".join(key.split("/")[-3:-1]) for key in keys if key.endswith("/bundle.zip"))
