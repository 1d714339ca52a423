"""Stands in for `service.worker`: the uploaded "model" is JSON that says what happens to the job's process.

{"do": "succeed", "files": {"a.bin": "text"}}     and so on, see `_ACTS`
"""

from __future__ import annotations

if __name__ == "__main__":
    # Like the real one: before anything starts a thread. Not so in the tests of what else holds.
    import sys
    from pathlib import Path

    from service.worker import confinement

    if "--unconfined" not in sys.argv:
        confinement.enter(Path(sys.argv[-1]))

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter import ErrorCode, Progress, QatError, write_zip
from service.worker import child
from service.worker.order import FinalizeWork, PrepareWork

Script = dict[str, Any]


def prepare(work: PrepareWork, result: Path, progress: Progress) -> None:
    script = {
        **json.loads(work.model.read_text()),
        "inputs": {"model": work.model, "calibration": work.calibration},
    }
    # The stage tells the test which process to look for.
    progress(f"pid {os.getpid()}", 0.5)
    time.sleep(script.get("seconds", 0))
    files = result / "files"
    files.mkdir()
    _ACTS[script.get("do", "succeed")](script, files)
    for name, text in script.get("files", {"manifest.json": "{}"}).items():
        (files / name).write_text(text)
    (files / "seen.json").write_text(
        json.dumps(
            {
                "recipe": work.recipe.model_dump(mode="json"),
                "calibration": work.calibration and work.calibration.read_text(),
                "beside_model": sorted(path.name for path in work.model.parent.iterdir()),
                "environment": sorted(os.environ),
                "directory": os.getcwd(),
            }
        )
    )
    write_zip(files, result / "bundle.zip")


def finalize(work: FinalizeWork, result: Path, progress: Progress) -> None:
    progress("fold", 0.5)
    files = result / "files"
    files.mkdir()
    (files / "model.int8.onnx").write_text(
        json.dumps(
            [
                sorted(path.name for path in work.bundle.iterdir()),
                work.checkpoint and work.checkpoint.read_text(),
                work.verify and work.verify.read_text(),
            ]
        )
    )


def _fail(script: Script, files: Path) -> None:
    raise QatError(ErrorCode.MODEL_DOMAIN_UNKNOWN, "Unknown domain.", node="n1")


def _fail_for_want_of_room(script: Script, files: Path) -> None:
    try:
        raise OSError(script["errno"], "no room")
    except OSError as error:
        raise QatError(ErrorCode.OUTPUT_UNWRITABLE, "The bundle cannot be written.") from error


def _fail_for_want_of_memory(script: Script, files: Path) -> None:
    try:
        raise RuntimeError("std::bad_alloc")
    except RuntimeError as error:
        raise QatError(ErrorCode.RUN_FAILED, "onnxruntime could not run the model.") from error


def _raise(script: Script, files: Path) -> None:
    raise RuntimeError("secret detail")


def _allocate(script: Script, files: Path) -> None:
    bytearray(script["bytes"])


def _burn(script: Script, files: Path) -> None:
    while True:
        pass


def _write_large(script: Script, files: Path) -> None:
    with (files / "large").open("wb") as file:
        file.truncate(script["bytes"])


def _fill(script: Script, files: Path) -> None:
    (files / "filling").write_bytes(bytes(script["bytes"]))


def _write_outside(script: Script, files: Path) -> None:
    Path(script["path"]).write_text("outside")


def _link(script: Script, files: Path) -> None:
    (files / "link").symlink_to(script["path"])


def _spawn(script: Script, files: Path) -> None:
    """Leave a process behind in the group and say which."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (files / "pid").write_text(str(process.pid))


def _try(script: Script, files: Path) -> None:
    """Run pieces of Python code, as a model that took over the process could, and say how each ended."""
    outcomes = {}
    for name, code in script["codes"].items():
        try:
            exec(code, {"files": files, **script["inputs"]})
            outcomes[name] = "done"
        except OSError as error:
            outcomes[name] = errno.errorcode[error.errno or 0]
    (files / "outcomes.json").write_text(json.dumps(outcomes))


def _babble(script: Script, files: Path) -> None:
    """Write nonsense to every open descriptor, the one for reports included."""
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b'{"type": "outcome", "failure": 1}\nnonsense\n' + b"x" * 100_000 + b"\n")
        except OSError:
            continue


def _flood(script: Script, files: Path) -> None:
    """Write to the supervisor without end."""
    while True:
        _babble(script, files)


def _hang_up(script: Script, files: Path) -> None:
    """Close the connection to the supervisor, go on for a while, then fail to report."""
    os.closerange(3, 64)
    time.sleep(1)


_ACTS: dict[str, Callable[[Script, Path], None]] = {
    "succeed": lambda script, files: None,
    "fail": _fail,
    "raise": _raise,
    "no_room": _fail_for_want_of_room,
    "no_memory": _fail_for_want_of_memory,
    "segfault": lambda script, files: ctypes.string_at(0),
    "exit": lambda script, files: os._exit(3),
    "bad_alloc": lambda script, files: (
        print("std::bad_alloc", flush=True),
        os.kill(os.getpid(), signal.SIGABRT),
    ),
    "allocate": _allocate,
    "burn": _burn,
    "write_large": _write_large,
    "fill": _fill,
    "write_outside": _write_outside,
    "link": _link,
    "spawn": _spawn,
    "try": _try,
    "babble": _babble,
    "flood": _flood,
    "hang_up": _hang_up,
}

if __name__ == "__main__":
    child.WORK["prepare"] = prepare
    child.WORK["finalize"] = finalize
    sys.exit(child.main(Path(sys.argv[-1])))
