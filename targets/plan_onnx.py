"""Which tensors of an ONNX graph are to be integers, so that ONNX Runtime's CPU kernels compute with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .onnx_graph import Graph, weight_of

__all__ = ["Plan", "plan"]

_JOINERS = {"Add": 2, "Mul": 2, "Concat": 1000, "AveragePool": 1, "GlobalAveragePool": 1, "LeakyRelu": 1, "Sigmoid": 1}
"""Operators with an integer kernel that are worth it only where all they read are integers already, and how many inputs."""

_MOVERS = {
    *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Expand", "Tile", "Gather", "Identity"),
    *("MaxPool", "Pad"),
}
"""Operators that move numbers and make no new ones: they run on the integers themselves, whatever the scale."""


@dataclass
class Plan:
    """What becomes of a graph.

    Attributes:
        layers: convolutions and linear layers that compute with integers.
        joiners: other operators that do.
        movers: operators that are to move integers.
        shares: tensors in integers, and for each the tensor whose scale it has; itself for most.
        tails: the tensor behind the activation function that a kernel has built in, by what the operator itself makes.
    """

    layers: list[Any] = field(default_factory=list)
    joiners: list[Any] = field(default_factory=list)
    movers: list[Any] = field(default_factory=list)
    shares: dict[str, str] = field(default_factory=dict)
    tails: dict[str, str] = field(default_factory=dict)

    @property
    def scaled(self) -> list[str]:
        """The tensors that have a scale of their own."""
        return [name for name, root in self.shares.items() if name == root]


def plan(graph: Graph, static: Collection[str]) -> Plan:
    """Choose the tensors.

    A convolution needs integers on both sides, or it runs in float. A linear layer takes integers and gives floats where
    nothing behind it wants integers, so the outputs of a classifier keep their precision. Sums, products, concatenations and
    pools join where all that they read are integers. What only moves numbers moves the integers.

    Args:
        graph: an fp32 model.
        static: the first outputs of those nodes that may compute with integers.
    """
    chosen = Plan()
    free = [node for node in graph.nodes if node.output and node.output[0] in static]
    for node in free:
        if _is_layer(graph, node):
            chosen.layers.append(node)
            chosen.shares.setdefault(node.input[0], node.input[0])
            if node.op_type == "Conv":
                _scale_behind(graph, chosen, node)
    while True:
        before = len(chosen.shares) + len(chosen.joiners)
        for node in free:
            if node.op_type in _MOVERS and _can_move(graph, chosen, node):
                chosen.movers.append(node)
                root = chosen.shares[node.input[0]]
                chosen.shares.update({name: root for name in node.output if name})
            elif node.op_type in _JOINERS and node.output[0] not in chosen.tails and _can_join(graph, chosen, node):
                chosen.joiners.append(node)
                _scale_behind(graph, chosen, node)
        if len(chosen.shares) + len(chosen.joiners) == before:
            break
    for node in chosen.layers:
        if node.op_type != "Conv" and (tail := _tail(graph, node.output[0])) in chosen.shares:
            chosen.tails[node.output[0]] = tail
    return chosen


def _is_layer(graph: Graph, node: Any) -> bool:
    weight = weight_of(graph, node)
    if weight is None or node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[0] in graph.tensors:
        return False
    bias = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and (bias is None or bias.ndim != 1 or bias.dtype != np.float32):
        return False
    if node.op_type == "MatMul":
        return weight.ndim == 2
    settings = {attribute.name: attribute for attribute in node.attribute}
    plain = all(settings[name].f == 1 for name in ("alpha", "beta") if name in settings)
    return plain and not ("transA" in settings and settings["transA"].i)


def _scale_behind(graph: Graph, chosen: Plan, node: Any) -> None:
    tail = _tail(graph, node.output[0])
    chosen.tails[node.output[0]] = tail
    chosen.shares.setdefault(tail, tail)


def _tail(graph: Graph, name: str) -> str:
    """Behind a ReLU or a clip at zero that is all that reads a tensor: an unsigned integer cannot hold less anyway."""
    readers = graph.used_by[name]
    if len(readers) != 1 or name in graph.outputs:
        return name
    reader = readers[0]
    low = graph.constant(reader.input[1]) if reader.op_type == "Clip" and len(reader.input) > 1 else None
    return str(reader.output[0]) if reader.op_type == "Relu" or (low is not None and float(low) == 0) else name


def _can_move(graph: Graph, chosen: Plan, node: Any) -> bool:
    if node.input[0] not in chosen.shares or node.output[0] in chosen.shares:
        return False
    if node.op_type == "MaxPool":
        return len(node.output) == 1
    if node.op_type != "Pad":
        return True
    mode = next((attribute.s for attribute in node.attribute if attribute.name == "mode"), b"constant")
    value = graph.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
    return mode != b"constant" or (value is not None and not value.any())


def _can_join(graph: Graph, chosen: Plan, node: Any) -> bool:
    """Where the network's outputs are made in floats anyway, an integer would only cost precision."""
    tail = _tail(graph, node.output[0])
    if tail in graph.outputs or len(node.input) > _JOINERS[node.op_type] or not graph.used_by[tail]:
        return False
    constants = [graph.constant(name) for name in node.input if name in graph.tensors]
    small = all(value is not None and value.size == 1 and value.dtype == np.float32 for value in constants)
    moving = [name for name in node.input if name not in graph.tensors]
    return small and bool(moving) and all(name in chosen.shares for name in moving)
