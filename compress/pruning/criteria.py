"""What a channel is worth: pure functions from (weight, gradient) to numbers that are summed over the channel's class.

A criterion scores single elements; the sum over every position that a channel takes in every weight, and what becomes of that
sum, are the same loop for all of them (`scores`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..errors import RecipeError

__all__ = ["Criterion", "Magnitude", "Random", "Taylor"]


class Criterion(Protocol):
    """How channels are scored; low scores go first."""

    @property
    def gradients(self) -> bool:
        """Whether `element` reads gradients, so that training batches are run."""
        ...

    @property
    def degree(self) -> int:
        """How scores grow with what a channel does to the loss: 2 squared, 1 linearly, 0 not comparable between layers."""
        ...

    @property
    def readers_only(self) -> bool:
        """Whether only the weights that read a channel count, where there are any; otherwise its whole class does."""
        ...

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """A number for each element of a weight, in its shape."""
        ...

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """One batch's score of each channel ``[C]``, from the sum and the number of its elements ``[C]``."""
        ...


@dataclass(frozen=True)
class Taylor:
    """First-order Taylor expansion of the loss (Molchanov et al. 2019, https://arxiv.org/abs/1906.10771, equation 8).

    What the loss changes by when a set of weights is zeroed is, to first order, the sum of weight times gradient. Removing a
    channel is the same as zeroing the slices of every layer that reads it, so the sum runs over those, all of them; it is
    squared for each batch and averaged over batches. By the chain rule this is the paper's gate behind BatchNorm, scale times
    its gradient plus shift times its gradient, wherever only ReLU and linear operators lie between, and it also holds where
    there is no BatchNorm or several layers read the channel. Adding the producing side as well (filters, BatchNorm) would
    count the same change twice, once without BatchNorm's shift: measured on ResNet-56 at half of its multiply-accumulates,
    single channels, without recovery, that gives 60 % where this gives 69 %. A channel that no weight reads (the width of
    an attention head) is scored by everything in its class.

    Args:
        squared: square each batch's sum; otherwise its absolute value is taken.

    Example:
        >>> w, g = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> Taylor().score(Taylor().element(w, g).sum().view(1), torch.tensor([2]))
        tensor([1.])
    """

    squared: bool = True
    gradients: ClassVar[bool] = True
    readers_only: ClassVar[bool] = True

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


@dataclass(frozen=True)
class Magnitude:
    """Mean of ``|w| ** p`` over a channel's elements (p=1: Li et al. 2017, https://arxiv.org/abs/1608.08710).

    Layers differ in scale, so scores are relative to the mean of the channel's group.

    Args:
        p: 1 or 2.

    Example:
        >>> w = torch.tensor([1.0, -3.0])
        >>> Magnitude(p=1).score(Magnitude(p=1).element(w, w).sum().view(1), torch.tensor([2]))
        tensor([2.])
    """

    p: int = 2
    gradients: ClassVar[bool] = False
    degree: ClassVar[int] = 0
    readers_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.p not in (1, 2):
            raise RecipeError(f"Magnitude(p={self.p!r}) makes no sense: p is 1 or 2.")

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """``|w| ** p``."""
        return weight.abs() if self.p == 1 else weight.square()

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """The mean."""
        return sums / counts


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
    gradients: ClassVar[bool] = False
    degree: ClassVar[int] = 0
    readers_only: ClassVar[bool] = False

    def element(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """Nothing of the weight counts."""
        return torch.zeros_like(weight)

    def score(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(len(sums), generator=torch.Generator().manual_seed(self.seed)).to(sums)
