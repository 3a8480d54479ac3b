"""Rules of operators that choose positions by numbers: constant tables, and indices computed on the way."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from .call import Call, operator_name
from .labels import Axes, Axis, axis, fixed, size
from .rules_layout import static
from .table import Replacement, Table, Unsupported, Value

if TYPE_CHECKING:
    from .analysis import Analysis
    from .rewrite import Cut

__all__ = ["TABLE"]

TABLE = Table()
aten = torch.ops.aten
_COPIES = {"lift_fresh_copy", "alias", "detach", "clone", "contiguous", "to"}


def _chosen(a: Analysis, c: Call) -> tuple[int, NDArray[np.int64]] | None:
    """The one dimension of ``self`` that a constant table chooses from, and what it chooses; None where there is more to it."""
    indices = [*[None] * (c["dim"] % len(a.axes(c["self"]))), c["index"]] if c.name == "index_select" else c["indices"]
    given = [(d, node) for d, node in enumerate(indices) if node is not None]
    if len(given) != 1 or not static(c["self"], given[0][0]):
        return None
    ((d, node),) = given
    while node.op == "call_function" and operator_name(node.target) in _COPIES:
        node = node.args[0]
    table = operator.attrgetter(str(node.target))(a.module) if node.op == "get_attr" else None
    if not isinstance(table, torch.Tensor) or table.dim() != 1 or table.is_floating_point() or table.dtype == torch.bool:
        return None
    return d, table.cpu().numpy().astype(np.int64) % size(a.axes(c["self"])[d])


def _choose(a: Analysis, c: Call) -> Axes | None:
    """The axes of the result where channels are chosen by a table; None where they are not."""
    chosen, x = _chosen(a, c), list(a.axes(c["self"]))
    if chosen is None or not a.labels.alive(x[chosen[0]]):
        return None
    d, places = chosen
    part = a.labels.positions(x[d])[places]
    if len(part) > 1:
        a.pieces.append(part)
    else:
        a.labels.freeze(part, "a single position is taken out")
    x[d] = axis(len(part), part)
    return tuple(x)


def _rechosen(cut: Cut, c: Call) -> dict[str, Any] | Replacement:
    """The same choice among the channels that are kept."""
    chosen = _chosen(cut.analysis, c)
    if chosen is None:
        return {}
    d, places = chosen
    kept = cut.mask(cut.axes(c["self"])[d])
    if kept.all():
        return {}
    table = cut.inserted(c.node, torch.tensor, (np.cumsum(kept) - 1)[places[kept[places]]].tolist())
    return Replacement(aten.index.Tensor, (c["self"], [*[None] * d, table]))


@TABLE.rule("index_select")
def _index_select(a: Analysis, c: Call) -> Value:
    if (chosen := _choose(a, c)) is not None:
        return chosen
    x = list(a.axes(c["self"]))
    d = c["dim"] % len(x)
    a.labels.freeze_axis(x[d], "indexed")
    x[d] = axis(c.shape[d])
    return tuple(x)


def _indexed(a: Analysis, c: Call) -> tuple[Axes, int, int]:
    """The axes of ``self[indices]``, and from where to where the indices' own axes stand among them."""
    x = a.axes(c["self"])
    at = {d: n for d, n in enumerate(c["indices"]) if n is not None}
    if any(n.meta["val"].dtype in (torch.bool, torch.uint8) for n in at.values()):
        raise Unsupported("indexed by a mask")
    for d, n in at.items():
        a.labels.freeze_axes([x[d], *a.axes(n)], "indexed")
    places = sorted(at)
    adjacent = places == list(range(places[0], places[-1] + 1))
    where = places[0] if adjacent else 0  # NumPy's rule: separated indices put their result first
    shape = np.broadcast_shapes(*[[size(ax) for ax in a.axes(n)] for n in at.values()])
    rest: Axes = tuple(ax for d, ax in enumerate(x) if d not in at)
    return (*rest[:where], *fixed(shape), *rest[where:]), where, where + len(shape)


@TABLE.rule("index")
def _index(a: Analysis, c: Call) -> Value:
    chosen = _choose(a, c)
    return _indexed(a, c)[0] if chosen is None else chosen


_index_select.rewrites(_rechosen)
_index.rewrites(_rechosen)


@TABLE.rule("index_put")
def _index_put(a: Analysis, c: Call) -> Value:
    a.labels.broadcast([_indexed(a, c)[0], a.axes(c["values"])])
    return a.axes(c["self"])


@TABLE.rule("index_add", "index_copy", "index_reduce")
def _index_add(a: Analysis, c: Call) -> Value:
    x, source = list(a.axes(c["self"])), list(a.axes(c["source"]))
    d = c["dim"] % len(x)
    a.labels.freeze_axes([x[d], source[d]], "indexed")
    place, x[d], source[d] = x[d], (), ()
    joined = list(a.labels.broadcast([tuple(x), tuple(source)]))
    joined[d] = place
    return tuple(joined)


def _beside(a: Analysis, axes: Axes, others: Axes, d: int, what: str) -> Axes:
    """Join two tensors along all dimensions but ``d``; where one has fewer positions than the other, both stay."""
    a.labels.freeze_axes([axes[d], others[d]], what)
    out: list[Axis] = []
    for i, (x, y) in enumerate(zip(axes, others, strict=True)):
        same = i != d and size(x) == size(y)
        if not same:
            a.labels.freeze_axes([x, y], what)
        out.append(a.labels.unify(x, y) if same else y)
    return tuple(out)


@TABLE.rule("gather", "take_along_dim")
def _gather(a: Analysis, c: Call) -> Value:
    if c.get("dim") is None:
        raise Unsupported("runs over the flattened tensor")
    x, index = a.axes(c["self"]), a.axes(c["index" if "index" in c else "indices"])
    return _beside(a, x, index, c["dim"] % max(len(x), 1), "indexed")


@TABLE.rule("scatter", "scatter_add", "scatter_reduce")
def _scatter(a: Analysis, c: Call) -> Value:
    x, d = a.axes(c["self"]), c["dim"] % max(len(a.axes(c["self"])), 1)
    for name in ("index", "src"):
        if isinstance(c.get(name), fx.Node):
            _beside(a, x, a.axes(c[name]), d, "indexed")
    return x
