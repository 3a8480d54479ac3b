"""Structured pruning: labels on every axis position, criteria, selection, rewriting."""

from .analysis import Analysis, analyse
from .criteria import (
    OBD,
    Activation,
    BatchNormScale,
    Criterion,
    Fisher,
    GeometricMedian,
    Lamp,
    Magnitude,
    Random,
    Taylor,
)
from .groups import Channels, Group, channels_of
from .inspection import Frozen, GroupReport, Inspection, inspect
from .normalise import Normalisation, normalised
from .oracle import masked, relative_error
from .prune import Prune
from .rewrite import remove
from .scores import branch_scores, channel_scores
from .selection import Bounds, Depth, Goal, Selection, select

__all__ = [
    "OBD",
    "Activation",
    "Analysis",
    "BatchNormScale",
    "Bounds",
    "Channels",
    "Criterion",
    "Depth",
    "Fisher",
    "Frozen",
    "GeometricMedian",
    "Goal",
    "Group",
    "GroupReport",
    "Inspection",
    "Lamp",
    "Magnitude",
    "Normalisation",
    "Prune",
    "Random",
    "Selection",
    "Taylor",
    "analyse",
    "branch_scores",
    "channel_scores",
    "channels_of",
    "inspect",
    "masked",
    "normalised",
    "relative_error",
    "remove",
    "select",
]
