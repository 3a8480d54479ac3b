"""What a channel is worth: pure functions of weights, gradients or activations, and how their numbers become scores.

Three kinds, by what they look at. An `ElementCriterion` scores single elements of weights, which are summed over a channel's
class; a `RowCriterion` sees the channels of a group beside one another; a `GateCriterion` sees each example's activation times
gradient, summed over whatever reads the channel. The loops over networks that feed them stand in `scores` and `gates`.

The loss is a mean over the examples of a batch everywhere, and the network runs in evaluation mode, so that examples are
independent of one another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ..errors import RecipeError

__all__ = [
    "OBD",
    "Activation",
    "BatchNormScale",
    "Criterion",
    "ElementCriterion",
    "Fisher",
    "GateCriterion",
    "GeometricMedian",
    "Lamp",
    "Magnitude",
    "Random",
    "RowCriterion",
    "Scope",
    "Taylor",
]

Scope: TypeAlias = Literal["readers", "class", "filters", "scales"]
"""Which of a channel's weights count: those that read it, all of its class, those that make it, or its BatchNorm scales.

Where there are none that read or make a channel (the width of an attention head, say), all of its class count.
"""


@runtime_checkable
class ElementCriterion(Protocol):
    """Scores single elements of weights; low scores go first."""

    @property
    def gradients(self) -> bool:
        """Whether `element` reads gradients, so that training batches are run."""
        ...

    @property
    def degree(self) -> int:
        """How scores grow with what a channel does to the loss: 2 squared, 1 linearly, 0 not comparable between layers."""
        ...

    @property
    def over(self) -> Scope:
        """Which of a channel's weights count."""
        ...

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """A number for each element of a weight, in its shape."""
        ...

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """One batch's score of each channel ``[C]``, from the sum and the number of its elements ``[C]``."""
        ...


@runtime_checkable
class RowCriterion(Protocol):
    """Scores the channels of a group by comparing them; low scores go first."""

    @property
    def degree(self) -> int:
        """As in `ElementCriterion`."""
        ...

    @property
    def over(self) -> Scope:
        """Which of a channel's weights count."""
        ...

    def rows(self, rows: Tensor) -> Tensor:
        """The score of each channel ``[C]`` of one group, from their weights, flattened ``[C, elements]``."""
        ...


@runtime_checkable
class GateCriterion(Protocol):
    """Scores gates: channels or whole branches, multiplied by one; low scores go first."""

    @property
    def degree(self) -> int:
        """As in `ElementCriterion`."""
        ...

    def gates(self, contributions: Tensor, scale: float) -> Tensor:
        """One batch's score of each gate, ``[G]``.

        Args:
            contributions: the batch's loss differentiated by each example's gates, ``[N, G]``: activation times gradient,
                summed over all positions and readers. Closing a gate changes the loss by minus that, to first order.
            scale: times this they belong to the example's own loss: N, the loss being a mean (see `scores` for
                batches without targets).
        """
        ...


Criterion: TypeAlias = ElementCriterion | RowCriterion | GateCriterion


# ---- by the loss


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor expansion of the loss on weights (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, eq. 8).

    What the loss changes by when a set of weights is zeroed is, to first order, minus the sum of weight times gradient.
    Removing a channel is the same as zeroing the slices of every layer that reads it, so the sum runs over those, all of
    them; as in the paper it is squared after summing, once for each batch, and averaged over batches. By the chain rule this
    is the paper's gate behind BatchNorm, scale times its gradient plus shift times its gradient, wherever only ReLU and
    linear operators lie between, and it also holds where there is no BatchNorm or several layers read the channel. Adding
    the producing side as well (filters, BatchNorm) counts the same change twice, once without BatchNorm's shift: measured on
    ResNet-56 at half of its multiply-accumulates, single channels, without recovery, that gives 60 % where this gives 69 %.
    ``over="class"`` does so all the same, as other tools do.

    Args:
        squared: square each batch's sum (the paper's choice); otherwise its absolute value is taken.
        over: ``"readers"``, or ``"class"`` for every weight that goes with the channel, BatchNorm included.

    Example:
        >>> w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> Taylor().score(Taylor().element(w, g).sum().view(1), torch.tensor([2]))
        tensor([1.])
    """

    squared: bool = True
    over: Literal["readers", "class"] = "readers"
    gradients: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _choice("Taylor", "over", self.over, ("readers", "class"))

    @property
    def degree(self) -> int:
        """2, or 1 where absolute values are taken."""
        return 2 if self.squared else 1

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Weight times gradient."""
        return weight * gradient

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The square, or the absolute value, of the sum."""
        return sums.square() if self.squared else sums.abs()

    def gates(self, contributions: Tensor, scale: float) -> Tensor:
        """The same of a gate: its readers' weights times gradients are the sum of its contributions."""
        return self.score(contributions.sum(0), contributions)


@dataclass(frozen=True)
class Activation:
    """First-order Taylor expansion on activations (Molchanov et al. 2017, https://arxiv.org/abs/1611.06440).

    Activation times gradient is summed over positions, its absolute value taken for each example and averaged over examples.
    The paper takes the mean over positions, and then divides each layer's scores by their l2 norm, which takes the number of
    positions out again; without that (``normalised`` does it) sums are what is comparable between layers. The activation is
    taken where it is read, and all readers are summed before the absolute value.

    Example:
        >>> Activation().gates(torch.tensor([[1.0, 0.0], [-3.0, 0.0]]), scale=2)
        tensor([4., 0.])
    """

    degree: ClassVar[int] = 1

    def gates(self, contributions: Tensor, scale: float) -> Tensor:
        """The mean over examples of the absolute value."""
        return contributions.abs().mean(0) * scale


@dataclass(frozen=True)
class Fisher:
    """Second-order expansion with the Fisher information of gates, in units of the loss.

    Half the mean over examples of the square of activation times gradient, which is summed over all positions and all
    readers before it is squared (Theis et al. 2018, https://arxiv.org/abs/1801.05787; over several readers as in
    Liu et al. 2021, "Group Fisher Pruning", https://arxiv.org/abs/2108.00708). For a loss that is minus a log
    likelihood this is the diagonal of the Gauss-Newton term; the first-order term is left out, being zero at a minimum. It is
    not the square of a batch's mean: examples that a channel helps and others that it hurts do not cancel.

    Example:
        >>> Fisher().gates(torch.tensor([[1.0, 0.5], [-1.0, 0.5]]), scale=2)
        tensor([2.0000, 0.5000])
    """

    degree: ClassVar[int] = 2

    def gates(self, contributions: Tensor, scale: float) -> Tensor:
        """Half the mean over examples of the square."""
        return (contributions * scale).square().mean(0) / 2


@dataclass(frozen=True)
class OBD:
    """Optimal Brain Damage (LeCun, Denker, Solla 1990): ``h * w**2 / 2``, summed over the weights that read a channel.

    Second derivatives between weights are left out, within a channel too, which is where it differs from `Fisher`. The
    paper propagates the diagonal h backwards; here it is the empirical Fisher information, the squared gradient of each batch,
    averaged over batches. For examples whose gradients are independent with mean zero, as at a minimum, that is the mean of
    their squares up to the batch size, a factor that all scores share.

    Args:
        over: ``"readers"``, or ``"class"`` for every weight that goes with the channel.

    Example:
        >>> OBD().element(torch.tensor([2.0]), torch.tensor([3.0]))
        tensor([18.])
    """

    over: Literal["readers", "class"] = "readers"
    gradients: ClassVar[bool] = True
    degree: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _choice("OBD", "over", self.over, ("readers", "class"))

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Half the square of weight times gradient."""
        return (weight * gradient).square() / 2

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The sum."""
        return sums


# ---- by the weights alone


@dataclass(frozen=True)
class Magnitude:
    """Mean of ``|w| ** p`` over a channel's elements (p=1: Li et al. 2017, https://arxiv.org/abs/1608.08710).

    Layers differ in scale, so scores are relative to the mean of the channel's group.

    Args:
        p: 1 or 2.
        over: ``"class"``, every weight that goes with the channel, or ``"filters"``, those that make it, as in the paper.

    Example:
        >>> w = torch.tensor([1.0, -3.0])
        >>> Magnitude(p=1).score(Magnitude(p=1).element(w, w).sum().view(1), torch.tensor([2]))
        tensor([2.])
    """

    p: int = 2
    over: Literal["class", "filters"] = "class"
    gradients: ClassVar[bool] = False
    degree: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise RecipeError(f"Magnitude(p={self.p!r}) makes no sense: p is 1 or 2.")
        _choice("Magnitude", "over", self.over, ("class", "filters"))

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``|w| ** p``."""
        return weight.abs() if self.p == 1 else weight.square()

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The mean."""
        return sums / counts


@dataclass(frozen=True)
class BatchNormScale:
    """Mean size of a channel's BatchNorm scales (Liu et al. 2017, "network slimming", https://arxiv.org/abs/1708.06519).

    The paper trains with an l1 penalty on the scales first; without it they say less. A channel that passes no BatchNorm counts
    like the best that does.

    Example:
        >>> BatchNormScale().score(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([2, 1, 0]))
        tensor([1.5000, 1.0000, 1.5000])
    """

    over: ClassVar[Scope] = "scales"
    gradients: ClassVar[bool] = False
    degree: ClassVar[int] = 0

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``|w|``."""
        return weight.abs()

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The mean.

        Raises:
            RecipeError: no channel passes a BatchNorm.
        """
        if len(counts) and not bool((counts > 0).any()):
            raise RecipeError("BatchNormScale cannot score a network without BatchNorm layers: choose Taylor or Magnitude.")
        mean = sums / counts.clamp(min=1)
        return torch.where(counts > 0, mean, mean.max()) if len(counts) else mean


@dataclass(frozen=True)
class Lamp:
    """Layer-adaptive magnitude (Lee et al. 2021, https://arxiv.org/abs/2010.07611), of channels.

    A channel's squared weights over those of every channel of its group that is not smaller: what removing it distorts,
    once all smaller ones are gone. The largest scores 1, so no layer empties before another. The paper scores single weights.

    Args:
        over: ``"class"`` or ``"filters"``, as in `Magnitude`.

    Example:
        >>> Lamp().rows(torch.tensor([[2.0], [0.0], [1.0], [1.0]]))
        tensor([1.0000, 0.0000, 0.1667, 0.2000])
    """

    over: Literal["class", "filters"] = "class"
    degree: ClassVar[int] = 2

    def __post_init__(self) -> None:
        _choice("Lamp", "over", self.over, ("class", "filters"))

    def rows(self, rows: Tensor) -> Tensor:
        """The squared norm over the sum of the squared norms from there up, ties in the order of the channels."""
        squares = rows.square().sum(1)
        order = squares.argsort(stable=True)
        above = squares[order].flip(0).cumsum(0).flip(0)
        return torch.empty_like(squares).index_copy_(0, order, squares[order] / above.clamp(min=1e-30))


@dataclass(frozen=True)
class GeometricMedian:
    """Distance from all other filters of the layer, summed (FPGM: He et al. 2019, https://arxiv.org/abs/1811.00250).

    What lies near the geometric median of the filters can be spared, for the others replace it. Where several layers make
    the same channels, as in a residual stream, their filters are laid end to end.

    Example:
        >>> GeometricMedian().rows(torch.tensor([[0.0], [1.0], [5.0]]))
        tensor([6., 5., 9.])
    """

    over: ClassVar[Scope] = "filters"
    degree: ClassVar[int] = 0

    def rows(self, rows: Tensor) -> Tensor:
        """The sum of Euclidean distances to the other rows."""
        return torch.cdist(rows, rows).sum(1)


@dataclass(frozen=True)
class Random:
    """Chance: what any criterion has to beat.

    Args:
        seed: of the scores; the same seed gives the same choice.

    Example:
        >>> ones = torch.ones(3)
        >>> torch.equal(Random(1).score(ones, ones), Random(1).score(ones, ones))
        True
    """

    seed: int = 0
    over: ClassVar[Scope] = "class"
    gradients: ClassVar[bool] = False
    degree: ClassVar[int] = 0

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Nothing of the weight counts."""
        return torch.zeros_like(weight)

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(len(sums), generator=torch.Generator().manual_seed(self.seed)).to(sums)


def _choice(criterion: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"{criterion}({name}={value!r}) makes no sense: {name} is {' or '.join(choices)}.")
