"""Tiny ONNX models that hold one layer several times between others, so that its time can be read off.

ONNX Runtime rewrites a graph as it loads it: convolutions work on channels in blocks, and what stands beside them is put into
blocks and out again. So a layer is timed where it usually stands, behind a convolution and in front of one. int8 models
have the form that `edgepress.targets.quantize_onnx` gives them. Weights are noise: how long a kernel takes does not depend on
them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgepress.compress.pruning.layers import Layer

__all__ = ["OPERATORS", "onnx_context", "onnx_probe"]

_OPSET, _IR = 18, 10  # as files are exported
_NARROW = 8  # channels of what feeds a layer and of what reads it
_SCALE, _WEIGHT_SCALE = 0.0235, 0.003  # 255 steps end just below 6: ONNX Runtime then drops a ReLU6, as it does in real files
_WEIGHTED = {"conv", "depthwise", "conv_transpose", "linear", "scale"}


class _Model:
    """A graph in the making. In an int8 one every value passes through a pair of quantize and dequantize."""

    def __init__(self, int8: bool):
        import onnx

        self.onnx, self.int8 = onnx, int8
        self.random = np.random.default_rng(0)
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._count = 0

    def input(self, shape: Sequence[int]) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(self.onnx.helper.make_tensor_value_info(name, self.onnx.TensorProto.FLOAT, [1, *shape]))
        return self.quantized(name)

    def output(self, name: str, kind: int | None = None) -> None:
        self.outputs.append(self.onnx.helper.make_tensor_value_info(name, kind or self.onnx.TensorProto.FLOAT, None))

    def constant(self, value: np.ndarray) -> str:
        name = self._name()
        self.constants.append(self.onnx.numpy_helper.from_array(value, name))
        return name

    def weight(self, shape: Sequence[int], axis: int = 0) -> str:
        """Noise; in an int8 model dequantized with a scale for each position of ``axis``."""
        if not self.int8:
            return self.constant(self.random.standard_normal(shape).astype(np.float32) * 0.05)
        stored = self.constant(self.random.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(np.full(shape[axis], _WEIGHT_SCALE, np.float32))
        zero = self.constant(np.zeros(shape[axis], np.int8))
        return self.call("DequantizeLinear", [stored, scale, zero], axis=axis)

    def vector(self, n: int) -> str:
        return self.constant(self.random.random(n).astype(np.float32))

    def call(self, operator: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = self._name()
        self.nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def quantized(self, name: str) -> str:
        if not self.int8:
            return name
        return self.call("DequantizeLinear", [self.stored(name), *self._scale()])

    def stored(self, name: str) -> str:
        """The 8-bit form of a value."""
        return self.call("QuantizeLinear", [name, *self._scale()])

    def _scale(self) -> list[str]:
        # zero lies at the end of the range: a ReLU before it is done by the rounding, as in a file of real ranges
        return [self.constant(np.array(_SCALE, np.float32)), self.constant(np.array(0, np.uint8))]

    def bytes(self) -> bytes:
        helper = self.onnx.helper
        graph = helper.make_graph(self.nodes, "probe", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR)
        return bytes(model.SerializeToString())

    def _name(self) -> str:
        self._count += 1
        return f"v{self._count}"


# ---- one layer


def _conv(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    channels, out = layer.inputs[0][0], layer.output[0]
    groups = channels if layer.operator == "depthwise" else layer.groups
    weight = m.weight([out, channels // groups, *layer.kernel])
    y = m.call(
        "Conv", [inputs[0], weight, m.vector(out)], kernel_shape=layer.kernel, strides=layer.stride, dilations=layer.dilation,
        pads=[*layer.padding, *layer.padding], group=groups,
    )  # fmt: skip
    return _activated(m, layer, y)


def _conv_transpose(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    channels, out = layer.inputs[0][0], layer.output[0]
    weight = m.weight([channels, out // layer.groups, *layer.kernel], 1)
    y = m.call(
        "ConvTranspose", [inputs[0], weight, m.vector(out)], kernel_shape=layer.kernel, strides=layer.stride,
        dilations=layer.dilation, pads=[*layer.padding, *layer.padding], group=layer.groups,
    )  # fmt: skip
    return _activated(m, layer, y)


def _linear(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    rows, columns = layer.output[-1], layer.inputs[0][-1]
    if len(layer.output) == 1:
        y = m.call("Gemm", [inputs[0], m.weight([rows, columns]), m.vector(rows)], transB=1)
    else:
        y = m.call("Add", [m.call("MatMul", [inputs[0], m.weight([columns, rows], 1)]), m.vector(rows)])
    return _activated(m, layer, y)


def _matmul(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    return m.call("MatMul", [inputs[0], inputs[-1]])


def _binary(operator: str) -> Callable[[_Model, Layer, Sequence[str]], str]:
    def build(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
        return _activated(m, layer, m.call(operator, [inputs[0], inputs[-1]]))

    return build


def _unary(operator: str, **attributes: Any) -> Callable[[_Model, Layer, Sequence[str]], str]:
    return lambda m, layer, inputs: m.call(operator, [inputs[0]], **attributes)


def _clip(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    return m.call("Clip", [inputs[0], m.constant(np.array(0, np.float32)), m.constant(np.array(6, np.float32))])


def _scale(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    vectors = [m.vector(layer.output[0]) for _ in range(4)]
    return _activated(m, layer, m.call("BatchNormalization", [inputs[0], *vectors]))


def _pool(operator: str) -> Callable[[_Model, Layer, Sequence[str]], str]:
    def build(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
        pads = [*layer.padding, *layer.padding]
        return m.call(operator, [inputs[0]], kernel_shape=layer.kernel, strides=layer.stride, pads=pads)

    return build


def _mean(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    axes = list(range(2, len(layer.inputs[0]) + 1)) if len(layer.inputs[0]) > 2 else [1]
    return m.call("ReduceMean", [inputs[0], m.constant(np.array(axes, np.int64))], keepdims=0)


def _cat(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    axis = next((i for i, n in enumerate(layer.output) if any(s[i] != n for s in layer.inputs)), 0)
    return m.call("Concat", list(inputs), axis=axis + 1)


def _pad(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    more = [b - a for a, b in zip(layer.inputs[0], layer.output, strict=True)]
    pads = np.array([0, *(n // 2 for n in more), 0, *(n - n // 2 for n in more)], np.int64)
    return m.call("Pad", [inputs[0], m.constant(pads)])


def _slice(m: _Model, layer: Layer, inputs: Sequence[str]) -> str:
    """One operator for each axis that shrinks, as the exporter writes it."""
    x = inputs[0]
    for axis, (n, left) in enumerate(zip(layer.inputs[0], layer.output, strict=True), start=1):
        if left != n:
            step = max(n // left, 1)
            numbers = [m.constant(np.array([v], np.int64)) for v in (0, left * step, axis, step)]
            x = m.quantized(m.call("Slice", [x, *numbers]))
    return x


OPERATORS: dict[str, Callable[[_Model, Layer, Sequence[str]], str]] = {
    "conv": _conv, "depthwise": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "matmul": _matmul,
    "add": _binary("Add"), "mul": _binary("Mul"), "scale": _scale, "max_pool": _pool("MaxPool"), "avg_pool": _pool("AveragePool"),
    "mean": _mean, "cat": _cat, "pad": _pad, "slice": _slice, "relu": _unary("Relu"), "relu6": _clip, "hardtanh": _clip,
    "sigmoid": _unary("Sigmoid"), "tanh": _unary("Tanh"), "hardswish": _unary("HardSwish"), "softmax": _unary("Softmax", axis=-1),
}  # fmt: skip
"""How each operator of a `Layer` looks in an ONNX model."""


def _activated(m: _Model, layer: Layer, x: str) -> str:
    if layer.activation == "relu6":
        return _clip(m, layer, [x])
    return m.call("Relu", [x]) if layer.activation else x


# ---- what stands beside it


def onnx_context(layer: Layer) -> tuple[Layer, ...]:
    """The layers that each copy in a layer's probe brings with it, whose time has to be taken off.

    Example:
        >>> [other.operator for other in onnx_context(Layer("add", ((8, 4, 4),) * 2, (8, 4, 4)))]
        ['tail', 'conv']
    """
    if layer.operator in ("input", "tail"):
        return ()
    tail = (_tail(layer.output),) if _image(layer.output) else ()
    return (*tail, _pointwise(layer.inputs[-1])) if _own_source(layer) else tail


def _image(shape: Sequence[int]) -> bool:
    return len(shape) == 3


def _own_source(layer: Layer) -> bool:
    """Whether each copy reads a convolution of its own: without weights they would all be one and the same."""
    return layer.operator not in _WEIGHTED and _image(layer.inputs[-1])


def _tail(shape: tuple[int, ...]) -> Layer:
    """Reads one pixel of what a layer gives, as a convolution would read it."""
    return Layer("tail", (shape,), (_NARROW, 1, 1), (1,) * (len(shape) - 1), shape[1:])


def _pointwise(shape: tuple[int, ...]) -> Layer:
    rank = len(shape) - 1
    return Layer("conv", (shape,), shape, (1,) * rank, (1,) * rank, (0,) * rank, (1,) * rank)


def _head(m: _Model, shape: tuple[int, ...]) -> str:
    """A value of that shape as a layer before it gives it."""
    if _image(shape):
        x = m.input([_NARROW, *shape[1:]])
        made = Layer("conv", ((_NARROW, *shape[1:]),), shape, (1, 1), (1, 1), (0, 0), (1, 1), 1, "relu")
        return m.quantized(_conv(m, made, [x]))
    return m.input(shape)


def _read(m: _Model, x: str, shape: tuple[int, ...]) -> None:
    """Make it an output of the model, through a tail where there is one; 8-bit in an int8 model."""
    if _image(shape):
        weight = m.weight([_NARROW, shape[0], 1, 1])
        x = m.call("Conv", [x, weight, m.vector(_NARROW)], kernel_shape=[1, 1], strides=shape[1:])
        if m.int8:
            return m.output(m.stored(x), m.onnx.TensorProto.UINT8)
    m.output(x)
    return None


def onnx_probe(layer: Layer, copies: int, precision: str) -> bytes:
    """A model that computes a layer ``copies`` times from the same inputs, each with its own weights and reader.

    The layer ``'input'`` is a model that takes such an input and reads one pixel of it; ``'tail'`` is a reader alone.

    Raises:
        KeyError: the operator has no form here.
    """
    m = _Model(precision == "int8")
    if layer.operator == "input":
        _read(m, m.input(layer.output), layer.output)
        return m.bytes()
    inputs = [_head(m, shape) for shape in layer.inputs]
    for _ in range(copies):
        if layer.operator == "tail":
            _read(m, inputs[0], layer.inputs[0])
            continue
        operands = inputs
        if _own_source(layer):
            operands = [*inputs[:-1], m.quantized(_conv(m, _pointwise(layer.inputs[-1]), inputs[-1:]))]
        y = OPERATORS[layer.operator](m, layer, operands)
        _read(m, m.quantized(y) if _image(layer.output) else y, layer.output)
    return m.bytes()
