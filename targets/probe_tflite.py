"""Tiny TFLite files that hold one layer several times, so that its time can be read off.

They are written with the format's own schema: a conversion takes seconds, writing one of these a millisecond. Weights are
noise, scales are made up: how long a kernel takes depends on neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from edgepress.compress.pruning.layers import Layer

__all__ = ["OPERATORS", "tflite_probe"]

_VERSIONS = {"CONV_2D": (1, 3), "DEPTHWISE_CONV_2D": (1, 3), "FULLY_CONNECTED": (1, 4), "TRANSPOSE_CONV": (3, 3),
             "HARD_SWISH": (1, 1)}  # fmt: skip
"""Of an operator's fp32 and int8 forms; the others are (1, 2)."""
_SCALE, _WEIGHT_SCALE = 0.05, 0.003
_FIXED_RANGES = {"LOGISTIC": (1 / 256, -128), "SOFTMAX": (1 / 256, -128), "TANH": (1 / 128, 0)}
"""Scale and zero point that the format prescribes for what these give."""
_SAME, _VALID = 0, 1
_FUSED = {"": 0, "relu": 1, "relu6": 3}


class _File:
    """A flatbuffer in the making: one subgraph."""

    def __init__(self, int8: bool):
        from ai_edge_litert import schema_py_generated as schema

        self.schema, self.int8 = schema, int8
        self.random = np.random.default_rng(0)
        self.graph = schema.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.model = schema.ModelT()
        self.model.version, self.model.subgraphs = 3, [self.graph]
        self.model.buffers, self.model.operatorCodes = [schema.BufferT()], []
        self._codes: dict[str, int] = {}

    def activation(self, shape: Sequence[int], scale: float = _SCALE, zero: int = 0) -> int:
        kind = self.schema.TensorType.INT8 if self.int8 else self.schema.TensorType.FLOAT32
        return self._tensor(shape, kind, quantization=self._quantized(np.array([scale]), zero, 0) if self.int8 else None)

    def constant(self, value: np.ndarray) -> int:
        kind = self.schema.TensorType.INT32 if value.dtype == np.int32 else self.schema.TensorType.FLOAT32
        return self._tensor(value.shape, kind, value)

    def weight(self, shape: Sequence[int], axis: int | None = None) -> int:
        """Noise, in an int8 file with a scale for each position of ``axis``."""
        if not self.int8:
            return self.constant(self.random.standard_normal(shape).astype(np.float32) * 0.05)
        noise = self.random.integers(-127, 128, shape).astype(np.int8)
        scales = self._quantized(np.full(1 if axis is None else shape[axis], _WEIGHT_SCALE), 0, axis or 0)
        return self._tensor(shape, self.schema.TensorType.INT8, noise, scales)

    def bias(self, n: int) -> int:
        if not self.int8:
            return self.constant(np.zeros(n, np.float32))
        scales = self._quantized(np.full(n, _SCALE * _WEIGHT_SCALE), 0, 0)
        return self._tensor([n], self.schema.TensorType.INT32, np.zeros(n, np.int32), scales)

    def call(self, name: str, inputs: Sequence[int], shape: Sequence[int], options: str | None = None, **values: Any) -> int:
        """Add an operator and the tensor that it gives."""
        schema = self.schema
        operator = schema.OperatorT()
        operator.opcodeIndex = self._code(name)
        operator.inputs = np.array(inputs, np.int32)
        output = self.activation(shape, *_FIXED_RANGES.get(name, (_SCALE, 0)))
        operator.outputs = np.array([output], np.int32)
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, options + "T")()
            for key, value in values.items():
                setattr(operator.builtinOptions, key, value)
        self.graph.operators.append(operator)
        return output

    def bytes(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        import flatbuffers

        self.graph.inputs, self.graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())

    def _tensor(self, shape: Sequence[int], kind: int, value: np.ndarray | None = None, quantization: Any = None) -> int:
        tensor = self.schema.TensorT()
        tensor.shape, tensor.type, tensor.hasRank = np.array(shape, np.int32), kind, True
        tensor.name, tensor.buffer, tensor.quantization = f"#{len(self.graph.tensors)}", 0, quantization
        if value is not None:
            buffer = self.schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            self.model.buffers.append(buffer)
            tensor.buffer = len(self.model.buffers) - 1
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def _quantized(self, scales: np.ndarray, zero: int, axis: int) -> Any:
        quantization = self.schema.QuantizationParametersT()
        quantization.scale, quantization.quantizedDimension = scales.astype(np.float32), axis
        quantization.zeroPoint = np.full(len(scales), zero, np.int64)
        return quantization

    def _code(self, name: str) -> int:
        if name not in self._codes:
            code, number = self.schema.OperatorCodeT(), getattr(self.schema.BuiltinOperator, name)
            code.builtinCode, code.deprecatedBuiltinCode = number, min(number, 127)
            code.version = _VERSIONS.get(name, (1, 2))[self.int8]
            self.model.operatorCodes.append(code)
            self._codes[name] = len(self.model.operatorCodes) - 1
        return self._codes[name]


# ---- one layer


def _conv(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    shape, out = _last(layer.inputs[0]), _last(layer.output)
    kernel, stride, padding, dilation = layer.kernel, layer.stride, layer.padding, layer.dilation
    x, mode = inputs[0], _VALID
    if _keeps(kernel, stride, padding, dilation):
        mode = _SAME
    elif any(padding):  # as the converter writes it
        x = _padded(f, x, shape, [(0, 0), *((p, p) for p in padding), (0, 0)])
    depthwise = layer.operator == "depthwise"
    name, options = ("DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions") if depthwise else ("CONV_2D", "Conv2DOptions")
    weight = [1, *kernel, out[-1]] if depthwise else [out[-1], *kernel, shape[-1] // layer.groups]
    extra = {"depthMultiplier": max(out[-1] // shape[-1], 1)} if depthwise else {}
    return f.call(
        name, [x, f.weight(weight, 3 if depthwise else 0), f.bias(out[-1])], out, options, padding=mode,
        strideH=stride[0], strideW=stride[1], dilationHFactor=dilation[0], dilationWFactor=dilation[1],
        fusedActivationFunction=_FUSED[layer.activation], **extra,
    )  # fmt: skip


def _conv_transpose(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    shape, out = _last(layer.inputs[0]), _last(layer.output)
    kernel, stride = layer.kernel, layer.stride
    full = [1, *((n - 1) * s + k for n, s, k in zip(shape[1:3], stride, kernel, strict=True)), out[-1]]
    operands = [f.constant(np.array(full, np.int32)), f.weight([out[-1], *kernel, shape[-1]], 0), inputs[0], f.bias(out[-1])]
    y = f.call("TRANSPOSE_CONV", operands, full, "TransposeConvOptions", padding=_VALID, strideH=stride[0], strideW=stride[1])
    return y if full == out else _cut(f, y, full, out)


def _linear(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    rows, columns = layer.output[-1], layer.inputs[0][-1]
    operands = [inputs[0], f.weight([rows, columns], 0), f.bias(rows)]
    return f.call(
        "FULLY_CONNECTED", operands, [1, *layer.output], "FullyConnectedOptions", keepNumDims=True,
        fusedActivationFunction=_FUSED[layer.activation],
    )  # fmt: skip


def _matmul(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    return f.call("BATCH_MATMUL", list(inputs), [1, *layer.output], "BatchMatMulOptions")


def _binary(name: str, options: str) -> Callable[[_File, Layer, Sequence[int]], int]:
    def build(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
        operands = [inputs[0], inputs[-1]]
        return f.call(name, operands, _last(layer.output), options, fusedActivationFunction=_FUSED[layer.activation])

    return build


def _unary(name: str, options: str | None = None, **values: Any) -> Callable[[_File, Layer, Sequence[int]], int]:
    def build(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
        return f.call(name, [inputs[0]], _last(layer.output), options, **values)

    return build


def _scale(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    shape = _last(layer.output)
    vector = [*[1] * (len(shape) - 1), shape[-1]]
    factor = f.call("MUL", [inputs[0], f.weight(vector)], shape, "MulOptions")
    return f.call("ADD", [factor, f.weight(vector)], shape, "AddOptions")


def _pool(name: str) -> Callable[[_File, Layer, Sequence[int]], int]:
    def build(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
        kernel, stride, padding, x = layer.kernel, layer.stride, layer.padding, inputs[0]
        if any(padding):
            x = _padded(f, x, _last(layer.inputs[0]), [(0, 0), *((p, p) for p in padding), (0, 0)])
        return f.call(
            name, [x], _last(layer.output), "Pool2DOptions", padding=_VALID, strideH=stride[0], strideW=stride[1],
            filterHeight=kernel[0], filterWidth=kernel[1],
        )  # fmt: skip

    return build


def _mean(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    """The converter turns the channels back before a mean over space."""
    shape = layer.inputs[0]
    if len(shape) != 3:
        return f.call("MEAN", [inputs[0], f.constant(np.array([1], np.int32))], [1, *layer.output], "ReducerOptions")
    turned = f.call("TRANSPOSE", [inputs[0], f.constant(np.array([0, 3, 1, 2], np.int32))], [1, *shape], "TransposeOptions")
    return f.call("MEAN", [turned, f.constant(np.array([2, 3], np.int32))], [1, shape[0]], "ReducerOptions")


def _cat(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    out = _last(layer.output)
    shapes = [_last(s) for s in layer.inputs]
    axis = next((i for i, n in enumerate(out) if any(s[i] != n for s in shapes)), len(out) - 1)
    return f.call("CONCATENATION", list(inputs), out, "ConcatenationOptions", axis=axis)


def _pad(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    shape, out = _last(layer.inputs[0]), _last(layer.output)
    return _padded(f, inputs[0], shape, [((m - n) // 2, m - n - (m - n) // 2) for n, m in zip(shape, out, strict=True)])


def _slice(f: _File, layer: Layer, inputs: Sequence[int]) -> int:
    """Every so many pixels of an image are taken by a pooling, see `pool_slices`; of other axes the first positions."""
    x, shape, out = inputs[0], _last(layer.inputs[0]), _last(layer.output)
    steps = [max(n // m, 1) for n, m in zip(shape, out, strict=True)]
    if len(shape) == 4 and max(steps[1:3]) > 1:
        shape = [1, out[1], out[2], shape[3]]
        options = {"strideH": steps[1], "strideW": steps[2], "filterHeight": 1, "filterWidth": 1}
        x = f.call("MAX_POOL_2D", [x], shape, "Pool2DOptions", padding=_VALID, **options)
    return x if shape == out else _cut(f, x, shape, out)


OPERATORS: dict[str, Callable[[_File, Layer, Sequence[int]], int]] = {
    "conv": _conv, "depthwise": _conv, "conv_transpose": _conv_transpose, "linear": _linear, "matmul": _matmul,
    "add": _binary("ADD", "AddOptions"), "mul": _binary("MUL", "MulOptions"), "scale": _scale,
    "max_pool": _pool("MAX_POOL_2D"), "avg_pool": _pool("AVERAGE_POOL_2D"), "mean": _mean, "cat": _cat, "pad": _pad,
    "slice": _slice, "relu": _unary("RELU"), "relu6": _unary("RELU6"), "hardtanh": _unary("RELU6"), "sigmoid": _unary("LOGISTIC"),
    "tanh": _unary("TANH"), "hardswish": _unary("HARD_SWISH"), "softmax": _unary("SOFTMAX", "SoftmaxOptions", beta=1.0),
}  # fmt: skip
"""How each operator of a `Layer` looks in a TFLite file."""


def _padded(f: _File, x: int, shape: Sequence[int], padding: Sequence[tuple[int, int]]) -> int:
    out = [n + a + b for n, (a, b) in zip(shape, padding, strict=True)]
    return f.call("PAD", [x, f.constant(np.array(padding, np.int32))], out, "PadOptions")


def _cut(f: _File, x: int, shape: Sequence[int], out: Sequence[int]) -> int:
    begin = [(n - m) // 2 for n, m in zip(shape, out, strict=True)]
    return f.call("SLICE", [x, f.constant(np.array(begin, np.int32)), f.constant(np.array(out, np.int32))], out, "SliceOptions")


def _keeps(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether the padding is what the format calls SAME."""
    return set(stride) == {1} and all(2 * p == d * (k - 1) for k, p, d in zip(kernel, padding, dilation, strict=True))


def _planar(layer: Layer) -> Layer:
    """A 1-D convolution or pooling as one of height 1, which is how the format has it."""
    if len(layer.kernel) != 1:
        return layer
    shapes = [(s[0], 1, *s[1:]) for s in (*layer.inputs, layer.output)]
    return dataclasses.replace(
        layer, inputs=tuple(shapes[:-1]), output=shapes[-1], kernel=(1, *layer.kernel), stride=(1, *layer.stride),
        padding=(0, *layer.padding), dilation=(1, *layer.dilation),
    )  # fmt: skip


def _last(shape: Sequence[int]) -> list[int]:
    """``[C, H, W]`` as the file has it, ``[1, H, W, C]``; other shapes with the batch in front."""
    return [1, *shape[1:], shape[0]] if len(shape) == 3 else [1, *shape]


# ---- files


def tflite_probe(layer: Layer, copies: int, precision: str) -> bytes:
    """A file that computes a layer ``copies`` times from the same inputs, each with its own weights.

    The layer ``'input'`` is a file that takes such an input and adds two single numbers.

    Raises:
        KeyError: the operator has no form here.
    """
    f, layer = _File(precision == "int8"), _planar(layer)
    shapes = [layer.output, (1,)] if layer.operator == "input" else layer.inputs
    inputs = [f.activation([1, *shape] if layer.operator == "matmul" else _last(shape)) for shape in shapes]
    if layer.operator == "input":
        outputs = [f.call("ADD", [inputs[1], inputs[1]], [1, 1], "AddOptions")]
    else:
        outputs = [OPERATORS[layer.operator](f, layer, inputs) for _ in range(copies)]
    return f.bytes(inputs, outputs)
