"""The service in processes of its own, and models to give it: for benchmarks that load it or kill it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

HOST: Final = "127.0.0.1"
_READY_SECONDS: Final = 120
_ONNX_QAT: Final = "import sys; from service.cli import app; sys.exit(app())"


class Process:
    """`onnx-qat COMMAND --data-dir DATA`; settings from the environment and from `settings`."""

    def __init__(
        self, *command: str, data: Path, settings: Mapping[str, str], prefix: tuple[str, ...] = ()
    ) -> None:
        self._command = [*prefix, sys.executable, "-c", _ONNX_QAT, *command, "--data-dir", str(data)]
        self._environment = {**os.environ, "ONNX_QAT_LOG_LEVEL": "error", **settings}
        self.start()

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, env=self._environment)

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.is_running():
            self._process.send_signal(how)
        self._process.wait(120)

    def memory(self, what: str = "VmRSS") -> float:
        """Resident memory, in MiB; with VmHWM at its peak."""
        found = re.search(rf"{what}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        assert found is not None
        return int(found[1]) / 1024


class Api(Process):
    """`onnx-qat serve` on a port of its own."""

    def __init__(self, *, data: Path, settings: Mapping[str, str], prefix: tuple[str, ...] = ()) -> None:
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port: int = probe.getsockname()[1]
        super().__init__("serve", "--port", str(self.port), data=data, settings=settings, prefix=prefix)

    def start(self) -> None:
        """Start it and wait until it answers."""
        super().start()
        deadline = time.monotonic() + _READY_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if self.connection().request("GET", "/health/ready").status == 200:
                    return
            if not self.is_running() or time.monotonic() > deadline:
                raise SystemExit("the service did not start")
            time.sleep(0.05)

    def connection(self) -> Connection:
        return Connection(self.port)


class Answer:
    """Status and body of an HTTP answer."""

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)


class Connection:
    """One connection that is kept open. Not safe to use from several threads."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=600, blocksize=1 << 20)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        """Raises: OSError: there is no connection, or it broke."""
        try:
            self._connection.request(method, path, body, headers)
            answer = self._connection.getresponse()
            return Answer(answer.status, answer.read())
        except http.client.HTTPException as error:
            self._connection.close()
            raise OSError(str(error)) from error
        except OSError:
            self._connection.close()
            raise

    def post_json(self, path: str, value: Any, **headers: str) -> Answer:
        return self.request(
            "POST", path, json.dumps(value).encode(), **{"Content-Type": "application/json", **headers}
        )


class Models:
    """Models of about that many bytes, which differ in a comment only. They are made one by one."""

    def __init__(self, approximate_bytes: int) -> None:
        width = max(4, int((approximate_bytes / 8) ** 0.5))
        weights = np.random.default_rng(0).normal(0, 0.1, (2, width, width)).astype(np.float32)
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [
                onnx.helper.make_node("MatMul", ["x", "w0"], ["h"]),
                onnx.helper.make_node("Relu", ["h"], ["r"]),
                onnx.helper.make_node("MatMul", ["r", "w1"], ["y"]),
            ],
            "perceptron",
            [value("x", onnx.TensorProto.FLOAT, ["n", width])],
            [value("y", onnx.TensorProto.FLOAT, ["n", width])],
            [onnx.numpy_helper.from_array(weight, f"w{number}") for number, weight in enumerate(weights)],
        )
        opset = onnx.helper.make_opsetid("", 17)
        self._common: bytes = onnx.helper.make_model(
            graph, opset_imports=[opset], ir_version=8
        ).SerializeToString()

    def __getitem__(self, number: int) -> bytes:
        # Protocol buffers that are strung together are one message with the fields of both.
        comment: bytes = onnx.ModelProto(doc_string=f"number {number}").SerializeToString()
        return self._common + comment
