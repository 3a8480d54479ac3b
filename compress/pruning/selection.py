"""Choose what goes, globally: channels and whole branches compete by what they cost the loss for what they save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

import numpy as np
from numpy.typing import NDArray

from .cost import Cost
from .groups import Channels, Group
from .labels import Ids

__all__ = ["Bounds", "Depth", "Goal", "Selection", "select"]

Along = Sequence[tuple[str, frozenset[str]]]
"""Graph nodes that go when all that read them are gone, each with its readers; readers come first."""

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
    along: Along = (),
) -> Selection:
    """Take channels and branches away until the network fits its budgets.

    A knapsack as in HALP (Shen et al. 2022, https://arxiv.org/abs/2110.10811): keep the most importance that fits. HALP
    fixes each step's latency from the unpruned neighbours and solves by dynamic programming; here each group offers its
    lowest-scored channels in runs of one or several steps, each branch offers itself, the move with the least score for what
    it saves goes first, and every saving is counted anew after each move, from the channel counts on both sides and without
    the layers of branches that are gone. A run of several steps competes as a whole, so that stairs on which a single step
    saves nothing are climbed. A move that saves nothing is never taken.

    The move that reaches the budgets may save much more than was missing: half of a residual stream, say. So what has the
    most score for what it costs comes back while it fits, and going on with smaller moves instead is tried: the least sum
    of scores that fits is taken.

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
        along: the nodes that several of these take along together, see `taken_along`.

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
    state = _State(np.array([len(g.channels) for g in channels.groups], float), np.zeros(len(offers), int), branches, along)
    missing = [(g, float(g.cost.total(state.counts)) - g.limit) for g in goals]
    if missing := [(g, excess) for g, excess in missing if excess > 0]:
        state = _Search(offers, branches, missing, degree).run(state)
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
    """Steps of a group, or a branch; ``ends`` where all goals are met behind it."""

    rank: float
    ends: bool
    group: int = -1
    jump: int = 0
    branch: int = -1


@dataclass
class _State:
    """Where selection stands: channels left and steps taken in each group, and branches gone."""

    counts: NDArray[np.float64]
    taken: NDArray[np.int64]
    branches: Sequence[Depth]
    along: Along
    gone: list[int] = field(default_factory=list)

    @property
    def without(self) -> frozenset[str]:
        """The graph nodes that are gone with the branches."""
        nodes = set[str]().union(*(self.branches[i].nodes for i in self.gone))
        for name, readers in self.along:
            if readers <= nodes:
                nodes.add(name)
        return frozenset(nodes)

    def copy(self) -> _State:
        return replace(self, counts=self.counts.copy(), taken=self.taken.copy(), gone=list(self.gone))


@dataclass(frozen=True)
class _Search:
    """The greedy search through a knapsack; each goal comes with what had to go at the start."""

    offers: Sequence[_Offer]
    branches: Sequence[Depth]
    goals: Sequence[tuple[Goal, float]]
    degree: int

    def run(self, state: _State) -> _State:
        """The state of the least price that meets the goals; where none does, the smallest that was found."""
        best, least = None, np.inf
        while self.price(state) < least:
            moves = sorted([*self._channel_moves(state), *self._branch_moves(state)], key=lambda move: move.rank)
            if moves and moves[0].ends:
                end = self._without_excess(self._after(state, moves[0]))
                best, least = min((best, least), (end, self.price(end)), key=lambda found: found[1])
            smaller = next((move for move in moves if not move.ends), None)
            if smaller is None:
                break
            state = self._after(state, smaller)
        return best or state

    def met(self, state: _State) -> bool:
        """Whether all goals are."""
        return all(_total(g.cost, state) <= g.limit for g, _ in self.goals)

    def price(self, state: _State) -> float:
        """The scores of all that is gone."""
        steps = sum(sum(o.prices[:t]) for o, t in zip(self.offers, state.taken, strict=True))
        return steps + sum(self.branches[i].score for i in state.gone)

    def _after(self, state: _State, move: _Move) -> _State:
        state = state.copy()
        if move.branch >= 0:
            state.gone.append(move.branch)
        else:
            size, _ = self.offers[move.group].run(int(state.taken[move.group]), move.jump)
            state.counts[move.group] -= size
            state.taken[move.group] += move.jump
        return state

    def _without_excess(self, state: _State) -> _State:
        """Take back what fits within the limits again, the greatest score for what it costs first."""
        while True:
            last = np.array([-o.sizes[t - 1] if t else 0 for o, t in zip(self.offers, state.taken, strict=True)], float)
            price = np.array([o.prices[t - 1] if t else 0.0 for o, t in zip(self.offers, state.taken, strict=True)])
            fits, grown = self._changes(state, last)
            moves = [(self._worth(price[g], grown[g]), g, -1) for g in np.flatnonzero(fits & (price > 0)).tolist()]
            for branch in state.gone:
                fit, cost = self._change(state, [other for other in state.gone if other != branch])
                if fit and self.branches[branch].score > 0:
                    moves.append((self._worth(self.branches[branch].score, cost), -1, branch))
            if not moves:
                return state
            _, group, branch = max(moves)
            if branch >= 0:
                state.gone.remove(branch)
            else:
                state.counts[group] -= last[group]
                state.taken[group] -= 1

    def _worth(self, price: float, cost: float) -> float:
        return float(self._rank(np.array(price), np.array(max(cost, 1e-12)), 1))

    def _channel_moves(self, state: _State) -> Iterable[_Move]:
        for jump in _JUMPS:
            runs = [o.run(int(t), jump) for o, t in zip(self.offers, state.taken, strict=True)]
            steps = np.array([size for size, _ in runs], float)
            if not steps.any():
                return
            ends, grown = self._changes(state, steps)
            price = np.array([price for _, price in runs])
            rank = self._rank(price, np.maximum(-grown, 1e-12), jump)
            for kind in (True, False):
                possible = np.flatnonzero((steps > 0) & (grown < -1e-9) & (ends == kind))
                if len(possible):
                    best = int(possible[np.argmin(rank[possible])])
                    yield _Move(float(rank[best]), kind, group=best, jump=jump)

    def _branch_moves(self, state: _State) -> Iterable[_Move]:
        additions = {self.branches[i].addition for i in state.gone}
        without = state.without
        for i, branch in enumerate(self.branches):
            if branch.addition in additions or branch.nodes <= without:
                continue
            ends, grown = self._change(state, [*state.gone, i])
            if grown < -1e-9:
                yield _Move(float(self._rank(np.array(branch.score), np.array(-grown), 1)), ends, branch=i)

    def _changes(self, state: _State, steps: NDArray[np.float64]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        """For each group with so many channels less: whether all goals are met, and what the costs grow by."""
        without, met, grown = state.without, np.ones(len(steps), bool), np.zeros(len(steps))
        for goal, excess in self._open(state):
            guide = goal.guide or goal.cost
            after = guide.after(state.counts, steps, without)
            grown += (after - float(guide.total(state.counts, without))) / excess
            met &= (after if guide is goal.cost else goal.cost.after(state.counts, steps, without)) <= goal.limit
        return met, grown

    def _change(self, state: _State, gone: list[int]) -> tuple[bool, float]:
        """The same for other branches."""
        other = replace(state, gone=gone)
        grown = 0.0
        for goal, excess in self._open(state):
            guide = goal.guide or goal.cost
            grown += (_total(guide, other) - _total(guide, state)) / excess
        return self.met(other), grown

    def _open(self, state: _State) -> Sequence[tuple[Goal, float]]:
        """The goals that are not met yet; all of them where all are."""
        return [(g, excess) for g, excess in self.goals if _total(g.cost, state) > g.limit] or self.goals

    def _rank(self, price: NDArray[np.float64], saved: NDArray[np.float64], steps: int) -> NDArray[np.float64]:
        return price / steps if self.degree == 0 else price / saved ** (self.degree / 2)


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
