"""Where an int8 file gives another answer on an x86 CPU without VNNI instructions, and weights for which it cannot.

Such a CPU multiplies unsigned activations with signed weights by ``vpmaddubsw``: it adds the products of two neighbours in
16 bits and saturates. ONNX Runtime's kernels (MLAS, ``QgemmU8S8KernelAvx2``, ``ConvSymKernelAvx2``) have the inputs of a layer
in the order ``[height, width, channel]`` and pair an even one with the next. Two weights of one sign whose sizes add up to 129
or more can saturate with large activations.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_graph import Graph, channel_axis
from .weight_grid import on_grid, scales_of

__all__ = ["may_saturate", "safe_scales"]

_LARGEST = 255
_INT16 = 2**15 - 1
_PAIR = _INT16 // _LARGEST  # 128
_SLOTS = {
    **dict.fromkeys(("Conv", "Gemm", "MatMul", "MatMulInteger"), (1,)),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), (3,)),
    "DynamicQuantizeLSTM": (1, 2),
}


def may_saturate(model: Any) -> dict[str, int]:
    """The layers whose sums can leave 16 bits, and the largest sum of a pair that their weights allow.

    It is a bound: whether the activations ever get there is not asked. Depthwise convolutions have kernels of their own, which
    add in 32 bits.

    Args:
        model: an ``onnx.ModelProto`` of quantized layers, as ``DequantizeLinear`` in front of them or as operators on integers.

    Returns:
        By the name of the node: more than 32,767.
    """
    graph = Graph(model)
    found: dict[str, int] = {}
    for node in graph.nodes:
        for integers in _integers(graph, node):
            axis = 2 if node.op_type == "DynamicQuantizeLSTM" else channel_axis(node)
            groups = integers if axis == 2 else [integers]  # each direction of a recurrent layer, [inputs, outputs]
            if not _is_depthwise(node, integers):
                largest = max(int(_pair_sums(_rows(node, group, min(axis, 1))).max(initial=0)) for group in groups) * _LARGEST
                if largest > _INT16:
                    found[node.name] = max(largest, found.get(node.name, 0))
    return found


def safe_scales(node: Any, weight: NDArray[np.float32], axis: int, bits: int = 8) -> NDArray[np.float32]:
    """Scales as `scales_of` gives them, widened for just those output channels whose integers could saturate, and just enough.

    Such a channel keeps between 7 and 8 bits, and its file costs no time anywhere. On ResNet-20 the outputs' squared error is
    0.0009 of their square so, 0.0012 with 7 bits for all weights, and 0.0218 with 8 where the CPU saturates.

    Args:
        node: the layer that reads the weight.
        weight: its float weight.
        axis: of the output channels.
        bits: of each integer.

    Example:
        >>> from onnx import helper
        >>> layer = helper.make_node("MatMul", ["x", "w"], ["y"])
        >>> safe_scales(layer, np.float32([[127, 127], [127, -127]]), 1).tolist()  # the first column's pair has one sign
        [1.984375, 1.0]
    """
    scales = scales_of(weight, axis, bits)
    if _is_depthwise(node, weight):
        return scales
    while True:
        sums = _pair_sums(_rows(node, on_grid(weight, scales, axis, bits), axis))
        if (sums <= _PAIR).all():
            return scales
        scales = np.where(sums > _PAIR, scales * (sums / np.float32(_PAIR)), scales).astype(np.float32)


def _integers(graph: Graph, node: Any) -> list[NDArray[Any]]:
    """The int8 weights of a layer."""
    names = [node.input[slot] for slot in _SLOTS.get(node.op_type, ()) if slot < len(node.input)]
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        makers = [graph.made_by.get(name) for name in names]
        names = [maker.input[0] for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"]
    values = [graph.constant(name) for name in names]
    return [value for value in values if value is not None and value.dtype == np.int8 and value.ndim >= 2]


def _is_depthwise(node: Any, weight: NDArray[Any]) -> bool:
    groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
    return groups > 1 and weight.shape[1] == 1


def _rows(node: Any, weight: NDArray[Any], axis: int) -> NDArray[Any]:
    """``[outputs, inputs]`` in the order in which the kernels go through the inputs."""
    first = np.moveaxis(weight, axis, 0)
    return (np.moveaxis(first, 1, -1) if "Conv" in node.op_type else first).reshape(len(first), -1)


def _pair_sums(rows: NDArray[Any]) -> NDArray[np.int32]:
    """The largest size that two neighbours of one sign add up to, in each output channel."""
    pairs = np.pad(rows.astype(np.int32), ((0, 0), (0, rows.shape[1] % 2))).reshape(len(rows), -1, 2)
    up, down = np.maximum(pairs, 0).sum(2), np.maximum(-pairs, 0).sum(2)
    return np.asarray(np.maximum(up, down).max(1, initial=0), np.int32)
