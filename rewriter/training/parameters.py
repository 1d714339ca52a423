"""Decides which initializers are parameters that training may change.

A float32 initializer is a candidate when an operator reads it where weights belong (`_ROLES`), directly or
through a FakeQuantize. Everything else is a constant of the computation: epsilons, factors, clip bounds,
running statistics, masks. Constants of one element are scalars of a formula, never parameters.
Whether a candidate can be trained is the gradients' question (`rewriter.gradients.trainability`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from rewriter import fake_quantize
from rewriter.errors import ErrorCode, QatError


@dataclasses.dataclass(frozen=True)
class ParameterChoice:
    """What may be trained, and what may not and why, by initializer name; both in initializer order."""

    candidates: tuple[ir.Value, ...]
    frozen: dict[str, str]


def choose_parameters(
    graph: ir.Graph,
    frozen_prefixes: Sequence[str],
    *,
    known: Collection[ir.Value] = (),
    excluded: Collection[ir.Value] = (),
) -> ParameterChoice:
    """Candidates for training among the initializers of `graph`; scales of quantizers are not among them.

    Args:
        known: initializers that are parameters whatever reads them.
        excluded: initializers that are none, and need no reason: state, what ranges are computed of.
        frozen_prefixes: names of parameters, or prefixes that end at a "/" or "." of the name, that are
            not to be trained.
    """
    scales = {scale.name for scale in quantizer_scales(graph)}
    floats = [
        v
        for v in graph.initializers.values()
        if v.dtype in _FLOATS and v.name not in scales and v not in excluded
    ]
    candidates, frozen = [], {}
    for value in floats:
        reason = _reason_not_to_train(value, graph, frozen_prefixes, is_known=value in known)
        if reason is None:
            candidates.append(value)
        elif _elements(value) > 1:  # the scalars of a formula are no news
            frozen[value.name or ""] = reason
    return ParameterChoice(tuple(candidates), frozen)


def quantizer_scales(graph: ir.Graph) -> list[ir.Value]:
    """The scales of the FakeQuantize nodes, each once, in graph order."""
    scales = (fake_quantize.read(n).scale for n in graph if fake_quantize.is_fake_quantize(n))
    return list(dict.fromkeys(scales))


def matches(name: str, prefix: str) -> bool:
    """Whether `prefix` is `name` or a part of it that ends at a "/" or "."."""
    return name == prefix or (
        name.startswith(prefix) and (prefix[-1] in _BOUNDARIES or name[len(prefix)] in _BOUNDARIES)
    )


_BOUNDARIES: Final = "/."
_FLOATS: Final = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})

_Condition = Callable[[ir.Value], bool]


def _elements(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


def _is_table(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 2


def _is_affine(value: ir.Value) -> bool:
    """A bias, a gain or a table of embeddings, not an additive mask of infinite or huge values."""
    assert value.const_value is not None
    assert value.shape is not None
    if sum(dim != 1 for dim in value.shape) < 2:
        return True
    return bool(np.abs(value.const_value.numpy()).max() < _MASK)


_MASK: Final = 1e4  # masks hold -10000, -1e9, the lowest float or -inf


# Operator -> inputs that hold parameters, and what they must look like beyond that.
_ROLES: Final[Mapping[str, Mapping[int, _Condition | None]]] = {
    "Conv": {1: None, 2: None},
    "ConvTranspose": {1: None, 2: None},
    "Gemm": {0: None, 1: None, 2: None},
    "MatMul": {0: None, 1: None},
    "BatchNormalization": {1: None, 2: None},  # 3 and 4 are running statistics
    "InstanceNormalization": {1: None, 2: None},
    "GroupNormalization": {1: None, 2: None},
    "LayerNormalization": {1: None, 2: None},
    "PRelu": {1: None},
    "LSTM": {1: None, 2: None, 3: None},
    "GRU": {1: None, 2: None, 3: None},
    "RNN": {1: None, 2: None, 3: None},
    "Gather": {0: _is_table},
    "Add": {0: _is_affine, 1: _is_affine},
    "Mul": {0: _is_affine, 1: _is_affine},
}


def _reason_not_to_train(
    value: ir.Value, graph: ir.Graph, frozen_prefixes: Sequence[str], *, is_known: bool
) -> str | None:
    name = value.name or ""
    prefix = next((p for p in frozen_prefixes if matches(name, p)), None)
    if prefix is not None:
        return f"frozen by the recipe ({prefix!r})"
    uses = list(_readers(value))
    if not is_known and not any(_is_parameter(value, node, index) for node, index in uses):
        if not uses:
            return "no operator reads it"
        node, index = uses[0]
        return f"a constant, not a weight: input {index} of {node.op_type} {node.name!r}"
    if value.dtype != ir.DataType.FLOAT:
        return f"{value.dtype} is not trained, only float32 is"
    if value.is_graph_output():
        return "it is also an output of the model"
    if any(node.graph is not graph for node, _ in uses):
        return "it is read inside a subgraph of a control-flow operator"
    return None


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that read the value, and at which input, seen through FakeQuantize."""
    for use in value.uses():
        if fake_quantize.is_fake_quantize(use.node) or fake_quantize.is_fake_quantize_bias(use.node):
            yield from ((quantized.node, quantized.idx) for quantized in use.node.outputs[0].uses())
        else:
            yield use.node, use.idx


def _is_parameter(value: ir.Value, node: ir.Node, index: int) -> bool:
    if node.domain != "" or index not in (roles := _ROLES.get(node.op_type, {})):
        return False
    if _elements(value) <= 1 and node.op_type in ("Add", "Mul"):
        return False
    condition = roles[index]
    return condition is None or condition(value)


def require_frozen_names(prefixes: Sequence[str], trainable: Sequence[str], state: Sequence[str]) -> None:
    """Raise `recipe_scope_unmatched` for a prefix of the recipe's `frozen` that freezes nothing.

    Args:
        trainable: names of what could be trained: parameters, scales and zero points.
        state: names of what the training graph itself updates: no parameter, but perhaps what was meant.
    """
    for index, prefix in enumerate(prefixes):
        if prefix and any(matches(name, prefix) for name in trainable):
            continue
        known = ", ".join(repr(name) for name in trainable[:3])
        message = f"No parameter is called {prefix!r} or begins with it at a '/' or '.' ({known}, ...)."
        if prefix and any(matches(name, prefix) for name in state):
            message = (
                f"{prefix!r} is not trained but updated by the training graph: freeze_bn_delay keeps running "
                'statistics, ranges = "fixed" keeps ranges; an override does so for some nodes only.'
            )
        raise QatError(ErrorCode.RECIPE_SCOPE_UNMATCHED, message, field=f"frozen.{index}")


def float_names(graph: ir.Graph) -> list[str]:
    """The floating-point initializers, by name."""
    return [name for name, value in graph.initializers.items() if value.dtype in _FLOATS]
