"""What the inputs and outputs of a file are called."""

from __future__ import annotations

import keyword
import re

import torch

__all__ = ["port_names"]


def port_names(program: torch.export.ExportedProgram) -> tuple[list[str], list[str]]:
    """Names for the inputs and outputs of an exported program: the arguments' own, and ``output`` or ``output_0`` ....

    Example:
        >>> class Sum(torch.nn.Module):
        ...     def forward(self, image, mask):
        ...         return image + mask
        >>> port_names(torch.export.export(Sum(), (torch.zeros(2), torch.zeros(2))))
        (['image', 'mask'], ['output'])
    """
    inputs = [_identifier(str(name)) for name in program.graph_signature.user_inputs]
    count = len(program.graph_signature.user_outputs)
    outputs = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
    taken = set(inputs)
    return inputs, [name if name not in taken else f"{name}_" for name in outputs]


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"{name}_" if keyword.iskeyword(name) or not name.isidentifier() else name
