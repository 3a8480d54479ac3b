"""An fp32 TFLite model into one with smaller numbers: ai-edge-quantizer writes it, by ranges of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from edgepress.compress.quantization import Quantization, quantization

from .artifact import Port
from .layout import stored
from .silence import silence
from .tflite_bias import corrected_biases
from .tflite_recipe import Operator, activation_bits, described, tflite_operators, tflite_recipe
from .tflite_scales import left_float
from .tflite_tensors import activation_ranges, float_tensors, port_names, read_model

__all__ = ["feeds_of", "quantize_tflite"]

Ranges = Mapping[str, tuple[float, float]]

_CORRECTED = 64  # most examples that biases are corrected with, and
_CORRECTED_BYTES = 2**26  # most bytes of them


def quantize_tflite(
    content: bytes,
    ports: Sequence[Port],
    pieces: Iterable[tuple[np.ndarray, ...]] | None = None,
    how: Quantization | None = None,
    ranges: Ranges | None = None,
    correct: bool = True,
) -> bytes:
    """Quantize a file as a description says.

    Weights are symmetric: of each channel, block or tensor the scale is the largest absolute value over 127 (7 in 4 bits), and
    a weight the nearest multiple, halves to the even one. Biases are 32-bit integers (64 beside 16-bit activations). Operators
    that LiteRT has no integer kernels for stay float, and so do concatenations that would put outputs of unlike ranges on
    one scale. Inputs and outputs are integers where the operators beside all of them are.

    Args:
        content: an fp32 flatbuffer that takes one example, annotated by `edgepress.targets.tflite_file.annotate_tflite`.
        ports: its inputs.
        pieces: calibration examples in the network's layout, one in each piece; read once. None where nothing is calibrated.
        how: the description; int8 where None.
        ranges: (lowest, highest) of some tensors, as training learned them, instead of the calibration's.
        correct: shift biases by what calibration examples show, see `corrected_biases`; only without `ranges`, as training has
            done that already.

    Raises:
        UserError: bf16, which LiteRT has no kernels for.
        RecipeError: numbers that LiteRT has no kernels for.
    """
    how = how or quantization("int8")
    model = read_model(content)
    operators = tflite_operators(model)
    faint = _faint(content, operators, how)
    recipe = tflite_recipe(operators, how, faint)
    bits = activation_bits(operators, recipe)
    found: dict[str, tuple[float, float]] = {}
    kept: list[dict[str, np.ndarray]] = []
    if any(bits):
        examples = _watched(feeds_of(ports, pieces or ()), kept)
        found = activation_ranges(content, examples, how.calibrator, 2 ** max(bits) - 1) | dict(ranges or {})
        inputs, outputs = port_names(model)
        left = left_float(operators, bits, found, outputs) | faint
        bits = [0 if number in left else n for number, n in enumerate(bits)]
        recipe = tflite_recipe(operators, how, left, _integer_ports(operators, bits, how, (inputs, outputs)))
    result = _quantized(content, recipe, found)
    return corrected_biases(content, result, kept) if correct and kept and not ranges else result


def _faint(content: bytes, operators: Sequence[Operator], how: Quantization) -> set[int]:
    """The layers with a block of weights whose scale, which is stored in two bytes, would be zero."""
    found: dict[int, tuple[str, int, int]] = {}
    for number, operator in enumerate(operators):
        numbers = described(operator, how).weights
        if numbers is not None and isinstance(numbers.per, int):
            found[number] = operator.constant, numbers.per, numbers.limits[1]
    values = float_tensors(content) if found else {}
    scales = {number: np.abs(values[name]).reshape(-1, per).max(1) / top for number, (name, per, top) in found.items()}
    return {number for number, each in scales.items() if not each.astype(np.float16).all()}


def feeds_of(ports: Sequence[Port], pieces: Iterable[tuple[np.ndarray, ...]]) -> Iterator[dict[str, np.ndarray]]:
    """Examples in the network's layout as a file's signature takes them."""
    for piece in pieces:
        yield {port.name: stored(value, port) for port, value in zip(ports, piece, strict=True)}


def _watched(feeds: Iterable[dict[str, np.ndarray]], kept: list[dict[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    """Pass examples on, and keep copies of the first few."""
    left = _CORRECTED_BYTES
    for example in feeds:
        left -= sum(value.nbytes for value in example.values())
        if not kept or (len(kept) < _CORRECTED and left >= 0):
            kept.append({name: value.copy() for name, value in example.items()})
        yield example


def _integer_ports(
    operators: Sequence[Operator], bits: Sequence[int], how: Quantization, ports: tuple[Collection[str], Collection[str]]
) -> tuple[bool, bool]:
    """Whether inputs, and outputs, are stored as the description's integers.

    They are where everything that reads an input, or makes an output, computes in them. An output that is an input goes with
    the inputs. One that an operator in floats reads, too, keeps outputs in floats: the quantizer would name two tensors for it.
    """
    wanted = how.activations.bits if how.activations and how.calibrated else 0
    inputs, outputs = ports
    numbered = list(zip(operators, bits, strict=True))
    reading = all(n == wanted for operator, n in numbered if set(operator.inputs) & set(inputs))
    making = {name: n for operator, n in numbered for name in operator.outputs}
    made = all(making.get(name, wanted) == wanted for name in outputs)
    alone = all(n == wanted for operator, n in numbered if set(operator.inputs) & set(outputs))
    if set(inputs) & set(outputs):
        reading = made = reading and made
    return reading, made and alone


def _quantized(content: bytes, recipe: list[dict[str, Any]], ranges: Ranges) -> bytes:
    with silence():
        from ai_edge_quantizer.quantizer import Quantizer

        worker = Quantizer(content, recipe)
        values = {
            name: {"min": np.float32(low), "max": np.float32(high)}
            for name, (low, high) in ranges.items()
            if np.isfinite(high - low)
        }
        return bytes(worker.quantize(values or None, enable_progress_report=False).quantized_model)
