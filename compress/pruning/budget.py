"""Budgets: how much of a network may be left, in which currency, as a part or as an amount."""

from __future__ import annotations

import math
import re
from typing import TypeAlias

from ..errors import RecipeError

__all__ = ["Budget", "limit"]

Budget: TypeAlias = float | str
"""A part of what came in (0.5), or an amount: '40 M' multiply-accumulates or weights, '600 kB', '0.25 ms'."""

_UNITS = {
    "macs": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "parameters": {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9},
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3},
    "activations": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 1024.0, "MiB": 1024.0**2, "GiB": 1024.0**3},
    "latency": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6},
}


def limit(currency: str, budget: Budget, start: float) -> float:
    """What may be left of ``start``, in the currency's own unit: a number, bytes or seconds.

    Args:
        currency: 'macs', 'parameters', 'bytes', 'activations' or 'latency'.
        budget: a part of ``start`` or an amount.
        start: what came in.

    Raises:
        RecipeError: not a part from 0 to 1, or not an amount in that currency.

    Example:
        >>> limit("macs", 0.5, 8e6), limit("latency", "0.25 ms", 1e-3), limit("bytes", "600 kB", 1e6)
        (4000000.0, 0.00025, 600000.0)
    """
    if isinstance(budget, str):
        return _amount(currency, budget)
    if isinstance(budget, bool) or not 0 < budget <= 1:
        raise RecipeError(
            f"Prune({currency}={budget!r}) makes no sense: it is the part to keep, above 0 and at most 1, or an amount such as "
            f"'{_EXAMPLES[currency]}'."
        )
    return start * budget


_EXAMPLES = {"macs": "40 M", "parameters": "500 k", "bytes": "600 kB", "activations": "64 KiB", "latency": "0.25 ms"}


def _amount(currency: str, text: str) -> float:
    found = re.fullmatch(r"\s*([0-9.eE+-]*[0-9.])\s*([a-zA-Zµ]*)\s*", text)
    units = _UNITS[currency]
    try:
        value = float(found[1]) * units[found[2]] if found else math.nan
    except (ValueError, KeyError):
        value = math.nan
    if not value > 0:
        named = ", ".join(u for u in units if u)
        raise RecipeError(
            f"Prune({currency}={text!r}) makes no sense: write a part such as 0.5, or an amount such as '{_EXAMPLES[currency]}' "
            f"(units: {named})."
        )
    return value
