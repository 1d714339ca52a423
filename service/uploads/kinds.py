"""What uploads there are, and the names their files are stored under."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final


class UploadKind(enum.StrEnum):
    """What an upload is used as. The value names its collection in paths."""

    MODEL = "models"
    DATASET = "datasets"
    CHECKPOINT = "checkpoints"


# What the main file of each kind is stored as.
FILE_NAMES: Final[Mapping[UploadKind, str]] = {
    UploadKind.MODEL: "model.onnx",
    UploadKind.DATASET: "data.npz",
    UploadKind.CHECKPOINT: "checkpoint",
}

# One of each, in a sentence.
SINGULAR: Final[Mapping[UploadKind, str]] = {
    UploadKind.MODEL: "model",
    UploadKind.DATASET: "data set",
    UploadKind.CHECKPOINT: "checkpoint",
}
