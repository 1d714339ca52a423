"""One process of `benchmarks.fashion_mnist`: trains in PyTorch; needs torch and NumPy only.

python -m benchmarks.fashion_torch FOLDER PIXELS

The folder holds program.json and weights.npz (`benchmarks.fashion_torch_program` writes them) and
schedule.json; PIXELS is an npz of train_pixels, train_labels, test_pixels and test_labels. Answers one line
of JSON on standard output: the loss of each step, top-1 on the test images in percent, and the CPU seconds of
the steps.

Quantizers are PyTorch's own `_fake_quantize_learnable_*`, from our calibrated start: scale = initial scale *
exp(p), with p and the zero point of activations trained. A convolution with batch norm is what torch.ao's
quantization-aware training makes of it (`ConvBn2d`):

    y = BN(conv(x, FQ(W * gamma / sigma)) / (gamma / sigma))        sigma = sqrt(running variance + epsilon)

with batch statistics in training until they are frozen, and running statistics then and in evaluation; biases
stay float. The optimizer is
the fused AdamW without weight decay.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch  # type: ignore[import-not-found]
import torch.nn.functional as F  # type: ignore[import-not-found]  # noqa: N812

from benchmarks.fashion_schedule import Schedule, top1
from benchmarks.torch_step import OPERATORS, Attributes

_EVALUATION_BATCH: Final = 500
_RUNNING_MOMENTUM: Final = 0.1  # of the new value; ONNX's 0.9 of the old one


class Network:
    """The program with its parameters, run node by node."""

    def __init__(self, folder: Path) -> None:
        program = json.loads((folder / "program.json").read_text())
        with np.load(folder / "weights.npz") as arrays:
            values = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.nodes = program["nodes"]
        self.batch_statistics = True
        self.freeze_bn_delay = program["freeze_bn_delay"]  # the first step, from 1, with running statistics
        self._scores, self._loss = program["scores"], program["loss"]
        self._scales = {name: values.pop(name) for name in program["scales"]}
        self._multipliers = {
            name: torch.nn.Parameter(torch.zeros_like(scale)) for name, scale in self._scales.items()
        }
        for name in program["zero_points"]:
            values[name] = values[name].float()
        trainable = (*program["trainable"], *program["trained_zero_points"])
        self._parameters = {name: torch.nn.Parameter(values.pop(name)) for name in trainable}
        self._constants = values

    def parameters(self) -> list[Any]:
        return [*self._parameters.values(), *self._multipliers.values()]

    def loss(self, images: Any, labels: Any) -> Any:
        return self._run({"images": images, "labels": labels}, self._loss)

    def scores(self, images: Any) -> Any:
        return self._run({"images": images}, self._scores)

    def _run(self, feeds: dict[str, Any], wanted: str) -> Any:
        values = self._constants | self._parameters | feeds
        values.update((name, s0 * torch.exp(self._multipliers[name])) for name, s0 in self._scales.items())
        for node in self.nodes:
            inputs = [values[name] if name else None for name in node["inputs"]]
            operator, attributes = node["op"], node["attributes"]
            if operator == "ConvBatchNorm":
                result = self._conv_batch_norm(attributes, *inputs)
            elif operator == "FoldedWeight":
                result = _folded_weight(attributes, *inputs)
            else:
                result = OPERATORS[operator](attributes, *inputs)
            values[node["output"]] = result
            if node["output"] == wanted:
                break
        return values[wanted]

    def _conv_batch_norm(
        self, a: Attributes, x: Any, folded: Any, gamma: Any, beta: Any, mean: Any, variance: Any
    ) -> Any:
        factor = gamma / torch.sqrt(variance + a["epsilon"])
        y = OPERATORS["Conv"](a, x, folded) / factor.reshape(1, -1, 1, 1)
        batch = self.batch_statistics
        return F.batch_norm(y, mean, variance, gamma, beta, batch, _RUNNING_MOMENTUM, a["epsilon"])


def _folded_weight(a: Attributes, weight: Any, gamma: Any, variance: Any) -> Any:
    return weight * (gamma / torch.sqrt(variance + a["epsilon"])).reshape(-1, 1, 1, 1)


def train(network: Network, schedule: Schedule, data: dict[str, Any]) -> tuple[list[float], float]:
    """The loss of each step, and the CPU seconds of all."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=schedule.learning_rate, weight_decay=0, fused=True)
    losses = []
    start = time.process_time()
    for step, (images, labels) in enumerate(schedule.batches(data["train_pixels"], data["train_labels"])):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        if network.freeze_bn_delay is not None and step + 1 >= network.freeze_bn_delay:
            network.batch_statistics = False
        loss = network.loss(torch.from_numpy(images), torch.from_numpy(labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, time.process_time() - start


def evaluate(network: Network, pixels: Any, labels: Any) -> float:
    network.batch_statistics = False
    with torch.no_grad():
        scores = [
            network.scores(torch.from_numpy(pixels[start : start + _EVALUATION_BATCH] * np.float32(1 / 255)))
            for start in range(0, len(pixels), _EVALUATION_BATCH)
        ]
    return top1(torch.cat(scores).numpy(), labels)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("pixels", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schedule = Schedule(**json.loads((arguments.folder / "schedule.json").read_text()))
    with np.load(arguments.pixels) as arrays:
        data = dict(arrays.items())
    network = Network(arguments.folder)
    losses, seconds = train(network, schedule, data)
    accuracy = evaluate(network, data["test_pixels"], data["test_labels"])
    print(json.dumps({"losses": losses, "top1": accuracy, "seconds": seconds}))


if __name__ == "__main__":
    main()
