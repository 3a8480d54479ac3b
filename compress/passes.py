"""What a pass is: a frozen dataclass whose fields are its configuration, called with a network and a task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from torch.export import ExportedProgram

from .network import Network
from .task import Task

__all__ = ["Pass", "describe"]


class Pass(Protocol):
    """A network in, another out; the one that came in stays as it was."""

    def __call__(self, network: Network, task: Task) -> Network:
        """Return a new network with one more entry of history."""
        ...


def describe(value: Any) -> dict[str, Any]:
    """A pass's configuration as plain values, for recipes and reports; what cannot be written down is left out.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halve:
        ...     macs: float = 0.5
        >>> describe(Halve())
        {'macs': 0.5}
    """
    plain: dict[str, Any] = {}
    for field in fields(value):
        item = getattr(value, field.name)
        if item is None or isinstance(item, bool | int | float | str):
            plain[field.name] = item
        elif is_dataclass(item) and not isinstance(item, type):
            plain[field.name] = {type(item).__name__.lower(): describe(item)}
        elif isinstance(item, Mapping):
            plain[field.name] = dict(item) or None
        elif isinstance(item, list | tuple):
            plain[field.name] = [str(x) for x in item] if all(isinstance(x, str | Path) for x in item) else None
        elif isinstance(item, Path):
            plain[field.name] = str(item) if field.name != "checkpoint" else None
        elif not (isinstance(item, Network | nn.Module | ExportedProgram) or callable(getattr(item, "seconds", None))):
            plain[field.name] = str(item)
    return {name: item for name, item in plain.items() if item is not None}
