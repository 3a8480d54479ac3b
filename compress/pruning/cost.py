"""Multiply-accumulates as a function of channel counts."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .groups import Channels
from .labels import Ids

__all__ = ["Macs"]

Counts = NDArray[np.float64]


class Macs:
    """The multiply-accumulates of one example for any number of channels in each group.

    Every product of the graph is a factor times the sizes of some axes, and every size is a constant plus, for each group,
    positions per channel times channels. So both sides of a channel count, filters and readers, as selection proceeds.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2))
        >>> macs = Macs(channels_of(analyse(trace(net, torch.zeros(1, 4)))))
        >>> float(macs.total(np.array([6.0]))), float(macs.total(np.array([3.0])))
        (36.0, 18.0)
    """

    def __init__(self, channels: Channels):
        self._group = np.repeat(np.arange(len(channels.groups)), [len(g.channels) for g in channels.groups])
        self._per_group = np.array([len(g.channels) for g in channels.groups], float)
        self._channels = channels
        self._constants: list[float] = [1.0]  # size 0 is the number one: it fills products up to the same length
        self._rows: list[Counts] = [np.zeros(len(channels.groups))]
        self._known: dict[bytes, int] = {}
        factors, products = [], []
        for factor, axes in channels.analysis.products:
            sizes = [self._atom(atom_labels) for a in axes for n, atom_labels in a if atom_labels is not None]
            fixed = [n for a in axes for n, atom_labels in a if atom_labels is None]
            factors.append(factor * float(np.prod(fixed, dtype=float)))
            products.append(sizes)
        longest = max([len(p) for p in products], default=0)
        self._factors = np.array(factors)
        self._index = np.array([p + [0] * (longest - len(p)) for p in products], int).reshape(len(products), longest)
        self._constant, self._slope = np.array(self._constants), np.array(self._rows)

    def _atom(self, labels: Ids) -> int:
        key = self._channels.analysis.labels.find(labels).tobytes()
        if key not in self._known:
            index = self._channels.index(labels)
            live = self._group[index[index >= 0]]
            self._rows.append(np.bincount(live, minlength=len(self._per_group)) / self._per_group)
            self._constants.append(float((index < 0).sum()))
            self._known[key] = len(self._rows) - 1
        return self._known[key]

    def total(self, counts: Counts) -> Counts:
        """Multiply-accumulates with ``counts`` channels in each group: ``[G]`` to a number, ``[G, K]`` to ``[K]``."""
        sizes = self._constant.reshape(-1, *[1] * (counts.ndim - 1)) + self._slope @ counts
        result: Counts = np.tensordot(self._factors, sizes[self._index].prod(axis=1), 1)
        return result

    def after(self, counts: Counts, steps: Counts) -> Counts:
        """For each group, the total with ``steps[g]`` channels less in that group alone, ``[G]``."""
        return self.total(counts[:, None] - np.diag(steps))
