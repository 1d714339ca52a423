"""Errors a caller can cause: one exception class, one stable code per cause.

The codes are part of the interface: the command line prints them, a failed job carries them and the HTTP
problem documents repeat them. A code is never renamed; a new cause gets a new code.
"""

from __future__ import annotations

import enum


class ErrorCode(enum.StrEnum):
    """Why a request cannot be carried out. The value is what callers see."""

    # The model file.
    MODEL_NOT_FOUND = "model_not_found"
    MODEL_NOT_ONNX = "model_not_onnx"  # not a protobuf, truncated, or no graph in it
    MODEL_INVALID = "model_invalid"  # a protobuf, but not a valid ONNX graph
    MODEL_TOO_LARGE = "model_too_large"
    MODEL_OPSET_UNSUPPORTED = "model_opset_unsupported"
    MODEL_DOMAIN_UNKNOWN = "model_domain_unknown"  # a node of an operator set we know nothing about
    MODEL_UNSUPPORTED = "model_unsupported"  # valid, but a construct of it cannot be rewritten
    MODEL_NO_FLOAT_WEIGHTS = "model_no_float_weights"
    EXTERNAL_DATA_OUTSIDE = "external_data_outside"  # the path leaves the model's own folder
    EXTERNAL_DATA_MISSING = "external_data_missing"

    # The recipe.
    RECIPE_INVALID = "recipe_invalid"
    RECIPE_UNSUPPORTED = "recipe_unsupported"  # valid, but this version cannot do it
    RECIPE_SCOPE_UNMATCHED = "recipe_scope_unmatched"

    # Calibration, training and verification data.
    DATA_NOT_FOUND = "data_not_found"
    DATA_NOT_NPZ = "data_not_npz"
    DATA_INPUT_MISSING = "data_input_missing"
    DATA_SHAPE_MISMATCH = "data_shape_mismatch"
    DATA_TYPE_MISMATCH = "data_type_mismatch"
    DATA_EMPTY = "data_empty"
    DATA_NOT_FINITE = "data_not_finite"
    DATA_LABEL_OUT_OF_RANGE = "data_label_out_of_range"  # a label that is none of the model's classes

    # Rewriting.
    NOTHING_TO_QUANTIZE = "nothing_to_quantize"
    NOTHING_TO_TRAIN = "nothing_to_train"
    GRADIENT_UNSUPPORTED = "gradient_unsupported"
    LOSS_INVALID = "loss_invalid"

    # Running: calibration, fine-tuning, verification.
    RUN_FAILED = "run_failed"  # onnxruntime refused or failed to run the graph
    TRAINING_DIVERGED = "training_diverged"
    TRAINING_INTERRUPTED = "training_interrupted"  # by its caller; what it needs to go on is written
    RESUME_UNAVAILABLE = "resume_unavailable"  # there is no interrupted run to go on with
    RESUME_MISMATCH = "resume_mismatch"  # the interrupted run had other data or arguments
    TRAINING_RUNTIME_MISSING = "training_runtime_missing"

    ARGUMENT_INVALID = "argument_invalid"  # a number of epochs, a learning rate, ... that cannot be meant

    # Bundles and checkpoints.
    BUNDLE_INVALID = "bundle_invalid"
    CHECKPOINT_INVALID = "checkpoint_invalid"
    OUTPUT_EXISTS = "output_exists"
    OUTPUT_UNWRITABLE = "output_unwritable"


class QatError(Exception):
    """A model, recipe or data set that cannot be processed, said so that its owner can act on it.

    Attributes:
        code: stable identifier of the cause.
        message: one sentence: what is wrong and what to do about it.
        node: name of the graph node concerned, if there is one.
        field: name of the recipe field or of the graph input concerned, if there is one.
        file: name (not the full path) of the file concerned, if there is one.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        node: str | None = None,
        field: str | None = None,
        file: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.node = node
        self.field = field
        self.file = file

    def __str__(self) -> str:
        where = [
            f"{label} {value!r}"
            for label, value in (("node", self.node), ("field", self.field), ("file", self.file))
            if value is not None
        ]
        return f"{self.message} [{', '.join([self.code.value, *where])}]"
