"""Scores relative to their group's: a choice apart from the criterion."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from ..errors import RecipeError
from .groups import Channels

__all__ = ["Normalisation", "normalised"]

Normalisation: TypeAlias = Literal["none", "mean", "max", "l2"]


def normalised(scores: Tensor, channels: Channels, how: Normalisation) -> Tensor:
    """Scores ``[C]`` divided by a statistic of their group: its mean, its largest, or its l2 norm; or as they are.

    The l2 norm is Molchanov et al.'s (2017, https://arxiv.org/abs/1611.06440, section 2.2), for `Activation`. What is divided
    is no longer in units of the loss. Scores per multiply-accumulate or per microsecond are the selection's business: it
    sets the scores of a step against what the step saves.

    Args:
        scores: in the order of ``channels.classes``.
        channels: whose groups count.
        how: ``"none"``, ``"mean"``, ``"max"`` or ``"l2"``.

    Raises:
        RecipeError: there is no such normalisation.

    Example:
        >>> from edgepress.compress.network import trace
        >>> from .analysis import analyse
        >>> from .groups import channels_of
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
        >>> normalised(torch.tensor([3.0, 4.0]), channels_of(analyse(trace(net, torch.zeros(1, 4)))), "l2")
        tensor([0.6000, 0.8000])
    """
    if how not in get_args(Normalisation):
        raise RecipeError(f"normalise={how!r} makes no sense: it is one of {', '.join(get_args(Normalisation))}.")
    if how == "none" or not len(scores):
        return scores
    statistic = {"mean": torch.mean, "max": torch.amax, "l2": torch.linalg.vector_norm}[how]
    parts = scores.split([len(g.channels) for g in channels.groups])
    return torch.cat([part / statistic(part).clamp(min=1e-30) for part in parts])
