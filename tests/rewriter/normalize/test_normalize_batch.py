"""A fixed batch of one becomes dynamic where that is proved to be right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from normalize_helpers import model, normal, run

from rewriter.normalize.batch import DynamicBatchPass, ProofLimits
from rewriter.normalize.shapes import CleanShapesPass, InferShapesPass


def rewritten(text: str, limits: ProofLimits | None = None) -> tuple[ir.Model, DynamicBatchPass]:
    source = model(text)
    InferShapesPass()(source)
    rewrite = DynamicBatchPass() if limits is None else DynamicBatchPass(limits)
    rewrite(source)
    return source, rewrite


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu(x)",
        "y = Reshape(x, flat)",
        "a = Reshape(x, flat_infer)  y = Relu(a)",
        "a = Reshape(x, groups)  b = Transpose <perm = [0, 2, 1, 3, 4]> (a)  y = Reshape(b, image)",
        "a = Reshape(x, rows)  b = Relu(a)  y = Reshape(b, image)",
        "a = Flatten(x)  y = Softmax(a)",
        "y = ReduceMean(x, space)",
        "y = Reshape(x, kept)",
        "s = Shape(x)  y = Reshape(x, s)",
        "a = Mul(x, w)  y = Concat <axis = 1> (a, x)",
    ],
)
def test_models_of_independent_samples_get_a_dynamic_batch(nodes):
    text = f"""g (float[1,4,2,2] x) => (float[] y)
        <int64[2] flat = {{1, 16}}, int64[2] flat_infer = {{1, -1}}, int64[5] groups = {{1, 2, 2, 2, 2}},
         int64[4] image = {{1, 4, 2, 2}}, int64[2] rows = {{4, 4}}, int64[3] kept = {{0, 4, 4}},
         int64[2] space = {{2, 3}}, float[4,1,1] w = {{1, 2, 3, 4}}> {{ {nodes} }}"""
    fixed = model(text)
    dynamic, rewrite = rewritten(text)
    assert rewrite.warnings == []
    assert rewrite.inputs == ("x",)
    assert str(dynamic.graph.inputs[0].shape[0]) == "batch"
    x = normal(5, 4, 2, 2, seed=9)
    (y,) = run(dynamic, {"x": x})
    np.testing.assert_allclose(
        y, np.concatenate([run(fixed, {"x": x[i : i + 1]})[0] for i in range(5)]), rtol=1e-5, atol=1e-6
    )


def test_the_output_has_the_symbol_of_the_input():
    dynamic, _ = rewritten(
        "g (float[1,4,2,2] x) => (float[1,16] y) <int64[2] s = {1, 16}> { a = Relu(x)  y = Reshape(a, s) }"
    )
    assert [str(dim) for dim in dynamic.graph.outputs[0].shape] == ["batch", "16"]


@pytest.mark.parametrize(
    "nodes",
    [
        "m = ReduceMean(x)  y = Sub(x, m)",  # over the samples
        "y = ReduceSum <keepdims = 0> (x)",  # no batch in the output
        "y = Concat <axis = 0> (x, x)",
        "y = Transpose <perm = [1, 0, 2, 3]> (x)",
        "t = Transpose <perm = [1, 0, 2, 3]> (x)  y = Reshape(t, image)",
        "a = Concat <axis = 1> (x, token)  y = Relu(a)",
    ],
)
def test_models_that_mix_samples_keep_the_batch_of_one_and_say_so(nodes):
    text = f"""g (float[1,4,2,2] x) => (float[] y)
        <int64[4] image = {{1, 4, 2, 2}}, float[1,1,2,2] token = {{1, 2, 3, 4}}> {{ {nodes} }}"""
    source = model(text)
    InferShapesPass()(source)
    before = ir.to_proto(source).SerializeToString(deterministic=True)
    rewrite = DynamicBatchPass()
    assert not rewrite(source).modified
    (warning,) = rewrite.warnings
    assert "stays fixed at 1" in warning
    assert ir.to_proto(source).SerializeToString(deterministic=True) == before


def test_all_inputs_of_one_sample_share_the_batch():
    dynamic, rewrite = rewritten(
        "g (float[1,3] a, float[1,3] b, float[3] scale) => (float[] y) { s = Add(a, b)  y = Mul(s, scale) }"
    )
    assert rewrite.inputs == ("a", "b")
    assert dynamic.graph.inputs[0].shape[0] == dynamic.graph.inputs[1].shape[0]
    assert dynamic.graph.inputs[2].shape[0] == 3


def test_a_fixed_batch_of_several_stays_with_a_warning():
    source, rewrite = rewritten("g (float[8,3] x) => (float[8,3] y) { y = Relu(x) }")
    assert source.graph.inputs[0].shape[0] == 8
    assert "'x': 8" in rewrite.warnings[0]


def test_inputs_that_disagree_about_the_batch_stay_with_a_warning():
    source, rewrite = rewritten("g (float[1,3] x, float[4,1,3] h) => (float[] y) { y = Add(x, h) }")
    assert source.graph.inputs[0].shape[0] == 1
    assert len(rewrite.warnings) == 1


def test_a_state_beside_a_dynamic_batch_is_no_reason_to_warn():
    _, rewrite = rewritten("g (float[N,3] x, float[1,3] h) => (float[] y) { y = Add(x, h) }")
    assert (rewrite.inputs, rewrite.warnings) == ((), [])


def test_a_dynamic_batch_stays_as_it_is():
    source, rewrite = rewritten("g (float[N,3] x) => (float[N,3] y) { y = Relu(x) }")
    assert str(source.graph.inputs[0].shape[0]) == "N"
    assert (rewrite.inputs, rewrite.warnings) == ((), [])


@pytest.mark.parametrize("limits", [ProofLimits(input_elements=2), ProofLimits(seconds=0.0)])
def test_without_room_for_a_proof_the_batch_stays_fixed(limits):
    body = "a0 = MatMul(x, x)  " + "  ".join(f"a{i + 1} = MatMul(a{i}, x)" for i in range(40))
    source, rewrite = rewritten(f"g (float[1,256,256] x) => (float[] a40) {{ {body} }}", limits)
    assert source.graph.inputs[0].shape[0] == 1
    assert len(rewrite.warnings) == 1


def test_unknown_dimensions_get_symbols_of_their_own():
    source = model("g (float[N,3,H,W] x, int64[K] k) => (float[] y) { y = Relu(x) }")
    source.graph.inputs[0].shape = ir.Shape([-1, 3, "?", "?"])
    source.graph.inputs[1].shape = ir.Shape([None])
    CleanShapesPass()(source)
    assert [str(dim) for dim in source.graph.inputs[0].shape] == ["batch", "3", "x_dim_2", "x_dim_3"]
    assert [str(dim) for dim in source.graph.inputs[1].shape] == ["k_dim_0"]
