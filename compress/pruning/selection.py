"""Choose what goes, globally: channels and whole branches compete by what they cost the loss for what they save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from .cost import Cost
from .groups import Channels, Group
from .labels import Ids

__all__ = ["Bounds", "Depth", "Goal", "Selection", "select"]

_JUMPS = (1, 2, 3, 4, 6, 8)
"""Steps that are weighed at once: where time is a staircase, one step may save nothing and two a whole stair."""


@dataclass(frozen=True)
class Bounds:
    """How far each group may shrink.

    Attributes:
        multiple: see `Group.step`.
        min_channels: at least so many stay.
        max_part: at most this part goes, of ``originals`` where a group is named there, else of what it has now.
        originals: a group's axes to the channels it had before any pruning.
        limits: patterns of weight names (``layer1.*``) to what stays of every group that makes or reads such a weight's
            filters: up to 1 a part of its channels (1 leaves them all), above 1 a number of channels.
    """

    multiple: int = 8
    min_channels: int = 1
    max_part: float = 0.9
    originals: dict[tuple[tuple[str, int, int], ...], int] | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def floor(self, group: Group) -> int:
        """The fewest channels of a group that may stay.

        Example:
            >>> group = Group((("conv.weight", 0, 1),), np.arange(32))
            >>> Bounds(max_part=0.75).floor(group), Bounds(limits={"conv*": 0.5}).floor(group)
            (8, 16)
        """
        had = (self.originals or {}).get(group.axes, len(group.channels))
        stays = [had * (1 - self.max_part), self.min_channels, 1]
        for pattern, limit in self.limits.items():
            if any(dim == 0 and fnmatchcase(name, pattern) for name, dim, _ in group.axes):
                stays.append(had * limit if limit <= 1 else limit)
        return min(len(group.channels), int(np.ceil(max(stays) - 1e-9)))

    def least(self, group: Group) -> int:
        """The fewest channels that steps of `Group.step` lead to."""
        n, step = len(group.channels), group.step(self.multiple)
        return n - step * ((n - self.floor(group)) // step)


@dataclass(frozen=True)
class Goal:
    """A budget.

    Attributes:
        cost: the currency.
        limit: to end at, or just below, in the cost's own unit.
        guide: what tells which step helps where the cost itself does not say: a peak that two places share shrinks at neither.
    """

    cost: Cost
    limit: float
    guide: Cost | None = None


@dataclass(frozen=True)
class Depth:
    """A whole residual branch that may go.

    Attributes:
        nodes: the graph nodes that go with it.
        score: what it is worth, in the units of the channels' scores.
        addition: the addition that it ends in, which has to keep one operand.
    """

    nodes: frozenset[str]
    score: float
    addition: str


@dataclass(frozen=True)
class Selection:
    """What was chosen.

    Attributes:
        removed: representatives of the classes that go.
        branches: which of the branches go, by position.
        kept: channels that stay, by group.
        totals: each goal's cost afterwards.
        reached: whether all are within their limits.
    """

    removed: Ids
    branches: tuple[int, ...]
    kept: tuple[int, ...]
    totals: tuple[float, ...]
    reached: bool


def select(
    channels: Channels,
    scores: NDArray[np.float64],
    goals: Sequence[Goal],
    bounds: Bounds,
    *,
    degree: int = 2,
    branches: Sequence[Depth] = (),
) -> Selection:
    """Take channels and branches away until the network fits its budgets.

    A knapsack as in HALP (Shen et al. 2022, https://arxiv.org/abs/2110.10811): keep the most importance that fits. HALP
    fixes each step's latency from the unpruned neighbours and solves by dynamic programming; here each group offers its
    lowest-scored channels in runs of one or several steps, each branch offers itself, the move with the least score for what
    it saves goes first, and every saving is counted anew after each move, from the channel counts on both sides and without
    the layers of branches that are gone. A run of several steps competes as a whole, so that stairs on which a single step
    saves nothing are climbed. A move that saves nothing is never taken.

    Savings are in parts of what has to go; where several goals are not met yet, their parts add up. (Scores of degree
    one are set against the root of what is saved, which ranks single channels as their squares would be. Set against the
    savings themselves they took half of every residual stream of ResNet-56 first, and 54 points of accuracy with it.)

    Args:
        channels: the candidates.
        scores: one for each of ``channels.classes``; low ones go.
        goals: the budgets; all are to be met.
        bounds: how far groups may shrink.
        degree: how scores grow with a channel's effect, see `Criterion`. At 0 each group's are divided by their mean, and
            steps are compared by their mean score alone.
        branches: that may go too.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .cost import Macs
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> found = channels_of(analyse(trace(net, torch.zeros(1, 4))))
        >>> chosen = select(found, np.array([5.0, 1.0, 4.0, 2.0, 6.0, 3.0]), [Goal(Macs(found), 18)], Bounds(multiple=1))
        >>> chosen.kept, chosen.totals, np.flatnonzero(~found.without(chosen.removed)).tolist()
        ((3,), (18.0,), [1, 3, 5])
    """
    offers = _offers(channels, scores, bounds, relative=degree == 0)
    state = _State(np.array([len(g.channels) for g in channels.groups], float), np.zeros(len(offers), int))
    start = [float(g.cost.total(state.counts)) for g in goals]
    while unmet := [(g, s) for g, s in zip(goals, start, strict=True) if _total(g.cost, state) > g.limit]:
        best = min(
            [*_channel_moves(offers, state, unmet, degree), *_branch_moves(branches, state, unmet, degree)],
            key=lambda move: move.rank,
            default=None,
        )
        if best is None:
            break
        state.take(best, offers, branches)
    removed = [o.order[: int(sum(o.sizes[:t]))] for o, t in zip(offers, state.taken, strict=True)]
    totals = tuple(_total(g.cost, state) for g in goals)
    return Selection(
        removed=np.concatenate(removed) if removed else np.zeros(0, np.int64),
        branches=tuple(state.gone),
        kept=tuple(int(n) for n in state.counts),
        totals=totals,
        reached=all(t <= g.limit for t, g in zip(totals, goals, strict=True)),
    )


@dataclass(frozen=True)
class _Offer:
    """A group's channels from the lowest score up, cut into steps, each with its price."""

    order: Ids
    sizes: Sequence[int]
    prices: Sequence[float]

    def run(self, taken: int, jump: int) -> tuple[int, float]:
        """(channels, price) of the next ``jump`` steps; no channels where there are fewer."""
        if taken + jump > len(self.sizes):
            return 0, 0.0
        return sum(self.sizes[taken : taken + jump]), sum(self.prices[taken : taken + jump])


@dataclass(frozen=True)
class _Move:
    rank: float
    group: int = -1
    jump: int = 0
    branch: int = -1


@dataclass
class _State:
    """Where selection stands: channels left and steps taken in each group, branches gone and the graph nodes gone with them."""

    counts: NDArray[np.float64]
    taken: NDArray[np.int64]
    gone: list[int] = field(default_factory=list)
    without: frozenset[str] = frozenset()
    additions: frozenset[str] = frozenset()

    def take(self, move: _Move, offers: Sequence[_Offer], branches: Sequence[Depth]) -> None:
        if move.branch >= 0:
            self.gone.append(move.branch)
            self.without |= branches[move.branch].nodes
            self.additions |= {branches[move.branch].addition}
        else:
            size, _ = offers[move.group].run(int(self.taken[move.group]), move.jump)
            self.counts[move.group] -= size
            self.taken[move.group] += move.jump


_Unmet = Sequence[tuple[Goal, float]]  # a goal and its cost at the start


def _channel_moves(offers: Sequence[_Offer], state: _State, unmet: _Unmet, degree: int) -> Iterable[_Move]:
    for jump in _JUMPS:
        runs = [o.run(int(t), jump) for o, t in zip(offers, state.taken, strict=True)]
        steps = np.array([size for size, _ in runs], float)
        if not steps.any():
            return
        saved = np.zeros(len(offers))
        for goal, start in unmet:
            guide = goal.guide or goal.cost
            before = float(guide.total(state.counts, state.without))
            saved += (before - guide.after(state.counts, steps, state.without)) / _excess(goal, start)
        price = np.array([price for _, price in runs])
        possible = np.flatnonzero((steps > 0) & (saved > 1e-9))
        if len(possible):
            rank = _rank(price[possible], saved[possible], jump, degree)
            best = int(np.argmin(rank))
            yield _Move(float(rank[best]), group=int(possible[best]), jump=jump)


def _branch_moves(branches: Sequence[Depth], state: _State, unmet: _Unmet, degree: int) -> Iterable[_Move]:
    for i, branch in enumerate(branches):
        if branch.addition in state.additions or branch.nodes <= state.without:
            continue
        saved = 0.0
        for goal, start in unmet:
            guide = goal.guide or goal.cost
            after = guide.total(state.counts, state.without | branch.nodes)
            saved += (float(guide.total(state.counts, state.without)) - float(after)) / _excess(goal, start)
        if saved > 1e-9:
            yield _Move(float(_rank(np.array(branch.score), np.array(saved), 1, degree)), branch=i)


def _rank(price: NDArray[np.float64], saved: NDArray[np.float64], steps: int, degree: int) -> NDArray[np.float64]:
    return price / steps if degree == 0 else price / saved ** (degree / 2)


def _excess(goal: Goal, start: float) -> float:
    return max(start - goal.limit, 1e-9 * start)


def _total(cost: Cost, state: _State) -> float:
    return float(cost.total(state.counts, state.without))


def _offers(channels: Channels, scores: NDArray[np.float64], bounds: Bounds, *, relative: bool) -> list[_Offer]:
    out, at = [], 0
    for group in channels.groups:
        n = len(group.channels)
        mine, at = scores[at : at + n], at + n
        order = np.argsort(mine, kind="stable")
        step = group.step(bounds.multiple)
        sizes = [step] * ((n - bounds.least(group)) // step)
        unit = step * max(float(mine.mean()), 1e-30) if relative else 1.0
        ranked = mine[order]
        prices = [float(ranked[i * step : (i + 1) * step].sum()) / unit for i in range(len(sizes))]
        out.append(_Offer(group.channels[order], sizes, prices))
    return out
