"""The network's arrays into a file's layout and type, and back."""

from __future__ import annotations

import numpy as np

from .artifact import Port

__all__ = ["real", "stored"]


def stored(value: np.ndarray, port: Port) -> np.ndarray:
    """The network's array ``[N, C, ...]`` in the file's layout and type, quantized where the port is.

    Example:
        >>> port = Port("x", (1, 2), "int8", scale=0.5, zero_point=-3)
        >>> stored(np.array([[1.0, 100.0]], np.float32), port)
        array([[ -1, 127]], dtype=int8)
    """
    if port.channels_last:
        value = np.moveaxis(value, 1, -1)
    dtype = np.dtype(port.dtype)
    if port.scale is not None and value.dtype != dtype:
        limits = np.iinfo(dtype)
        value = np.clip(np.rint(value / np.float32(port.scale)) + (port.zero_point or 0), limits.min, limits.max)
    return np.ascontiguousarray(value, dtype).reshape(value.shape)


def real(value: np.ndarray, port: Port) -> np.ndarray:
    """The file's array in the network's layout, as real numbers.

    Example:
        >>> real(np.array([[-1]], np.int8), Port("x", (1, 1), "int8", scale=0.5, zero_point=-3))
        array([[1.]], dtype=float32)
    """
    if port.scale is not None:
        value = (value.astype(np.float32) - np.float32(port.zero_point or 0)) * np.float32(port.scale)
    return np.moveaxis(value, -1, 1) if port.channels_last else value
