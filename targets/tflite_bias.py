"""Bias correction on the file: what quantization shifts on average is put back into the biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .artifact import inline
from .ranges import between_ends
from .silence import silence
from .tflite_pieces import Pieces
from .tflite_tensors import float_tensors, read_model, tensor_name, tflite_tensors, weight_integers

__all__ = ["corrected_biases"]

_SHARE = 0.1  # of a channel's values that a bias moves, at least: the others sit at an end of the activation's range
_JUDGED = 4  # each such example says whether the correction helps, the others what it is

Feeds = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Layer:
    """A layer with a bias of integers of its own.

    Args:
        source: name of its input in the fp32 file.
        output: name of its result.
        index: of that tensor.
        scale: of that tensor.
        zero_point: of that tensor.
        lost: stored weights less those of the fp32 file, summed over a kernel's positions: ``[out, in]``; depthwise ``[out]``.
        scales: of the bias, one or one for each channel.
        bias: the integers, a view into the file.
        buffer: number of the buffer that holds them.
    """

    source: str
    output: str
    index: int
    scale: float
    zero_point: int
    lost: np.ndarray
    scales: np.ndarray
    bias: np.ndarray
    buffer: int


def corrected_biases(content: bytes, quantized: bytes, feeds: Sequence[Feeds]) -> bytes:
    """Shift the biases of a quantized file so that its layers give what they gave in floats, on average per channel.

    Rounded weights move the mean of a channel, and the means add up from layer to layer (Nagel et al. 2019, Data-Free
    Quantization Through Weight Equalization and Bias Correction, https://arxiv.org/abs/1906.04721). First each layer is
    relieved of what its own weights lost, times the mean of its input. Then, in the order in which they run, of what is
    still measured once those before are right; every operator runs twice. Either is kept where it brings the outputs of other
    examples nearer.

    Args:
        content: the fp32 file.
        quantized: what became of it; its tensors have the same names.
        feeds: examples, by the signature's names and in the fp32 file's types.

    Returns:
        the file, of the same size; as it was where nothing helps.
    """
    judged, learned = feeds[:: _JUDGED if len(feeds) > 1 else 1], [x for i, x in enumerate(feeds) if i % _JUDGED] or feeds
    result = bytearray(quantized)
    layers = _layers(content, result)
    means, shares = _float_means(content, learned, layers)
    candidates = [quantized]
    for layer in layers:
        if (mean := means.get(layer.source)) is not None and (shift := _expected(layer.lost, mean)) is not None:
            _move(layer, -shift)
    candidates.append(bytes(result))
    _correct_in_turn(bytes(result), learned, layers, means, shares)
    candidates.append(bytes(result))
    wanted = [_outputs(content, judged), *(_outputs(candidate, judged) for candidate in candidates)]
    errors = [_error(found, wanted[0]) for found in wanted[1:]]
    return candidates[int(np.argmin(errors))]


def _correct_in_turn(
    content: bytes,
    feeds: Sequence[Feeds],
    layers: Sequence[_Layer],
    means: Mapping[str, np.ndarray],
    shares: Mapping[str, np.ndarray],
) -> None:
    """Move each layer's biases by what is measured once the layers before are right."""
    pieces = Pieces(content, [layer.index for layer in layers])
    known = [pieces.inputs(example) for example in feeds]
    for layer, piece in zip(layers, pieces.segments, strict=True):
        rows = [value.reshape(-1, len(layer.bias)) for value in pieces.run(piece, known)]
        mean = np.mean([r.mean(0, dtype=np.float64) for r in rows], 0)
        found = (mean - layer.zero_point) * layer.scale
        _move(layer, (means[layer.output] - found) / np.maximum(shares[layer.output], _SHARE))
        pieces.model.buffers[layer.buffer].data = np.frombuffer(layer.bias.tobytes(), np.uint8)
        for example, value in zip(known, pieces.run(piece, known), strict=True):
            example[piece.output] = value
            for index in piece.done:
                del example[index]


def _move(layer: _Layer, shift: np.ndarray) -> None:
    """Add a real shift to a layer's biases, in the file."""
    limits = np.iinfo(np.int32)  # 64-bit biases are summed with 32-bit products on some devices
    layer.bias[:] = np.clip(layer.bias + np.rint(shift / layer.scales), limits.min, limits.max)


def _expected(lost: np.ndarray, mean: np.ndarray) -> np.ndarray | None:
    """What a layer's lost weights make of an input's mean: ``[out]``; None where the shapes are unknown."""
    if lost.ndim == 1:  # depthwise, with one or several results for each channel
        return np.asarray(lost * np.repeat(mean, len(lost) // len(mean))) if len(lost) % len(mean) == 0 else None
    rows, width = lost.shape
    groups = len(mean) // width
    if groups * width != len(mean) or rows % groups:
        return None
    return np.asarray(lost.reshape(groups, rows // groups, width) @ mean.reshape(groups, width, 1)).reshape(-1)


def _layers(content: bytes, quantized: bytearray) -> list[_Layer]:
    """The layers of a file that have a bias of integers of their own, in the order in which they run."""
    from ai_edge_litert import schema_py_generated as schema

    model, floats, table = read_model(bytes(quantized)), float_tensors(content), schema.Model.GetRootAs(quantized, 0)
    for buffer in model.buffers:
        inline(buffer, bytes(quantized))
    tensors = model.subgraphs[0].tensors
    kinds = {schema.TensorType.INT32: np.int32, schema.TensorType.INT64: np.int64}
    found: dict[int, _Layer | None] = {}
    for operator in model.subgraphs[0].operators:
        if operator.inputs is None or len(operator.inputs) != 3 or len(operator.outputs) != 1 or operator.inputs[2] < 0:
            continue
        source, weights, bias, output = (tensors[int(i)] for i in (*operator.inputs, operator.outputs[0]))
        original = floats.get(tensor_name(weights))
        dtype = kinds.get(bias.type)
        if dtype is None or original is None or bias.quantization.scale is None or output.quantization.scale is None:
            continue
        values = np.frombuffer(quantized, dtype, bias.shape[0], _place(quantized, table.Buffers(bias.buffer)))
        layer = _Layer(
            tensor_name(source).removesuffix("_quantized"),
            tensor_name(output),
            int(operator.outputs[0]),
            float(output.quantization.scale[0]),
            int(output.quantization.zeroPoint[0]),
            _lost(weights, weight_integers(weights, model.buffers[weights.buffer].data), original),
            np.asarray(bias.quantization.scale),
            values,
            bias.buffer,
        )
        found[bias.buffer] = None if bias.buffer in found else layer  # what two layers share is left alone
    return [layer for layer in found.values() if layer is not None]


def _place(content: bytearray, buffer: Any) -> int:
    """Where a buffer's data begins in a file; a large file keeps it behind its tables."""
    if not buffer.DataLength():
        return int(buffer.Offset())
    start = np.frombuffer(content, np.uint8).__array_interface__["data"][0]
    return int(buffer.DataAsNumpy().__array_interface__["data"][0] - start)


def _lost(tensor: Any, integers: np.ndarray, original: np.ndarray) -> np.ndarray:
    axis = tensor.quantization.quantizedDimension
    scales = np.asarray(tensor.quantization.scale, np.float64)
    lost = integers * scales.reshape([-1 if i == axis else 1 for i in range(original.ndim)]) - original
    if axis == original.ndim - 1 and original.ndim == 4:  # depthwise: [1, height, width, channels]
        return np.asarray(lost.sum((0, 1, 2)))
    return np.asarray(lost.reshape(len(lost), -1, lost.shape[-1]).sum(1))


# ---- measuring


def _float_means(
    content: bytes, feeds: Sequence[Feeds], layers: Sequence[_Layer]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """By tensor: the mean of each channel, and which share of its values is not at an end of an activation like ReLU6."""
    run = tflite_tensors(content)
    names = {name for layer in layers for name in (layer.source, layer.output)}
    means: dict[str, np.ndarray] = {}
    shares: dict[str, np.ndarray] = {}
    for example in feeds:
        for name, value in run(example).items():
            if name in names:
                rows = value.reshape(-1, value.shape[-1]).astype(np.float64)
                means[name] = means.get(name, 0.0) + rows.mean(0) / len(feeds)
                shares[name] = shares.get(name, 0.0) + between_ends(rows).mean(0) / len(feeds)
    return means, shares


def _outputs(content: bytes, feeds: Sequence[Feeds]) -> list[dict[str, np.ndarray]]:
    run = _runner(content)
    return [run(example) for example in feeds]


def _error(found: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> float:
    """Squared error over squared value, summed over the outputs."""
    total = 0.0
    for name in wanted[0]:
        pairs = [(f[name].astype(np.float64), w[name].astype(np.float64)) for f, w in zip(found, wanted, strict=True)]
        total += sum(((f - w) ** 2).sum() for f, w in pairs) / max(sum((w**2).sum() for _, w in pairs), 1e-30)
    return total


def _runner(content: bytes) -> Callable[[Feeds], dict[str, np.ndarray]]:
    """A function that runs a file on real inputs and gives real outputs, by the signature's names."""
    with silence():
        from ai_edge_litert import interpreter as litert

        interpreter = litert.Interpreter(model_content=content, num_threads=1)
        interpreter.allocate_tensors()
    runner = interpreter.get_signature_runner()
    inputs, outputs = runner.get_input_details(), runner.get_output_details()

    def run(example: Feeds) -> dict[str, np.ndarray]:
        found = runner(**{name: _on_grid(value, inputs[name]) for name, value in example.items()})
        return {name: _real(value, outputs[name]) for name, value in found.items()}

    return run


def _on_grid(value: np.ndarray, port: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = port["quantization"]
    if not scale:
        return value
    limits = np.iinfo(port["dtype"])
    return np.asarray(np.clip(np.rint(value / np.float32(scale)) + zero_point, limits.min, limits.max), port["dtype"])


def _real(value: np.ndarray, port: Mapping[str, Any]) -> np.ndarray:
    scale, zero_point = port["quantization"]
    return np.asarray((value.astype(np.float32) - zero_point) * np.float32(scale)) if scale else value
