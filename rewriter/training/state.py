"""State of the training graph: tensors in the checkpoint that the graph itself updates in every execution.

They are frozen parameters to onnxruntime-training, so that saving and loading a checkpoint keeps them, and
the eval model reads them. `com.microsoft.InPlaceAccumulatorV2` writes the new value into the parameter's own
memory. When it does so is up to onnxruntime: who reads the old value must have done so before. That is made
sure of by data: the update's flag is a `Group` of what all readers of the state computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from rewriter.initializers import add_initializer
from rewriter.names import FreeNames
from rewriter.operators import MICROSOFT
from rewriter.recipe import CounterUnit
from rewriter.training import layout
from rewriter.training.emitter import Emitter

# Their outputs may be the memory of their input: the readers of that memory are what reads them.
_VIEWS: Final = frozenset({"Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze"})


class States:
    """The states of one graph, in the order in which they were added."""

    def __init__(self, graph: ir.Graph, names: FreeNames) -> None:
        self._graph = graph
        self._names = names
        self._new: dict[ir.Value, ir.Value] = {}
        self.values: dict[ir.Value, None] = {}  # a set, in order

    def add(self, wanted: str, start: npt.NDArray[Any]) -> ir.Value:
        """A new state, float32, called `wanted` where that is free."""
        value = add_initializer(self._graph, self._names.take(wanted), np.asarray(start, np.float32))
        self.values[value] = None
        return value

    def adopt(self, value: ir.Value) -> None:
        """Make a state of an initializer that is in the graph."""
        self.values[value] = None

    def current(self, state: ir.Value) -> ir.Value:
        """What the updates so far make of the state: where several add up, one continues the other."""
        return self._new.get(state, state)

    def update(self, state: ir.Value, new: ir.Value) -> None:
        """At the end of the execution the state becomes `new`, of the same shape."""
        self._new[state] = new

    @property
    def updated(self) -> list[ir.Value]:
        """The new values, which nothing else in the graph may need."""
        return list(self._new.values())

    def write_updates(self) -> None:
        """Append the updates; the graph is otherwise complete, the readers of the old values included."""
        true = None
        for state, new in self._new.items():
            readers = list(dict.fromkeys(_readings(state)))
            if readers:
                flag = self._append("Group", readers, f"{state.name}/read")
            else:
                if true is None:
                    true = add_initializer(self._graph, self._names.take("true"), np.array([True]))
                flag = true
            self._append("InPlaceAccumulatorV2", [state, new, flag], f"{state.name}/update")

    def _append(self, op_type: str, inputs: list[ir.Value], name: str) -> ir.Value:
        output = ir.Value(
            name=self._names.take(name),
            shape=ir.Shape([] if op_type == "Group" else [1]),
            type=ir.TensorType(ir.DataType.BOOL),
        )
        node_name = self._names.take(f"{name}/{op_type}")
        self._graph.append(ir.node(op_type, inputs, domain=MICROSOFT, outputs=[output], name=node_name))
        return output


def _readings(value: ir.Value) -> Iterator[ir.Value]:
    """One output of each node that reads the memory of `value`."""
    for use in value.uses():
        output = use.node.outputs[0]
        if use.node.domain == "" and use.node.op_type in _VIEWS:
            yield from _readings(output)
        else:
            yield output


def add_step_counter(states: States) -> ir.Value:
    """The state that counts the steps: 0 at first, float32, shape []."""
    return states.add(layout.STEP_COUNTER, np.zeros((), np.float32))


def count_step(
    emit: Emitter, counter: ir.Value, states: States, counts: CounterUnit, reset: ir.Value
) -> None:
    """Add one to the counter in every execution, before anything reads it.

    Args:
        emit: at the head of the graph.
        counts: "optimizer_steps" adds one only in the execution that begins a new accumulation.
        reset: the graph's `lazy_reset_grad` input, bool [1], which says so.
    """
    readers = list(counter.uses())
    emit = emit.at(counter.name or "")
    if counts == "executions":
        one = emit.constant(1.0)
    else:
        begins = emit.op("Cast", reset, shape=[1], to=ir.DataType.FLOAT.value)
        one = emit.op("Reshape", begins, emit.constant(np.zeros(0), np.int64), shape=[])
    new = emit.op("Add", counter, one, shape=[])
    for use in readers:
        use.node.replace_input_with(use.idx, new)
    states.update(counter, new)


class Gates:
    """Conditions "the counter has reached a delay", one for each delay."""

    def __init__(self, emit: Emitter, counter: ir.Value) -> None:
        self._emit = emit
        self._counter = counter
        self._gates: dict[int, ir.Value] = {}

    def at(self, delay: int) -> ir.Value | None:
        """Bool, shape []; None where it always holds: the first step is number 1."""
        if delay <= 1:
            return None
        if delay not in self._gates:
            emit = self._emit.at(f"step_{delay}")
            self._gates[delay] = emit.op(
                "GreaterOrEqual",
                self._counter,
                emit.constant(float(delay)),
                shape=[],
                dtype=ir.DataType.BOOL,
            )
        return self._gates[delay]
