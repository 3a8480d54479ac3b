"""What pruning sees in a network: groups of channels, and what holds the rest in place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from ..network import Network
from .analysis import NO_RULE, Analysis, analyse
from .call import operator_name, user_line
from .cost import Macs
from .groups import channels_of
from .rules_layers import KERNEL

__all__ = ["Frozen", "GroupReport", "Inspection", "inspect"]


@dataclass(frozen=True)
class GroupReport:
    """Channels that are alike.

    Attributes:
        name: the first weight whose filters they are.
        channels: how many there are.
        weights: (weight, dim, positions that one channel takes there).
        macs_per_channel: multiply-accumulates of one example that the first channel to go saves.
    """

    name: str
    channels: int
    weights: tuple[tuple[str, int, int], ...]
    macs_per_channel: float


@dataclass(frozen=True)
class Frozen:
    """An operator that holds channels in place.

    Attributes:
        operator: its name; 'output' for what the network returns.
        reason: why.
        line: the user's code that calls it, '' where that is not known.
        weights: (weight, dim) of axes that it locks, wholly or in part.
        known: whether there is a rule for the operator; if not, a rule would free them.
    """

    operator: str
    reason: str
    line: str
    weights: tuple[tuple[str, int], ...]
    known: bool


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` finds.

    Attributes:
        groups: channels that may go, in the order of the weights.
        frozen: what holds the others in place, in the order of the graph.
        macs: multiply-accumulates of one example.
    """

    groups: tuple[GroupReport, ...]
    frozen: tuple[Frozen, ...]
    macs: float


def inspect(network: Network) -> Inspection:
    """Show which channels of a network can go, and what holds the others in place.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
        >>> found = inspect(trace(net, torch.zeros(1, 4)))
        >>> [(g.name, g.channels, g.macs_per_channel) for g in found.groups]
        [('0.weight', 6, 6.0)]
        >>> [(f.operator, f.reason, f.weights) for f in found.frozen][-1]
        ('output', "the network's output", (('2.weight', 0), ('2.bias', 0)))
    """
    analysis = analyse(network)
    channels = channels_of(analysis)
    macs = Macs(channels)
    counts = np.array([len(g.channels) for g in channels.groups], float)
    total = float(macs.total(counts))
    saved = total - macs.after(counts, np.ones(len(counts)))
    groups = tuple(GroupReport(g.name, len(g.channels), g.axes, float(s)) for g, s in zip(channels.groups, saved, strict=True))
    return Inspection(groups, frozen_by(analysis), total)


def frozen_by(analysis: Analysis) -> tuple[Frozen, ...]:
    """What froze which weights."""
    where: dict[int, list[tuple[str, int]]] = {}
    for name, parameter in analysis.parameters.items():
        for dim, ids in enumerate(parameter.labels):
            for root in np.unique(analysis.labels.find(ids)).tolist() if len(ids) > 1 else ():
                where.setdefault(root, []).append((name, dim))
    found: dict[tuple[str, str, str, bool], dict[tuple[str, int], None]] = {}
    for context, reason, ids in analysis.labels.log:
        axes = dict.fromkeys(a for root in np.unique(analysis.labels.find(ids)).tolist() for a in where.get(root, ()))
        key = (_operator(context), reason, user_line(context), reason != NO_RULE)
        if axes and reason != KERNEL:  # nobody expects a 3x3 kernel to lose a row
            found.setdefault(key, {}).update(axes)
    return tuple(Frozen(operator, why, line, tuple(axes), known) for (operator, why, line, known), axes in found.items())


def locked(analysis: Analysis) -> str:
    """'; fft at net.py, line 3 (...) locks 12 weights' for operators without a rule; '' where there is none."""
    unknown = [f for f in frozen_by(analysis) if not f.known]
    parts = [f"{f.operator}{' at ' + f.line if f.line else ''} has no rule and locks {len(f.weights)} axes" for f in unknown]
    return "; " + ", ".join(parts[:3]) if parts else ""


def _operator(node: fx.Node) -> str:
    return operator_name(node.target) if node.op == "call_function" else node.op
