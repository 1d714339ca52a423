"""One process of `benchmarks.train_step`: trains the artifacts in a folder with stock onnxruntime-training.

A step is the module, the optimizer and the reset of the gradients, on the arrays of `feeds.npz`.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from benchmarks.step_process import Step, serve
from rewriter import training_api

# Operators whose output is their input's memory: they take no time and move nothing.
_VIEWS: Final = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


def make_step(folder: Path, threads: int, profile: Path | None = None) -> Step:
    """A step on the artifacts of `folder`; when deleted, it writes what each node took to `profile`."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.enable_profiling = profile is not None
    options.profile_file_prefix = str(profile / "module") if profile else ""
    api = training_api()
    state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
    module = api.Module(folder / "training_model.onnx", state, None, "cpu", options)
    options.profile_file_prefix = str(profile / "optimizer") if profile else ""
    optimizer = api.Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(1e-4)
    with np.load(folder / "feeds.npz") as arrays:
        feeds = list(arrays.values())

    def step() -> float:
        loss = float(np.ravel(module(*feeds))[0])
        optimizer.step()
        module.lazy_reset_grad()
        return loss

    return step


def profiled(folder: Path, threads: int, warm_up: int, steps: int) -> dict[str, dict[str, float]]:
    """Per operator: seconds (medians of its nodes), bytes in and out, and nodes, in one step."""
    with tempfile.TemporaryDirectory() as name:
        step = make_step(folder, threads, Path(name))
        for _ in range(warm_up + steps):
            step()
        del step
        events = [e for file in sorted(Path(name).iterdir()) for e in json.loads(file.read_bytes())]
    nodes: dict[tuple[str, str], list[dict[str, Any]]] = collections.defaultdict(list)
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            nodes[event["args"]["op_name"], event["name"]].append(event)
    operators: dict[str, dict[str, float]] = {}
    for (op_type, _), runs in nodes.items():
        count = len(runs) // (warm_up + steps)  # nodes without a name share the empty one
        measured = runs[-steps * count :]
        per_step = [sum(e["dur"] for e in measured[i * count : (i + 1) * count]) for i in range(steps)]
        operator = operators.setdefault(op_type, {"seconds": 0.0, "bytes": 0.0, "nodes": 0.0})
        operator["seconds"] += statistics.median(per_step) / 1e6
        operator["nodes"] += count
        operator["bytes"] += sum(moved_bytes(op_type, event["args"]) for event in measured) / steps
    return operators


def moved_bytes(op_type: str, arguments: dict[str, Any]) -> int:
    """Inputs and outputs of one run of a node, from the profiler's sizes."""
    if op_type in _VIEWS:
        return 0
    return sum(int(arguments[key]) for key in ("activation_size", "parameter_size", "output_size"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS")
    arguments = parser.parse_args()
    if arguments.profile:
        print(json.dumps(profiled(arguments.folder, arguments.threads, arguments.warm_up, arguments.profile)))
    else:
        serve(lambda: make_step(arguments.folder, arguments.threads), arguments.warm_up)


if __name__ == "__main__":
    main()
