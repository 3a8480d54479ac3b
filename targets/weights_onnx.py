"""Weights of an ONNX file in fewer bytes: half floats, 4 bits, or int8 with activations that are quantized while it runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .onnx_graph import Graph, channel_axis, weight_of
from .saturation import safe_scales
from .weight_grid import blocks_on_grid, on_grid, scales_of

__all__ = ["MICROSOFT", "write_blocks", "write_dynamic", "write_halves", "write_integers", "write_rows"]

MICROSOFT = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_PACKED = 1024
"""Weights from which 4-bit storage pays for the operators that unpack it."""

_LARGEST_HALF = float(np.finfo(np.float16).max)


def write_halves(graph: Graph, node: Any, kind: str) -> bool:
    """Store a node's weights in two bytes each, with a cast to float32 that ONNX Runtime carries out once, on loading.

    Args:
        graph: an ONNX graph; changed in place.
        node: any node; its constants with two or more dimensions are stored so.
        kind: ``'float'`` (IEEE) or ``'bfloat'``.

    Returns:
        Whether there was a weight.
    """
    from onnx import TensorProto, helper, numpy_helper

    found = False
    for slot, name in enumerate(node.input):
        value = graph.constant(name)
        if value is None or value.dtype != np.float32 or value.ndim < 2:
            continue
        found, wide = True, f"{name}_wide_{kind}"
        if wide not in graph.made_by:
            if kind == "float":
                half = np.clip(value, -_LARGEST_HALF, _LARGEST_HALF).astype(np.float16)
                tensor = numpy_helper.from_array(half, f"{name}_fp16")
            else:
                tensor = helper.make_tensor(f"{name}_bf16", TensorProto.BFLOAT16, value.shape, _bfloat(value).tobytes(), raw=True)
            graph.made_by[wide] = graph.add_node("Cast", [graph.add_tensor(tensor)], [wide], to=TensorProto.FLOAT)
        node.input[slot] = wide
    return found


def _bfloat(value: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of floats, rounded half to even."""
    whole = np.ascontiguousarray(value).view(np.uint32).astype(np.uint64)
    return np.asarray((whole + 0x7FFF + ((whole >> 16) & 1)) >> 16, np.uint16)


def write_blocks(graph: Graph, node: Any, block: int) -> bool:
    """Store a linear layer's weight in 4 bits, as ``MatMulNBits``, whose CPU kernel reads them as they are.

    The file asks for float32 arithmetic (``accuracy_level`` 0). Level 4 would quantize the activations too.

    Args:
        graph: an ONNX graph; changed in place.
        node: any node; those that are no linear layer with a constant weight stay.
        block: weights in a row that share a scale: a power of two from 16 on.

    Returns:
        Whether it was one.
    """
    matrix = _matrix(graph, node)
    if matrix is None:
        return False
    integers, scales = blocks_on_grid(matrix, block)
    raised = (integers + 8).astype(np.uint8)
    name = node.input[1]
    packed = graph.add_constant(f"{name}_int4", raised[..., 0::2] | (raised[..., 1::2] << 4))
    inputs = [node.input[0], packed, graph.add_constant(f"{name}_int4_scale", scales.reshape(-1))]
    whole = node.output[0]
    middle = f"{whole}_unbiased" if _has_bias(node) else whole
    size: dict[str, Any] = {"K": matrix.shape[1], "N": matrix.shape[0], "bits": 4, "block_size": block, "accuracy_level": 0}
    graph.add_node("MatMulNBits", inputs, [middle], node.name, MICROSOFT, **size)
    if middle != whole:
        graph.add_node("Add", [middle, node.input[2]], [whole], f"{node.name}_bias")
    graph.nodes.remove(node)
    return True


def write_dynamic(graph: Graph, node: Any) -> bool:
    """Store a linear layer's or an LSTM's weights in int8; activations get their range while the file runs.

    ONNX Runtime has no such kernel for GRU, and a slow one for convolutions: they stay.

    Args:
        graph: an ONNX graph; changed in place.
        node: any node.

    Returns:
        Whether it was one of those.
    """
    if node.op_type == "LSTM":
        return _write_lstm(graph, node)
    matrix = _matrix(graph, node)
    if matrix is None:
        return False
    weight = np.ascontiguousarray(matrix.T)
    layer = graph.add_node("MatMulInteger", [], [f"{node.output[0]}_int32"], node.name)
    scales = safe_scales(layer, weight, 1)
    name, whole = node.input[1], node.output[0]
    grid = [graph.add_constant(f"{name}_int8", on_grid(weight, scales, 1)), graph.add_constant(f"{name}_scale", scales)]
    quantized = [f"{whole}_input_{part}" for part in ("uint8", "scale", "zero_point")]
    graph.add_node("DynamicQuantizeLinear", [node.input[0]], quantized)
    layer.input.extend([quantized[0], grid[0], quantized[2]])
    graph.add_node("Cast", [layer.output[0]], [f"{whole}_cast"], to=1)
    graph.add_node("Mul", [quantized[1], grid[1]], [f"{whole}_scale"])
    middle = f"{whole}_unbiased" if _has_bias(node) else whole
    graph.add_node("Mul", [f"{whole}_cast", f"{whole}_scale"], [middle])
    if middle != whole:
        graph.add_node("Add", [middle, node.input[2]], [whole], f"{node.name}_bias")
    graph.nodes.remove(node)
    return True


def write_rows(graph: Graph, node: Any) -> bool:
    """Store an embedding's table in int8, a scale for each row; what is looked up is floats again.

    Args:
        graph: an ONNX graph; changed in place.
        node: any node; those that look up no rows of a constant table stay.

    Returns:
        Whether it was one.
    """
    table = graph.constant(node.input[0]) if node.op_type == "Gather" else None
    axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
    if table is None or table.dtype != np.float32 or table.ndim != 2 or axis:
        return False
    name, whole = f"{node.input[0]}_rows", node.output[0]
    if f"{name}_int8" not in graph.tensors:
        scales = scales_of(table, 0)
        graph.add_constant(f"{name}_int8", on_grid(table, scales, 0))
        graph.add_constant(f"{name}_scale", scales[:, None])
    graph.add_node("Gather", [f"{name}_scale", node.input[1]], [f"{whole}_scale"])
    graph.add_node("Cast", [f"{whole}_int8"], [f"{whole}_cast"], to=1)
    graph.add_node("Mul", [f"{whole}_cast", f"{whole}_scale"], [whole], f"{node.name}_scaled")
    node.input[0], node.output[0] = f"{name}_int8", f"{whole}_int8"
    return True


def _has_bias(node: Any) -> bool:
    return len(node.input) > 2 and bool(node.input[2])


def _matrix(graph: Graph, node: Any) -> NDArray[np.float32] | None:
    """A linear layer's weight as ``[outputs, inputs]``."""
    weight = weight_of(graph, node)
    if weight is None or node.op_type not in ("Gemm", "MatMul") or weight.ndim != 2 or node.input[0] in graph.tensors:
        return None
    settings = {attribute.name: attribute for attribute in node.attribute}
    if any(settings[name].f != 1 for name in ("alpha", "beta") if name in settings) or (
        "transA" in settings and settings["transA"].i
    ):
        return None
    return weight if channel_axis(node) == 0 else np.ascontiguousarray(weight.T)


def _write_lstm(graph: Graph, node: Any) -> bool:
    """``DynamicQuantizeLSTM``: a scale for each of the four gates of each unit."""
    weights = [graph.constant(name) for name in node.input[1:3]]
    settings = {attribute.name: attribute for attribute in node.attribute}
    if any(weight is None for weight in weights) or ("layout" in settings and settings["layout"].i):
        return False
    inputs = [*node.input, *[""] * (8 - len(node.input))]
    for slot, weight in enumerate(weights, 1):
        assert weight is not None
        name = node.input[slot]
        scales = np.stack([safe_scales(node, direction, 0) for direction in weight])
        integers = np.stack([on_grid(direction, scale, 0).T for direction, scale in zip(weight, scales, strict=True)])
        inputs[slot] = graph.add_constant(f"{name}_int8", integers)
        inputs.append(graph.add_constant(f"{name}_scale", scales))
        inputs.append(graph.add_constant(f"{name}_zero_point", np.zeros(scales.shape, np.int8)))
    made = graph.add_node("DynamicQuantizeLSTM", inputs, list(node.output), node.name, MICROSOFT)
    made.attribute.extend(attribute for attribute in node.attribute if attribute.name != "layout")
    graph.nodes.remove(node)
    return True


def write_integers(graph: Graph, name: str, integers: NDArray[np.int8], bits: int) -> str:
    """A constant of integers; 4-bit ones two to a byte, with the operators that unpack them.

    ONNX Runtime's CPU kernels take no 4-bit weight in a convolution: a DequantizeLinear of INT4 in front of one leaves it in
    float. What only reads constants it computes once, when it loads the file, and so the integer kernels find int8 weights.

    Args:
        graph: an ONNX graph; changed in place.
        name: of the float weight.
        integers: of any shape.
        bits: of each, 4 or 8.

    Returns:
        The name of the int8 tensor.
    """
    from onnx import TensorProto

    if bits > 4 or integers.size < _PACKED or integers.size % 2:
        return graph.add_constant(f"{name}_int8", integers)
    raised = (integers.reshape(-1) + 8).astype(np.uint8)
    middle = raised.size // 2
    packed = graph.add_constant(f"{name}_int4", raised[:middle] | (raised[middle:] << 4))
    fixed: dict[str, NDArray[Any]] = {
        "low": np.full(1, 15, np.uint8),
        "shift": np.full(1, 4, np.uint8),
        "zero": np.full(1, 8, np.int8),
    }
    for key, value in fixed.items():
        if f"unpack_{key}" not in graph.tensors:
            graph.add_constant(f"unpack_{key}", value)
    shape = graph.add_constant(f"{name}_shape", np.array(integers.shape, np.int64))
    steps = [f"{name}_{step}" for step in ("first", "second", "both", "raised", "flat", "int8")]
    graph.add_node("BitwiseAnd", [packed, "unpack_low"], [steps[0]])
    graph.add_node("BitShift", [packed, "unpack_shift"], [steps[1]], direction="RIGHT")
    graph.add_node("Concat", steps[:2], [steps[2]], axis=0)
    graph.add_node("Cast", [steps[2]], [steps[3]], to=TensorProto.INT8)
    graph.add_node("Sub", [steps[3], "unpack_zero"], [steps[4]])
    graph.add_node("Reshape", [steps[4], shape], [steps[5]])
    return steps[5]
