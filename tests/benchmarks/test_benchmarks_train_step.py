"""benchmarks/train_step.py: variants train the same batch in processes of their own; ratios are to float."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from benchmarks.onnxruntime_step import moved_bytes
from benchmarks.resnet import CLASSES, IMAGE, resnet
from benchmarks.torch_program import write_torch_program
from benchmarks.train_step import Row, report
from benchmarks.training_graphs import NETWORKS, Job

REPOSITORY = Path(__file__).parents[2]
VARIANTS = ["float, stock", "float", "learned W8A8"]


def test_a_short_run_measures_time_memory_and_traffic(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train_step", "resnet", "--steps", "2", "--threads", "1"]
    chosen = [word for variant in VARIANTS for word in ("--variant", variant)]
    run = subprocess.run(
        [*command, *chosen, "--json", str(tmp_path / "t.json")],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    )
    rows = {row["variant"]: row for row in json.loads((tmp_path / "t.json").read_text())["rows"]}
    assert list(rows) == VARIANTS
    for row in rows.values():
        assert row["error"] is None
        assert len(row["seconds"]) == 2
        assert row["peak_bytes"] > row["imports_bytes"] > 0
        assert row["operators"]["ConvGrad"]["nodes"] == 15
        assert row["operators"]["AdamWOptimizer"]["nodes"] == 1
    stock, ours, learned = (rows[variant] for variant in VARIANTS)
    # The same weights, loss and batch, differentiated by two programs; the optimizers differ in epsilon.
    np.testing.assert_allclose(ours["losses"], stock["losses"], rtol=1e-3)
    assert learned["losses"][-1] < learned["losses"][0]
    moved = {name: sum(o["bytes"] for o in row["operators"].values()) for name, row in rows.items()}
    assert moved["learned W8A8"] > moved["float"]
    assert "QuantizeLinear" in learned["operators"]
    assert "QuantizeLinear" not in ours["operators"]
    assert "resnet, learned W8A8 against float" in run.stdout


def test_the_resnet_has_the_size_it_is_said_to_have() -> None:
    model = resnet()
    weights = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert 100_000 < weights < 300_000
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"images": np.zeros((3, *IMAGE), np.float32)})
    assert scores.shape == (3, CLASSES)


def test_bytes_moved_are_inputs_and_outputs() -> None:
    """One Relu of a [2, 3] tensor reads 24 bytes and writes 24."""
    event = {"activation_size": "24", "parameter_size": "0", "output_size": "24"}
    assert moved_bytes("Relu", event) == 48
    assert moved_bytes("Reshape", event) == 0


def test_ratios_are_those_to_float_of_the_same_network() -> None:
    operators = {"Conv": {"seconds": 0.02, "bytes": 10 * 2**20, "nodes": 1}}
    more = {"Conv": {"seconds": 0.03, "bytes": 15 * 2**20, "nodes": 1}}
    mib = 2**20
    rows = [
        Row("a", "float", [0.02, 0.04, 0.06], 200 * mib, 100 * mib, [], operators),
        Row("a", "learned W8A8", [0.03, 0.06, 0.09], 300 * mib, 100 * mib, [], more),
        Row("b", "float", [1.0], 200 * mib, 100 * mib, [], operators),
        Row("b", "moving average W8A8", error="not available"),
    ]
    lines = [line.split() for line in report(rows).splitlines()]
    learned = ["a", "learned", "W8A8", "60.0", "(30.0..90.0)", "1.50", "1.50", "300", "1.50", "200", "2.00"]
    assert lines[2] == [*learned, "15", "1.50"]
    text = report(rows)
    assert "b  moving average W8A8  not measured: not available" in text
    assert "Conv +10.0" in text


def test_a_process_that_fails_is_a_row_with_its_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train_step", "resnet", "--steps", "1", "--threads", "1"]
    torch = ["--torch-python", sys.executable, "--variant", "torch float"]  # this Python has no torch
    run = subprocess.run([*command, *torch], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    line = next(line for line in run.stdout.splitlines() if line.startswith("resnet  torch float"))
    assert "torch" in line.split("not measured:")[1]


def test_a_torch_program_has_each_quantizer_and_weight_once(tmp_path: Path) -> None:
    job = Job.write(NETWORKS["resnet"], 2, tmp_path)
    weight = onnx.numpy_helper.to_array(resnet().graph.initializer[-2])
    write_torch_program(job.float_model(), "cross_entropy", ["head.weight"], tmp_path)
    program = json.loads((tmp_path / "program.json").read_text())
    assert [node["op"] for node in program["nodes"]].count("Conv") == 15
    assert program["nodes"][-1]["output"] == program["loss"]
    with np.load(tmp_path / "weights.npz") as weights:
        np.testing.assert_array_equal(weights["head.weight"], weight)
