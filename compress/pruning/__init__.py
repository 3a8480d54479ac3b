"""Structured pruning: labels on every axis position, criteria, selection, rewriting."""

from .analysis import Analysis, analyse
from .criteria import Criterion, Magnitude, Random, Taylor
from .groups import Channels, Group, channels_of
from .inspection import Frozen, GroupReport, Inspection, inspect
from .oracle import masked, relative_error
from .prune import Prune
from .rewrite import remove
from .scores import channel_scores
from .selection import Bounds, Selection, select

__all__ = [
    "Analysis",
    "Bounds",
    "Channels",
    "Criterion",
    "Frozen",
    "Group",
    "GroupReport",
    "Inspection",
    "Magnitude",
    "Prune",
    "Random",
    "Selection",
    "Taylor",
    "analyse",
    "channel_scores",
    "channels_of",
    "inspect",
    "masked",
    "relative_error",
    "remove",
    "select",
]
