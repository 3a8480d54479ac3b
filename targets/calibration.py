"""Calibration data on its way to a quantizer: checked, cut into small pieces, never held."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from edgepress.compress.errors import UserError
from edgepress.compress.network import Network
from edgepress.compress.task import Batches, input_batches

__all__ = ["halves", "pieces"]


def pieces(network: Network, batches: Batches, size: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield the calibration examples as tuples of arrays ``[n, ...]`` in the network's layout, ``n <= size``.

    One batch is held at a time, so memory does not grow with the number of examples; and a quantizer that keeps every
    activation of what it is given sees ``size`` examples at a time, whatever the batch size of the data.

    Args:
        network: whose inputs the data is checked against.
        batches: unlabelled batches, as in ``Task.calibration_batches``.
        size: most examples in one piece.

    Raises:
        UserError: no examples, a shape that does not fit the network, or a value that is not finite.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
        >>> [x.shape for x, in pieces(network, [torch.zeros(5, 3)], size=2)]
        [(2, 3), (2, 3), (1, 3)]
    """
    empty = True
    for batch in input_batches(batches):
        arrays = tuple(x.detach().cpu().numpy() for x in batch)
        _check(network, arrays)
        for at in range(0, len(arrays[0]), size):
            empty = False
            # copies: a piece that a quantizer keeps must not keep the whole batch
            yield tuple(np.array(array[at : at + size]) for array in arrays)
    if empty:
        raise UserError(_EMPTY)


def halves(batches: Batches, count: int) -> tuple[list[tuple[torch.Tensor, ...]], list[np.ndarray]]:
    """The first ``count`` calibration examples in two halves: to calibrate with, as batches, and to look at, as arrays.

    Where there is one example only, it is both.

    Raises:
        UserError: no examples.

    Example:
        >>> import torch
        >>> seen, shown = halves([torch.zeros(5, 3), torch.ones(5, 3)], 8)
        >>> [x.shape for x, in seen], [x.shape for x in shown]
        ([torch.Size([4, 3])], [(4, 3)])
    """
    taken: list[tuple[torch.Tensor, ...]] = []
    for batch in input_batches(batches):
        taken.append(batch)
        if sum(len(b[0]) for b in taken) >= count:
            break
    examples = [torch.cat(column)[:count] for column in zip(*taken, strict=True)]
    if not examples or not len(examples[0]):
        raise UserError(_EMPTY)
    half = max(1, len(examples[0]) // 2)
    return [tuple(x[:half] for x in examples)], [x[-half:].numpy() for x in examples]


_EMPTY = "The calibration data holds no examples: give some batches of typical inputs."


def _check(network: Network, arrays: tuple[np.ndarray, ...]) -> None:
    given = [tuple(array.shape[1:]) for array in arrays]
    wanted = [tuple(example.shape[1:]) for example in network.example_inputs]
    if given != wanted or any(not array.ndim for array in arrays):
        shapes = [", ".join(str(["N", *shape]) for shape in shapes).replace("'", "") for shapes in (given, wanted)]
        raise UserError(f"A calibration batch of shape {shapes[0]} does not fit the network, which takes {shapes[1]}.")
    if len({len(array) for array in arrays}) > 1:
        raise UserError("A calibration batch has inputs of different lengths: one batch needs as many examples of each.")
    if not all(np.isfinite(array).all() for array in arrays if array.dtype.kind == "f"):
        raise UserError("The calibration data holds NaN or infinite values: remove those examples.")
