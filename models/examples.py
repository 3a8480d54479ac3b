"""A small labelled set without a training part: some of it calibrates, the rest judges, and none does both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from edgepress.compress.task import Predict

__all__ = ["Examples"]


@dataclass(frozen=True)
class Examples:
    """Labelled examples, every so-manieth of which is put aside for calibration and training.

    Attributes:
        inputs: as they are stored ``[N, ...]``.
        labels: int64 ``[N]``.
        prepare: stored inputs to what the network takes.
        aside: every so-manieth example is put aside; none where it is 0.
        first: judge by the first so many of the others only; all where None.
        batch: most examples that are prepared at once.

    Example:
        >>> data = Examples(torch.arange(6)[:, None], torch.tensor([0, 1, 0, 1, 0, 1]), Tensor.float, aside=3)
        >>> [batch.flatten().tolist() for batch in data.calibration()]
        [[0.0, 3.0]]
        >>> data.evaluate(lambda x: torch.nn.functional.one_hot(torch.from_numpy(x[:, 0]).long() % 3 % 2, 2).numpy())
        {'accuracy': 50.0}
    """

    inputs: Tensor
    labels: Tensor
    prepare: Callable[[Tensor], Tensor]
    aside: int = 5
    first: int | None = None
    batch: int = 50

    @property
    def is_aside(self) -> Tensor:
        """bool ``[N]``: which examples are put aside."""
        rows = torch.arange(len(self.labels))
        return rows % self.aside == 0 if self.aside else torch.zeros_like(rows, dtype=torch.bool)

    def calibration(self) -> Iterator[Tensor]:
        """The inputs that are put aside, unlabelled, in batches."""
        for inputs in self.inputs[self.is_aside].split(self.batch):
            yield self.prepare(inputs)

    def training(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples that are put aside, with their labels, in an order that changes from epoch to epoch."""
        rows = self.is_aside.nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(epoch))
        for some in rows[order].split(self.batch):
            yield self.prepare(self.inputs[some]), self.labels[some]

    def judged(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(prepared inputs, labels) of the examples that judge, in batches."""
        rows = (~self.is_aside).nonzero()[:, 0][: self.first]
        for some in rows.split(self.batch):
            yield self.prepare(self.inputs[some]), self.labels[some]

    def evaluate(self, predict: Predict) -> dict[str, float]:
        """Top-1 accuracy in percent on the examples that judge."""
        right = total = 0
        for inputs, labels in self.judged():
            right += int((predict(inputs.numpy()).argmax(1) == labels.numpy()).sum())
            total += len(labels)
        return {"accuracy": 100.0 * right / total}
