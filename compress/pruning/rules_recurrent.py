"""Rules of recurrent layers: the gates of one hidden unit go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .call import Call
from .labels import Axes, Axis, Ids, axis
from .table import Table, Unsupported, Value

if TYPE_CHECKING:
    from torch import fx

    from .analysis import Analysis

__all__ = ["RECURRENT", "TABLE"]

TABLE = Table()
RECURRENT = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""Operator to its number of gates."""


@TABLE.rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(a: Analysis, c: Call) -> Value:
    if "input" not in c:
        raise Unsupported("a packed sequence")
    x, weights, gates = list(a.axes(c["input"])), c["params"], RECURRENT[c.name]
    layers, directions, each = c["num_layers"], 1 + c["bidirectional"], 4 if c["has_biases"] else 2
    if len(weights) != layers * directions * each:
        raise Unsupported("a recurrent layer with projections")
    hidden = a.labels.new(a.axes(weights[1])[1][0].size if a.axes(weights[1])[1] else 1, soft=True)
    steps = [x[0] if not c["batch_first"] or len(x) == 2 else x[1], *([] if len(x) == 2 else [x[1 - c["batch_first"]]])]
    below = x[-1]
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * each
            _gates(a, c, weights[first : first + each], below, hidden, gates, steps)
        below = axis(directions * len(hidden), np.tile(hidden, directions))
    # All layers and directions share one tensor of initial states, and so one set of hidden units.
    states = c["hx"] if isinstance(c["hx"], Sequence) else [c["hx"]]
    for state in states:
        a.labels.freeze_axis(a.axes(state)[0], "the layers of a recurrent network")
        a.labels.unify(a.axes(state)[-1], axis(len(hidden), hidden))
    last: Axes = (axis(layers * directions), *a.axes(states[0])[1:-1], axis(len(hidden), hidden))
    return [(*x[:-1], below), *[last for _ in states]]


def _gates(a: Analysis, c: Call, weights: Sequence[fx.Node], below: Axis, hidden: Ids, gates: int, steps: Any) -> None:
    """One direction of one layer: weights of the input ``[gates * H, I]`` and of the state ``[gates * H, H]``, biases."""
    n = len(hidden)
    rows = axis(gates * n, np.tile(hidden, gates))
    for weight, columns in zip(weights[:2], (below, axis(n, hidden)), strict=True):
        a.labels.unify(a.axes(weight)[1], columns)
        a.contracts(c, weight, 1)
        a.counts(c, [*steps, *a.axes(weight)])
    for weight in weights:
        a.labels.unify(a.axes(weight)[0], rows)
