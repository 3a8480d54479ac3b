"""Take channels out: slice the weights, rewrite the constants of the graph, export again."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from ..network import Network, retrace
from .analysis import Analysis
from .call import Call
from .labels import Axes, Axis, Ids, size
from .rules import rule_of
from .table import Replacement

__all__ = ["Cut", "remove"]


class Cut:
    """What is left of an analysed graph when some classes go. The rewriting halves of the rules work on it.

    Args:
        analysis: of the graph.
        removed: representatives of the classes that go.
        graph: where nodes for sizes that are computed at run time are inserted, and the copy of each node there; without
            it no such size can be rewritten.
    """

    def __init__(self, analysis: Analysis, removed: Iterable[int], copies: dict[fx.Node, fx.Node] | None = None):
        self.analysis = analysis
        self._removed = np.unique(np.fromiter(removed, np.int64))
        self._copies = copies
        self._at: fx.Node | None = None

    def keep(self, labels: Ids) -> NDArray[np.bool_]:
        """Which positions stay."""
        return ~np.isin(self.analysis.labels.find(labels), self._removed)

    def kept(self, a: Axis) -> int:
        """How many positions of an axis stay."""
        return math.prod(n if labels is None else int(self.keep(labels).sum()) for n, labels in a)

    def mask(self, a: Axis) -> NDArray[np.bool_]:
        """Which positions of an axis stay."""
        mask = np.ones(1, bool)
        for n, labels in a:
            mask = np.outer(mask, np.ones(n, bool) if labels is None else self.keep(labels)).ravel()
        return mask

    def axes(self, node: fx.Node) -> Axes:
        """The axes of an operand or result, as they were."""
        return self.analysis.axes(node)

    def parts(self, node: fx.Node) -> list[Axes]:
        """The axes of each of several results."""
        value = self.analysis.values[node]
        assert isinstance(value, list)
        return [axes for axes in value if axes is not None]

    def sizes(self, old: Sequence[Any], axes: Sequence[Axis]) -> list[Any]:
        """Size arguments as they are afterwards; -1 stays, and sizes computed from the batch are scaled."""
        return [self._size(n, a) for n, a in zip(old, axes, strict=True)]

    def _size(self, old: Any, a: Axis) -> Any:
        kept, full = self.kept(a), size(a)
        if kept == full or (isinstance(old, int) and old == -1):
            return old
        if isinstance(old, int):
            return kept
        # batch * heads, say: the batch is in the expression, the heads are hidden in it
        assert self._at is not None
        common = math.gcd(kept, full)
        scaled = self.inserted(self._at, operator.mul, old, kept // common)
        return self.inserted(self._at, operator.floordiv, scaled, full // common)

    def inserted(self, before: fx.Node, target: Any, *args: Any) -> fx.Node:
        """A new call in the graph that is rewritten, before the place of a node of the analysed one."""
        assert self._copies is not None
        at = self._copies[before]
        with at.graph.inserting_before(at):
            return at.graph.call_function(target, fx.map_arg(args, lambda n: self._copies.get(n, n)))  # type: ignore[union-attr, arg-type]

    def arguments(self, node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """(target, args, kwargs) of a call afterwards, in terms of the analysed graph's nodes."""
        rule = rule_of(node.target)
        same = (node.target, node.args, dict(node.kwargs))
        if rule is None or rule.rewrite is None or not self.touches(node):
            return same
        self._at = node
        call = Call(node)
        changed = rule.rewrite(self, call)
        if isinstance(changed, Replacement):
            return changed.target, changed.arguments, {}
        changed = {name: value for name, value in changed.items() if value != call[name]}
        return (node.target, *call.with_arguments(changed)) if changed else same

    def touches(self, node: fx.Node) -> bool:
        """Whether anything goes from what a call takes or gives."""
        for n in (node, *node.all_input_nodes):
            value = self.analysis.values.get(n)
            for axes in value if isinstance(value, list) else [value]:
                if any(self.kept(a) != size(a) for a in axes or ()):
                    return True
        return False


def remove(network: Network, analysis: Analysis, removed: Iterable[int]) -> Network:
    """A network without some channels.

    Args:
        network: stays as it was.
        analysis: of ``network``.
        removed: representatives of the classes that go, from `channels_of`.

    Returns:
        The smaller network, exported again, in evaluation mode on the same device; names of weights as they were.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.zeros(1, 4))
        >>> analysis = analyse(network)
        >>> smaller = remove(network, analysis, channels_of(analysis).groups[0].channels[:2])
        >>> [tuple(p.shape) for p in smaller.parameters()]
        [(4, 4), (4,), (2, 4), (2,)]
    """
    module = copied(network.module)
    originals = list(network.module.graph.nodes)
    copies = dict(zip(originals, list(module.graph.nodes), strict=True))
    cut = Cut(analysis, removed, copies)
    _slice_weights(module, cut)
    for node in originals:
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
            target, args, kwargs = cut.arguments(node)
            if (target, args, kwargs) != (node.target, node.args, dict(node.kwargs)):
                there = copies[node]
                there.target = target
                there.args = fx.map_arg(args, lambda n: copies.get(n, n))
                there.kwargs = fx.map_arg(kwargs, lambda n: copies.get(n, n))
    module.graph.lint()
    module.recompile()
    kept = network.kept.after(_masks(cut))
    smaller = retrace(Network(module, network.example_inputs, network.history, kept)).to(network.device)
    for name, parameter in smaller.module.named_parameters():
        parameter.requires_grad_(network.module.get_parameter(name).requires_grad)
    return smaller.eval()


def copied(module: fx.GraphModule) -> fx.GraphModule:
    """A deep copy, without the warning that torch's own pytree gives on the way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(module)


def _slice_weights(module: fx.GraphModule, cut: Cut) -> None:
    for parameter in cut.analysis.parameters.values():
        smaller = sliced(parameter.tensor.detach(), [cut.keep(ids) for ids in parameter.labels])
        if smaller.shape == parameter.tensor.shape:
            continue
        value: Tensor = smaller.contiguous()
        if isinstance(parameter.tensor, nn.Parameter):
            value = nn.Parameter(value, parameter.tensor.requires_grad)
        for name in parameter.names:  # tied weights stay tied
            path, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(path), leaf, value)


def _masks(cut: Cut) -> dict[str, list[NDArray[np.bool_]]]:
    """For each weight, under every name it has, which positions of each axis stay."""
    parameters = cut.analysis.parameters.values()
    return {name: [cut.keep(ids) for ids in p.labels] for p in parameters for name in p.names}


def sliced(tensor: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    """The positions of a tensor that every mask keeps, one mask for each dimension."""
    for dim, mask in enumerate(masks):
        if not mask.all():
            tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(mask)).to(tensor.device))
    return tensor
