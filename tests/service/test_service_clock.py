"""The wall clock jumps while jobs run: nobody takes a worker for lost, and no job is stuck or removed."""

from __future__ import annotations

import datetime
import hashlib
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import absent
from service_helpers import HERE, Server, submit, wait_for

DAY = 86400


class Clock:
    """The wall clock of processes with the given environment."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            absent("cc", FileNotFoundError("there is no C compiler"))
        library, self._offset = directory / "clock_offset.so", directory / "offset"
        self.jump(0)
        subprocess.run(
            [str(compiler), "-shared", "-fPIC", "-O", "-o", library, HERE / "clock_offset.c"], check=True
        )
        self.environment = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(self._offset)}

    def jump(self, seconds: int) -> None:
        """From now on it is so many seconds off."""
        with self._offset.open("r+b" if self._offset.exists() else "wb") as file:
            file.write(struct.pack("=q", seconds))


@pytest.mark.parametrize("days", [1, -1])
def test_jobs_outlive_a_jump_of_the_clock(
    start_server: Callable[..., Server], tmp_path: Path, days: int
) -> None:
    clock = Clock(tmp_path)
    # The lease runs out while the long job runs, were its heart to beat by the wall clock.
    server = start_server(ONNX_QAT_LEASE_SECONDS="5", ONNX_QAT_JOB_TIMEOUT_SECONDS="600", **clock.environment)
    with server.client() as client:
        job = submit(client, {"seconds": 8, "files": {"a": "long"}})
        started = wait_for(client, job, "running")["started_at"]
        clock.jump(days * DAY)
        done = wait_for(client, job)
        assert (done["state"], done["attempt"]) == ("succeeded", 1), done
        # The clock did jump for the service.
        times = [datetime.datetime.fromisoformat(text) for text in (started, done["finished_at"])]
        assert abs((times[1] - times[0]).total_seconds() - days * DAY) < DAY / 2

        next_job = submit(client, {"files": {"a": "next"}})
        assert wait_for(client, next_job)["state"] == "succeeded"
        clock.jump(0)
        for identifier in (job, next_job):
            bundle = client.get(f"/v1/jobs/{identifier}/bundle").content
            expected = client.get(f"/v1/jobs/{identifier}").json()["bundle"]["sha256"]
            assert hashlib.sha256(bundle).hexdigest() == expected
        assert client.get("/health/ready").status_code == 200
