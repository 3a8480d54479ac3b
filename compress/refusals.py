"""Why a network cannot be captured, in one sentence: what the caller gave, which line of the code, what to do."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .errors import TraceError

__all__ = ["advice", "first_line", "given_inputs", "user_line"]


def given_inputs(model: Any, example_inputs: Any) -> tuple[Tensor, ...]:
    """The example inputs as a tuple of tensors.

    Raises:
        TraceError: they are something else, or the model is no module.

    Example:
        >>> len(given_inputs(nn.Linear(2, 2), torch.zeros(1, 2)))
        1
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"The network is a {type(model).__name__}: give a torch.nn.Module.")
    inputs = tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)
    for x in inputs or (None,):
        if not isinstance(x, Tensor):
            raise TraceError(
                f"The example inputs hold a {type(x).__name__}: give a tensor, or a tuple of tensors in the order in which "
                "forward() takes them, batch first."
            )
        if x.dim() and not len(x):
            raise TraceError(f"An example input of shape {list(x.shape)} holds no example: give one at least, batch first.")
    return inputs


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def user_line(error: BaseException) -> str:
    """' at model.py, line 12 (`if x.sum() > 0:`)': the last line of the user's code that the error names."""
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    found = [
        (file, int(line), code.strip())
        for file, line, code in re.findall(r'File "([^"]+)", line (\d+), in \w+\n\s+(.*)', text)
        if not re.search(r"site-packages|dist-packages|<frozen|/lib/python3", file)
        and os.path.dirname(file) != os.path.dirname(__file__)
        and file != "<string>"
        and not file.startswith("<eval_with_key>")
    ]
    return f" at {found[-1][0]}, line {found[-1][1]} (`{found[-1][2]}`)" if found else ""


def advice(first: Exception, second: Exception, run: Callable[[], Any]) -> str:
    """What to do about a network that torch.export refuses.

    Args:
        first: what its first way of capturing said.
        second: what its second way said.
        run: runs the network itself on the batch that it was to be captured with.
    """
    text = f"{first}\n{second}"
    if "data-dependent" in text.lower():
        return "the code branches on a tensor's values; use torch.where or torch.cond, or move the branch out of forward()."
    try:
        with torch.no_grad():
            run()
    except Exception as error:
        return (
            f"it runs on the example inputs but on no batch of another size ({first_line(error)}); give them batch first and "
            "take its size from them (x.shape[0], or -1 in view and reshape)."
        )
    if "specialized it to be a constant" in text or "Constraints violated" in text:
        return "the code fixes the batch size; take it from the input (x.shape[0], or -1 in view and reshape)."
    return f"{first_line(first)}."
