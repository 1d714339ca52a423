"""A model whose own names are those of a training model still trains."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from rewriter.finalize import finalize
from rewriter.finetune import finetune
from rewriter.prepare import prepare
from rewriter.training.reserved_names import free_reserved_names
from tests.rewriter.training import nets

NAMES = (
    "W1_grad.accumulation.buffer",
    "W1_grad.accumulation.out",
    "W1_grad",
    "lazy_reset_grad",
    "W1_scale.initial",
    "W1_scale.log_multiplier",
    "W1_scale.multiplier",
    "W1_scale/Mul",
    "W1_scale.log_multiplier/Exp",
    "scale_0",
)


def rename(net: ir.Model, what: str, name: str) -> None:
    """Give a part of the network another name."""
    node = next(iter(net.graph))
    parts = {
        "initializer": net.graph.initializers["b2"],
        "inner value": node.outputs[0],
        "output": net.graph.outputs[0],
        "node": node,
    }
    parts[what].name = name


@pytest.mark.parametrize("what", ["initializer", "inner value", "output", "node"])
@pytest.mark.parametrize("name", NAMES)
def test_the_bundle_trains_and_finalizes(tmp_path: Path, what: str, name: str) -> None:
    net = nets.mlp()
    rename(net, what, name)
    ir.save(net, tmp_path / "float.onnx")
    manifest = prepare(tmp_path / "float.onnx", tmp_path / "bundle")
    x, labels = nets.batch(32)
    np.savez(tmp_path / "train.npz", x=x, labels=labels)
    report = finetune(tmp_path / "bundle", tmp_path / "train.npz", epochs=20, learning_rate=1e-2)
    assert report.losses[-1] < report.losses[0]
    finalize(tmp_path / "bundle", tmp_path / "int8.onnx")
    outputs = [value.name for value in ir.load(tmp_path / "int8.onnx").graph.outputs]
    assert outputs == [value.name for value in net.graph.outputs]
    assert list(manifest.training.eval_outputs) == outputs


def test_inputs_and_outputs_keep_their_names() -> None:
    net = nets.mlp()
    net.graph.inputs[0].name = "lazy_reset_grad"
    net.graph.outputs[0].name = "W1_grad.accumulation.out"
    free_reserved_names(net)
    assert net.graph.inputs[0].name == "lazy_reset_grad"
    assert net.graph.outputs[0].name == "W1_grad.accumulation.out"
