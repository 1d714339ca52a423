"""Stock onnxruntime-training as the oracle: its generate_artifacts, and gradients read off its API."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx_ir as ir

from rewriter.training.runtime import training_api, without_pytorch


def generate_artifacts(
    model: ir.Model, folder: Path, *, trainable: list[str], frozen: list[str], optimizer: str = "adamw"
) -> None:
    """generate_artifacts with a cross-entropy loss on a float model."""
    logging.disable(logging.INFO)
    try:
        with without_pytorch():
            from onnxruntime.training import artifacts

            artifacts.generate_artifacts(
                ir.to_proto(model),
                requires_grad=trainable,
                frozen_params=frozen,
                loss=artifacts.LossType.CrossEntropyLoss,
                optimizer={"adamw": artifacts.OptimType.AdamW, "sgd": artifacts.OptimType.SGD}[optimizer],
                artifact_directory=folder,
            )
    finally:
        logging.disable(logging.NOTSET)


def gradients(folder: Path, *feeds: np.ndarray) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradients of one training step over the artifacts in `folder`; default session options."""
    api = training_api()
    state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
    module = api.Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    module.train()
    loss = module(*feeds)
    return float(loss), {
        name: np.array(parameter.grad) for name, parameter in state.parameters if parameter.requires_grad
    }
