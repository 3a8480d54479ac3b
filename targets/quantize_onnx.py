"""An fp32 ONNX model to int8 with NNCF, the way ONNX Runtime's CPU kernels run it fastest."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .silence import silence

__all__ = ["PIECE", "quantize_onnx"]

PIECE = 16
"""Examples that NNCF sees at a time: it asks ONNX Runtime for every activation of them at once."""

_ALL = 2**31 - 1
_TELEMETRY = "openvino_telemetry"


def quantize_onnx(model: Any, pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]]) -> Any:
    """Quantize weights per channel and activations per tensor to int8, from the ranges of the calibration data.

    NNCF's default quantizes the activations before a depthwise convolution per channel; ONNX Runtime 1.31 then fails at
    run time or runs slower than in fp32, so per-tensor ranges are asked for. The preset 'mixed' makes activations
    asymmetric, which costs ONNX Runtime nothing and uses the whole range of those that are not centred.

    Args:
        model: an fp32 ``onnx.ModelProto``; it is left as it was.
        pieces: a function that gives the calibration examples from the start, as tuples of arrays ``[n, ...]``; NNCF reads
            them more than once.

    Returns:
        A new ``onnx.ModelProto`` with QuantizeLinear and DequantizeLinear operators.
    """
    import onnx

    nncf = _nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters

    names = [value.name for value in model.graph.input]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with silence():
        quantized = nncf.quantize(
            copy,
            nncf.Dataset(_Feeds(names, pieces)),
            subset_size=_ALL,
            preset=nncf.QuantizationPreset.MIXED,
            advanced_parameters=AdvancedQuantizationParameters(
                activations_quantization_params=QuantizationParameters(per_channel=False)
            ),
        )
    return _unsigned(quantized)


def _unsigned(model: Any) -> Any:
    """Store every quantized activation as uint8: the same numbers, 128 further up.

    NNCF chooses uint8 behind a ReLU and int8 elsewhere. ONNX Runtime on Arm fuses no operator whose inputs and outputs differ in
    that, and computes it in floats: of ResNet-20's 19 convolutions it ran 10 so, with nearly twice the instructions.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    signed = {
        node.output[0]: node.input[2]
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) == 3 and _is_int8(constants.get(node.input[2]))
    }
    moved: dict[str, str] = {}
    for node in model.graph.node:
        for quantized in ({node.output[0]} if node.op_type == "QuantizeLinear" else set(node.input)) & signed.keys():
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
                continue
            old = signed[quantized]
            if old not in moved:
                moved[old] = f"{old}_unsigned"
                point = numpy_helper.to_array(constants[old]).astype(np.int16) + 128
                model.graph.initializer.append(numpy_helper.from_array(point.astype(np.uint8), moved[old]))
            node.input[2] = moved[old]
    del model.graph.value_info[:]  # it may name the old types
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used or tensor.name not in moved]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def _is_int8(tensor: Any) -> bool:
    import onnx

    return tensor is not None and tensor.data_type == onnx.TensorProto.INT8


class _Feeds:
    """What NNCF iterates over: one dict of arrays at a time, from the start each time."""

    def __init__(self, names: list[str], pieces: Callable[[], Iterator[tuple[np.ndarray, ...]]]):
        self._names, self._pieces = names, pieces

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (dict(zip(self._names, arrays, strict=True)) for arrays in self._pieces())


def _nncf() -> Any:
    """Import NNCF with its telemetry off.

    Importing it makes a client number in the home folder, and each call posts to Google Analytics. Without the package
    openvino_telemetry NNCF does neither, so it finds none.
    """
    found = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]  # an import of it raises ImportError
    try:
        with silence():
            import nncf
            from nncf.telemetry import decorator, wrapper
    finally:
        if found is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = found
    if isinstance(wrapper.telemetry, wrapper.NNCFTelemetry):  # somebody imported it before us
        wrapper.telemetry = decorator.telemetry = wrapper.NNCFTelemetryStub()
    return nncf
