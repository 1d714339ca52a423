"""The whole path through the service: it prepares, this machine trains, it finalizes.

python examples/service/quantize.py MODEL.onnx DATA OUTPUT    (in DATA: calibration.npz, train.npz, test.npz)

Environment: ONNX_QAT_SERVER (default: http://127.0.0.1:8000), ONNX_QAT_API_KEY.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import rewriter
from service.client import Client, ClientError

SERVER = os.environ.get("ONNX_QAT_SERVER", "http://127.0.0.1:8000")


def quantize(
    client: Client, model: Path, data: Path, output: Path, *, bits: int = 8, epochs: int = 1
) -> Path:
    """Make OUTPUT/bundle and OUTPUT/int8/model.int8.onnx; the path of the latter."""
    recipe = rewriter.Recipe(weight_bits=bits, activation_bits=bits)
    prepared = client.prepare(model, recipe=recipe, calibration=data / "calibration.npz")
    for job in client.watch(prepared.id):
        print(f"{job.kind} {job.id}: {job.state} {job.progress.stage or ''}")
    client.wait(prepared.id)  # raises JobFailed, with the reason, unless it has succeeded
    bundle = client.download_bundle(prepared.id, output / "bundle")

    # In place of this line: your own loop over onnxruntime.training.api.
    print(rewriter.finetune(bundle, data / "train.npz", evaluation=data / "test.npz", epochs=epochs))

    finalized = client.finalize(
        prepared.id, checkpoint=bundle / "trained_checkpoint", verify=data / "test.npz"
    )
    client.wait(finalized.id)
    return client.download_files(finalized.id, output / "int8") / "model.int8.onnx"


def main() -> int:
    parser = argparse.ArgumentParser(description="Quantize a model through the service.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    try:
        with Client(SERVER) as client:
            print(quantize(client, **vars(arguments)))
    except (ClientError, rewriter.QatError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
