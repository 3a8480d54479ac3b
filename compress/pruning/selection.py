"""Choose which channels go: globally, by what they cost the loss for each multiply-accumulate that they save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cost import Macs
from .groups import Channels, Group
from .labels import Ids

__all__ = ["Bounds", "Selection", "select"]


@dataclass(frozen=True)
class Bounds:
    """How far each group may shrink.

    Attributes:
        multiple: see `Group.step`.
        min_channels: at least so many stay.
        max_part: at most this part goes, of ``originals`` where a group is named there, else of what it has now.
        originals: a group's axes to the channels it had before any pruning.
    """

    multiple: int = 8
    min_channels: int = 1
    max_part: float = 0.9
    originals: dict[tuple[tuple[str, int, int], ...], int] | None = None

    def floor(self, group: Group) -> int:
        """The fewest channels of a group that may stay."""
        had = (self.originals or {}).get(group.axes, len(group.channels))
        least = int(np.ceil(had * (1 - self.max_part) - 1e-9))
        return min(len(group.channels), max(least, self.min_channels, 1))


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        removed: representatives of the classes that go.
        kept: channels that stay, by group.
        macs: multiply-accumulates of one example afterwards.
        reached: whether that is within the budget.
    """

    removed: Ids
    kept: tuple[int, ...]
    macs: float
    reached: bool


def select(channels: Channels, scores: NDArray[np.float64], budget: float, bounds: Bounds, *, degree: int = 2) -> Selection:
    """Take channels away until the network fits a budget of multiply-accumulates.

    Each group offers its next step, its lowest-scored channels in as many as keep the channel counts multiples of what
    kernels like. The step with the smallest sum of scores for each multiply-accumulate saved goes first; savings are counted
    anew after each step, from the channel counts on both sides. A step that saves nothing is never taken. (Scores of degree
    one are set against the root of what is saved, which ranks single channels as their squares would be. Set against the
    savings themselves they took half of every residual stream of ResNet-56 first, and 54 points of accuracy with it.)

    Args:
        channels: the candidates.
        scores: one for each of ``channels.classes``; low ones go.
        budget: multiply-accumulates of one example to end at, or just below.
        bounds: how far groups may shrink.
        degree: how scores grow with a channel's effect, see `Criterion`. At 0 each group's are divided by their mean, and
            steps are compared by their mean score alone.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> found = channels_of(analyse(trace(net, torch.zeros(1, 4))))
        >>> chosen = select(found, np.array([5.0, 1.0, 4.0, 2.0, 6.0, 3.0]), 18, Bounds(multiple=1))
        >>> chosen.kept, chosen.macs, np.flatnonzero(~found.without(chosen.removed)).tolist()
        ((3,), 18.0, [1, 3, 5])
    """
    macs = Macs(channels)
    offers = _offers(channels, scores, bounds, relative=degree == 0)
    taken = [0] * len(offers)
    counts = np.array([len(g.channels) for g in channels.groups], float)
    total = float(macs.total(counts))
    while total > budget:
        steps = np.array([o.sizes[t] if t < len(o.sizes) else 0 for o, t in zip(offers, taken, strict=True)], float)
        price = np.array([o.prices[t] if t < len(o.sizes) else np.inf for o, t in zip(offers, taken, strict=True)])
        saved = total - macs.after(counts, steps)
        worth = saved > total * 1e-9
        if not worth.any():
            break
        rank = np.where(worth, price / np.where(worth, saved, 1.0) ** (degree / 2), np.inf)
        best = int(np.argmin(rank))
        counts[best] -= steps[best]
        taken[best] += 1
        total = float(macs.total(counts))
    removed = [o.order[: int(sum(o.sizes[:t]))] for o, t in zip(offers, taken, strict=True)]
    return Selection(
        removed=np.concatenate(removed) if removed else np.zeros(0, np.int64),
        kept=tuple(int(n) for n in counts),
        macs=total,
        reached=total <= budget,
    )


@dataclass(frozen=True)
class _Offer:
    """A group's channels from the lowest score up, cut into steps, each with its price."""

    order: Ids
    sizes: Sequence[int]
    prices: Sequence[float]


def _offers(channels: Channels, scores: NDArray[np.float64], bounds: Bounds, *, relative: bool) -> list[_Offer]:
    out, at = [], 0
    for group in channels.groups:
        n = len(group.channels)
        mine, at = scores[at : at + n], at + n
        order = np.argsort(mine, kind="stable")
        step = group.step(bounds.multiple)
        sizes = [step] * ((n - bounds.floor(group)) // step)
        unit = step * max(float(mine.mean()), 1e-30) if relative else 1.0
        ranked = mine[order]
        prices = [float(ranked[i * step : (i + 1) * step].sum()) / unit for i in range(len(sizes))]
        out.append(_Offer(group.channels[order], sizes, prices))
    return out
