"""ONNX quantization-aware training: a float model in, a trainable bundle and an int8 model out.

manifest = prepare(Path("model.onnx"), Path("bundle"), calibration=Path("samples.npz"))
finetune(Path("bundle"), Path("train.npz"), epochs=3)       # or any loop over onnxruntime.training.api
report = finalize(Path("bundle"), Path("model.int8.onnx"))
"""

from rewriter.bundle import read_manifest, write_zip
from rewriter.errors import ErrorCode, QatError
from rewriter.finalize import Agreement, FinalizeReport, finalize
from rewriter.finetune import Evaluation, FinetuneReport, finetune
from rewriter.manifest import Manifest
from rewriter.prepare import prepare
from rewriter.progress import Progress
from rewriter.recipe import Calibration, GraphLoss, Override, Recipe

__all__ = [
    "Agreement",
    "Calibration",
    "ErrorCode",
    "Evaluation",
    "FinalizeReport",
    "FinetuneReport",
    "GraphLoss",
    "Manifest",
    "Override",
    "Progress",
    "QatError",
    "Recipe",
    "finalize",
    "finetune",
    "prepare",
    "read_manifest",
    "write_zip",
]
