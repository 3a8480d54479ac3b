"""Rules of recurrent layers: the gates of one hidden unit go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .call import Call
from .labels import Axes, Axis, Ids, axis, size
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
    layers, directions = c["num_layers"], 1 + c["bidirectional"]
    each = len(weights) // (layers * directions)
    hidden = _fresh(a, size(a.axes(weights[0])[0]) // gates)
    state = _fresh(a, size(a.axes(weights[1])[1])) if each % 2 else hidden  # an LSTM may hand on a projection
    steps = [x[0] if not c["batch_first"] or len(x) == 2 else x[1], *([] if len(x) == 2 else [x[1 - c["batch_first"]]])]
    below = x[-1]
    for layer in range(layers):
        for direction in range(directions):
            first = (layer * directions + direction) * each
            _gates(a, c, weights[first : first + each], below, (hidden, state), gates, steps)
        below = axis(directions * len(state), np.tile(state, directions))
    # All layers and directions share one tensor of initial states, and so one set of hidden units.
    states = list(zip(c["hx"] if isinstance(c["hx"], Sequence) else [c["hx"]], (state, hidden)))  # noqa: B905
    last: list[Axes | None] = []
    for initial, units in states:
        ax = a.axes(initial)
        a.labels.freeze_axis(ax[0], "the layers of a recurrent network")
        a.labels.unify(ax[-1], axis(len(units), units))
        last.append((axis(layers * directions), *ax[1:-1], axis(len(units), units)))
    return [(*x[:-1], below), *last]


@TABLE.rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _cell(a: Analysis, c: Call) -> Value:
    gates = RECURRENT[c.name.removesuffix("_cell")]
    states = [a.axes(n) for n in (c["hx"] if isinstance(c["hx"], Sequence) else [c["hx"]])]
    hidden = _fresh(a, size(states[0][-1]))
    units = axis(len(hidden), hidden)
    for ax in states:
        a.labels.unify(ax[-1], units)
    weights = [c[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if c[name] is not None]
    x = a.axes(c["input"])
    _gates(a, c, weights, x[-1], (hidden, hidden), gates, list(x[:-1]))
    out: Axes = (*states[0][:-1], units)
    return [out, out] if len(states) == 2 else out


def _fresh(a: Analysis, n: int) -> Ids:
    """Labels of hidden units; a single one stays."""
    return a.labels.new(n, soft=True) if n > 1 else a.labels.constant(n, "an axis of one position")


def _gates(
    a: Analysis, c: Call, weights: Sequence[fx.Node], below: Axis, units: tuple[Ids, Ids], gates: int, steps: list[Axis]
) -> None:
    """One direction of one layer.

    Args:
        a: the analysis.
        c: the call.
        weights: of the input ``[gates * H, I]`` and of the state ``[gates * H, P]``, biases, and the projection ``[P, H]``
            where there is one; without it P is H.
        below: the channels of the input.
        units: labels of the H hidden units, and of the P that are handed on.
        gates: how many each unit has.
        steps: axes over which all this is repeated.
    """
    hidden, state = units
    rows = axis(gates * len(hidden), np.tile(hidden, gates))
    readers = [(weights[0], below), (weights[1], axis(len(state), state))]
    if len(weights) % 2:
        *weights, projection = weights
        a.labels.unify(a.axes(projection)[0], axis(len(state), state))
        readers.append((projection, axis(len(hidden), hidden)))
    for weight, columns in readers:
        a.labels.unify(a.axes(weight)[1], columns)
        a.contracts(c, weight, 1)
        a.counts(c, [*steps, *a.axes(weight)])
    for weight in weights:
        a.labels.unify(a.axes(weight)[0], rows)
