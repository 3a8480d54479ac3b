"""The operator table: every operator that pruning knows, gathered from the files that hold their rules by subject."""

from __future__ import annotations

from typing import Any

import torch

from .call import operator_name
from .rules_elementwise import TABLE as ELEMENTWISE
from .rules_elementwise import elementwise
from .rules_indexing import TABLE as INDEXING
from .rules_layers import TABLE as LAYERS
from .rules_layout import TABLE as LAYOUT
from .rules_recurrent import TABLE as RECURRENT
from .table import Rule

__all__ = ["RULES", "rule_of"]

RULES: dict[str, Rule] = {name: rule for table in (ELEMENTWISE, INDEXING, LAYERS, LAYOUT, RECURRENT) for name, rule in table}
"""Operator name, as in ``torch.ops.aten``, to its rule; an in-place variant goes by the plain name."""


def rule_of(target: Any) -> Rule | None:
    """The rule for a call's target, or None: whatever it touches is then frozen.

    Operators that PyTorch tags as pointwise need no entry.

    Example:
        >>> rule_of(torch.ops.aten.conv2d.default) is RULES["conv2d"]
        True
        >>> rule_of(torch.ops.aten.linalg_matrix_exp.default) is None
        True
    """
    known = RULES.get(operator_name(target))
    if known is None and isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags:
        return elementwise
    return known
