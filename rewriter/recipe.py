"""The recipe: what a caller asks of `prepare`, as validated settings.

The first six fields have the names and the meaning that `tf.contrib.quantize` gave them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

import pydantic
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import ErrorDetails

from rewriter.errors import ErrorCode, QatError

WeightBits = Annotated[int, Field(ge=2, le=8)]
ActivationBits = Annotated[int, Field(ge=2, le=16)]
LossName = Literal["cross_entropy", "mse", "bce_with_logits", "l1"]
# "graph": the model computes its loss itself.
LossKind = LossName | Literal["graph"]
OptimizerName = Literal["adamw", "sgd"]
RangeSource = Literal["learned", "moving_average", "fixed"]
BatchNormMode = Literal["fold_training", "fold_inference", "keep"]
FoldStatistics = Literal["quantized_layer", "float_layer"]
CounterUnit = Literal["executions", "optimizer_steps"]
TrainingDevice = Literal["any", "cpu"]

# The step counter is a float32 number, which counts exactly up to here.
LARGEST_DELAY: Final = 2**24
Delay = Annotated[int, Field(ge=0, le=LARGEST_DELAY)]

# A recipe is kept, compared and handed on whole, by a service in many copies.
LARGEST_RECIPE_BYTES: Final = 64 << 10
_MOST_ENTRIES: Final = 1024
# Names of a graph's nodes and values have no control characters, which databases and terminals act upon.
_Name = Annotated[str, Field(max_length=1024, pattern=r"^[^\x00-\x1f\x7f]*$")]
NamePrefix = _Name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Calibration(_Section):
    """How initial activation ranges come from samples."""

    method: Literal["minmax", "percentile", "mse"] = Field(
        default="mse", description="mse: the range with the smallest squared quantization error"
    )
    percentile: float = Field(
        default=99.99, gt=50.0, le=100.0, description="share of the values kept, in percent (percentile only)"
    )


class Override(_Section):
    """Settings for some nodes only; of several overrides that match a node the last one wins."""

    match: NamePrefix = Field(min_length=1, description="operator type, or node-name prefix ('/' boundaries)")
    quantize: bool | None = Field(
        default=None,
        description="false: leave the nodes in float; true: quantize an Add or Mul also where that gains "
        "nothing; null: as the target has it",
    )
    weight_bits: WeightBits | None = None
    activation_bits: ActivationBits | None = None
    symmetric: bool | None = None
    per_channel: bool | None = None
    ranges: RangeSource | None = None
    quant_delay: Delay | None = None
    freeze_bn_delay: Delay | None = None
    batch_norm: BatchNormMode | None = None


class GraphLoss(_Section):
    """A loss that the model computes itself, or the output that a built-in loss is attached to."""

    output: _Name = Field(min_length=1, description="name of a model output")
    kind: LossName | None = Field(
        default=None, description="built-in loss attached to that output; null: the output is the loss itself"
    )


class Recipe(_Section):
    """What to quantize and how, and how to train it. Unknown fields and wrong types are errors."""

    weight_bits: WeightBits = Field(
        default=8,
        description="bits of a quantized weight; 7 for onnxruntime on x86 without VNNI, where 8 saturates",
    )
    activation_bits: ActivationBits = Field(default=8, description="bits of a quantized activation")
    symmetric: bool = Field(default=False, description="symmetric activation ranges; weights always are")
    quant_delay: Delay = Field(
        default=0, description="the first training step that is quantized; 0 and 1: all are"
    )
    freeze_bn_delay: Delay | None = Field(
        default=None,
        description="the first training step whose batch norms use their running statistics; null: never",
    )
    scope: NamePrefix | None = Field(default=None, description="node-name prefix, matched at '/' boundaries")

    per_channel: bool = Field(default=True, description="one scale per output channel of a weight")
    ranges: RangeSource = Field(
        default="learned",
        description="learned: scales (and zero points) are trained; moving_average: tf.contrib's trackers; "
        "fixed: as calibrated",
    )
    target: Literal["onnxruntime", "tensorrt", "tf_contrib"] = Field(
        default="onnxruntime",
        description="where quantizers are placed: onnxruntime: for its fused integer kernels; tf_contrib: "
        "where tf.contrib.quantize put them; tensorrt: not carried out yet",
    )
    batch_norm: BatchNormMode = Field(
        default="fold_training",
        description="fold_training: into the layer before it, with the statistics of the batch until frozen; "
        "fold_inference: once, with its running statistics; keep: trained as a batch norm until frozen",
    )
    fold_statistics: FoldStatistics | None = Field(
        default=None,
        description="fold_training: what the statistics of the batch are taken of, the quantized layer's "
        "result or that of a second, float layer; null: quantized_layer, for target tf_contrib float_layer",
    )
    step_counter: CounterUnit = Field(
        default="executions",
        description="what the delays count: executions of the training graph, or optimizer steps, which "
        "differ when gradients are accumulated",
    )
    overrides: tuple[Override, ...] = Field(
        default=(),
        max_length=_MOST_ENTRIES,
        description="other settings for some nodes; the last one that matches a node wins",
    )
    calibration: Calibration = Field(
        default=Calibration(), description="how initial activation ranges come from samples"
    )
    loss: LossName | GraphLoss = Field(
        default="cross_entropy",
        description="loss that training minimizes: a built-in one, or an output of the model",
    )
    optimizer: OptimizerName = Field(default="adamw", description="optimizer that the bundle trains with")
    frozen: tuple[NamePrefix, ...] = Field(
        default=(), max_length=_MOST_ENTRIES, description="name prefixes of parameters not to train"
    )
    training_device: TrainingDevice = Field(
        default="any",
        description="what the gradients are made for: any: CUDA and CPU; cpu: also in forms that take less "
        "time on the CPU and leave a GPU idle",
    )

    @model_validator(mode="after")
    def _freeze_after_quantization(self) -> Self:
        if self.freeze_bn_delay is not None and self.freeze_bn_delay < self.quant_delay:
            raise ValueError("freeze_bn_delay must not be smaller than quant_delay")
        for index, override in enumerate(self.overrides):
            delay = self.quant_delay if override.quant_delay is None else override.quant_delay
            freeze = self.freeze_bn_delay if override.freeze_bn_delay is None else override.freeze_bn_delay
            if freeze is not None and freeze < delay:
                raise ValueError(
                    f"freeze_bn_delay ({freeze}) must not be smaller than quant_delay ({delay}), which "
                    f"overrides.{index} makes them"
                )
        return self

    @model_validator(mode="after")
    def _of_bounded_size(self) -> Self:
        if len(self.model_dump_json().encode()) > LARGEST_RECIPE_BYTES:
            largest = max(type(self).model_fields, key=lambda name: len(self.model_dump_json(include={name})))
            raise ValueError(
                f"{largest} makes it larger than {LARGEST_RECIPE_BYTES} bytes; a prefix or an operator type "
                "stands for many names"
            )
        return self

    @classmethod
    def parse(cls, settings: Mapping[str, Any] | str | bytes) -> Recipe:
        """Validate a recipe given as a mapping or as JSON text.

        Raises:
            QatError: `recipe_invalid`, naming the first field that is wrong; `recipe_unsupported` for a
                setting that the format allows and this version does not carry out.
        """
        try:
            # JSON has no tuples: going through JSON keeps strict types and accepts lists.
            text = settings if isinstance(settings, str | bytes) else _to_json(settings)
            recipe = cls.model_validate_json(text)
        except pydantic.ValidationError as error:
            first, location = _first_error(error)
            field = ".".join(location) or _field_in(first["msg"])
            raise QatError(
                ErrorCode.RECIPE_INVALID, f"The recipe is not valid: {_reason(first)}.", field=field
            ) from error
        recipe.require_supported()
        return recipe

    def require_supported(self) -> None:
        """Raise `recipe_unsupported` for the first setting that this version cannot carry out."""
        for field, supported in _SUPPORTED_VALUES.items():
            value = getattr(self, field)
            if value not in supported:
                raise QatError(
                    ErrorCode.RECIPE_UNSUPPORTED,
                    f"{field} = {value!r} is not available in this version; use one of "
                    f"{', '.join(repr(v) for v in supported)}.",
                    field=field,
                )


# What the format allows and this version carries out, field by field.
_SUPPORTED_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "target": ("onnxruntime", "tf_contrib"),
}


def _to_json(settings: Mapping[str, Any]) -> bytes:
    try:
        return pydantic.TypeAdapter(dict[str, Any]).dump_json(dict(settings))
    except (pydantic.ValidationError, ValueError, TypeError) as error:
        raise QatError(ErrorCode.RECIPE_INVALID, "The recipe is not a JSON object.") from error


def _first_error(error: pydantic.ValidationError) -> tuple[ErrorDetails, tuple[str, ...]]:
    """The first error and its field; of those of a field with several forms, the deepest."""
    located = [(e, _location(e["loc"])) for e in error.errors(include_url=False)]
    top = located[0][1][:1]
    return max((pair for pair in located if pair[1][:1] == top), key=lambda pair: len(pair[1]))


def _reason(error: ErrorDetails) -> str:
    if error["type"] == "string_pattern_mismatch":
        return "A name has no control characters"
    return error["msg"].removeprefix("Value error, ")


def _location(loc: tuple[int | str, ...]) -> tuple[str, ...]:
    """Without the marks for the forms that a field can have."""
    parts = [str(part) for part in loc]
    return tuple(p for p in parts if p != GraphLoss.__name__ and not p.startswith("literal["))


def _field_in(message: str) -> str | None:
    """The field that a message about several fields names first."""
    named = [name for name in Recipe.model_fields if name in message]
    return min(named, key=message.index, default=None)
