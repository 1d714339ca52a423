"""One process of `benchmarks.train_step`: trains the same graph in PyTorch; needs torch and NumPy only.

`program.json` holds the nodes of the graph in order, `weights.npz` its initializers, `feeds.npz` the batch
(`benchmarks.torch_program` writes them). Each node is a call of the function that PyTorch has for it,
quantizers are PyTorch's own learnable fake quantization with scale = initial scale * exp(p), as in our
bundles; tensors are contiguous (NCHW), the optimizer is the fused AdamW. Nothing is compiled.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]
import torch.nn.functional as F  # type: ignore[import-not-found]  # noqa: N812

from benchmarks.step_process import Step, serve

Attributes = dict[str, Any]


def _conv(a: Attributes, x: Any, weight: Any, bias: Any = None) -> Any:
    pads = a.get("pads", [0] * (2 * (weight.dim() - 2)))
    begin = pads[: len(pads) // 2]
    assert begin == pads[len(pads) // 2 :], "pads must be symmetric"
    return F.conv2d(x, weight, bias, a.get("strides", 1), begin, a.get("dilations", 1), a.get("group", 1))


def _gemm(a: Attributes, x: Any, weight: Any, bias: Any = None) -> Any:
    assert not a.get("transA", 0)
    return F.linear(x, weight if a.get("transB", 0) else weight.t(), bias)


def _fake_quantize(a: Attributes, x: Any, scale: Any, zero_point: Any) -> Any:
    low, high = a["qmin"], a["qmax"]
    if "axis" not in a:
        factor = 1 / math.sqrt(x[0].numel() * high)
        return torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero_point, low, high, factor)
    factor = 1 / math.sqrt(x[0].numel() * high)
    return torch._fake_quantize_learnable_per_channel_affine(
        x, scale, zero_point, a["axis"], low, high, factor
    )


OPERATORS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: x + y,
    "Cast": lambda a, x: x.float(),
    "Clip": lambda a, x, low=None, high=None: torch.clamp(x, low, high),
    "Concat": lambda a, *x: torch.cat(x, a["axis"]),
    "Conv": _conv,
    "Div": lambda a, x, y: x / y,
    "Erf": lambda a, x: torch.erf(x),
    "Expand": lambda a, x, shape: x.expand(shape.tolist()),
    "FakeQuantize": _fake_quantize,
    "FakeQuantizeBias": lambda a, bias, x_scale, weight_scale: bias,
    "Flatten": lambda a, x: x.flatten(1),
    "Gather": lambda a, table, indices: F.embedding(indices, table),
    "Gelu": lambda a, x: F.gelu(x),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: F.adaptive_avg_pool2d(x, 1),
    "Identity": lambda a, x: x,
    "LayerNormalization": lambda a, x, w, b: F.layer_norm(x, w.shape, w, b, a.get("epsilon", 1e-5)),
    "MatMul": lambda a, x, y: x @ y,
    "Mul": lambda a, x, y: x * y,
    "ReduceMean": lambda a, x: x.mean(),
    "ReduceSum": lambda a, x, axes: x.sum(axes.tolist(), keepdim=bool(a.get("keepdims", 1))),
    "Relu": lambda a, x: F.relu(x),
    "Reshape": lambda a, x, shape: x.reshape(shape.tolist()),
    "Softmax": lambda a, x: F.softmax(x, a.get("axis", -1)),
    "SoftmaxCrossEntropyLoss": lambda a, x, labels: F.cross_entropy(x, labels),
    "Sub": lambda a, x, y: x - y,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": lambda a, x, axes: x.unsqueeze(int(axes)),
}


def make_step(folder: Path, threads: int) -> Step:
    torch.set_num_threads(threads)
    program = json.loads((folder / "program.json").read_text())
    values = _tensors(folder / "weights.npz")
    feeds = _tensors(folder / "feeds.npz")
    parameters = {name: torch.nn.Parameter(values.pop(name)) for name in program["trainable"]}
    scales = {name: values.pop(name) for name in program["scales"]}
    multipliers = {name: torch.nn.Parameter(torch.zeros_like(scale)) for name, scale in scales.items()}
    for name in program["zero_points"]:
        values[name] = values[name].float()
    optimizer = torch.optim.AdamW([*parameters.values(), *multipliers.values()], lr=1e-4, fused=True)
    nodes = [(OPERATORS[n["op"]], n["attributes"], n["inputs"], n["output"]) for n in program["nodes"]]
    last_use = {name: i for i, (_, _, inputs, _) in enumerate(nodes) for name in inputs}

    def loss_of_batch() -> Any:
        live = values | parameters | feeds
        live.update((name, scale * torch.exp(multipliers[name])) for name, scale in scales.items())
        for index, (operator, attributes, inputs, output) in enumerate(nodes):
            live[output] = operator(attributes, *(live[name] if name else None for name in inputs))
            for name in inputs:  # as locals of a module's forward would, values go with their last use
                if name and last_use[name] == index:
                    live.pop(name, None)
        return live[program["loss"]]

    def step() -> float:
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def profiled(folder: Path, threads: int, warm_up: int, steps: int) -> dict[str, dict[str, float]]:
    """Per operator of PyTorch: seconds and calls in one step."""
    step = make_step(folder, threads)
    for _ in range(warm_up):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    return {
        event.key: {"seconds": event.self_cpu_time_total / 1e6 / steps, "nodes": event.count / steps}
        for event in profile.key_averages()
    }


def _tensors(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


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
