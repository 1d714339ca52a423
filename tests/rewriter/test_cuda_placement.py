"""Nothing that is trained falls back to the CPU under CUDA, and nothing is copied to or from it in a step.

Decided from the kernel table of onnxruntime-training 1.19.2's CUDA build; no GPU is needed. Two things are
allowed in CPU memory:

* arithmetic on shapes, which is int64 and bool. onnxruntime keeps shapes there, computes with them there on
  purpose (GetCpuPreferredNodes), and its CUDA kernels read shapes, axes, pads and sizes there: nothing waits.
* what a training loop feeds and reads there: `lazy_reset_grad`, the learning rate and the step, and the flags
  that InPlaceAccumulatorV2 and the optimizers give out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import rewriter
from rewriter import Recipe
from tests.rewriter.cuda_nets import NETS
from tests.rewriter.cuda_placement import Placement, Stray, as_run, placement

# Every net is prepared with the first, `small_resnet` and `normalized` with all.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "per tensor": {"per_channel": False},
    "symmetric": {"symmetric": True},
    "fixed": {"ranges": "fixed"},
    "fixed symmetric per tensor": {"ranges": "fixed", "symmetric": True, "per_channel": False},
    "4 bits": {"weight_bits": 4, "activation_bits": 4},
    "4 bits fixed per tensor": {
        "weight_bits": 4,
        "activation_bits": 4,
        "ranges": "fixed",
        "per_channel": False,
    },
    "16-bit activations": {"activation_bits": 16},
    "moving averages": {"ranges": "moving_average"},
    "moving averages, symmetric": {"ranges": "moving_average", "symmetric": True},
    "moving averages, 4 bits per tensor": {
        "ranges": "moving_average",
        "weight_bits": 4,
        "activation_bits": 4,
        "per_channel": False,
    },
    "delayed": {"quant_delay": 10},
    "delayed moving averages": {"ranges": "moving_average", "quant_delay": 10, "freeze_bn_delay": 20},
    "delayed by optimizer steps": {"quant_delay": 10, "step_counter": "optimizer_steps"},
    "frozen batch norm": {"freeze_bn_delay": 20},
    "statistics of the float layer": {"fold_statistics": "float_layer", "freeze_bn_delay": 20},
    "folded before training": {"batch_norm": "fold_inference"},
    "batch norm kept": {"batch_norm": "keep", "freeze_bn_delay": 20},
    "sgd": {"optimizer": "sgd"},
    "mse": {"loss": "mse"},
    "l1": {"loss": "l1"},
    "bce_with_logits": {"loss": "bce_with_logits"},
}

REAL = ("ppocr2-cls", "light-densenet121", "light-resnet50", "light-shufflenet", "minilm-l3")

# In CPU memory because a training loop feeds it there.
FED = {
    "learning_rate": "the optimizers read it there",
    "lazy_reset_grad": "one flag; where it is counted too, it is copied once, at the head of a step",
}


def check(bundle: Path, tmp_path: Path) -> None:
    for name in ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx"):
        found = placement(as_run(bundle / name, tmp_path))
        assert found.without_kernel == (), name
        assert found.to_host == (), name
        assert unexcused(found.to_device) == [], name
        assert unexcused(found.numbers_on_host) == [], name


def unexcused(strays: Sequence[Stray]) -> list[Stray]:
    return [stray for stray in strays if stray.value not in FED]


def prepared(model: ir.Model, recipe: str, folder: Path) -> Path:
    path = folder / "float.onnx"
    onnx.save(ir.to_proto(model), path)
    rewriter.prepare(path, folder / "bundle", recipe=Recipe.parse(RECIPES[recipe]))
    return folder / "bundle"


@pytest.mark.parametrize("name", NETS)
def test_every_node_of_a_net_stays_on_the_gpu(name: str, tmp_path: Path) -> None:
    check(prepared(NETS[name](), "default", tmp_path), tmp_path)


@pytest.mark.parametrize("recipe", list(RECIPES)[1:])
@pytest.mark.parametrize("name", ["small_resnet", "normalized"])
def test_every_node_stays_on_the_gpu_whatever_the_recipe(name: str, recipe: str, tmp_path: Path) -> None:
    check(prepared(NETS[name](), recipe, tmp_path), tmp_path)


@pytest.mark.parametrize("name", REAL)
def test_every_node_of_a_real_model_stays_on_the_gpu(
    name: str, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    rewriter.prepare(real_model(name), tmp_path / "bundle")
    check(tmp_path / "bundle", tmp_path)


# The decision itself, on single nodes.


def placed(text: str, opset: int = 18) -> Placement:
    model = onnx.parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n{text}'
    )
    for node in model.graph.node:
        node.name = node.output[0]
    return placement(model)


@pytest.mark.parametrize(
    ("opset", "text", "reason"),
    [
        (18, "bool[2] y) { y = Equal(x, x) }", None),
        (19, "bool[2] y) { y = Equal(x, x) }", "version 19"),
        (18, "float[2] y) { y = com.microsoft.FakeQuantGrad(x, m) }", None),
        (18, "float[2] y) { y = com.microsoft.BroadcastGradientArgs(x, x) }", "no CUDA kernel"),
        (18, "float[2] y) { y = Celu(x) }", "no CUDA kernel"),
        (18, "float[2] y) { y = HardSwish(x) }", None),  # by its definition
        (18, "int32[2] y) { y = Clip(i) }", "is int32"),
        (18, "float[2] y) { y = ConvTranspose<pads=[1,0,1,0]>(x, x) }", None),
        (18, "float[2] y) { y = ConvTranspose<pads=[1,0,0,0]>(x, x) }", "asymmetric"),
        (18, "float[1] y) { y = ReduceSum(x) }", None),
        (18, 'float[1] y) { y = ReduceSum(x, "") }', "without a name"),
    ],
)
def test_a_kernel_is_for_versions_types_and_forms(opset: int, text: str, reason: str | None) -> None:
    found = placed(f"g (float[2] x, int32[2] i, bool[2] m) => ({text}", opset).without_kernel
    assert (reason is None) == (found == ())
    assert reason is None or reason in found[0]


def test_a_computed_scale_in_host_memory_is_found() -> None:
    """com.microsoft.FakeQuant reads its scale in CPU memory: the GPU would be waited for."""
    text = "g (float[2] x, float[2] p, float z) => (float[2] y) {{ s = Exp(p) y = {}(x, s, z) }}"
    found = placed(text.format("com.microsoft.FakeQuant"))
    assert [stray.value for stray in found.to_host] == ["s"]
    assert [stray.value for stray in found.numbers_on_host] == ["s", "z"]
    found = placed(text.format("Clip"))
    assert found.to_host == found.numbers_on_host == ()


def test_a_number_made_of_a_shape_is_found_and_shapes_themselves_are_not() -> None:
    text = "g (float[2,n] x) => (float[2,n] y) { e = Exp(x) s = Size(e) c = Cast<to=1>(s) y = Div(e, c) }"
    assert [stray.value for stray in placed(text).to_device] == ["c"]
    text = """g (float[2,n] x) => (float[n,2] y) <int64[1] two = {2}> {
        s = Shape(x) r = Neg(s) t = Abs(r) u = Concat<axis=0>(t, two) y = Reshape(x, u)
    }"""
    found = placed(text)
    assert found.shape_arithmetic == ("Neg r", "Abs t", "Concat u")
    assert found.to_device == found.to_host == found.numbers_on_host == ()


def test_an_input_that_both_memories_hold_is_found() -> None:
    text = """g (float[2] buffer, float[2] g, bool[1] lazy_reset_grad) => (bool[1] done, float[1] counted) {
        done = com.microsoft.InPlaceAccumulatorV2(buffer, g, lazy_reset_grad)
        counted = Cast<to=1>(lazy_reset_grad)
    }"""
    assert [stray.value for stray in placed(text).to_device] == ["lazy_reset_grad"]
