"""State that the training graph updates in the checkpoint: the step counter, gates, what a restart keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import rewriter
from rewriter.quantization import IntegerRange, Plan, QuantizedTensor, Quantizer
from rewriter.recipe import Recipe
from rewriter.training.artifacts import write_training_artifacts
from rewriter.training.runtime import open_session
from tests.rewriter.training import nets
from tests.rewriter.training.test_training_batch_norm import separable_net

COUNTER = "quantization_step"


def counter(session: object) -> float:
    return float(session.state.parameters[COUNTER].data)  # type: ignore[attr-defined]


def test_the_counter_counts_executions_of_the_training_graph(tmp_path: Path) -> None:
    write_training_artifacts(nets.quantized_mlp(), Recipe(), tmp_path)
    session, feeds = open_session(tmp_path), nets.batch()
    assert counter(session) == 0
    for expected in (1, 2, 3):
        session.module.train()
        session.module(*feeds)
        session.module.eval()
        session.module(*feeds)  # evaluation does not count
        assert counter(session) == expected


def test_with_gradient_accumulation_it_counts_executions_or_optimizer_steps(tmp_path: Path) -> None:
    found = {}
    for counts in ("executions", "optimizer_steps"):
        folder = tmp_path / counts
        folder.mkdir()
        write_training_artifacts(nets.quantized_mlp(), Recipe(step_counter=counts), folder)
        session = open_session(folder)
        session.module.train()
        values = []
        for _ in range(2):
            for _ in range(3):
                session.module(*nets.batch())
                values.append(counter(session))
            session.optimizer.step()
            session.module.lazy_reset_grad()
        found[counts] = values
    assert found == {"executions": [1, 2, 3, 4, 5, 6], "optimizer_steps": [1, 1, 1, 2, 2, 2]}


@pytest.mark.parametrize("ranges", ["learned", "moving_average", "fixed"])
def test_before_the_delay_nothing_is_quantized(tmp_path: Path, ranges: str) -> None:
    """Losses and gradients are those of the float net, then those of the quantized one without a delay.

    Tracked ranges saw float values until then, and so differ a little.
    """
    tolerance = 1e-2 if ranges == "moving_average" else 1e-6
    losses, gradients = {}, {}
    for name, net, delay in (
        ("float", nets.mlp(), 0),
        ("delayed", nets.quantized_mlp(), 3),
        ("quantized", nets.quantized_mlp(), 0),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_training_artifacts(net, Recipe(ranges=ranges, quant_delay=delay), folder)
        session = open_session(folder)
        for step in range(1, 5):
            session.module.train()
            losses[name, step] = float(session.module(*nets.batch(seed=step)))
            gradients[name, step] = {
                parameter: np.array(session.state.parameters[parameter].grad) for parameter in ("W1", "b2")
            }
            if name == "delayed" and ranges == "learned":
                scale = np.array(session.state.parameters["W1_scale.log_multiplier"].grad)
                assert scale.any() == (step >= 3)
            session.module.lazy_reset_grad()
            session.module.eval()
            losses[f"{name}, evaluated", step] = float(session.module(*nets.batch(seed=step))[0])
    for step in range(1, 5):
        expected = "float" if step < 3 else "quantized"
        allowed = 1e-6 if step < 3 else tolerance
        assert losses["delayed", step] == pytest.approx(losses[expected, step], rel=allowed)
        evaluated = losses[f"{expected}, evaluated", step]
        assert losses["delayed, evaluated", step] == pytest.approx(evaluated, rel=allowed)
        assert losses["delayed", step] != losses["quantized" if step < 3 else "float", step]
        if step < 3 or ranges != "moving_average":
            for parameter, value in gradients[expected, step].items():
                np.testing.assert_allclose(gradients["delayed", step][parameter], value, rtol=1e-5, atol=1e-8)


def test_each_quantizer_may_have_its_own_delay(tmp_path: Path) -> None:
    net = nets.quantized_mlp()
    quantizer = Quantizer(
        name="W1",
        kind="weight",
        bits=4,
        range=IntegerRange.for_weights(4),
        symmetric=True,
        axis=1,
        tensors=(QuantizedTensor("W1", ("node_h",)),),
        quant_delay=2,
    )
    write_training_artifacts(net, Recipe(), tmp_path, plan=Plan((quantizer,), (), ()))
    session = open_session(tmp_path)
    session.module.train()
    moved = []
    for _ in range(2):
        session.module(*nets.batch())
        moved.append(
            [np.any(session.state.parameters[f"{name}_scale.log_multiplier"].grad) for name in ("W1", "W2")]
        )
        session.module.lazy_reset_grad()
    assert moved == [[False, True], [True, True]]


def test_trackers_run_and_batch_norm_is_folded_during_the_delay(tmp_path: Path) -> None:
    net, folder = separable_net(), tmp_path / "bundle"
    onnx.save(rewriter_model(net), tmp_path / "net.onnx")
    recipe = Recipe(ranges="moving_average", quant_delay=100)
    manifest = rewriter.prepare(tmp_path / "net.onnx", folder, recipe=recipe)
    session = open_session(folder)
    states = [n for entry in manifest.quantizers for n in entry.range_states if entry.kind == "activation"]
    assert len(manifest.folded) == 5
    before = {name: np.array(session.state.parameters[name].data) for name in manifest.training.state}
    session.module.train()
    x = np.random.default_rng(0).standard_normal((4, 3, 13, 11)).astype(np.float32)
    session.module(x, np.arange(4))
    after = {name: np.array(session.state.parameters[name].data) for name in manifest.training.state}
    assert all((after[name] != before[name]).any() for name in states)
    assert all((after[f"b{i}.var"] != before[f"b{i}.var"]).any() for i in range(1, 6))


def rewriter_model(net: object) -> onnx.ModelProto:
    """The net as an exporter would write it, not normalized."""
    import onnx_ir as ir

    return ir.to_proto(net.model())  # type: ignore[attr-defined]


# --- A restart: the next ten steps are bit-identical. ---

_STEPS = """
import json, sys, pathlib
import numpy as np
from rewriter import training_api
folder, source, target, first, last, at = sys.argv[1:]
folder, api = pathlib.Path(folder), training_api()
state = api.CheckpointState.load_checkpoint(source)
module = api.Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
optimizer = api.Optimizer(folder / "optimizer_model.onnx", module)
losses = []
for step in range(int(first), int(last)):
    random = np.random.default_rng(step)
    module.train()
    optimizer.set_learning_rate(1e-2)
    loss = module(random.standard_normal((8, 3, 13, 11)).astype(np.float32), random.integers(0, 4, 8))
    losses.append(np.ravel(loss)[0].tobytes().hex())
    optimizer.step()
    module.lazy_reset_grad()
    if step + 1 == int(at):
        api.CheckpointState.save_checkpoint(state, target, include_optimizer_state=True)
values = {name: np.array(p.data).tobytes().hex() for name, p in state.parameters}
print(json.dumps([losses, values]))
"""


def steps(folder: Path, source: Path, target: Path, first: int, last: int, at: int = -1) -> list:
    command = [sys.executable, "-c", _STEPS, *map(str, (folder, source, target, first, last, at))]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_delay": 4, "freeze_bn_delay": 9},
        {"ranges": "moving_average", "fold_statistics": "float_layer", "optimizer": "sgd"},
    ],
    ids=["learned, delays", "moving average, sgd"],
)
def test_saved_and_resumed_in_a_new_process_ten_steps_are_bit_identical(
    tmp_path: Path, settings: dict[str, object]
) -> None:
    onnx.save(rewriter_model(separable_net()), tmp_path / "net.onnx")
    folder, saved = tmp_path / "bundle", tmp_path / "saved"
    rewriter.prepare(tmp_path / "net.onnx", folder, recipe=Recipe(**settings))  # type: ignore[arg-type]
    losses, values = steps(folder, folder / "checkpoint", saved, 0, 13, at=3)
    resumed_losses, resumed_values = steps(folder, saved, tmp_path / "unused", 3, 13)
    assert resumed_losses == losses[3:]
    assert resumed_values == values
    assert COUNTER in values
