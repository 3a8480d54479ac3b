"""How long a network is trained, and with which steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import RecipeError

__all__ = ["Schedule"]

_RATES = {"sgd": 0.05, "adamw": 1e-3}


@dataclass(frozen=True)
class Schedule:
    """How long, with which steps, and what is kept of them.

    Args:
        epochs: passes over the training data; a fraction is allowed where the data's length is known.
        minutes: where given, training ends after this time at the latest and the learning rate falls accordingly: a time budget
            that fits whatever machine it runs on.
        optimizer: 'sgd' (Nesterov momentum 0.9) or 'adamw'.
        lr: the peak learning rate, reached after ``warmup`` (a fraction of the whole), then down to 0 along a cosine
            (Loshchilov and Hutter 2017, without restarts); where None, 0.05 for 'sgd' and 0.001 for 'adamw'.
        weight_decay: on weights of two and more dimensions; biases and normalisations decay in no case.
        clip: largest norm of the gradient; steps in bfloat16 need it.
        seed: of everything random in the network, dropout say, and of the training data's random numbers.
        accumulate: batches of the task that make one step, for batches larger than fit into memory.
        ema: decay of a moving average of the weights, 0.999 say; where given, the average is what is judged and delivered.
        patience: where given, the metric is judged after every epoch, training ends after so many epochs without a better one,
            and the weights of the best epoch are delivered.
        deterministic: compute with kernels that give the same bits every time; fp32 where no precision is given.
        compile: try ``torch.compile`` and keep it where steps are faster; it takes a minute or more before the first step.
        log: a file that ends in '.csv', or a folder for TensorBoard.
    """

    epochs: float = 10.0
    minutes: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float | None = None
    warmup: float = 0.05
    weight_decay: float = 5e-4
    clip: float = 5.0
    seed: int = 0
    accumulate: int = 1
    ema: float | None = None
    patience: int | None = None
    deterministic: bool = False
    compile: bool = False
    log: str | None = None

    def __post_init__(self) -> None:
        positive = (self.epochs, self.peak, self.clip, 1 if self.minutes is None else self.minutes)
        if min(positive) <= 0 or not 0 <= self.warmup < 1:
            raise RecipeError("Training needs epochs, lr, minutes and clip above 0, and a warmup of at least 0 and below 1.")
        if self.optimizer not in _RATES:
            raise RecipeError(f"The optimizer '{self.optimizer}' is unknown: take 'sgd' or 'adamw'.")
        if self.accumulate < 1 or (self.patience is not None and self.patience < 1):
            raise RecipeError("Training needs accumulate and patience of at least 1.")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RecipeError(f"Training with ema={self.ema} makes no sense: the decay lies between 0 and 1, 0.999 say.")
        if self.deterministic and self.minutes is not None:
            raise RecipeError("Deterministic training cannot end after minutes, which no two runs use alike: give epochs.")

    @property
    def peak(self) -> float:
        """The highest learning rate."""
        return _RATES.get(self.optimizer, 1.0) if self.lr is None else self.lr

    def rate(self, progress: float) -> float:
        """The learning rate at ``progress`` from 0 to 1.

        Example:
            >>> s = Schedule(lr=0.1, warmup=0.1)
            >>> [round(s.rate(p), 3) for p in (0.05, 0.1, 0.55, 1.0)]
            [0.05, 0.1, 0.05, 0.0]
        """
        if progress < self.warmup:
            return self.peak * progress / self.warmup
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))
