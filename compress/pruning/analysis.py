"""Run the operator table over a network's graph: which positions of which weights go together."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from ..network import EXPORT_BATCH, Network
from .call import Call, operator_name, shape_of
from .labels import Axes, Axis, Ids, Labels, axis, fixed, size
from .rules import rule_of
from .table import Unsupported, Value

__all__ = ["NO_RULE", "RULE_FAILED", "Analysis", "Attention", "Parameter", "Product", "analyse", "tensor_of"]

NO_RULE = "no rule for this operator"
"""Why an unknown operator froze what it touches."""

RULE_FAILED = "its rule failed"
"""How the reason begins where a rule met something that it was not written for: a bug, but one that freezes."""

Attention: TypeAlias = Literal["heads", "head_dim"]
"""What goes from an attention: whole heads, or the same positions of every head."""

_PRODUCTS = {"matmul", "bmm", "scaled_dot_product_attention", "einsum", "baddbmm"}
_LAYERS = _PRODUCTS | {"mm", "addmm", "linear", "bilinear", "embedding", "conv1d", "conv2d", "conv3d", "lstm", "gru"}
_PASSES = 4


class Parameter(NamedTuple):
    """A weight or buffer (once, however many names it has) and the labels of its axes."""

    names: tuple[str, ...]
    tensor: Tensor
    labels: tuple[Ids, ...]


class Product(NamedTuple):
    """Multiply-accumulates of one example, done by the graph node of that name: ``factor`` times the sizes of ``axes``."""

    factor: float
    axes: Axes
    node: str


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

    def __init__(self, module: fx.GraphModule, sides: dict[tuple[str, int], str] | None = None, attention: Attention = "heads"):
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
        self._head_side = "outer" if attention == "heads" else "inner"
        self._to_attention = _to_attention(module.graph)
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
        """`Labels.reshape` with the choice of side: `Attention` where that follows; groups of channels keep their number."""

        def side(number: int) -> str:
            return self.sides.get((node.name, number)) or (self._head_side if node in self._to_attention else "inner")

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
        self.products.append(Product(factor / (EXPORT_BATCH if batched else 1), tuple(axes), c.node.name))

    def take(self, a: Axis, start: int, stop: int, step: int = 1) -> Axis:
        """Positions ``start:stop:step`` of an axis; the part may not become empty.

        With a step, the positions between one and the next go together: then the same step finds what is kept.
        """
        if (start, step) == (0, 1) and stop >= size(a):
            return a
        labels = self.labels.flat(a)
        n = len(range(start, min(stop, size(a)), step))
        if labels is None:
            return axis(n)
        if step != 1 and (size(a) % step or start >= step or n * step != size(a)):
            self.labels.freeze(labels, "sliced with a step that does not divide it")
        elif step != 1:
            labels = np.repeat(self.labels.tie(labels, n, step, keep="outer"), step)
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
                elif not (tensor.is_floating_point() or tensor.is_complex()):
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
        try:
            return self._ruled(call)
        except Unsupported as why:
            reason = str(why)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            reason = f"{RULE_FAILED} ({type(error).__name__}: {error})"  # one operator's surprise must not cost the network
        for operand in node.all_input_nodes:
            self._freeze(operand, reason)
        return _fixed_value(call.value)

    def _ruled(self, call: Call) -> Value:
        rule = rule_of(call.node.target)
        if rule is None:
            raise Unsupported(NO_RULE)
        value = rule.relate(self, call)
        if isinstance(value, tuple) and isinstance(call.value, Tensor):
            assert [size(a) for a in value] == call.shape, f"axes that do not fit {call.shape}"
        return value

    def _freeze(self, node: fx.Node, reason: str) -> None:
        value = self.values.get(node)
        for axes in value if isinstance(value, list) else [value]:
            self.labels.freeze_axes(axes or (), reason)


def analyse(network: Network, attention: Attention = "heads") -> Analysis:
    """Label every axis of a network's graph.

    Where a split of a labelled axis (``view(b, heads, head_dim)``) ended up frozen, the other side is tried, for that split
    and for all of them.

    Args:
        network: whatever `trace` gave; it stays as it was.
        attention: 'heads' frees whole attention heads, 'head_dim' the positions inside them, the same ones in every head.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> found = analyse(trace(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.zeros(1, 4)))
        >>> [int((~found.labels.frozen(ids)).sum()) for ids in found.parameters["0.weight"].labels]
        [6, 0]
    """
    best, settled = _analysed(network.module, attention)
    if not settled:
        other, _ = _analysed(network.module, "head_dim" if attention == "heads" else "heads")
        best = other if _freedom(other) > _freedom(best) else best
    return best


def _analysed(module: fx.GraphModule, attention: Attention) -> tuple[Analysis, bool]:
    """The best analysis of a few, with the other side of splits that ended up frozen; whether the first had none of those."""
    best = Analysis(module, attention=attention)
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
        other = Analysis(module, sides, attention)
        if _freedom(other) >= _freedom(best):
            best = other
    return best, not sides


def _freedom(analysis: Analysis) -> int:
    """How many positions of weights could go."""
    return sum(int((~analysis.labels.frozen(ids)).sum()) for p in analysis.parameters.values() for ids in p.labels)


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


def _to_attention(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose result enters a product of two activations before it meets a weight: there its channels are heads."""
    active: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in active for n in node.all_input_nodes):
            active.add(node)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        for user in node.users:
            name = operator_name(user.target)
            product = name in _PRODUCTS and sum(n in active for n in user.all_input_nodes) > 1
            if product or (user in found and name not in _LAYERS):
                found.add(node)
    return found
