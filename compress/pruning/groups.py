"""From labels to channels: the classes that may go, and the groups of classes that touch the same axes of the same weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .analysis import Analysis
from .labels import Ids

__all__ = ["Channels", "Group", "channels_of"]


@dataclass(frozen=True)
class Group:
    """Channels that are alike: each touches the same axes of the same weights, the same number of times.

    Attributes:
        axes: (weight, dim, positions that one channel takes there), in the order of the weights.
        channels: the classes, as label representatives.
    """

    axes: tuple[tuple[str, int, int], ...]
    channels: Ids = field(repr=False, compare=False)

    @property
    def name(self) -> str:
        """The first weight whose filters the channels are."""
        made = [name for name, dim, _ in self.axes if dim == 0]
        return (made or [self.axes[0][0]])[0]

    def step(self, multiple: int) -> int:
        """How many channels go at once so that filter counts stay multiples of ``multiple``, where they were.

        Channels that take several filters (one in each group of a grouped convolution, say) count that often; where the
        count was no multiple, its largest common divisor with one is kept.

        Example:
            >>> group = Group((("conv.weight", 0, 4),), np.arange(16))
            >>> group.step(8), Group((("conv.weight", 0, 1),), np.arange(12)).step(8)
            (2, 4)
        """
        taken = math.gcd(*([n for _, dim, n in self.axes if dim == 0] or [n for _, _, n in self.axes]))
        return math.gcd(len(self.channels), multiple // math.gcd(multiple, taken))


@dataclass(frozen=True)
class Channels:
    """All channels of a network that may go.

    Attributes:
        analysis: where they come from.
        groups: the groups, in the order of the weights.
    """

    analysis: Analysis
    groups: tuple[Group, ...]

    @property
    def classes(self) -> Ids:
        """Every class, group after group."""
        return np.concatenate([g.channels for g in self.groups]) if self.groups else np.zeros(0, np.int64)

    def index(self, labels: Ids) -> Ids:
        """For each label its place in `classes`, or -1 where it must stay."""
        classes = self.classes
        order = np.argsort(classes)
        roots = self.analysis.labels.find(labels)
        if not len(classes):
            return np.full(len(roots), -1)
        at = np.minimum(np.searchsorted(classes[order], roots), len(classes) - 1)
        found: Ids = np.where(classes[order][at] == roots, order[at], -1)
        return found

    def without(self, removed: Iterable[int]) -> NDArray[np.bool_]:
        """For each of `classes`, whether it stays when ``removed`` (label representatives) go."""
        return ~np.isin(self.classes, np.fromiter(removed, np.int64))


def channels_of(analysis: Analysis) -> Channels:
    """Group the classes of an analysis that may go.

    Parts that were sliced off count like axes of weights: a part whose last channel went would be an empty tensor.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> [g.axes for g in channels_of(analyse(trace(net, torch.zeros(1, 4)))).groups]
        [(('0.weight', 0, 1), ('0.bias', 0, 1), ('2.weight', 1, 1))]
    """
    labels = analysis.labels
    touched: dict[int, list[tuple[str, int, int]]] = {}
    for name, parameter in analysis.parameters.items():
        for dim, ids in enumerate(parameter.labels):
            roots, counts = np.unique(labels.find(ids[~labels.frozen(ids)]), return_counts=True)
            for root, n in zip(roots.tolist(), counts.tolist(), strict=True):
                touched.setdefault(root, []).append((name, dim, n))
    parts: dict[int, list[int]] = {}
    for i, ids in enumerate(analysis.pieces):
        for root in np.unique(labels.find(ids)).tolist():
            parts.setdefault(root, []).append(i)
    groups: dict[tuple[tuple[tuple[str, int, int], ...], tuple[int, ...]], list[int]] = {}
    for root, axes in touched.items():
        groups.setdefault((tuple(axes), tuple(parts.get(root, ()))), []).append(root)
    return Channels(analysis, tuple(Group(axes, np.array(roots)) for (axes, _), roots in groups.items()))
