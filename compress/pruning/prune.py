"""The pass: prune a network until it fits its budgets."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distill import Distill
from ..errors import EdgepressError, RecipeError
from ..network import Network
from ..passes import describe
from ..progress import bar
from ..randomness import FixedDraws
from ..shorten import Branch, branches, found_again, left_out, taken_along, without
from ..task import Task, labelled_loss, training_batches
from .analysis import Analysis, Attention, analyse
from .budget import Budget, limit
from .cost import Clock, Cost, FileBytes, Latency, Macs, Parameters, PeakActivation
from .criteria import Criterion, Fisher
from .groups import Channels, channels_of
from .inspection import locked
from .labels import Ids
from .normalise import Normalisation, normalised
from .oracle import masked, relative_error
from .rewrite import remove
from .rounds import Rounds
from .scores import joint_scores
from .selection import Bounds, Depth, Goal, select

__all__ = ["Prune"]

_PARITY = {torch.float64: 1e-3, torch.float32: 1e-3}
"""Largest relative difference from the oracle by type of the weights: float32 gives 1e-6 but for very deep networks."""
_HALF_PARITY = 0.1

_EXTRA = 2
"""Rounds that may follow where a branch that went saved less than was counted: what fuses is known once it is gone."""


@dataclass(frozen=True)
class Prune:
    """Remove channels, and with ``depth`` whole residual branches, until the budgets are met.

    In each round everything is scored anew, the least valuable goes, and the smaller network is checked against the oracle:
    the original with the removed channels' weights zeroed. With ``recover`` each round ends with that training; without,
    follow the pass with a recovery.

    A budget is a part of what came in (0.5) or an amount ('40 M', '600 kB', '0.25 ms'); several hold together. The budget
    falls geometrically from round to round.

    Args:
        criterion: what a channel is worth, see `criteria`.
        macs: multiply-accumulates of one example; 0.5 where no budget is given at all.
        parameters: trainable numbers.
        bytes: of the weights in the file, at ``precision``.
        activations: bytes of activations alive at once for one example, at ``precision``.
        latency: time of one run, by ``clock``.
        depth: residual branches may go whole, scored by the same criterion.
        rounds: in how many the budget is reached; gradients are refreshed between them.
        multiple: kept channel counts are multiples of this where the original's are: kernels take their time in steps.
        batches: training batches per round that the criterion is averaged over.
        max_per_layer: at most this part of a group's channels goes.
        min_channels: at least so many of each group stay.
        limits: patterns of weight names to what stays at least of the channels of such a weight, see `Bounds`.
        attention: what of attention goes, whole heads or dimensions of every head.
        normalise: scores relative to their group's, see `normalised`.
        precision: of the deployed file, for ``bytes``, ``activations`` and the clock that a recipe's ``latency`` is measured by.
        format: of the deployed file, for that clock.
        recover: training after each round.
        clock: times of layers on the target, for ``latency``.
        checkpoint: a folder to keep finished rounds in, so that an interrupted pass goes on after the last one.

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

    criterion: Criterion = field(default_factory=Fisher)
    macs: Budget | None = None
    parameters: Budget | None = None
    bytes: Budget | None = None
    activations: Budget | None = None
    latency: Budget | None = None
    depth: bool = False
    rounds: int = 4
    multiple: int = 8
    batches: int = 16
    max_per_layer: float = 0.9
    min_channels: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    attention: Attention = "heads"
    normalise: Normalisation = "none"
    precision: Literal["fp32", "int8"] = "int8"
    format: Literal["onnx", "tflite"] = "tflite"
    recover: Distill | None = None
    clock: Clock | None = field(default=None, repr=False)
    checkpoint: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not self._budgets:
            object.__setattr__(self, "macs", 0.5)
        for currency, budget in self._budgets.items():
            limit(currency, budget, 1.0)
        if not 0 < self.max_per_layer < 1:
            raise RecipeError(f"Prune(max_per_layer={self.max_per_layer}) makes no sense: it lies between 0 and 1.")
        for name in ("rounds", "multiple", "batches", "min_channels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise RecipeError(f"Prune({name}={value!r}) makes no sense: it is a whole number of at least 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Prune ``network``, which stays as it was; the result is in evaluation mode."""
        if self.latency is not None and self.clock is None:
            raise RecipeError(
                "Prune(latency=...) needs a clock: pass clock=edgepress.LatencyTable('litert', 'int8'), for example."
            )
        start = self._start(network)
        batches = _Batches(task)
        rounds = Rounds(self.checkpoint, describe(self), network)
        smaller, done = rounds.last()
        with bar("Prune") as update:
            while (i := len(done)) < self.rounds or (i < self.rounds + _EXTRA and self._missed(self._left(smaller), start)):
                fresh = batches.take(i * self.batches, self.batches)
                smaller, found = self._round(smaller, task, fresh, start, min(1.0, (i + 1) / self.rounds))
                if self.recover is not None:
                    smaller = replace(self.recover, checkpoint=rounds.file("recover"))(smaller, task)
                done.append(found)
                rounds.keep(smaller, done)
                update(min(1.0, (i + 1) / self.rounds), f"round {i + 1} of {self.rounds}")
        end = self._left(smaller)
        if missed := self._missed(end, start):
            raise RecipeError(
                f"Prune({missed}={self._budgets[missed]!r}) was not reached: {end[missed] / start.totals[missed]:.3f} of what "
                "came in is left and no further step saves anything. Give it a larger budget or smaller multiple, or allow depth."
            )
        rounds.clear()
        return smaller.then(
            **{"pass": "Prune"},
            **describe(self),
            macs_before=round(start.macs),
            macs_after=round(_macs(smaller)),
            parameters_before=network.parameter_count,
            parameters_after=smaller.parameter_count,
            budgets={n: {"before": start.totals[n], "limit": start.limits[n], "after": end[n]} for n in end},
            oracle_error=max((r["oracle_error"] for r in done), default=0.0),
            branches=[b for r in done for b in r["branches"]],
            channels=_shrunk(network, smaller),
        )

    @property
    def _budgets(self) -> dict[str, Budget]:
        named = {n: getattr(self, n) for n in ("macs", "parameters", "bytes", "activations", "latency")}
        return {name: budget for name, budget in named.items() if budget is not None}

    @property
    def _width(self) -> int:
        """Bytes of a number in the file."""
        return 1 if self.precision == "int8" else 4

    def _costs(self, channels: Channels) -> dict[str, Cost]:
        """The currencies that there is a budget in."""
        make: dict[str, Callable[[], Cost]] = {
            "macs": lambda: Macs(channels),
            "parameters": lambda: Parameters(channels),
            "bytes": lambda: FileBytes(channels, self._width),
            "activations": lambda: PeakActivation(channels, self._width),
            "latency": lambda: Latency(channels, self.clock),  # type: ignore[arg-type]
        }
        return {name: make[name]() for name in self._budgets}

    def _start(self, network: Network) -> _Start:
        """What the budgets mean for this network; refused where they cannot be met."""
        analysis = analyse(network, self.attention)
        channels = channels_of(analysis)
        costs = self._costs(channels)
        full = _full(channels)
        totals = {name: float(cost.total(full)) for name, cost in costs.items()}
        limits = {name: limit(name, budget, totals[name]) for name, budget in self._budgets.items()}
        originals = {g.axes: len(g.channels) for g in channels.groups}
        bounds = Bounds(self.multiple, self.min_channels, self.max_per_layer, originals, self.limits)
        least = np.array([bounds.least(g) for g in channels.groups], float)
        may_go = branches(network) if self.depth else []
        gone = {n for b in may_go for n in b.nodes} | {n for n, _ in taken_along(network, may_go)}
        for name, cost in costs.items():
            floor = float(cost.total(least, gone))
            if floor > limits[name] and totals[name] > limits[name]:
                raise RecipeError(
                    f"Prune({name}={self._budgets[name]!r}) cannot be reached: at least {floor / totals[name]:.3f} of what came "
                    f"in stays with multiple={self.multiple}, max_per_layer={self.max_per_layer} and the other limits"
                    f"{locked(analysis)}. Give the recipe's prune a smaller multiple, or a larger budget."
                )
        return _Start(totals, limits, bounds, float(Macs(channels).total(full)))

    def _round(
        self, network: Network, task: Task, batches: Iterator[Any], start: _Start, part: float
    ) -> tuple[Network, dict[str, Any]]:
        """Choose and remove so much that ``part`` of the way, in logarithms, is gone."""
        analysis = analyse(network, self.attention)
        channels = channels_of(analysis)
        goals = []
        for name, cost in self._costs(channels).items():
            now = start.totals[name] * min(1.0, start.limits[name] / start.totals[name]) ** part
            guide = PeakActivation(channels, self._width, order=8) if name == "activations" else None
            goals.append(Goal(cost, now, guide))
        if all(g.cost.total(_full(channels)) <= g.limit for g in goals):
            return network, {"oracle_error": 0.0, "branches": []}
        scores, ends = self._scores(network, channels, task, batches)
        depths = [Depth(frozenset(b.nodes), s, b.addition) for b, s in ends]
        along = taken_along(network, [b for b, _ in ends])
        chosen = select(channels, scores, goals, start.bounds, degree=self.criterion.degree, branches=depths, along=along)
        gone = [ends[i][0] for i in chosen.branches]
        smaller, error = _cut(network, analysis, chosen.removed)
        if gone:
            smaller, difference = _shortened(smaller, found_again(gone, network, smaller))
            error = max(error, difference)
        return smaller, {"oracle_error": error, "branches": [b.module for b in gone]}

    def _scores(
        self, network: Network, channels: Channels, task: Task, batches: Iterable[Any]
    ) -> tuple[NDArray[np.float64], list[tuple[Branch, float]]]:
        """Of the channels, and of the branches where those may go."""

        def loss(outputs: Any, targets: Any) -> Tensor:
            return labelled_loss(task, outputs, targets)

        found = branches(network) if self.depth else []
        scores, worth = joint_scores(network, channels, found, self.criterion, batches, loss)
        scores = normalised(scores, channels, self.normalise)
        return scores.double().numpy(), list(zip(found, worth.tolist(), strict=True))

    def _left(self, network: Network) -> dict[str, float]:
        """What is left, by currency."""
        channels = channels_of(analyse(network, self.attention))
        return {name: float(cost.total(_full(channels))) for name, cost in self._costs(channels).items()}

    @staticmethod
    def _missed(left: dict[str, float], start: _Start) -> str:
        """A currency whose budget is not met; '' where all are."""
        return next((name for name, value in left.items() if value > start.limits[name] * (1 + 1e-6)), "")


@dataclass(frozen=True)
class _Start:
    """What came in and what may be left, by currency."""

    totals: dict[str, float]
    limits: dict[str, float]
    bounds: Bounds
    macs: float


class _Batches:
    """Training batches one after the other, epoch after epoch, so that each round sees others."""

    def __init__(self, task: Task):
        self._stream = self._endless(task)
        self._at = 0

    @staticmethod
    def _endless(task: Task) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        for epoch in itertools.count():
            empty = True
            for batch in training_batches(task, epoch):
                empty = False
                yield batch
            if empty:
                return

    def take(self, start: int, count: int) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
        """``count`` batches from the ``start``-th on, which must lie ahead."""
        yield from itertools.islice(self._stream, start - self._at, start - self._at + count)
        self._at = start + count


def _full(channels: Channels) -> NDArray[np.float64]:
    return np.array([len(g.channels) for g in channels.groups], float)


def _macs(network: Network) -> float:
    channels = channels_of(analyse(network))
    return float(Macs(channels).total(_full(channels)))


def _cut(network: Network, analysis: Analysis, removed: Ids) -> tuple[Network, float]:
    if not len(removed):
        return network, 0.0
    smaller = remove(network, analysis, removed)
    return smaller, _agreeing(smaller, masked(analysis, removed), network, "a pruning rule")


def _shortened(network: Network, gone: Sequence[Branch]) -> tuple[Network, float]:
    shorter, expected = without(network, *gone), network.copy()
    with contextlib.ExitStack() as stack:
        for branch in gone:
            stack.enter_context(left_out(expected, branch))
        return shorter, _agreeing(shorter, expected, network, "the removal of a branch")


def _agreeing(after: Network, expected: Any, before: Network, what: str) -> float:
    """Compare the smaller network with what it must compute, on noise around the example inputs; the relative error."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for x in before.example_inputs:
        x = x.repeat(-(-2 // x.shape[0]), *[1] * (x.dim() - 1))[:2]
        noise = torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else torch.zeros_like(x)
        inputs.append((x + noise).to(before.device))
    with torch.no_grad(), FixedDraws():
        error = relative_error(after(*inputs), expected(*inputs))
    tolerance = max((_PARITY.get(p.dtype, _HALF_PARITY) for p in before.parameters()), default=_HALF_PARITY)
    if not error <= tolerance:
        raise EdgepressError(
            f"The pruned network differs from its oracle by {error:.1e} (relative): this is a bug in {what}. "
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
