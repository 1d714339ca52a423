"""The disk is full, a real one (a small tmpfs): what is accepted is kept, what is not says why."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
from servers import absent
from service_helpers import HERE, assert_problem, free_port, submit, wait_for, wait_until_ready

MIB = 1 << 20
# In namespaces of its own, where mounting needs no privileges; the shell is replaced by the service.
MOUNT_AND_RUN = 'mount -t tmpfs -o size="$1" none "$2" && exec "$0" "$3" "$2" "$4"'


@contextlib.contextmanager
def service_on_a_small_disk(data: Path, size: str) -> Iterator[tuple[httpx.Client, Path]]:
    """A client of a service whose data directory is on a disk of that size; and where that disk is."""
    data.mkdir()
    namespaces = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run(
            [*namespaces, "mount", "-t", "tmpfs", "none", str(data)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        absent("unshare", error)
    port = free_port()
    process = subprocess.Popen(
        [
            *namespaces,
            "sh",
            "-c",
            MOUNT_AND_RUN,
            sys.executable,
            size,
            data,
            HERE / "fake_server.py",
            str(port),
        ],
        env={**os.environ, "ONNX_QAT_LOG_LEVEL": "error", "ONNX_QAT_RESERVED_BYTES": "1MiB"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, process)
        with httpx.Client(base_url=url, timeout=60) as client:
            # Only the processes in its namespace see the disk, and whoever looks with their eyes.
            yield client, Path(f"/proc/{process.pid}/root{data}")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_full_disk_loses_nothing_and_can_be_emptied(tmp_path: Path) -> None:
    with service_on_a_small_disk(tmp_path / "data", "6m") as (client, disk):
        (disk / "of-somebody-else").write_bytes(bytes(MIB))
        kept = submit(client, {"files": {"a": "kept"}})
        assert wait_for(client, kept)["state"] == "succeeded"

        # An upload that does not fit is refused, and leaves nothing behind.
        answer = client.post("/v1/models", content=bytes(8 * MIB))
        assert_problem(answer, 507, "storage_full")

        # A job whose result does not fit fails by its name.
        large = submit(client, {"do": "fill", "bytes": 8 * MIB, "files": {"a": "large"}})
        done = wait_for(client, large)
        assert (done["state"], done["failure"]["code"]) == ("failed", "storage_full"), done

        # Fill the disk with what is accepted, until nothing is.
        stored = []
        for number in range(100):
            content = number.to_bytes(4) + os.urandom(200_000)
            answer = client.post("/v1/models", content=content)
            if answer.status_code == 507:
                break
            assert answer.status_code == 201, answer.text
            stored.append(content)
        assert_problem(answer, 507, "storage_full")

        # What was accepted is whole, and jobs that are there can be read.
        for content in stored:
            assert client.get(f"/v1/models/{hashlib.sha256(content).hexdigest()}").status_code == 200
        bundle = client.get(f"/v1/jobs/{kept}/bundle").content
        assert hashlib.sha256(bundle).hexdigest() == client.get(f"/v1/jobs/{kept}").json()["bundle"]["sha256"]

        # What was accepted can be removed, for which the database has to be written.
        identifier = hashlib.sha256(stored[0]).hexdigest()
        assert client.delete(f"/v1/models/{identifier}").status_code == 204

        # When there is room again the service goes on without a restart.
        (disk / "of-somebody-else").unlink()
        after = submit(client, {"files": {"a": "after"}})
        assert wait_for(client, after)["state"] == "succeeded"
