"""An exponential moving average of weights, often better than the last ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from .network import Network

__all__ = ["Average"]


class Average:
    """The moving average of a network's weights and statistics (Polyak and Juditsky 1992).

    After ``t`` updates the weight of the past is ``min(decay, (1 + t) / (10 + t))``, as in TensorFlow, so that the weights at the
    start are soon forgotten.

    Args:
        network: averaged from now on.
        decay: weight of the past, from 0 to below 1.

    Example:
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(1, 1, bias=False), torch.zeros(1, 1))
        >>> _ = network.module.weight.data.fill_(0.0)
        >>> average = Average(network, 0.99)
        >>> _ = network.module.weight.data.fill_(1.0)
        >>> average.update()
        >>> round(float(average.tensors[0]), 4)  # after one update the past weighs 2 / 11
        0.8182
    """

    def __init__(self, network: Network, decay: float):
        self.network, self.decay, self.updates = network, decay, 0
        self.tensors = [t.detach().clone() for t in network.tensors()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights in; whole numbers are copied."""
        self.updates += 1
        past = min(self.decay, (1 + self.updates) / (10 + self.updates))
        now = [t.detach() for t in self.network.tensors()]
        floats = [i for i, t in enumerate(now) if t.is_floating_point()]
        torch._foreach_lerp_([self.tensors[i] for i in floats], [now[i] for i in floats], 1 - past)
        for mine, theirs in zip(self.tensors, now, strict=True):
            if not theirs.is_floating_point():
                mine.copy_(theirs)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the network has the average weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for i, tensor in enumerate(self.network.tensors()):
            tensor.data, self.tensors[i] = self.tensors[i], tensor.data
