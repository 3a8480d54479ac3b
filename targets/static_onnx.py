"""A static int8 ONNX file: weights per channel, activations per tensor as uint8, in QuantizeLinear/DequantizeLinear pairs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepress.compress.quantization import Calibrator

from .onnx_graph import Graph, channel_axis, weight_of
from .onnx_tensors import stream
from .plan_onnx import Plan, plan
from .ranges import Statistics, scale_of
from .weight_grid import on_grid
from .weights_onnx import write_integers

__all__ = ["Measured", "Range", "measured", "plan_apart", "write_static"]

_APART = 32.0
"""Tensors that differ more than this in scale keep 3 of 8 bits, or fewer, where they share one."""

_INT32 = 2**31 - 1

Range = tuple[float, float]
Rule = Callable[[Any, NDArray[np.float32], int, int], NDArray[np.float32]]
Measured = tuple[dict[str, Range], dict[str, NDArray[np.float64]]]


def measured(
    model: Any,
    pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]],
    calibrator: Calibrator,
    ranges: Collection[str],
    means: Mapping[str, int],
) -> Measured:
    """The ranges of some tensors and the means of some tensors' channels over the calibration data, in bounded memory.

    Args:
        model: an fp32 ``onnx.ModelProto``.
        pieces: a function that gives the calibration examples as tuples of arrays ``[n, ...]``.
        calibrator: how a range is taken from what was seen.
        ranges: the tensors whose ranges are wanted.
        means: the tensors whose means are wanted, and the axis of their channels.
    """
    seen = {name: Statistics(histogram=calibrator not in ("minmax", "average")) for name in ranges}
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = {}
    for values in stream(model, pieces, {*ranges, *means}):
        for name, value in values.items():
            if name in seen:
                seen[name].update(value)
            if name in means:
                rows = np.moveaxis(value, means[name], -1)
                rows = rows.reshape(-1, rows.shape[-1])
                sums[name] = sums.get(name, np.zeros(rows.shape[1])) + rows.sum(0, dtype=np.float64)
                counts[name] = counts.get(name, 0) + len(rows)
    found = {name: statistics.range(calibrator) for name, statistics in seen.items() if statistics.count}
    return found, {name: total / counts[name] for name, total in sums.items()}


def plan_apart(graph: Graph, static: Collection[str], ranges: Mapping[str, Range]) -> Plan:
    """A `plan` that leaves a concatenation, and the layers that read it, in floats where what it joins differs too much in scale.

    Boxes of hundreds of pixels beside scores below one would leave the scores a handful of integers.

    Args:
        graph: an fp32 model.
        static: the first outputs of the nodes that may compute with integers.
        ranges: of the tensors, by name.
    """
    left = set(static)
    while True:
        chosen = plan(graph, left)
        apart = [node for node in chosen.joiners if node.op_type == "Concat" and _differ(chosen, node, ranges)]
        if not apart:
            return chosen
        for node in apart:
            left.discard(node.output[0])
            behind, movers = {chosen.tails[node.output[0]]}, {mover.output[0]: mover for mover in chosen.movers}
            while True:
                new = {name for mover in movers.values() if mover.input[0] in behind for name in mover.output} - behind
                if not new:
                    break
                behind |= new
            left -= {layer.output[0] for layer in chosen.layers if layer.input[0] in behind}


def _differ(chosen: Plan, node: Any, ranges: Mapping[str, Range]) -> bool:
    reach = [max(abs(end) for end in ranges[chosen.shares[name]]) for name in node.input if chosen.shares[name] in ranges]
    some = [value for value in reach if value > 0]
    return bool(some) and max(some) > _APART * min(some)


def write_static(
    graph: Graph,
    chosen: Plan,
    found: Measured,
    bits: Mapping[str, int],
    rule: Rule,
) -> None:
    """Put the pairs in, in place. A quantized tensor keeps its name for what is read from it: its values can be compared.

    Args:
        graph: an fp32 model.
        chosen: what is to be in integers.
        found: ranges of the tensors that have a scale, and channel means of what layers read (for the biases' correction).
        bits: of the weights of each layer, by its first output.
        rule: the scales of a weight, from (node, weight, axis of output channels, bits).
    """
    ranges, means = found
    numbers = {name: _unsigned(*ranges.get(name, (0.0, 0.0))) for name in chosen.scaled}
    points = {name: _write_numbers(graph, name, *numbers[name]) for name in numbers}
    integers: dict[str, str] = {}
    for node in chosen.layers:
        _write_layer(graph, node, numbers[chosen.shares[node.input[0]]][0], means, bits[node.output[0]], rule)
    for node in chosen.joiners:
        for slot, name in enumerate(node.input):
            if name in graph.tensors:
                node.input[slot] = _write_scalar(graph, name)
    whole = {chosen.tails.get(node.output[0]) for node in (*chosen.layers, *chosen.joiners)}
    reading = {id(node) for node in (*chosen.layers, *chosen.joiners, *chosen.movers)}
    moved = {name: node for node in chosen.movers for name in node.output if name}
    for name, root in chosen.shares.items():
        integers[name] = f"{name}_quantized"
        if name not in moved:
            _write_pair(graph, name, integers[name], points[root], reading, name in whole)
    for name, node in moved.items():
        _move(graph, node, name, integers, points[chosen.shares[name]], numbers[chosen.shares[name]][1])


def _unsigned(low: float, high: float) -> tuple[np.float32, np.uint8]:
    scale, point = scale_of(low, high)
    return np.float32(scale) or np.float32(1), np.uint8(np.clip(point + 128, 0, 255))


def _write_numbers(graph: Graph, name: str, scale: np.float32, point: np.uint8) -> tuple[str, str]:
    return graph.add_constant(f"{name}_scale", np.asarray(scale)), graph.add_constant(f"{name}_zero_point", np.asarray(point))


def _write_layer(
    graph: Graph,
    node: Any,
    scale: np.float32,
    means: Mapping[str, NDArray[np.float64]],
    bits: int,
    rule: Rule,
) -> None:
    """Weights in int8 per output channel, biases in int32 in steps of the input's scale times the weight's."""
    weight = weight_of(graph, node)
    assert weight is not None
    axis = channel_axis(node)
    steps = rule(node, weight, axis, bits)
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if bias is not None:  # a dead channel's scale is so small that its bias would not fit into 32 bits
        steps = np.maximum(steps, (np.abs(bias) / (np.float64(scale) * _INT32) * 1.0001).astype(np.float32))
    integers = on_grid(weight, steps, axis, bits)
    shape = [1] * weight.ndim
    shape[axis] = -1
    lost = weight - integers * steps.reshape(shape)
    shift = _shift(node, lost, means.get(node.input[0]))
    name, base = node.input[1], f"{node.output[0]}_weight"
    parts = [write_integers(graph, name, integers, bits), graph.add_constant(f"{base}_scale", steps)]
    parts.append(graph.add_constant(f"{base}_zero_point", np.zeros(len(steps), np.int8)))
    node.input[1] = f"{base}_dequantized"
    graph.add_node("DequantizeLinear", parts, [node.input[1]], axis=axis)
    if node.op_type == "MatMul" or (bias is None and shift is None):
        return
    total = (0 if bias is None else bias.astype(np.float64)) + (0 if shift is None else shift)
    fine = (np.float64(scale) * steps.astype(np.float64)).astype(np.float32)
    whole = np.clip(np.rint(total / fine), -_INT32, _INT32).astype(np.int32)
    parts = [graph.add_constant(f"{node.output[0]}_bias_int32", whole), graph.add_constant(f"{node.output[0]}_bias_scale", fine)]
    dequantized = f"{node.output[0]}_bias_dequantized"
    graph.add_node("DequantizeLinear", parts, [dequantized], axis=0)
    del node.input[2:]
    node.input.append(dequantized)


def _shift(node: Any, lost: NDArray[np.float32], mean: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """What rounding the weights takes from a layer's outputs on average (Nagel et al. 2019, section 4.2)."""
    if mean is None:
        return None
    if node.op_type != "Conv":
        by_output = lost if channel_axis(node) == 0 else lost.T
        return np.asarray(by_output @ mean, np.float64)
    sums = lost.reshape(*lost.shape[:2], -1).sum(2, dtype=np.float64)  # [outputs, inputs of a group]
    groups = len(mean) // sums.shape[1]
    parts = sums.reshape(groups, -1, sums.shape[1]) @ mean.reshape(groups, -1, 1)
    return np.asarray(parts.reshape(-1))


def _write_scalar(graph: Graph, name: str) -> str:
    """A constant of one number: the end of a range, and so exact."""
    value = graph.constant(name)
    assert value is not None
    number = float(value.reshape(()))
    scale, point = _unsigned(min(number, 0.0), max(number, 0.0))
    whole = np.clip(np.rint(value / scale) + np.float32(point), 0, 255).astype(np.uint8)
    parts = [graph.add_constant(f"{name}_uint8", whole), *_write_numbers(graph, f"{name}_uint8", scale, point)]
    dequantized = f"{parts[0]}_dequantized"
    graph.add_node("DequantizeLinear", parts, [dequantized])
    return dequantized


def _write_pair(graph: Graph, name: str, quantized: str, point: tuple[str, str], reading: set[int], whole: bool) -> None:
    """Quantize a tensor behind its maker; whoever computed in floats so far may read the floats if the maker does too."""
    maker = graph.made_by.get(name)
    exact, read = name, name
    if maker is None:  # an input of the network keeps its name
        read = f"{name}_dequantized"
    else:
        exact = f"{name}_float"
        maker.output[list(maker.output).index(name)] = exact
    for node in graph.used_by[name]:
        wanted = read if id(node) in reading or whole else exact
        for slot, given in enumerate(node.input):
            if given == name:
                node.input[slot] = wanted
    graph.add_node("QuantizeLinear", [exact, *point], [quantized])
    graph.add_node("DequantizeLinear", [quantized, *point], [read])


def _move(graph: Graph, node: Any, name: str, integers: Mapping[str, str], point: tuple[str, str], zero: np.uint8) -> None:
    """Let an operator that moves numbers move integers."""
    source = node.input[0]
    before = next((whole for real, whole in integers.items() if source in (real, f"{real}_dequantized")), source)
    node.input[0] = before
    node.output[list(node.output).index(name)] = integers[name]
    if node.op_type == "Pad":
        value = graph.add_constant(f"{name}_padding", np.asarray(zero))
        node.input.extend([""] * (3 - len(node.input)))
        node.input[2] = value
    graph.add_node("DequantizeLinear", [integers[name], *point], [name])
