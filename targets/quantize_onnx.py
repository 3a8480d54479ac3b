"""An fp32 ONNX model in the numbers of a `Quantization`, the way ONNX Runtime's CPU kernels run them fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from edgepress.compress.errors import UserError
from edgepress.compress.quantization import PRECISIONS, Quantization

from .onnx_bias import corrected_biases
from .onnx_graph import Graph, fold_constants, kind_of, module_of
from .plan_onnx import plan
from .saturation import safe_scales
from .static_onnx import Range, measured, plan_apart, write_static
from .weight_grid import scales_of
from .weights_onnx import MICROSOFT, write_blocks, write_dynamic, write_halves, write_rows

__all__ = ["PIECE", "Pieces", "quantize_onnx", "quantized_tensors"]

PIECE = 16
"""Examples in a piece of calibration data; fewer run at a time where their activations are large."""

_CORRECTED = 64  # most examples that biases are corrected with, and
_CORRECTED_BYTES = 2**26  # most bytes of them

Pieces = Callable[[], Iterator[tuple[np.ndarray, ...]]]


def quantize_onnx(
    model: Any,
    pieces: Pieces | None,
    how: Quantization = PRECISIONS["int8"],
    ranges: Mapping[str, Range] | None = None,
    *,
    safe: bool = True,
    correct: bool = True,
) -> Any:
    """Write a model in other numbers.

    Static int8: weights are integers in [-127, 127] by ``max|w| / 127`` of each output channel, rounded half to even;
    activations are uint8 with one scale for a tensor everywhere, which depthwise kernels and kernels on Arm need; biases are
    int32 in steps of the input's scale times the weight's, shifted by what the rounding of the weights takes from the outputs
    on average. Outputs of linear layers that nothing else computes with stay floats, LSTMs are dynamic, and embeddings are
    looked up in int8 and go on as floats. ``w4a8`` is the same with weights in [-7, 7], stored in 4 bits.

    Args:
        model: an fp32 ``onnx.ModelProto``; it is left as it was.
        pieces: a function that gives the calibration examples from the start, as tuples of arrays ``[n, ...]``; what is not
            static needs none.
        how: the description.
        ranges: (lowest, highest) by a tensor's name, from training for these numbers: they hold instead of calibrated ones,
            and the biases stay as they were trained.
        safe: scales of those output channels whose sums could leave 16 bits are made so much wider that they cannot; see
            `edgepress.targets.saturation.safe_scales`.
        correct: also measure what the file shifts its layers' outputs by on calibration examples, and put that into the biases
            (`edgepress.targets.onnx_bias`); only without ``ranges``, as training has done it already, and with ``safe``, as a
            file that saturates gives other numbers on other CPUs.

    Returns:
        A new ``onnx.ModelProto``.

    Raises:
        UserError: ONNX Runtime's CPU kernels do not take these numbers, nothing in the network can be stored so, or
            calibration data is missing.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.compress.quantization import quantization
        >>> from edgepress.targets.onnx_file import onnx_model
        >>> model = onnx_model(trace(torch.nn.Linear(4, 2), torch.zeros(1, 4)))
        >>> small = quantize_onnx(model, lambda: iter([(np.ones((2, 4), np.float32),)]), quantization("int8"))
        >>> sorted(node.op_type for node in small.graph.node)
        ['DequantizeLinear', 'DequantizeLinear', 'DequantizeLinear', 'Gemm', 'QuantizeLinear']
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = Graph(copy)
    fold_constants(graph)
    wanted = _wanted(graph, how)
    first = [(node, wanted[node.output[0]]) for node in graph.nodes if node.output]  # static tensors are renamed
    tails = _static(graph, model, pieces, how, wanted, ranges, safe)
    done = [*tails, *(node.name for node, each in first if _store(graph, node, each))]
    if not done and how.name != "fp32":
        raise UserError(
            f"Nothing in the network can be stored as {how.name} in a file for ONNX Runtime's CPU kernels: choose fp16 or fp32."
        )
    if any(node.domain == MICROSOFT for node in graph.nodes) and all(o.domain != MICROSOFT for o in copy.opset_import):
        copy.opset_import.add(domain=MICROSOFT, version=1)
    result = graph.finish()
    if correct and safe and tails and pieces is not None and ranges is None:
        result = corrected_biases(model, result, tails, _first(pieces))
    return Graph(result).sweep()  # last, for tensors that only the correction reads


def quantized_tensors(model: Any, how: Quantization) -> list[str]:
    """The activations that have a scale in a static file: those for which `quantize_onnx` asks for a range.

    Args:
        model: an fp32 ``onnx.ModelProto``.
        how: the description.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> from edgepress.compress.quantization import quantization
        >>> from edgepress.targets.onnx_file import onnx_model
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.ReLU())
        >>> quantized_tensors(onnx_model(trace(net, torch.zeros(1, 1, 8, 8))), quantization("int8"))
        ['input', 'output']
    """
    graph = Graph(model)
    return plan(graph, _calibrated(_wanted(graph, how))).scaled


def _wanted(graph: Graph, how: Quantization) -> dict[str, Quantization]:
    """What holds for each node, by its first output."""
    wanted = {node.output[0]: how.of(module_of(node), kind_of(graph, node)) for node in graph.nodes if node.output}
    if any(each.activations is not None and each.activations.bits > 8 for each in wanted.values()):
        raise UserError("ONNX Runtime's CPU kernels take no 16-bit activations: write int16x8 to a .tflite file, or choose int8.")
    return wanted


def _calibrated(wanted: Mapping[str, Quantization]) -> set[str]:
    return {name for name, each in wanted.items() if each.calibrated}


def _static(
    graph: Graph,
    model: Any,
    pieces: Pieces | None,
    how: Quantization,
    wanted: Mapping[str, Quantization],
    ranges: Mapping[str, Range] | None,
    safe: bool,
) -> dict[str, str]:
    """Calibrate and write what is static; the names of the layers, and the tensor behind each."""
    static = _calibrated(wanted)
    first = plan(graph, static)
    if not first.layers:
        return {}
    missing = [name for name in first.scaled if name not in (ranges or {})]
    means = {} if ranges is not None else {node.input[0]: 1 if node.op_type == "Conv" else -1 for node in first.layers}
    found: tuple[dict[str, Range], dict[str, Any]] = ({}, {})
    if missing or means:
        if pieces is None:
            raise UserError(f"{how.name} needs calibration data: some batches of typical inputs.")
        found = measured(model, pieces, how.calibrator, missing, means)
    every = {**found[0], **(ranges or {})}
    chosen = plan_apart(graph, static, every)
    bits = {node.output[0]: _bits(wanted[node.output[0]]) for node in chosen.layers}
    tails = {node.name: chosen.tails.get(node.output[0], node.output[0]) for node in chosen.layers}
    rule = safe_scales if safe else lambda node, weight, axis, bits: scales_of(weight, axis, bits)
    write_static(graph, chosen, (every, found[1]), bits, rule)
    return tails


def _first(pieces: Pieces) -> list[tuple[np.ndarray, ...]]:
    """The first few examples, one by one."""
    taken: list[tuple[np.ndarray, ...]] = []
    left = _CORRECTED_BYTES
    for arrays in pieces():
        for i in range(len(arrays[0])):
            left -= sum(array[i].nbytes for array in arrays)
            if taken and (len(taken) == _CORRECTED or left < 0):
                return taken
            taken.append(tuple(array[i : i + 1].copy() for array in arrays))  # a view would hold the whole piece
    return taken


def _bits(how: Quantization) -> int:
    return how.weights.bits if how.weights else 8


def _store(graph: Graph, node: Any, how: Quantization) -> bool:
    """Write one node's weights where they are not static: an LSTM has no static kernel, and is dynamic beside static layers."""
    if how.weights is None:
        return False
    if how.weights.kind != "int":
        return write_halves(graph, node, how.weights.kind)
    if isinstance(how.weights.per, int):
        return write_blocks(graph, node, how.weights.per)
    if node.op_type == "LSTM" or how.dynamic:
        return write_dynamic(graph, node) or write_rows(graph, node)
    return write_rows(graph, node)
