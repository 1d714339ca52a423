"""The service under load: uploads at the same time, then a full queue while clients read the jobs' states.

    python -m benchmarks.load [--uploads 200] [--jobs 500] [--readers 20] [--workers 2] [--apart]

starts `onnx-qat serve` with an empty data directory. --apart runs the workers in `onnx-qat worker`; name the
servers in the environment (ONNX_QAT_DATABASE_URL and so on). Ends with status 1 when anything is lost or done
twice, when 95 % of the reads take longer than 200 ms, or when the API's process grows while it works off the
queue.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from benchmarks.service_processes import Api, Connection, Models, Process

MIB: Final = 1 << 20
ALLOWED_P95: Final = 0.2  # seconds
ALLOWED_GROWTH: Final = 32.0  # MiB, from the second quarter of the time to the last one
_UPLOAD_BYTES: Final = 5_000_000
_JOB_MODEL_BYTES: Final = 20_000
_MOST_PER_PAGE: Final = 200
_PATIENCE_SECONDS: Final = 3600
_SAMPLE_SECONDS: Final = 0.5


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured; times in seconds, memory in MiB."""

    uploads_per_second: float
    jobs_per_second: float
    lost: int
    twice: int
    reads: Sequence[float]
    """How long each read of a job took, while the workers were busy, the fastest first."""
    peak_memory: float
    memory_growth: float

    @property
    def passed(self) -> bool:
        return (
            not self.lost
            and not self.twice
            and self.percentile(95) < ALLOWED_P95
            and self.memory_growth < ALLOWED_GROWTH
        )

    def percentile(self, percent: int) -> float:
        return self.reads[min(len(self.reads) - 1, len(self.reads) * percent // 100)]


def upload_at_once(api: Api, models: Sequence[bytes], expected: set[int]) -> float:
    """Upload all at the same time, each on a connection of its own; the seconds that it took."""
    start = threading.Barrier(len(models) + 1)

    def upload(model: bytes) -> tuple[int, str]:
        connection = api.connection()
        start.wait()
        answer = connection.request("POST", "/v1/models", model)
        return answer.status, answer.json().get("id", "")

    with ThreadPoolExecutor(len(models)) as threads:
        answers = [threads.submit(upload, model) for model in models]
        start.wait()
        started = time.monotonic()
        results = [answer.result() for answer in answers]
        seconds = time.monotonic() - started
    assert {status for status, _ in results} <= expected, results
    connection = api.connection()
    for model, (_, identifier) in zip(models, results, strict=True):
        assert identifier == hashlib.sha256(model).hexdigest()
        assert connection.request("GET", f"/v1/models/{identifier}").status == 200
    return seconds


def submit(connection: Connection, model: bytes) -> str:
    """Upload a model and queue its preparation; the job's id."""
    upload = connection.request("POST", "/v1/models", model).json()
    answer = connection.post_json("/v1/jobs", {"kind": "prepare", "model": upload["id"]})
    assert answer.status == 202, answer.body
    identifier: str = answer.json()["id"]
    return identifier


def all_jobs(connection: Connection) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = connection.request("GET", f"/v1/jobs?limit={_MOST_PER_PAGE}{cursor}").json()
        jobs += page["items"]
        if page["next"] is None:
            return jobs
        cursor = f"&cursor={page['next']}"


@contextlib.contextmanager
def job_reads(api: Api, jobs: Sequence[str], readers: int, pause: float) -> Iterator[list[float]]:
    """Clients that read states of jobs by chance; a list of the seconds that each answer took."""
    ended = threading.Event()
    reads: list[float] = []

    def read(seed: int) -> None:
        choice = random.Random(seed)
        connection = api.connection()
        while not ended.wait(choice.uniform(0, 2 * pause)):
            path = f"/v1/jobs/{choice.choice(jobs)}"
            asked = time.monotonic()
            answer = connection.request("GET", path)
            reads.append(time.monotonic() - asked)
            assert answer.status == 200, answer.body

    with ThreadPoolExecutor(readers) as threads:
        running = [threads.submit(read, seed) for seed in range(readers)]
        try:
            yield reads
        finally:
            ended.set()
        for reader in running:
            reader.result()


def work_off(api: Api) -> tuple[float, list[float]]:
    """Wait for all jobs; the seconds, and the API's memory at regular times meanwhile."""
    connection = api.connection()
    memory: list[float] = []
    started = time.monotonic()
    while True:
        memory.append(api.memory())
        if not any(
            connection.request("GET", f"/v1/jobs?limit=1&state={state}").json()["items"]
            for state in ("queued", "running")
        ):
            return time.monotonic() - started, memory
        assert time.monotonic() - started < _PATIENCE_SECONDS, "jobs are left"
        time.sleep(_SAMPLE_SECONDS)


def count_faults(api: Api, submitted: Sequence[str]) -> tuple[int, int]:
    """How many jobs were lost, and how many done twice."""
    connection = api.connection()
    found = {job["id"]: job for job in all_jobs(connection)}
    lost = 0
    for identifier in submitted:
        job = found.get(identifier)
        if job is None or job["state"] != "succeeded":
            lost += 1
            continue
        bundle = connection.request("GET", f"/v1/jobs/{identifier}/bundle")
        lost += hashlib.sha256(bundle.body).hexdigest() != job["bundle"]["sha256"]
    twice = sum(job["attempt"] != 1 for job in found.values()) + len(found) - len(set(submitted))
    return lost, twice


def results_on_disk(data: Path) -> int:
    return sum(1 for _ in data.glob("results/*/*/bundle.zip"))


def measure(arguments: argparse.Namespace, directory: Path) -> Outcome:
    data = directory / "data"
    settings = {"ONNX_QAT_WORKERS": "0" if arguments.apart else str(arguments.workers)}
    with contextlib.ExitStack() as stack:
        api = Api(data=data, settings=settings)
        stack.callback(api.stop)
        if arguments.apart:
            worker = Process(
                "worker", data=directory / "worker", settings={"ONNX_QAT_WORKERS": str(arguments.workers)}
            )
            stack.callback(worker.stop)
        print(f"memory of the API at its start: {api.memory():.0f} MiB")
        uploads_per_second = _measure_uploads(api, arguments.uploads)

        models = Models(_JOB_MODEL_BYTES)
        connection = api.connection()
        started = time.monotonic()
        jobs = [submit(connection, models[number]) for number in range(arguments.jobs)]
        print(f"{len(jobs)} jobs submitted in {time.monotonic() - started:.1f} s", flush=True)
        with job_reads(api, jobs, arguments.readers, arguments.pause) as reads:
            seconds, memory = work_off(api)
        lost, twice = count_faults(api, jobs)
        if not arguments.apart:
            twice += results_on_disk(data) - len(jobs)
        return Outcome(
            uploads_per_second=uploads_per_second,
            jobs_per_second=len(jobs) / seconds,
            lost=lost,
            twice=twice,
            reads=sorted(reads),
            peak_memory=max(memory),
            memory_growth=growth(memory),
        )


def growth(memory: Sequence[float]) -> float:
    """From what the second quarter of at least four samples has on average, to what the last one has."""
    count = len(memory)
    return statistics.mean(memory[3 * count // 4 :]) - statistics.mean(memory[count // 4 : count // 2])


def _measure_uploads(api: Api, number: int) -> float:
    models = Models(_UPLOAD_BYTES)
    distinct = list(itertools.islice((models[index] for index in itertools.count()), number))
    seconds = upload_at_once(api, distinct, {201})
    size = len(distinct[0])
    rate = number / seconds
    print(
        f"{number} uploads of {size / 1e6:.1f} MB at once: {seconds:.1f} s, {rate:.0f} a second, "
        f"{number * size / MIB / seconds:.0f} MiB/s; memory {api.memory():.0f} MiB",
        flush=True,
    )
    same = upload_at_once(api, [models[number]] * number, {200, 201})
    print(
        f"{number} uploads of the same model at once: {same:.1f} s; memory {api.memory():.0f} MiB", flush=True
    )
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--uploads", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--readers", type=int, default=20)
    parser.add_argument("--pause", type=float, default=0.1, help="mean seconds between two reads of a client")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--apart", action="store_true", help="workers in a process of their own")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="onnx-qat-load-") as directory:
        outcome = measure(arguments, Path(directory))
    print(
        f"{arguments.jobs} jobs on {arguments.workers} workers: {outcome.jobs_per_second:.2f} a second; "
        f"lost {outcome.lost}, done twice {outcome.twice}\n"
        f"{len(outcome.reads)} reads by {arguments.readers} clients meanwhile: "
        + ", ".join(f"p{percent} {outcome.percentile(percent) * 1000:.0f} ms" for percent in (50, 95, 99))
        + f"\nmemory of the API meanwhile: at most {outcome.peak_memory:.0f} MiB, "
        f"growth {outcome.memory_growth:+.1f} MiB\n" + ("passed" if outcome.passed else "FAILED")
    )
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
