"""A network as the steps that a runtime takes, their shapes as functions of how many channels each group keeps.

What runtimes fuse is one step: a batch normalisation folds into the convolution or product before it, a ReLU into the step
before it, and reshapes take no time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx

from ..network import EXPORT_BATCH
from .analysis import Analysis
from .call import Call, hint, operator_name
from .groups import Channels
from .labels import Axes, Axis, axis, size
from .sizes import Counts, Extent, Sizes

__all__ = ["Layer", "Step", "Steps"]

Shape = tuple[int, ...]

_NOTHING = {
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view", "contiguous", "clone", "detach", "alias",
    "dropout", "feature_dropout", "to", "_to_copy", "identity", "expand", "expand_as", "getitem", "lift_fresh_copy",
    "sym_size", "_assert_tensor_metadata",
}  # fmt: skip
"""Operators that move no data in a deployed file, or none worth counting."""
_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "hardtanh": "relu6"}
_FOLDS = ("conv", "depthwise", "conv_transpose", "linear")
_CARRIES = (*_FOLDS, "add")
"""Steps whose kernels clamp what they write, so that a ReLU behind them is free."""
_NAMES = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), "conv"),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), "conv_transpose"),
    **dict.fromkeys(("bmm", "mm"), "matmul"),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool2d_with_indices"), "max_pool"),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d"), "avg_pool"),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d"), "mean"),
    **dict.fromkeys(("split_with_sizes", "chunk"), "split"),
    "addmm": "linear", "batch_norm": "scale", "sub": "add", "div": "mul", "constant_pad_nd": "pad",
}  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """One timed step: an operator with what is fused into it, at definite sizes.

    Attributes:
        operator: ``'conv'`` (of any rank), ``'depthwise'``, ``'conv_transpose'``, ``'linear'``, ``'matmul'``, ``'add'``,
            ``'mul'``, ``'scale'`` (a batch normalisation that folds into nothing), ``'max_pool'``, ``'avg_pool'``, ``'mean'``,
            ``'cat'``, ``'pad'``, ``'slice'``, ``'input'`` (what a call costs before its first step), else the name of the ATen
            operator.
        inputs: shapes of the activations that it reads, batch left out, channels first.
        output: shape of what it writes.
        kernel: of a convolution or pooling; also stride, padding and dilation, one number for each spatial dimension.
        stride: see ``kernel``.
        padding: see ``kernel``.
        dilation: see ``kernel``.
        groups: of a convolution.
        activation: ``'relu'``, ``'relu6'`` or ``''``: what is fused into it.
    """

    operator: str
    inputs: tuple[Shape, ...]
    output: Shape
    kernel: Shape = ()
    stride: Shape = ()
    padding: Shape = ()
    dilation: Shape = ()
    groups: int = 1
    activation: str = ""


@dataclass
class Step:
    """A `Layer` whose sizes are not settled yet.

    Attributes:
        node: name of the graph node that it comes from.
        nodes: names of all that is fused into it, ``node`` first.
        operands: names of the nodes that it reads.
        layer: without its shapes.
        inputs: of the activations that it reads, without the batch.
        output: of what it writes; the first of several results.
        written: how many values each of its results has.
    """

    node: str
    nodes: list[str]
    operands: tuple[str, ...]
    layer: Layer
    inputs: tuple[tuple[Extent, ...], ...]
    output: tuple[Extent, ...]
    written: tuple[Extent, ...]

    @property
    def extents(self) -> list[Extent]:
        """Every size, inputs first."""
        return [e for shape in (*self.inputs, self.output) for e in shape]

    def at(self, values: Iterable[float]) -> Layer:
        """The layer when its `extents` have these values."""
        numbers = [round(float(v)) for v in values]
        shapes, start = [], 0
        for shape in (*self.inputs, self.output):
            shapes.append(tuple(numbers[start : start + len(shape)]))
            start += len(shape)
        return replace(self.layer, inputs=tuple(shapes[:-1]), output=shapes[-1])

    def gone(self, without: Collection[str]) -> bool:
        """Whether it is not computed when these nodes are gone: it is one of them, or adds what is."""
        return self.node in without or (self.layer.operator == "add" and any(n in without for n in self.operands))


@dataclass(frozen=True)
class Steps:
    """The steps of a network in the order that they run in.

    Attributes:
        sizes: what their extents refer to.
        steps: the steps.

    Example:
        >>> import numpy as np
        >>> from torch import nn, zeros
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
        >>> steps = Steps.of(channels_of(analyse(trace(net, zeros(1, 3, 6, 6)))))
        >>> [(x.operator, x.inputs, x.output, x.activation) for x in steps.at(np.array([7.0]))[1:]]
        [('conv', ((3, 6, 6),), (7, 4, 4), 'relu'), ('conv', ((7, 4, 4),), (4, 4, 4), '')]
    """

    sizes: Sizes
    steps: tuple[Step, ...] = field(repr=False)

    @classmethod
    def of(cls, channels: Channels) -> Steps:
        """The steps of the analysed network."""
        reader = _Reader(channels.analysis, Sizes(channels))
        for node in channels.analysis.values:
            reader.read(node)
        return cls(reader.sizes, tuple(reader.steps))

    def at(self, counts: Counts, without: Collection[str] = ()) -> tuple[Layer, ...]:
        """Every layer with ``counts[g]`` channels left in each group, ``[G]``, and the nodes ``without`` gone."""
        steps = [s for s in self.steps if not s.gone(without)]
        return tuple(s.at(self.sizes.of(s.extents, counts)) for s in steps)


class _Reader:
    """Goes along a graph and makes steps of what is not fused into one before."""

    def __init__(self, analysis: Analysis, sizes: Sizes):
        self.analysis, self.sizes = analysis, sizes
        self.steps: list[Step] = []
        self._source: dict[fx.Node, Step] = {}  # by which step a node's value was written

    def read(self, node: fx.Node) -> None:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor):
            self._source[node] = self._add(node, Layer("input", (), ()), [])
        if node.op != "call_function":
            return
        operands = [n for n in node.all_input_nodes if n.op != "get_attr" and n in self._source]
        if operands and not self._fused(node, operands) and isinstance(node.meta.get("val"), Tensor | tuple | list):
            call = Call(node)
            self._source[node] = self._add(node, _unsized(call, self.analysis), operands)

    def _fused(self, node: fx.Node, operands: list[fx.Node]) -> bool:
        """Whether the node is part of the step before it; noted where it is."""
        name, before = operator_name(node.target), self._source[operands[0]]
        alone = len(operands) == 1 and len(operands[0].users) == 1
        operator, free = before.layer.operator, alone and not before.layer.activation
        if name in _ACTIVATIONS and free and operator in _CARRIES:
            before.layer = replace(before.layer, activation=_ACTIVATIONS[name])
        elif name == "slice" and alone and operator == "slice":
            before.output, before.written = self._shape(node), self._written(node)
        elif not (name in _NOTHING or _whole(node, name) or (name == "batch_norm" and free and operator in _FOLDS)):
            return False
        before.nodes.append(node.name)
        self._source[node] = before
        return True

    def _add(self, node: fx.Node, layer: Layer, operands: list[fx.Node]) -> Step:
        inputs = tuple(self._shape(n) for n in operands)
        step = Step(
            node.name, [node.name], tuple(n.name for n in operands), layer, inputs, self._shape(node), self._written(node)
        )
        self.steps.append(step)
        return step

    def _shape(self, node: fx.Node) -> tuple[Extent, ...]:
        return tuple(self.sizes.extent([a]) for a in (_results(self.analysis, node) or [()])[0])

    def _written(self, node: fx.Node) -> tuple[Extent, ...]:
        return tuple(self.sizes.extent(axes) for axes in _results(self.analysis, node))


def _results(analysis: Analysis, node: fx.Node) -> list[Axes]:
    """The axes of each result for one example."""
    value, meta = analysis.values.get(node), node.meta.get("val")
    pairs = zip(value, meta or (), strict=False) if isinstance(value, list) else [(value, meta)]
    return [_one_example(a, list(t.shape)) for a, t in pairs if a is not None and isinstance(t, Tensor)]


def _one_example(axes: Axes, shape: list[Any]) -> Axes:
    """The batch's axis is left out, or its factor where an axis holds more."""
    parted = [a if isinstance(n, int) else _unbatched(a, hint(n)) for a, n in zip(axes, shape, strict=True)]
    return tuple(a for i, a in enumerate(parted) if a or i or isinstance(shape[i], int))


def _unbatched(a: Axis, full: int) -> Axis:
    batch = next((i for i, atom in enumerate(a) if atom.labels is None and atom.size == EXPORT_BATCH), None)
    if batch is not None:
        return (*a[:batch], *a[batch + 1 :])
    return axis(max(full // EXPORT_BATCH, 1)) if full == size(a) else a


def _whole(node: fx.Node, name: str) -> bool:
    """Whether a slice takes everything."""
    source = node.args[0] if node.args else None
    if name != "slice" or not isinstance(source, fx.Node):
        return False
    return list(node.meta["val"].shape) == list(source.meta["val"].shape)


def _unsized(c: Call, analysis: Analysis) -> Layer:
    """The call as a layer whose shapes and activation are still to come."""
    operator = _NAMES.get(c.name, c.name)
    if operator in ("conv", "conv_transpose"):
        weight = analysis.axes(c["weight"])
        rank = len(weight) - 2
        kernel, dilation = tuple(size(a) for a in weight[2:]), _per_dim(c["dilation"], rank)
        padding = c["padding"] if c["padding"] != "same" else [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
        shape = (kernel, _per_dim(c["stride"], rank), _per_dim(padding, rank), dilation)
        groups = c["groups"] if isinstance(c["groups"], int) else max(hint(c["groups"].meta["val"]) // EXPORT_BATCH, 1)
        if operator == "conv" and groups > 1 and groups == size(analysis.axes(c["input"])[-rank - 1]):
            return Layer("depthwise", (), (), *shape)  # as many groups as channels, however many these are
        return Layer(operator, (), (), *shape, groups)
    if operator in ("max_pool", "avg_pool"):
        kernel = tuple(c["kernel_size"])
        return Layer(operator, (), (), kernel, _per_dim(c["stride"] or kernel, len(kernel)), _per_dim(c["padding"], len(kernel)))
    return Layer(operator, (), ())


def _per_dim(value: Any, rank: int) -> Shape:
    if isinstance(value, str) or value is None:
        return (0,) * rank
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * rank if len(values) == 1 else values
