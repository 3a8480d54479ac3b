"""Bias correction on an ONNX file: what quantization shifts on average is measured and put back into the biases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_graph import Graph, captured
from .onnx_tensors import open_session, stream
from .ranges import between_ends
from .segments import Segment, segments

__all__ = ["corrected_biases"]

_SHARE = 0.1  # of a channel's values that a bias moves, at least: the others sit at an end of the activation's range
_JUDGED = 4  # each such example says whether the correction helps, the others what it is
_INT32 = 2**31 - 1

Examples = Sequence[tuple[np.ndarray, ...]]
Known = list[dict[str, np.ndarray]]


@dataclass(frozen=True)
class _Layer:
    """A layer with a bias of integers.

    Attributes:
        tail: the tensor that is compared, behind an activation function that the kernel has built in.
        cut: what the quantized file holds of it: integers where it has a scale.
        axis: of its channels.
        bias: name of the constant.
        scales: of the bias, one for each channel.
    """

    tail: str
    cut: str
    axis: int
    bias: str
    scales: NDArray[np.float32]


def corrected_biases(model: Any, quantized: Any, tails: Mapping[str, str], examples: Examples) -> Any:
    """Shift the biases of a quantized file so that its layers give what they gave in floats, on average per channel.

    Rounded weights and activations move the mean of a channel, and the means add up from layer to layer (Nagel et al. 2019,
    Data-Free Quantization Through Weight Equalization and Bias Correction, https://arxiv.org/abs/1906.04721, section 4.2 and
    appendix D). The layers are corrected in the order in which they run, each on what the corrected ones before give it; every
    operator runs twice. The result is kept where it brings the outputs of examples that were put aside nearer.

    Args:
        model: the fp32 ``onnx.ModelProto``.
        quantized: what became of it; a tensor with a scale keeps its name there.
        tails: for each layer's name the tensor, of both models, that is compared.
        examples: tuples of arrays ``[1, ...]`` in the order of the model's inputs.

    Returns:
        a new model, or ``quantized`` itself where nothing helps.
    """
    import onnx

    judged, learned = examples[:: _JUDGED if len(examples) > 1 else 1], [x for i, x in enumerate(examples) if i % _JUDGED]
    result = onnx.ModelProto()
    result.CopyFrom(quantized)
    graph = Graph(result)
    layers = _layers(graph, tails)
    if not layers:
        return quantized
    means, shares = _float_means(model, learned or examples, layers)
    layers = [layer for layer in layers if layer.tail in means]
    operators = [({*node.input} | captured(node), set(node.output)) for node in graph.nodes]
    pieces = segments([(r - graph.tensors.keys(), m) for r, m in operators], graph.inputs, [layer.cut for layer in layers])
    known = _fed(graph.inputs, learned or examples)
    for layer, piece in zip(layers, pieces, strict=True):
        found = _mean(graph, layer, _run(graph, piece, known))
        _move(graph, layer, (means[layer.tail] - found) / np.maximum(shares[layer.tail], _SHARE))
        for example, value in zip(known, _run(graph, piece, known), strict=True):
            example[piece.output] = value
            for name in piece.done:
                del example[name]
    wanted, before, after = (_outputs(each, judged) for each in (model, quantized, result))
    return result if _error(after, wanted) < _error(before, wanted) else quantized


def _layers(graph: Graph, tails: Mapping[str, str]) -> list[_Layer]:
    """In the order in which they run."""
    found = []
    for node in graph.nodes:
        maker = graph.made_by.get(node.input[2]) if node.name in tails and len(node.input) > 2 else None
        if maker is None or maker.op_type != "DequantizeLinear":
            continue
        tail = tails[node.name]
        reader = graph.made_by[tail]
        cut = reader.input[0] if reader.op_type == "DequantizeLinear" else tail
        scales = graph.constant(maker.input[1])
        assert scales is not None
        found.append(_Layer(tail, cut, 1 if node.op_type == "Conv" else -1, maker.input[0], scales))
    return found


def _move(graph: Graph, layer: _Layer, shift: NDArray[np.float64]) -> None:
    """Add a real shift to a layer's bias."""
    from onnx import numpy_helper

    whole = numpy_helper.to_array(graph.tensors[layer.bias]) + np.rint(shift / layer.scales)
    moved = np.clip(whole, -_INT32, _INT32).astype(np.int32)
    graph.tensors[layer.bias].CopyFrom(numpy_helper.from_array(moved, layer.bias))


def _float_means(
    model: Any, examples: Examples, layers: Sequence[_Layer]
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    """By tensor: the mean of each channel, and which share of its values is not at an end of an activation like ReLU6."""
    axes = {layer.tail: layer.axis for layer in layers}
    sums: dict[str, list[NDArray[np.float64]]] = {}
    counts: dict[str, int] = {}
    for values in stream(model, lambda: iter(examples), axes.keys()):
        for name in axes.keys() & values.keys():
            rows = _rows(values[name], axes[name])
            new = [rows.sum(0, dtype=np.float64), between_ends(rows).sum(0, dtype=np.float64)]
            sums[name] = [a + b for a, b in zip(sums.get(name, new), new, strict=True)] if name in sums else new
            counts[name] = counts.get(name, 0) + len(rows)
    means = {name: total / counts[name] for name, (total, _) in sums.items()}
    return means, {name: free / counts[name] for name, (_, free) in sums.items()}


def _rows(value: np.ndarray, axis: int) -> np.ndarray:
    return np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis])


def _fed(names: Sequence[str], examples: Examples) -> Known:
    return [dict(zip(names, example, strict=True)) for example in examples]


def _run(graph: Graph, piece: Segment, known: Known) -> list[np.ndarray]:
    """The piece's output for each example."""
    from onnx import ModelProto, ValueInfoProto, helper

    nodes = [graph.nodes[number] for number in piece.operators]
    read = {name for node in nodes for name in {*node.input} | captured(node)}
    tensors = [tensor for name, tensor in graph.tensors.items() if name in read]
    ports = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(known[0][name].dtype), list(known[0][name].shape))
        for name in piece.inputs
    ]
    body = helper.make_graph(nodes, "piece", ports, [ValueInfoProto(name=piece.output)], tensors)
    model: ModelProto = helper.make_model(body, opset_imports=graph.model.opset_import, ir_version=graph.model.ir_version)
    session = open_session(model)
    return [session.run([piece.output], {name: example[name] for name in piece.inputs})[0] for example in known]


def _mean(graph: Graph, layer: _Layer, found: Sequence[np.ndarray]) -> NDArray[np.float64]:
    """Of each channel, as real numbers."""
    rows = [_rows(value, layer.axis) for value in found]
    mean = np.sum([r.sum(0, dtype=np.float64) for r in rows], 0) / sum(map(len, rows))
    if layer.cut == layer.tail:
        return np.asarray(mean)
    scale, zero = (graph.constant(name) for name in graph.made_by[layer.tail].input[1:3])
    assert scale is not None
    assert zero is not None
    return np.asarray((mean - float(zero)) * float(scale))


def _outputs(model: Any, examples: Examples) -> list[list[np.ndarray]]:
    session = open_session(model)
    names = [value.name for value in model.graph.input]
    return [session.run(None, feeds) for feeds in _fed(names, examples)]


def _error(found: list[list[np.ndarray]], wanted: list[list[np.ndarray]]) -> float:
    """Squared error over squared value, summed over the float outputs."""
    total = 0.0
    for one, other in zip(zip(*found, strict=True), zip(*wanted, strict=True), strict=True):
        pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(one, other, strict=True)]
        total += sum(((a - b) ** 2).sum() for a, b in pairs) / max(sum((b**2).sum() for _, b in pairs), 1e-30)
    return total
