"""An MLflow run of one quantization: recipe, losses, bundle, int8 model and the report on it.

python examples/service/mlflow_run.py MODEL.onnx DATA    (in DATA: calibration.npz, train.npz, test.npz)

It needs `pip install mlflow` (or mlflow-skinny). Where the run goes is MLflow's affair: MLFLOW_TRACKING_URI,
MLFLOW_EXPERIMENT_NAME. Where the service is: ONNX_QAT_SERVER, ONNX_QAT_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import mlflow

import rewriter
from service.client import Client, ClientError

SERVER = os.environ.get("ONNX_QAT_SERVER", "http://127.0.0.1:8000")


def log_step(record: rewriter.LogRecord) -> None:
    """A line of the training's log as metrics."""
    prefix = "test" if record.event == "evaluation" else "train"
    mlflow.log_metric(f"{prefix}_loss", record.loss, step=record.step)
    if record.accuracy is not None:
        mlflow.log_metric(f"{prefix}_top1", record.accuracy, step=record.step)


def run(client: Client, model: Path, data: Path, recipe: rewriter.Recipe) -> str:
    """Prepare, train and finalize in one MLflow run; the run's id."""
    with mlflow.start_run(run_name=model.stem) as run, tempfile.TemporaryDirectory() as scratch:
        mlflow.log_params(recipe.model_dump(mode="json", exclude_unset=True))
        prepared = client.prepare(model, recipe=recipe, calibration=data / "calibration.npz")
        mlflow.set_tag("onnx_qat.prepare_job", prepared.id)
        client.wait(prepared.id)
        bundle = client.download_bundle(prepared.id, Path(scratch) / "bundle")
        mlflow.log_artifacts(str(bundle), "bundle")

        rewriter.finetune(
            bundle, data / "train.npz", evaluation=data / "test.npz", log_every=10, log=log_step
        )
        checkpoint = bundle / "trained_checkpoint"
        mlflow.log_artifact(str(checkpoint), "checkpoint")

        finalized = client.finalize(prepared.id, checkpoint=checkpoint, verify=data / "test.npz")
        mlflow.set_tag("onnx_qat.finalize_job", finalized.id)
        client.wait(finalized.id)
        mlflow.log_artifacts(str(client.download_files(finalized.id, Path(scratch) / "int8")), "int8")
        return str(run.info.run_id)


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantize a model through the service, as an MLflow run.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    arguments = parser.parse_args()
    recipe = rewriter.Recipe(weight_bits=arguments.bits, activation_bits=arguments.bits)
    try:
        with Client(SERVER) as client:
            print(run(client, arguments.model, arguments.data, recipe))
    except (ClientError, rewriter.QatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
