"""What a device says is checked before it is believed: it may be broken, or somebody else's."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from edgepress.compress.errors import DeviceError

from .base import Outcome, Taken

__all__ = ["amount", "checked", "environment", "filled", "word"]

_NUMBERS = ("cores", "usable_cores", "memory_bytes", "timer_resolution_ns", "celsius", "mhz", "other_cores", "stolen_cores",
            "clock_jump_s")  # fmt: skip


def checked(answer: Mapping[str, Any]) -> Taken:
    """What an agent found out about one file when it tried it.

    Raises:
        ValueError, KeyError: it makes no sense.

    Example:
        >>> sizes = {"peak_bytes": 2, "idle_bytes": 1, "load_ns": 3, "first_ns": 4, "compile_ns": None}
        >>> checked({"name": "litert", "version": "2.1", **sizes}).peak_bytes
        2
    """
    return Taken(
        runtime=word(answer["name"]), version=word(answer["version"]), peak_bytes=_count(answer["peak_bytes"]),
        idle_bytes=_count(answer["idle_bytes"]), load_ns=_count(answer["load_ns"]), first_ns=_count(answer["first_ns"]),
        compile_ns=None if answer["compile_ns"] is None else _count(answer["compile_ns"]),
    )  # fmt: skip


def filled(taken: Outcome, entry: Mapping[str, Any], samples: np.ndarray) -> Taken:
    """The same with the samples that were taken since, ``[rounds, repeats]`` nanoseconds.

    Raises:
        ValueError, KeyError: they make no sense.
    """
    if not isinstance(taken, Taken):
        raise ValueError("no such file")
    if samples.dtype != np.int64 or samples.ndim != 2 or len(samples) < 2 or not samples.size or samples.min() < 0:
        raise ValueError("no samples")
    rounds = tuple(map(tuple, samples.tolist()))
    joules = entry["joules"]
    if joules is not None and not (_is_number(joules) and 0 <= joules < 1e9):
        raise ValueError("no energy")
    return Taken(
        **{**vars(taken), "samples_ns": rounds, "loops": _count(entry["loops"]), "runs": _count(entry["runs"]), "joules": joules}
    )


def environment(answer: Mapping[str, Any], device: str) -> dict[str, Any]:
    """What a device says of itself, as plain values.

    Raises:
        DeviceError: it makes no sense.

    Example:
        >>> environment({"environment": {"cpu": "x" + chr(27) + "[2J", "cores": 4}}, "board")
        {'device': 'board', 'cpu': 'x[2J', 'cores': 4}
    """
    found = answer.get("environment")
    try:
        if isinstance(found, dict) and all(isinstance(key, str) and key.isidentifier() for key in found) and _sensible(found):
            return {"device": device, **{key: _tame(value) for key, value in found.items()}}
    except RecursionError:
        pass
    raise DeviceError(f"What {device} says of itself makes no sense, so it was not believed.")


def amount(value: object) -> float:
    """A time in a unit of the caller's.

    Raises:
        DeviceError: it is none.
    """
    if not _is_number(value) or not 0 <= value < 1e15:  # type: ignore[operator]
        raise DeviceError("A time that a device sent makes no sense, so it was not believed.")
    return float(value)  # type: ignore[arg-type]


def word(value: object) -> str:
    """The name or version of a runtime.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or not re.fullmatch(r"[\w.:+ -]{1,80}", value):
        raise ValueError("no name")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise ValueError("no count")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sensible(found: Mapping[str, Any]) -> bool:
    """Whether the values that others compute with, or show, are of their kind."""
    load, trace, packages = found.get("load_average"), found.get("trace"), found.get("packages")
    features = found.get("cpu_features")
    return (
        all(found.get(key) is None or _is_number(found[key]) for key in _NUMBERS)
        and (load is None or (_all(load, _is_number) and len(load) == 3))
        and (trace is None or _all(trace, lambda row: _all(row, lambda v: v is None or _is_number(v)) and len(row) == 3))
        and (packages is None or (isinstance(packages, dict) and _all(list(packages.values()), lambda v: isinstance(v, str))))
        and (features is None or _all(features, lambda v: isinstance(v, str)))
    )


def _all(values: object, fits: Any) -> bool:
    return isinstance(values, list) and all(map(fits, values))


def _tame(value: Any) -> Any:
    """Plain values without control characters: they end up on a terminal and in a report."""
    if isinstance(value, str):
        return "".join(c for c in value[:500] if c.isprintable())
    if isinstance(value, list):
        return [_tame(item) for item in value[:100_000]]
    if isinstance(value, dict):
        return {str(_tame(str(key))): _tame(item) for key, item in value.items()}
    return value if value is None or isinstance(value, bool | int | float) else None
