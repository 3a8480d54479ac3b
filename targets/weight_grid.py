"""Weights on a symmetric grid of integers: the one rule by which ONNX files hold them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["blocks_on_grid", "on_grid", "scales_of"]


def scales_of(weight: NDArray[np.float32], axis: int, bits: int = 8) -> NDArray[np.float32]:
    """One scale for each output channel: ``max|w| / (2**(bits - 1) - 1)``, and 1 where all weights are zero.

    Args:
        weight: of any shape.
        axis: of the output channels.
        bits: of each integer.

    Example:
        >>> scales_of(np.float32([[1.27, -0.5], [0, 0]]), 0).tolist()
        [0.009999999776482582, 1.0]
    """
    others = tuple(i for i in range(weight.ndim) if i != axis % weight.ndim)
    scales = np.abs(weight).max(axis=others).astype(np.float32) / np.float32(2 ** (bits - 1) - 1)
    return np.where(scales < np.finfo(np.float32).tiny, np.float32(1), scales).astype(np.float32)


def on_grid(weight: NDArray[np.float32], scales: NDArray[np.float32], axis: int, bits: int = 8) -> NDArray[np.int8]:
    """The integers: ``w / scale`` in float32, rounded half to even, never the most negative one.

    Example:
        >>> on_grid(np.float32([[1.27, -0.5], [0, 0]]), np.float32([0.01, 1]), 0).tolist()
        [[127, -50], [0, 0]]
    """
    shape = [1] * weight.ndim
    shape[axis] = -1
    top = 2 ** (bits - 1) - 1
    return np.asarray(np.clip(np.rint(weight / scales.reshape(shape)), -top, top), np.int8)


def blocks_on_grid(weight: NDArray[np.float32], block: int, bits: int = 4) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers and scales of blocks of weights along the last axis, which is filled up with zeros to whole blocks.

    Args:
        weight: ``[outputs, inputs]``.
        block: weights that share a scale.
        bits: of each integer.

    Returns:
        Integers ``[outputs, blocks, block]`` and scales ``[outputs, blocks]``.

    Example:
        >>> integers, scales = blocks_on_grid(np.float32([[7, -3, 0.7]]), block=2)
        >>> integers.tolist(), scales
        ([[[7, -3], [7, 0]]], array([[1. , 0.1]], dtype=float32))
    """
    rows, columns = weight.shape
    filled = np.pad(weight, ((0, 0), (0, -columns % block))).reshape(rows * (-(-columns // block)), block)
    scales = scales_of(filled, 0, bits)
    integers = on_grid(filled, scales, 0, bits)
    return integers.reshape(rows, -1, block), scales.reshape(rows, -1)
