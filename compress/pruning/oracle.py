"""The oracle of pruning: the original network at full size, with what was removed made to count for nothing.

Every sum over channels (convolutions, products, recurrent layers) gets zeros in place of the removed channels' weights on
its consuming side. Where an operator takes a statistic over channels (means, softmax, normalisation over channels), removal
changes what it means; there the oracle takes the statistic over the kept positions, and fills the removed ones with noise, so
that whatever still read them would show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from .analysis import Analysis
from .rewrite import Cut, sliced

__all__ = ["masked", "relative_error"]


def masked(analysis: Analysis, removed: Iterable[int]) -> Callable[..., Any]:
    """What a pruned network must compute, computed by the original.

    Args:
        analysis: of the original network.
        removed: representatives of the classes that went.

    Returns:
        A function of the network's inputs, giving its outputs.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> from .rewrite import remove
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2)), torch.zeros(1, 4))
        >>> analysis = analyse(network)
        >>> gone, x = channels_of(analysis).groups[0].channels[:2], torch.randn(3, 4)
        >>> relative_error(remove(network, analysis, gone)(x), masked(analysis, gone)(x)) < 1e-5
        True
    """
    oracle = _Masked(analysis, Cut(analysis, removed))

    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return oracle.run(*inputs)

    return run


def relative_error(outputs: Any, expected: Any) -> float:
    """Largest difference over largest magnitude, of whole (nested) outputs; infinite where shapes differ or only one is NaN.

    Example:
        >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
        0.5
    """
    mine, theirs = (torch.utils._pytree.tree_leaves(x) for x in (outputs, expected))
    if len(mine) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            worst = max(worst, _difference(a, b))
    return worst


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    a, b = a.detach().double(), b.detach().double()
    apart = ~((a == b) | (a.isnan() & b.isnan()))  # what is not finite must be the same in both
    if not apart.any():
        return 0.0
    error = (
        float((a - b)[apart].abs().max() / b[b.isfinite()].abs().amax().clamp(min=1e-12)) if b.isfinite().any() else float("nan")
    )
    return error if error == error else float("inf")


class _Masked(fx.Interpreter):
    """Runs the analysed graph itself; its nodes are the keys of the analysis."""

    def __init__(self, analysis: Analysis, cut: Cut):
        super().__init__(analysis.module)
        self._cut = cut
        self._zeroed: dict[fx.Node, list[tuple[fx.Node, int]]] = {}
        for node, operand, dim in analysis.contractions:
            self._zeroed.setdefault(node, []).append((operand, dim))

    def run_node(self, n: fx.Node) -> Any:
        if n in self._cut.analysis.mixers and self._cut.touches(n):
            return self._over_kept(n)
        if n not in self._zeroed:
            return super().run_node(n)
        values = dict(self.env)
        for operand, dim in self._zeroed[n]:
            keep = torch.from_numpy(self._cut.mask(self._cut.axes(operand)[dim])).to(values[operand].device)
            shape = [-1 if d == dim else 1 for d in range(values[operand].dim())]
            values[operand] = torch.where(keep.view(shape), values[operand], torch.zeros_like(values[operand]))
        args, kwargs = (fx.map_arg(x, lambda m: values[m]) for x in (n.args, n.kwargs))
        return n.target(*args, **kwargs)  # type: ignore[operator, misc, arg-type]

    def _over_kept(self, n: fx.Node) -> Any:
        """Run a statistic on the kept positions alone, then put the result back among noise."""
        target, args, kwargs = self._cut.arguments(n)

        def small(m: fx.Node) -> Any:
            value = self.env[m]
            if not isinstance(value, Tensor):
                return value
            # heads in the batch's axis: the mask is of the batch that was exported
            return sliced(value, [np.resize(mask, n) for mask, n in zip(self._masks(m), value.shape, strict=True)])

        result = target(*fx.map_arg(args, small), **fx.map_arg(kwargs, small))
        if isinstance(result, tuple):
            parts = zip(result, self._cut.parts(n), strict=True)
            return tuple(_scatter(part, [self._cut.mask(a) for a in axes]) for part, axes in parts)
        return _scatter(result, self._masks(n))

    def _masks(self, n: fx.Node) -> list[NDArray[np.bool_]]:
        return [self._cut.mask(a) for a in self._cut.axes(n)]


def _scatter(small: Tensor, masks: list[NDArray[np.bool_]]) -> Tensor:
    for dim, mask in enumerate(masks):
        if not mask.all():
            shape = list(small.shape)
            shape[dim] = shape[dim] * len(mask) // int(mask.sum())
            mask = np.resize(mask, shape[dim])
            noise = np.random.default_rng(0).random(shape) / 2 + 0.25  # roots and logarithms take it too
            full = torch.from_numpy(noise).to(small)
            small = full.index_copy_(dim, torch.from_numpy(np.flatnonzero(mask)).to(small.device), small)
    return small
