"""One operator call of an exported graph, its arguments by name."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["Call", "hint", "operator_name", "shape_of", "user_line"]


def hint(n: int | torch.SymInt) -> int:
    """The size that a dimension had when the graph was exported."""
    return n if isinstance(n, int) else int(n.node.hint)


def shape_of(value: Tensor) -> list[int]:
    """The shape a tensor of the graph had when it was exported, the batch being `EXPORT_BATCH`."""
    return [hint(n) for n in value.shape]


def operator_name(target: Any) -> str:
    """``'conv2d'`` for ``torch.ops.aten.conv2d.default``; in-place variants go by the plain name.

    Example:
        >>> operator_name(torch.ops.aten.relu_.default), operator_name(len)
        ('relu', 'len')
    """
    if not isinstance(target, torch._ops.OpOverload):
        return getattr(target, "__name__", str(target))
    name: str = target._schema.name.partition("::")[2]
    return name[:-1] if name.endswith("_") and not name.startswith("__") else name


_TORCH = os.path.dirname(torch.__file__) + os.sep


def user_line(node: fx.Node) -> str:
    """'net.py, line 12 (`x = x.fft()`)': the innermost line of the model's code; '' where it is not known.

    A model's code is whatever is not PyTorch's: a library of models counts. Constants have the line that uses them first.
    """
    trace = node.meta.get("stack_trace") or next((n.meta["stack_trace"] for n in node.users if n.meta.get("stack_trace")), "")
    lines = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]*)', trace)
    own = [x for x in lines if not x[0].startswith((_TORCH, "<"))]
    return f"{own[-1][0]}, line {own[-1][1]} (`{own[-1][2].strip()}`)" if own else ""


class Call:
    """A node that calls an ATen operator.

    ``call["dim"]`` is the argument of that name, or its default; ``call.get`` serves overloads that lack it.
    """

    def __init__(self, node: fx.Node):
        self.node = node
        self.name = operator_name(node.target)
        self._arguments: dict[str, Any] = {}
        if isinstance(node.target, torch._ops.OpOverload):
            for i, a in enumerate(node.target._schema.arguments):
                default = a.default_value if a.has_default_value() else None
                self._arguments[a.name] = node.args[i] if i < len(node.args) else node.kwargs.get(a.name, default)

    def __getitem__(self, name: str) -> Any:
        return self._arguments[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arguments

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or ``default`` where this overload has none of that name."""
        return self._arguments.get(name, default)

    @property
    def value(self) -> Any:
        """What the call gave when the graph was exported: fake tensors with its shapes."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> list[int]:
        """The result's shape; a symbolic size as its example value."""
        return shape_of(self.value)

    def symbolic(self, dim: int) -> bool:
        """Whether the result's size along ``dim`` depends on the batch."""
        return not isinstance(self.value.shape[dim], int)

    def dims(self, rank: int, name: str = "dim") -> list[int]:
        """A ``dim`` argument as a list of non-negative numbers; all dimensions where it is empty or absent."""
        given = self.get(name)
        if given is None or given == []:
            return list(range(rank))
        return [d % rank for d in (given if isinstance(given, Sequence) else [given])]

    def with_arguments(self, changed: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with some arguments changed."""
        target = self.node.target
        assert isinstance(target, torch._ops.OpOverload)
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        names = [a.name for a in target._schema.arguments]
        for name, value in changed.items():
            where = names.index(name)
            if where < len(args):
                args[where] = value
            else:
                kwargs[name] = value
        positional = [a.name for a in target._schema.arguments if not a.kwarg_only]
        # keywords that continue the positional arguments go there: the usual form of exported graphs
        while len(args) < len(positional) and positional[len(args)] in kwargs:
            args.append(kwargs.pop(positional[len(args)]))
        return tuple(args), kwargs
