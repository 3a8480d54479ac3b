"""An fp32 TFLite model to int8 with ai-edge-quantizer: weights per channel, activations per tensor, int8 in and out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .artifact import Port
from .layout import stored
from .silence import silence

__all__ = ["quantize_tflite", "running_mean"]


def quantize_tflite(content: bytes, ports: tuple[Port, ...], pieces: Iterator[tuple[np.ndarray, ...]]) -> bytes:
    """Quantize to int8, the ranges being the mean over the examples of each example's own extremes.

    ``Quantizer.calibrate`` makes a list of its data to count it, so the calibrator is fed one example at a time.

    Args:
        content: an fp32 flatbuffer that takes one example.
        ports: its inputs.
        pieces: calibration examples in the network's layout, one in each piece.
    """
    with silence():
        from ai_edge_quantizer import quantizer, recipe
        from ai_edge_quantizer.calibrator import Calibrator
        from ai_edge_quantizer.recipe_manager import RecipeManager

    plan = recipe.static_wi8_ai8()
    manager = RecipeManager()
    with silence():
        manager.load_quantization_recipe(plan)
        calibrator = Calibrator(content, num_threads=1, qsv_update_func=running_mean)
    key = next(iter(calibrator.get_signature_list()))
    for piece in pieces:
        feeds = {port.name: stored(value, port) for port, value in zip(ports, piece, strict=True)}
        with silence():
            calibrator.calibrate({key: [feeds]}, manager)
    ranges = {
        name: {k: v for k, v in found.items() if k != "examples"} for name, found in calibrator.get_model_qsvs().items()
    }
    with silence():
        worker = quantizer.Quantizer(content)
        worker.load_quantization_recipe(plan)
        result = worker.quantize(ranges).quantized_model
    return bytes(result)


def running_mean(ranges: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The mean of all ranges so far and a new one.

    The quantizer's own moving average forgets: its result depends on the order of the examples, and on the last twenty most.

    Example:
        >>> ranges = {"min": 0.0, "max": 1.0}
        >>> for high in (2.0, 3.0):
        ...     ranges = running_mean(ranges, {"min": 0.0, "max": high})
        >>> ranges["max"], ranges["examples"]
        (2.0, 3)
    """
    if not ranges:
        return new
    count = ranges.get("examples", 1)
    mean = {key: (ranges[key] * count + new[key]) / (count + 1) for key in ("min", "max")}
    return {**mean, "examples": count + 1}
