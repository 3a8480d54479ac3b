"""The pass: prune a network to a part of its multiply-accumulates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EdgepressError, RecipeError
from ..network import Network
from ..passes import describe
from ..task import Task, labelled_loss, training_batches
from .analysis import Analysis, analyse
from .cost import Macs
from .criteria import Criterion, Taylor
from .groups import Channels, channels_of
from .inspection import locked
from .labels import Ids
from .oracle import masked, relative_error
from .rewrite import remove
from .scores import channel_scores
from .selection import Bounds, select

__all__ = ["Prune"]

_PARITY = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative difference from the oracle by type of the weights: float32 gives 1e-6 but for very deep networks."""
_HALF_PARITY = 0.1


@dataclass(frozen=True)
class Prune:
    """Remove whole channels until a part of the multiply-accumulates is left.

    In each round the channels are scored anew, the least valuable ones go, and the smaller network is checked against the
    oracle: the original with the removed channels' weights zeroed. Nothing is trained here; follow it with a recovery.

    Args:
        criterion: what a channel is worth: `Taylor`, `Magnitude` or `Random`.
        macs: multiply-accumulates to keep, as a fraction of what came in; the result lies at it or just below.
        rounds: the budget falls geometrically from round to round, gradients are refreshed between them.
        multiple: kept channel counts are multiples of this where the original's are: kernels take their time in steps.
        batches: training batches per round that the criterion is averaged over.
        max_per_layer: at most this part of a group's channels goes.

    Raises:
        RecipeError: a setting that makes no sense, or a budget that cannot be reached.
        TaskError: no batches to score with.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2)), torch.randn(8, 4)
        >>> task = Task(model, x, lambda predict: {"score": 0.0}, "score", train_batches=[(x, torch.zeros(8).long())])
        >>> smaller = Prune(macs=0.5, multiple=4)(trace(model, x), task)
        >>> smaller.macs(), smaller.history[0]["channels"][0]["after"]
        (48, 8)
    """

    criterion: Criterion = field(default_factory=Taylor)
    macs: float = 0.5
    rounds: int = 4
    multiple: int = 8
    batches: int = 16
    max_per_layer: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.macs <= 1:
            raise RecipeError(f"Prune(macs={self.macs}) makes no sense: it is the fraction to keep, above 0 and at most 1.")
        if not 0 < self.max_per_layer < 1:
            raise RecipeError(f"Prune(max_per_layer={self.max_per_layer}) makes no sense: it lies between 0 and 1.")
        for name in ("rounds", "multiple", "batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RecipeError(f"Prune({name}={value!r}) makes no sense: it is a whole number of at least 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Prune ``network``, which stays as it was; the result is in evaluation mode."""
        smaller = network.copy().eval()  # gradients and the oracle both want the weights as they serve
        analysis = analyse(smaller)
        channels = channels_of(analysis)
        start = _total(channels)
        bounds = self._bounds(analysis, channels, start)
        batches = _Batches(task)
        worst = 0.0
        for i in range(self.rounds):
            budget = start * self.macs ** ((i + 1) / self.rounds)
            if i:
                analysis = analyse(smaller)
                channels = channels_of(analysis)
            removed = self._choose(smaller, channels, task, batches, budget, bounds)
            if len(removed):
                before, smaller = smaller, remove(smaller, analysis, removed)
                worst = max(worst, _check(before, analysis, removed, smaller))
        return smaller.then(
            **{"pass": "Prune"},
            **describe(self),
            macs_before=round(start),
            macs_after=round(_total(channels_of(analyse(smaller)))),
            parameters_before=network.parameter_count,
            parameters_after=smaller.parameter_count,
            oracle_error=worst,
            channels=_shrunk(network, smaller),
        )

    def _bounds(self, analysis: Analysis, channels: Channels, start: float) -> Bounds:
        originals = {g.axes: len(g.channels) for g in channels.groups}
        bounds = Bounds(self.multiple, max_part=self.max_per_layer, originals=originals)
        least = select(channels, np.ones(len(channels.classes)), 0.0, bounds)
        if least.macs > start * self.macs:
            raise RecipeError(
                f"Prune(macs={self.macs}) cannot be reached: at least {least.macs / start:.3f} of the multiply-accumulates stay "
                f"with multiple={self.multiple} and max_per_layer={self.max_per_layer}{locked(analysis)}. Give the "
                "recipe's prune a smaller multiple, or more macs."
            )
        return bounds

    def _choose(self, network: Network, channels: Channels, task: Task, batches: _Batches, budget: float, bounds: Bounds) -> Ids:
        if _total(channels) <= budget:
            return np.zeros(0, np.int64)
        scores = channel_scores(
            network, channels, self.criterion, batches.take(self.batches), lambda y, t: labelled_loss(task, y, t)
        )
        chosen = select(channels, scores.double().numpy(), budget, bounds, degree=self.criterion.degree)
        return chosen.removed


class _Batches:
    """Training batches one after the other, epoch after epoch, so that each round sees others."""

    def __init__(self, task: Task):
        self._stream = self._endless(task)

    @staticmethod
    def _endless(task: Task) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        for epoch in itertools.count():
            empty = True
            for batch in training_batches(task, epoch):
                empty = False
                yield batch
            if empty:
                return

    def take(self, count: int) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """The next ``count`` batches."""
        return itertools.islice(self._stream, count)


def _total(channels: Channels) -> float:
    return float(Macs(channels).total(np.array([len(g.channels) for g in channels.groups], float)))


def _check(before: Network, analysis: Analysis, removed: Ids, after: Network) -> float:
    """Compare the pruned network with the oracle on noise around the example inputs; the relative error."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for x in before.example_inputs:
        x = x.repeat(-(-2 // x.shape[0]), *[1] * (x.dim() - 1))[:2]
        noise = torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else torch.zeros_like(x)
        inputs.append((x + noise).to(before.device))
    with torch.no_grad():
        error = relative_error(after(*inputs), masked(analysis, removed)(*inputs))
    tolerance = max((_PARITY.get(p.dtype, _HALF_PARITY) for p in before.parameters()), default=_HALF_PARITY)
    if not error <= tolerance:
        raise EdgepressError(
            f"The pruned network differs from its oracle by {error:.1e} (relative): this is a bug in a pruning rule. "
            "Please report it with the network; `edgepress.compress.pruning.inspect` shows the groups."
        )
    return error


def _shrunk(before: Network, after: Network) -> list[dict[str, Any]]:
    """Weights whose first axis shrank: ``[{"weight": "conv1.weight", "before": 64, "after": 40}, ...]``."""
    theirs = dict(after.module.named_parameters())
    return [
        {"weight": name, "before": len(p), "after": len(theirs[name])}
        for name, p in before.module.named_parameters()
        if p.dim() > 1 and name in theirs
    ]
