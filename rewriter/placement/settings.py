"""What the recipe says about one node: scope and overrides.

Prefixes are matched at "/" boundaries: "encoder/layer1" matches "encoder/layer1" and "encoder/layer1/conv",
not "encoder/layer10". Of the overrides that match a node the last one counts, alone, on top of the recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import onnx
import onnx_ir as ir

from rewriter.errors import ErrorCode, QatError
from rewriter.recipe import BatchNormMode, Override, RangeSource, Recipe

_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class NodeSettings:
    """The recipe as it applies to one node. `quantize` is False, and `demanded` True, by an override only."""

    quantize: bool
    demanded: bool
    weight_bits: int
    activation_bits: int
    symmetric: bool
    per_channel: bool
    ranges: RangeSource
    quant_delay: int
    freeze_bn_delay: int | None
    batch_norm: BatchNormMode


def settings_for(node: ir.Node, recipe: Recipe) -> NodeSettings:
    """The recipe with the last override that matches the node."""
    return settings_for_unit((node,), recipe)


def settings_for_unit(nodes: Sequence[ir.Node], recipe: Recipe) -> NodeSettings:
    """The recipe with the last override that matches one of several nodes which are treated as one."""
    matching = (o for o in reversed(recipe.overrides) if any(_overrides(o, node) for node in nodes))
    override = next(matching, None) or Override(match=nodes[0].op_type)
    return NodeSettings(
        quantize=override.quantize is not False,
        demanded=override.quantize is True,
        weight_bits=_or_default(override.weight_bits, recipe.weight_bits),
        activation_bits=_or_default(override.activation_bits, recipe.activation_bits),
        symmetric=_or_default(override.symmetric, recipe.symmetric),
        per_channel=_or_default(override.per_channel, recipe.per_channel),
        ranges=_or_default(override.ranges, recipe.ranges),
        quant_delay=_or_default(override.quant_delay, recipe.quant_delay),
        freeze_bn_delay=_or_default(override.freeze_bn_delay, recipe.freeze_bn_delay),
        batch_norm=_or_default(override.batch_norm, recipe.batch_norm),
    )


def in_scope(node: ir.Node, recipe: Recipe) -> bool:
    return recipe.scope is None or has_prefix(node.name or "", recipe.scope)


def has_prefix(name: str, prefix: str) -> bool:
    """Whether `prefix` ends at the end of `name` or at one of its "/"."""
    stem = prefix.removesuffix("/")
    return name == stem or name.startswith(f"{stem}/")


def require_matches(nodes: Iterable[ir.Node], recipe: Recipe) -> None:
    """Raise `recipe_scope_unmatched` when the scope, or an override, matches no node.

    An override of an operator type that the model lacks is none: recipes are shared between models.
    """
    nodes = list(nodes) if recipe.scope is not None or recipe.overrides else []
    for index, override in enumerate(recipe.overrides):
        if not onnx.defs.has(override.match) and not any(_overrides(override, node) for node in nodes):
            raise QatError(
                ErrorCode.RECIPE_SCOPE_UNMATCHED,
                f"{override.match!r} is no operator type, and no node name starts with it (matched at '/' "
                "boundaries); give one or the other.",
                field=f"overrides.{index}.match",
            )
    if recipe.scope is not None and not any(in_scope(node, recipe) for node in nodes):
        raise QatError(
            ErrorCode.RECIPE_SCOPE_UNMATCHED,
            f"No node name starts with the scope {recipe.scope!r} (matched at '/' boundaries); "
            "give a prefix of the model's node names.",
            field="scope",
        )


def _overrides(override: Override, node: ir.Node) -> bool:
    return override.match == node.op_type or has_prefix(node.name or "", override.match)


def _or_default(value: _T | None, default: _T) -> _T:
    return default if value is None else value
