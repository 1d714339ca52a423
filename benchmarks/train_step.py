"""Step time, memory and traffic of quantization-aware training, as ratios to float training.

python -m benchmarks.train_step [--steps N] [--threads N] [--torch-python PATH] [--json FILE] [NETWORK ...]

The variants are those of `benchmarks.training_graphs`: float as generate_artifacts differentiates it, float
by our own gradients (the base of all ratios), our bundles, and with --torch-python the same graphs in
PyTorch, run by that Python interpreter. Every variant of a network gets the same batch.

* Each variant has a process of its own, so that its peak memory is its own. All of a network's processes wait
  for orders, and one at a time runs a few steps, in turns: a neighbour's load falls on all alike, and nothing
  of one variant (thread pools, arenas) is in the way of another.
* ms a step: forward, backward, optimizer and reset of the gradients; median of the steps after the warm-up.
  On a machine that others use too, the ratio of the minima (`x by min`) says more.
* peak MiB: largest resident set of the process, Python and libraries included; `net` is without what was
  there after the imports.
* MiB moved: inputs and outputs of all nodes, from onnxruntime's profiler, which runs afterwards in another
  process; views (Reshape and the like) count nothing. Operators are those with the most time there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from benchmarks.training_graphs import NETWORKS, TORCH_VARIANTS, VARIANTS, Job, write_variant
from rewriter.errors import QatError

BASE: Final = "float"
_WARM_UP: Final = 3
_BLOCK: Final = 3  # measured steps of one process in a turn
_TOP: Final = 6
_LONGEST_ERROR: Final = 160
_PACKAGES: Final = ("onnx-qat", "onnx", "onnxruntime-training-cpu", "onnxruntime-training", "numpy")
_REPOSITORY: Final = Path(__file__).resolve().parents[1]


@dataclass
class Row:
    """One variant of one network; `error` says why there are no numbers."""

    network: str
    variant: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    imports_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    operators: dict[str, dict[str, float]] = field(default_factory=dict)
    error: str | None = None

    @property
    def ms(self) -> float:
        return 1000 * statistics.median(self.seconds)

    @property
    def net_bytes(self) -> int:
        return self.peak_bytes - self.imports_bytes

    @property
    def moved_bytes(self) -> float:
        return sum(operator.get("bytes", 0.0) for operator in self.operators.values())

    def slowest(self) -> list[tuple[str, float]]:
        """Operators and their milliseconds, the slowest first."""
        times = [(name, 1000 * operator["seconds"]) for name, operator in self.operators.items()]
        return sorted(times, key=lambda entry: -entry[1])


class ChildError(Exception):
    """A measured process ended; its last words."""


class _Child:
    """A process that runs steps on demand (`benchmarks.step_process`)."""

    def __init__(self, command: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  closed in close()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, cwd=_REPOSITORY
        )

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise ChildError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        return answer

    def run(self, steps: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{steps}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ChildError(self._last_words()) from None
        return self.answer()

    def close(self) -> None:
        self._process.communicate()
        self._errors.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        reason = next(filter(str.strip, reversed(lines)), "no message")
        return f"exit status {self._process.poll()}: {reason[:_LONGEST_ERROR]}"


def _command(variant: str, folder: Path, threads: int, torch_python: str | None) -> list[str]:
    torch = variant in TORCH_VARIANTS
    interpreter = (torch_python or "") if torch else sys.executable
    module = "benchmarks.torch_step" if torch else "benchmarks.onnxruntime_step"
    settings = ["--threads", str(threads), "--warm-up", str(_WARM_UP)]
    return [interpreter, "-m", module, str(folder), *settings]


def measure(
    network: str, variants: Sequence[str], steps: int, threads: int, torch_python: str | None, folder: Path
) -> list[Row]:
    """The rows of one network, in the order of `variants`."""
    job = Job.write(NETWORKS[network], NETWORKS[network].batch, folder)
    rows, commands = {}, {}
    for number, variant in enumerate(variants):
        rows[variant] = Row(network, variant)
        try:
            write_variant(variant, job, folder / str(number))
            commands[variant] = _command(variant, folder / str(number), threads, torch_python)
        except QatError as error:
            rows[variant].error = str(error)[:_LONGEST_ERROR]
    _time(rows, commands, steps)
    for variant, command in commands.items():
        if rows[variant].error is None:
            _profile(rows[variant], [*command, "--profile", str(steps)])
    return list(rows.values())


def _time(rows: dict[str, Row], commands: dict[str, list[str]], steps: int) -> None:
    children = {}
    try:
        for variant, command in commands.items():  # one warm-up at a time
            children[variant] = _Child(command)
            _record(rows[variant], children[variant], None)
        for turn in range(0, steps, _BLOCK):
            print(f"{rows[BASE].network}: {turn}/{steps} steps", file=sys.stderr)
            for variant, child in children.items():
                if rows[variant].error is None:
                    _record(rows[variant], child, min(_BLOCK, steps - turn))
    finally:
        for child in children.values():
            child.close()


def _record(row: Row, child: _Child, steps: int | None) -> None:
    try:
        answer = child.answer() if steps is None else child.run(steps)
    except ChildError as error:
        row.error = str(error)
        return
    row.seconds += answer.get("seconds", [])
    row.losses += answer.get("losses", [])
    row.imports_bytes = answer.get("imports_bytes", row.imports_bytes)
    row.peak_bytes = answer.get("peak_bytes", row.peak_bytes)


def _profile(row: Row, command: list[str]) -> None:
    child = subprocess.run(command, capture_output=True, text=True, check=False, cwd=_REPOSITORY)
    if child.returncode:
        row.error = f"profile: {child.stderr.strip().splitlines()[-1][:_LONGEST_ERROR]}"
    else:
        row.operators = json.loads(child.stdout.splitlines()[-1])


# --- Reporting. ---

_HEADER: Final = (
    "network",
    "variant",
    "ms a step",
    "(min..max)",
    "x float",
    "x by min",
    "peak MiB",
    "x float",
    "net MiB",
    "x float",
    "MiB moved",
    "x float",
)


def report(rows: Sequence[Row]) -> str:
    """The table with ratios to `BASE` of the same network, then the slowest operators of each row."""
    base = {row.network: row for row in rows if row.variant == BASE and row.error is None}
    lines = [_line(row, base[row.network]) for row in rows if row.error is None and row.network in base]
    table = [_HEADER, *lines]
    widths = [max(len(line[column]) for line in table) for column in range(len(_HEADER))]
    text = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    ]
    text += [f"{row.network}  {row.variant}  not measured: {row.error}" for row in rows if row.error]
    text.append("")
    for row in rows:
        if row.error is None:
            slowest = ", ".join(f"{name} {ms:.1f}" for name, ms in row.slowest()[:_TOP])
            text.append(f"{row.network}, {row.variant}: {slowest} ms")
    for network, float_row in base.items():
        learned = next((row for row in rows if (row.network, row.variant) == (network, "learned W8A8")), None)
        if learned is not None and learned.error is None:
            text += ["", *_differences(float_row, learned)]
    return "\n".join(text)


def _line(row: Row, base: Row) -> tuple[str, ...]:
    seconds = [1000 * value for value in row.seconds]
    moved, base_moved = row.moved_bytes, base.moved_bytes
    return (
        row.network,
        row.variant,
        f"{row.ms:.1f}",
        f"({min(seconds):.1f}..{max(seconds):.1f})",
        f"{row.ms / base.ms:.2f}",
        f"{min(row.seconds) / min(base.seconds):.2f}",
        f"{row.peak_bytes / 2**20:.0f}",
        f"{row.peak_bytes / base.peak_bytes:.2f}",
        f"{row.net_bytes / 2**20:.0f}",
        f"{row.net_bytes / base.net_bytes:.2f}",
        f"{moved / 2**20:.0f}" if moved else "",
        f"{moved / base_moved:.2f}" if moved and base_moved else "",
    )


def _differences(base: Row, learned: Row) -> list[str]:
    """Where the extra time of `learned` goes, by operator."""
    times, base_times = dict(learned.slowest()), dict(base.slowest())
    changes = {name: times.get(name, 0) - base_times.get(name, 0) for name in times | base_times}
    largest = sorted(changes, key=lambda name: -abs(changes[name]))[: 2 * _TOP]
    entries = (f"{name} {changes[name]:+.1f}" for name in largest)
    total = f"{sum(times.values()):.1f} ms in nodes, float {sum(base_times.values()):.1f}"
    return [f"{base.network}, {learned.variant} against float: {total}:", "  " + ", ".join(entries)]


def _environment() -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # one of the two training packages
            continue
    return {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0)), "packages": versions}


def main() -> int:
    variants = [*VARIANTS, *TORCH_VARIANTS]
    parser = argparse.ArgumentParser(description="Measure training steps against float training.")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    parser.add_argument("--steps", type=int, default=30, metavar="N", help="measured steps a variant")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of every process")
    parser.add_argument(
        "--torch-python", metavar="PATH", help="Python interpreter that has torch; without it no torch rows"
    )
    parser.add_argument("--variant", action="append", choices=variants, help=f"only these and {BASE!r}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    arguments = parser.parse_args()
    networks = arguments.networks or list(NETWORKS)
    if unknown := [name for name in networks if name not in NETWORKS]:
        parser.error(f"unknown network {unknown[0]!r}; there are {', '.join(NETWORKS)}")
    if arguments.steps < 1 or arguments.threads < 1:
        parser.error("--steps and --threads must be at least 1")
    chosen = [
        name
        for name in variants
        if (name in VARIANTS or arguments.torch_python)
        and (not arguments.variant or name == BASE or name in arguments.variant)
    ]
    rows = []
    for network in networks:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(
                network,
                chosen,
                arguments.steps,
                arguments.threads,
                arguments.torch_python,
                Path(folder),
            )
    print(report(rows))
    if arguments.json:
        document = {"environment": _environment(), "threads": arguments.threads}
        arguments.json.write_text(json.dumps(document | {"rows": [asdict(row) for row in rows]}) + "\n")
    return 1 if any(row.error for row in rows if row.variant == BASE) else 0


if __name__ == "__main__":
    raise SystemExit(main())
