"""Sizes of axes as functions of how many channels each group keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .groups import Channels
from .labels import Axis, Ids

__all__ = ["Counts", "Extent", "Sizes"]

Counts = NDArray[np.float64]
"""Channels left in each group of a `Channels`: ``[G]``, or ``[G, K]`` for K choices at once."""


class Extent(NamedTuple):
    """A product of sizes: ``factor`` times the atoms of those numbers."""

    factor: float
    atoms: tuple[int, ...]


class Sizes:
    """The sizes of labelled atoms: a constant plus, for each group, positions per channel times channels.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> found = analyse(trace(torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)), torch.zeros(1, 4)))
        >>> sizes = Sizes(channels_of(found))
        >>> numel = sizes.extent(found.axes(next(n for n in found.values if n.name == "_0_weight")))
        >>> sizes.of([numel], np.array([5.0])).tolist()
        [20.0]
    """

    def __init__(self, channels: Channels):
        self._channels = channels
        self._group = np.repeat(np.arange(len(channels.groups)), [len(g.channels) for g in channels.groups])
        self._per_group = np.array([len(g.channels) for g in channels.groups], float)
        self._known: dict[bytes, int] = {}
        self._constants: list[float] = [1.0]  # atom 0 is the number one: it fills extents up to the same length
        self._slopes: list[Counts] = [np.zeros(len(channels.groups))]

    @property
    def full(self) -> Counts:
        """Every group as it is, ``[G]``."""
        return self._per_group.copy()

    def extent(self, axes: Iterable[Axis], factor: float = 1.0) -> Extent:
        """``factor`` times the sizes of ``axes``."""
        atoms = [atom for a in axes for atom in a]
        fixed = float(np.prod([n for n, labels in atoms if labels is None], dtype=float))
        return Extent(factor * fixed, tuple(self._atom(labels) for _, labels in atoms if labels is not None))

    def of(self, extents: Sequence[Extent], counts: Counts) -> Counts:
        """What each extent is at ``counts``: ``[E]`` for ``[G]``, ``[E, K]`` for ``[G, K]``."""
        return self.function(extents)(counts)

    def function(self, extents: Sequence[Extent]) -> Callable[[Counts], Counts]:
        """`of` for some extents, prepared to be called often."""
        longest = max((len(e.atoms) for e in extents), default=0)
        index = np.array([e.atoms + (0,) * (longest - len(e.atoms)) for e in extents], int).reshape(len(extents), longest)
        factors, constants = np.array([e.factor for e in extents]), np.array(self._constants)
        slopes = np.array(self._slopes)

        def values(counts: Counts) -> Counts:
            wide = (-1, *[1] * (counts.ndim - 1))
            atoms = constants.reshape(wide) + slopes @ counts
            result: Counts = factors.reshape(wide) * atoms[index].prod(axis=1)
            return result

        return values

    def groups(self, extents: Iterable[Extent]) -> tuple[int, ...]:
        """The groups that the extents depend on."""
        atoms = sorted({atom for e in extents for atom in e.atoms})
        return tuple(np.flatnonzero(np.array([self._slopes[a] for a in atoms]).any(axis=0)).tolist()) if atoms else ()

    def _atom(self, labels: Ids) -> int:
        key = self._channels.analysis.labels.find(labels).tobytes()
        if key not in self._known:
            index = self._channels.index(labels)
            live = self._group[index[index >= 0]]
            self._slopes.append(np.bincount(live, minlength=len(self._per_group)) / self._per_group)
            self._constants.append(float((index < 0).sum()))
            self._known[key] = len(self._slopes) - 1
        return self._known[key]
