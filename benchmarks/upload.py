"""Speed and memory of uploads: one large file by plain POST and by tus, then 200 models at the same time.

    python -m benchmarks.upload [--mebibytes 4096] [--directory DIR]

starts `onnx-qat serve` on an empty data directory in DIR. The reference for speed is a
process that receives the same bytes over loopback with `recv_into`, writes them to the same disk and syncs:
no HTTP, no digest. Each is first once, and what they write stays until the round is over: memory that was
freed a moment ago is cheaper than other memory, several times so where a virtual machine gives freed memory
back to its host. Ends with status 1 when a large upload is slower than half of the reference or raises the
service's memory by more than 64 MiB.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Final

from benchmarks.service_processes import HOST, Api

MIB: Final = 1 << 20
_ALLOWED_GROWTH: Final = 64  # MiB
_ALLOWED_SHARE: Final = 0.5
_MODELS: Final = 200
_MODEL_BYTES: Final = 5_000_000
_ROUNDS: Final = 3


class Service(Api):
    """The service, asked over a new connection each time, and what it needs meanwhile."""

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage]:
        """Status and header of the answer."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=600, blocksize=MIB)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})  # type: ignore[arg-type]
            answer = connection.getresponse()
            answer.read()
            return answer.status, answer.headers

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[float]]:
        """A list that holds, after the block, by how many MiB the resident memory grew at its peak."""
        (Path(f"/proc/{self.pid}") / "clear_refs").write_text("5")  # the peak so far is forgotten
        before = self.memory()
        growth: list[float] = []
        yield growth
        growth.append(self.memory("VmHWM") - before)

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Content:
    """A file's bytes with a first block of its own, so that no upload finds its content stored already."""

    def __init__(self, file: Path, tag: str) -> None:
        self.tag: Final = tag
        self._file = file
        self.size = file.stat().st_size

    def blocks(self) -> Iterator[memoryview]:
        block = memoryview(bytearray(MIB))
        with self._file.open("rb", buffering=0) as file:
            tag = self.tag.encode()
            while size := file.readinto(block):
                block[: len(tag)] = tag
                tag = b""
                yield block[:size]

    def sha256(self) -> str:
        digest = hashlib.sha256()
        for block in self.blocks():
            digest.update(block)
        return digest.hexdigest()


def _receive(listener: socket.socket, path: Path) -> None:
    """The reference: what arrives on one connection goes to a file."""
    connection, _ = listener.accept()
    # What is fastest; more at once costs the kernel more (service/uploads/intake.py).
    buffer = memoryview(bytearray(64 << 10))
    with connection, path.open("wb", buffering=0) as file:
        while size := connection.recv_into(buffer):
            file.write(buffer[:size])
        os.fsync(file.fileno())
        connection.sendall(b"!")


def reference_seconds(content: Content, directory: Path) -> float:
    path = directory / f"reference {content.tag}"
    with socket.create_server((HOST, 0)) as listener:
        receiver = multiprocessing.Process(target=_receive, args=[listener, path])
        receiver.start()
        started = time.monotonic()
        with socket.create_connection(listener.getsockname()) as connection:
            for block in content.blocks():
                connection.sendall(block)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1) == b"!"
        seconds = time.monotonic() - started
        receiver.join()
    return seconds


def post_seconds(service: Service, content: Content) -> float:
    headers = {"Content-Length": str(content.size), "Content-Type": "application/octet-stream"}
    started = time.monotonic()
    status, _ = service.request("POST", "/v1/models", content.blocks(), headers)
    seconds = time.monotonic() - started
    assert status == 201, status
    return seconds


def tus_seconds(service: Service, content: Content) -> float:
    tus = {"Tus-Resumable": "1.0.0"}
    begin = {**tus, "Upload-Length": str(content.size), "Upload-Metadata": "kind bW9kZWxz"}  # models
    started = time.monotonic()
    status, answer = service.request("POST", "/v1/uploads/tus", None, begin)
    assert status == 201, status
    headers = {
        **tus,
        "Upload-Offset": "0",
        "Content-Type": "application/offset+octet-stream",
        "Content-Length": str(content.size),
    }
    status, answer = service.request("PATCH", answer["Location"], content.blocks(), headers)
    assert status == 204, status
    seconds = time.monotonic() - started
    assert answer["Link"], "the upload has not become a model"
    return seconds


def require_stored(service: Service, sha256: str) -> None:
    status, _ = service.request("GET", f"/v1/models/{sha256}")
    if status != 200:
        raise SystemExit(f"the model {sha256} is not stored: {status}")


def _read_jobs(port: int, ended: Event, reads: SimpleQueue[list[float]]) -> None:
    """Ask for the jobs again and again, in a process of its own; the seconds that each answer took."""
    seconds: list[float] = []
    while not ended.is_set():
        asked = time.monotonic()
        with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=600)) as connection:
            connection.request("GET", "/v1/jobs")
            assert connection.getresponse().status == 200
        seconds.append(time.monotonic() - asked)
        time.sleep(0.05)
    reads.put(seconds)


@contextlib.contextmanager
def job_reads(service: Service) -> Iterator[list[float]]:
    """A list that holds, after the block, how long reads of the jobs took meanwhile, in order of length."""
    ended: Event = multiprocessing.Event()
    queue: SimpleQueue[list[float]] = multiprocessing.SimpleQueue()
    process = multiprocessing.Process(target=_read_jobs, args=[service.port, ended, queue])
    process.start()
    reads: list[float] = []
    yield reads
    ended.set()
    reads += sorted(queue.get())
    process.join()


def _p95(sorted_seconds: list[float]) -> str:
    return f"{sorted_seconds[int(len(sorted_seconds) * 0.95)] * 1000:.0f} ms"


def many(service: Service, number: int) -> None:
    """All models at the same time, and job reads beside them."""
    base = os.urandom(_MODEL_BYTES - 8)
    models = [(number * _MODELS + index).to_bytes(8) + base for index in range(_MODELS)]
    start = threading.Barrier(_MODELS + 1)

    def upload(model: bytes) -> int:
        start.wait()
        return service.request("POST", "/v1/models", model)[0]

    with (
        service.watched() as growth,
        job_reads(service) as reads,
        ThreadPoolExecutor(_MODELS) as threads,
    ):
        answers = [threads.submit(upload, model) for model in models]
        start.wait()
        started = time.monotonic()
        statuses = {answer.result() for answer in answers}
        seconds = time.monotonic() - started
    assert statuses == {201}, statuses
    for model in models:
        require_stored(service, hashlib.sha256(model).hexdigest())
    rate = _MODELS * _MODEL_BYTES / MIB / seconds
    print(
        f"{_MODELS} models of {_MODEL_BYTES / 1e6:.0f} MB, round {number + 1}: {seconds:.1f} s, "
        f"{rate:.0f} MiB/s, memory +{growth[0]:.0f} MiB, {len(reads)} job reads meanwhile: p95 {_p95(reads)}",
        flush=True,
    )


def _make_file(path: Path, mebibytes: int) -> None:
    block = os.urandom(64 * MIB)
    with path.open("wb") as file:
        for left in range(mebibytes, 0, -64):
            file.write(block[: left * MIB])
            block = block[1:] + block[:1]
        os.fsync(file.fileno())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mebibytes", type=int, default=4096)
    parser.add_argument("--directory", type=Path, default=None, help="on the disk that is to be measured")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="onnx-qat-upload-", dir=arguments.directory))
    # The file, and what a round writes in three ways; what many models take besides.
    needed = (4 * arguments.mebibytes + 4096) * MIB
    service = None
    try:
        if shutil.disk_usage(directory).free < needed:
            print(f"needs {needed / 2**30:.0f} GiB of free disk space", file=sys.stderr)
            return 2
        file = directory / "file"
        _make_file(file, arguments.mebibytes)
        largest = str(arguments.mebibytes * MIB)
        service = Service(data=directory / "data", settings={"ONNX_QAT_MAX_UPLOAD_BYTES": largest})
        assert service.request("POST", "/v1/models", b"warm")[0] == 201
        passed = _large(service, file, directory)
        with job_reads(service) as reads:
            time.sleep(3)
        print(f"{len(reads)} job reads and nothing else: p95 {_p95(reads)}")
        for number in range(_ROUNDS):
            many(service, number)
        return 0 if passed else 1
    finally:
        if service is not None:
            service.stop()
        shutil.rmtree(directory)


def _large(service: Service, file: Path, directory: Path) -> bool:
    """Each way in turn, and first in turn."""
    size = file.stat().st_size / MIB
    seconds: dict[str, list[float]] = {"reference": [], "POST": [], "tus": []}
    passed = True
    for number in range(_ROUNDS):
        ways = [("reference", None), ("POST", post_seconds), ("tus", tus_seconds)]
        for name, seconds_of in ways[number:] + ways[:number]:
            content = Content(file, f"{name} {number}")
            os.sync()
            if seconds_of is None:
                seconds[name].append(reference_seconds(content, directory))
                more = ""
            else:
                used = service.cpu_seconds()
                with service.watched() as growth:
                    seconds[name].append(seconds_of(service, content))
                used = (service.cpu_seconds() - used) * 1024 / size
                more = f", memory +{growth[0]:.0f} MiB, {used:.2f} s of CPU time for each GiB"
                passed = passed and growth[0] < _ALLOWED_GROWTH
                require_stored(service, content.sha256())
            last = seconds[name][-1]
            print(f"{name:10} {last:6.1f} s {size / last:6.0f} MiB/s{more}", flush=True)
        for written in (*directory.glob("reference *"), *(directory / "data" / "blobs").glob("*/*")):
            if written.stat().st_size == file.stat().st_size:
                written.unlink()
    for name in ("POST", "tus"):
        share = sum(seconds["reference"]) / sum(seconds[name])
        print(f"{name} reaches {share:.2f} of the reference's speed")
        passed = passed and share > _ALLOWED_SHARE
    return passed


if __name__ == "__main__":
    sys.exit(main())
