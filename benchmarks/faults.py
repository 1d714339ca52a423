"""Processes of the service are killed at random moments; afterwards no job is lost, stuck or done twice.

    python -m benchmarks.faults --minutes 5 --seed 1 [--apart]

starts `onnx-qat serve` on an empty data directory and gives it jobs without end, while it kills the process
(SIGKILL) again and again and starts it anew. --apart has two `onnx-qat worker` besides, and kills them and
the API independently of each other; name the servers in the environment (ONNX_QAT_DATABASE_URL and so on; the
database must be empty). Then all is left in peace, and checked. Ends with status 1 when a check fails.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.load import all_jobs
from benchmarks.service_processes import Api, Models, Process

_LEASE_SECONDS: Final = 4
_MOST_WAITING: Final = 20
_PATIENCE_SECONDS: Final = 900
_WORKERS: Final = 2


class Clients:
    """What is asked of the service, and what it promised."""

    def __init__(self, api: Api, seed: int) -> None:
        self._api = api
        self._models = Models(20_000)
        self._salt = seed * 1_000_000
        self.accepted: dict[str, str] = {}
        """Ids of jobs by their Idempotency-Key: those that the service has answered with 202."""
        self.unanswered: dict[str, int] = {}
        """Numbers of the models by the keys of jobs that were asked for without an answer."""

    def submit(self, number: int, key: str | None = None) -> None:
        """Upload a model and ask for a job; the service may be gone at any moment."""
        key = key or uuid.uuid4().hex
        self.unanswered[key] = number
        connection = self._api.connection()
        with contextlib.suppress(OSError):
            upload = connection.request("POST", "/v1/models", self._models[self._salt + number])
            if upload.status not in (200, 201):
                return
            order = {"kind": "prepare", "model": upload.json()["id"]}
            answer = connection.post_json("/v1/jobs", order, **{"Idempotency-Key": key})
            if answer.status == 202:
                self.accepted[key] = answer.json()["id"]
                del self.unanswered[key]

    def repeat_unanswered(self) -> None:
        for key, number in list(self.unanswered.items()):
            self.submit(number, key)
        assert not self.unanswered, "the service does not answer though it is left in peace"

    def waiting(self) -> int:
        """How many jobs wait or run; 0 when the service does not answer."""
        with contextlib.suppress(OSError, KeyError):
            connection = self._api.connection()
            pages = [
                connection.request("GET", f"/v1/jobs?limit=200&state={state}")
                for state in ("queued", "running")
            ]
            return sum(len(page.json()["items"]) for page in pages)
        return 0


def disturb(processes: Sequence[Process], clients: Clients, chance: random.Random, seconds: float) -> int:
    """Submit and kill until the time is over; how many kills there were."""
    deadline = time.monotonic() + seconds
    kills = number = 0
    next_kill = time.monotonic() + chance.uniform(1, 8)
    while time.monotonic() < deadline:
        if clients.waiting() < _MOST_WAITING:
            number += 1
            clients.submit(number)
        time.sleep(chance.uniform(0, 0.2))
        if time.monotonic() < next_kill:
            continue
        victims = [process for process in processes if chance.random() < 0.6] or list(processes)
        for victim in victims:
            victim.stop(signal.SIGKILL)
        kills += len(victims)
        time.sleep(chance.choice([0, 0, 0.5]))
        for victim in victims:
            victim.start()
        next_kill = time.monotonic() + chance.uniform(0, 8)
    return kills


def settle(clients: Clients, api: Api) -> list[dict[str, Any]]:
    """Wait until all jobs have ended; all of them."""
    clients.repeat_unanswered()
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while clients.waiting():
        assert time.monotonic() < deadline, "jobs do not end"
        time.sleep(0.5)
    return all_jobs(api.connection())


def problems(
    jobs: Sequence[dict[str, Any]], clients: Clients, api: Api, data: Sequence[Path]
) -> Iterator[str]:
    """What is not as it must be."""
    found = {job["id"]: job for job in jobs}
    for identifier in clients.accepted.values():
        if identifier not in found:
            yield f"the job {identifier} was accepted and is lost"
    if len(set(clients.accepted.values())) != len(jobs):
        yield f"{len(set(clients.accepted.values()))} jobs were accepted and there are {len(jobs)}"
    connection = api.connection()
    for job in jobs:
        if job["state"] != "succeeded":
            yield f"the job {job['id']} is {job['state']}: {json.dumps(job['failure'])}"
            continue
        bundle = connection.request("GET", f"/v1/jobs/{job['id']}/bundle")
        if hashlib.sha256(bundle.body).hexdigest() != job["bundle"]["sha256"]:
            yield f"the bundle of {job['id']} is not whole"
    for directory in data:
        for name in ("staging", "inputs", "scratch"):
            for left in (directory / name).glob("*"):
                yield f"{left} is left over"
        results = {
            path.parent.parent.name: path.parent.name for path in directory.glob("results/*/*/bundle.zip")
        }
        expected = {job["id"]: str(job["attempt"]) for job in jobs}
        if results and results != expected:
            yield f"results of other attempts are kept: {set(results.items()) ^ set(expected.items())}"
    yield from (f"the process {pid} of a job is left over" for pid in _processes_of_jobs(data))


def _processes_of_jobs(data: Sequence[Path]) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            if b"service.worker" in command and any(os.fsencode(directory) in command for directory in data):
                yield path.parent.name


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=5, help="how long processes are killed")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--apart", action="store_true", help="workers in processes of their own")
    arguments = parser.parse_args()
    seed = random.randrange(1000) if arguments.seed is None else arguments.seed
    with tempfile.TemporaryDirectory(prefix="onnx-qat-faults-") as directory:
        found = run(Path(directory), seed, arguments.minutes * 60, apart=arguments.apart)
    for problem in found:
        print(problem, file=sys.stderr)
    print("FAILED" if found else "passed")
    return 1 if found else 0


def run(directory: Path, seed: int, seconds: float, *, apart: bool) -> list[str]:
    """Disturb the service for so long; the problems that were found."""
    settings = {
        "ONNX_QAT_LEASE_SECONDS": str(_LEASE_SECONDS),
        # However often a job is struck.
        "ONNX_QAT_MAX_ATTEMPTS": "1000",
        "ONNX_QAT_WORKERS": str(0 if apart else _WORKERS),
    }
    data = [directory / "api"]
    with contextlib.ExitStack() as stack:
        api = Api(data=data[0], settings=settings)
        stack.callback(api.stop)
        processes: list[Process] = [api]
        for number in range(2 if apart else 0):
            data.append(directory / f"worker-{number}")
            worker = Process("worker", data=data[-1], settings={**settings, "ONNX_QAT_WORKERS": "1"})
            stack.callback(worker.stop)
            processes.append(worker)
        clients = Clients(api, seed)
        kills = disturb(processes, clients, random.Random(seed), seconds)
        jobs = settle(clients, api)
        attempts = Counter(job["attempt"] for job in jobs)
        print(f"seed {seed}: {kills} kills, {len(jobs)} jobs, by attempts {dict(sorted(attempts.items()))}")
        return list(problems(jobs, clients, api, data))


if __name__ == "__main__":
    sys.exit(main())
