"""Run the operator table over a network's graph: which positions of which weights go together."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx

from ..network import EXPORT_BATCH, Network
from .call import Call, operator_name, shape_of
from .labels import Axes, Axis, Ids, Labels, axis, fixed, size
from .rules import rule_of
from .table import Unsupported, Value

__all__ = ["NO_RULE", "Analysis", "Parameter", "Product", "analyse", "tensor_of"]

NO_RULE = "no rule for this operator"
"""Why an unknown operator froze what it touches."""

_ATTENTION = {"matmul", "bmm", "scaled_dot_product_attention", "einsum", "baddbmm"}
_LAYOUT = {
    "transpose", "permute", "view", "reshape", "select", "unsqueeze", "squeeze", "getitem", "unbind", "contiguous", "clone",
    "expand", "slice", "split", "chunk", "mul", "add", "div", "cat", "softmax", "dropout", "neg", "to", "split_with_sizes",
    "movedim", "unflatten", "flatten",
}  # fmt: skip
_LOOKAHEAD = 14  # operators between a split into heads and its attention product
_PASSES = 4


class Parameter(NamedTuple):
    """A weight or buffer (once, however many names it has) and the labels of its axes."""

    names: tuple[str, ...]
    tensor: Tensor
    labels: tuple[Ids, ...]


class Product(NamedTuple):
    """Multiply-accumulates of one example: ``factor`` times the sizes of ``axes``."""

    factor: float
    axes: Axes


class Analysis:
    """Labels of every axis of every tensor in a network's graph.

    Rules work on it through `axes`, `reshape`, `contracts`, `mixes`, `counts` and the `Labels` in ``labels``.

    Attributes:
        module: the analysed graph module.
        labels: the union-find.
        values: node to its axes; a list of axes for several results.
        parameters: weights and buffers, by the first name of each.
        contractions: (node, operand, dim): a sum over an axis of a weight or activation. The oracle zeroes what is removed.
        mixers: nodes that take a statistic over an axis (mean, softmax, norms): it is then taken over what is kept.
        products: the multiply-accumulates, for counting as channels go.
        pieces: labels of parts that were sliced off, none of which may become empty.
        splits: labelled splits, (node name, number) to ('outer' or 'inner', the labels kept).
    """

    def __init__(self, module: fx.GraphModule, sides: dict[tuple[str, int], str] | None = None):
        self.module = module
        self.labels = Labels()
        self.values: dict[fx.Node, Value] = {}
        self.parameters: dict[str, Parameter] = {}
        self.contractions: list[tuple[fx.Node, fx.Node, int]] = []
        self.mixers: set[fx.Node] = set()
        self.products: list[Product] = []
        self.pieces: list[Ids] = []
        self.splits: dict[tuple[str, int], tuple[str, Ids]] = {}
        self.sides = sides or {}
        self._names: dict[int, str] = {}
        for node in module.graph.nodes:
            self.labels.context = node
            self.values[node] = self._value(node)

    # ---- what rules call

    def axes(self, node: Any) -> Axes:
        """The axes of an operand.

        Raises:
            Unsupported: it is not a tensor of the graph.
        """
        value = self.values.get(node) if isinstance(node, fx.Node) else None
        if not isinstance(value, tuple):
            raise Unsupported("an operand is not a tensor")
        return value

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int], node: fx.Node) -> Axes:
        """`Labels.reshape` with the choice of side: heads stay whole where attention follows, groups keep their number."""

        def side(number: int) -> str:
            return self.sides.get((node.name, number)) or ("outer" if _feeds_attention(node) else "inner")

        out, kept = self.labels.reshape(axes, shape, side)
        self.splits.update({(node.name, i): (side(i), labels) for i, labels in kept.items()})
        return out

    def contracts(self, c: Call, operand: fx.Node, dim: int) -> None:
        """The call sums over this axis of ``operand``: zeroing removed positions there must equal their removal."""
        self.contractions.append((c.node, operand, dim))

    @property
    def readers(self) -> Ids:
        """Labels of positions where a channel is read: the consuming sides of all sums, as the oracle zeroes them."""
        found = [atom.labels for _, operand, dim in self.contractions for atom in self.axes(operand)[dim]]
        ids: Ids = np.unique(np.concatenate([x for x in found if x is not None] or [np.zeros(0, np.int64)]))
        return ids

    def mixes(self, c: Call, *axes: Axis) -> None:
        """The call takes a statistic over these axes, so that it changes when positions go."""
        if any(self.labels.alive(a) for a in axes):
            self.mixers.add(c.node)

    def counts(self, c: Call, axes: Sequence[Axis], factor: float = 1.0) -> None:
        """The call multiplies and accumulates ``factor`` times the product of the sizes of ``axes``."""
        value = c.value[0] if isinstance(c.value, tuple | list) else c.value
        batched = any(not isinstance(n, int) for n in value.shape)
        self.products.append(Product(factor / (EXPORT_BATCH if batched else 1), tuple(axes)))

    def take(self, a: Axis, start: int, stop: int, step: int = 1) -> Axis:
        """Positions ``start:stop:step`` of an axis; the part may not become empty."""
        if (start, step) == (0, 1) and stop >= size(a):
            return a
        labels = self.labels.flat(a)
        n = len(range(start, min(stop, size(a)), step))
        if labels is None:
            return axis(n)
        if step != 1:
            self.labels.freeze(labels, "sliced with a step")
        part = labels[start:stop:step]
        if n == 1:
            self.labels.freeze(part, "a single position is taken out")
        elif n:
            self.pieces.append(part)
        return axis(n, part)

    # ---- one node

    def _value(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return _fixed_value(node.meta.get("val"))
        if node.op == "get_attr":
            return self._attribute(node)
        if node.op == "call_function":
            return self._call(node)
        for operand in node.all_input_nodes:
            self._freeze(operand, "the network's output" if node.op == "output" else NO_RULE)
        return _fixed_value(node.meta.get("val"))

    def _attribute(self, node: fx.Node) -> Value:
        tensor = tensor_of(self.module, str(node.target))
        if tensor is None:
            return None
        first = self._names.setdefault(id(tensor), str(node.target))
        if first not in self.parameters:
            labels = tuple(self.labels.new(n) for n in tensor.shape)
            self.parameters[first] = Parameter((), tensor, labels)
            for one in labels:
                if len(one) == 1:
                    self.labels.freeze(one, "an axis of one position")
                elif not tensor.is_floating_point():
                    self.labels.freeze(one, "a table of integers")
        known = self.parameters[first]
        if node.target not in known.names:
            self.parameters[first] = known._replace(names=(*known.names, str(node.target)))
        return tuple(axis(n, one) for n, one in zip(tensor.shape, known.labels, strict=True))

    def _call(self, node: fx.Node) -> Value:
        if node.target is operator.getitem:
            source = self.values.get(node.args[0])  # type: ignore[arg-type]
            return source[node.args[1]] if isinstance(source, list) else _fixed_value(node.meta.get("val"))  # type: ignore[index]
        call = Call(node)
        rule = rule_of(node.target)
        operands = [n for n in node.all_input_nodes if self.values.get(n) is not None]
        if rule is None:
            for operand in operands:
                self._freeze(operand, NO_RULE)
            return _fixed_value(call.value)
        try:
            value = rule.relate(self, call)
        except Unsupported as reason:
            for operand in operands:
                self._freeze(operand, str(reason))
            return _fixed_value(call.value)
        if isinstance(value, tuple) and isinstance(call.value, Tensor):
            assert [size(a) for a in value] == call.shape, f"the rule for {call.name} gave axes that do not fit {call.shape}"
        return value

    def _freeze(self, node: fx.Node, reason: str) -> None:
        value = self.values.get(node)
        for axes in value if isinstance(value, list) else [value]:
            self.labels.freeze_axes(axes or (), reason)


def analyse(network: Network) -> Analysis:
    """Label every axis of a network's graph.

    Where a split of a labelled axis (``view(b, heads, head_dim)``) ended up frozen, the other side is tried.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> found = analyse(trace(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.zeros(1, 4)))
        >>> [int((~found.labels.frozen(ids)).sum()) for ids in found.parameters["0.weight"].labels]
        [6, 0]
    """
    best = Analysis(network.module)
    sides: dict[tuple[str, int], str] = {}
    for _ in range(_PASSES - 1):
        dead = {
            key: "inner" if side == "outer" else "outer"
            for key, (side, labels) in best.splits.items()
            if key not in sides and not best.labels.live(labels)
        }
        if not dead:
            break
        sides |= dead
        other = Analysis(network.module, sides)
        if _freedom(other) >= _freedom(best):
            best = other
    return best


def _freedom(analysis: Analysis) -> int:
    """How many classes could go."""
    labels = [ids for p in analysis.parameters.values() for ids in p.labels]
    flat = [analysis.labels.find(ids)[~analysis.labels.frozen(ids)] for ids in labels]
    return len({int(x) for ids in flat for x in ids})


def tensor_of(module: torch.nn.Module, name: str) -> Tensor | None:
    """The parameter, buffer or constant of that dotted name; None where it is something else."""
    value = operator.attrgetter(name)(module)
    return value if isinstance(value, Tensor) else None


def _fixed_value(value: Any) -> Value:
    if isinstance(value, Tensor):
        return fixed(shape_of(value))
    if isinstance(value, tuple | list):
        return [fixed(shape_of(t)) if isinstance(t, Tensor) else None for t in value]
    return None


def _feeds_attention(node: fx.Node) -> bool:
    """Whether what comes out soon enters a product of two activations."""
    todo: list[tuple[fx.Node, int]] = [(node, 0)]
    seen: set[fx.Node] = set()
    while todo:
        at, depth = todo.pop()
        for user in _calls(at.users):
            if user in seen:
                continue
            seen.add(user)
            name = operator_name(user.target)
            if name in _ATTENTION:
                return True
            if name in _LAYOUT and depth < _LOOKAHEAD:
                todo.append((user, depth + 1))
    return False


def _calls(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    return [n for n in nodes if n.op == "call_function"]
