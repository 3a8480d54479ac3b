"""Which precisions a runtime really computes in on a CPU: what to expect before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

__all__ = ["Speed", "expected_speed"]

Speed = Literal["fast", "as fp32", "perhaps", "slow", "none"]

_TABLE: Mapping[tuple[str, str], tuple[Speed, str]] = {
    ("onnx", "fp32"): ("as fp32", ""),
    ("onnx", "fp16"): ("as fp32", "weights become fp32 when the file is loaded"),
    ("onnx", "bf16"): ("as fp32", "weights become fp32 when the file is loaded"),
    ("onnx", "int8"): ("fast", ""),
    ("onnx", "int8-dynamic"): ("fast", "linear layers and LSTMs only; activations are quantized while it runs"),
    ("onnx", "int16x8"): ("none", "there are no kernels for 16-bit activations"),
    ("onnx", "w4a8"): ("fast", "weights become int8 when the file is loaded"),
    ("onnx", "int4"): ("perhaps", "linear layers only; gains where weights do not fit into the cache"),
    ("tflite", "fp32"): ("as fp32", ""),
    ("tflite", "fp16"): ("as fp32", "weights become fp32 when the file is loaded"),
    ("tflite", "bf16"): ("none", "there are no kernels for it"),
    ("tflite", "int8"): ("fast", ""),
    ("tflite", "int8-dynamic"): ("fast", "activations are quantized while it runs"),
    ("tflite", "int16x8"): ("slow", "reference kernels"),
    ("tflite", "w4a8"): ("fast", "depthwise weights stay in 8 bits"),
    ("tflite", "int4"): ("perhaps", "linear layers only"),
}
_NO_DOT = "the CPU has no instruction for 8-bit dot products, so int8 gains little and may lose"
_DOTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def expected_speed(format: str, precision: str, device: Mapping[str, Any]) -> tuple[Speed, str]:
    """How fast the runtime of a format computes in a precision, against fp32, and why; what counts is what is measured.

    Args:
        format: ``'onnx'``, for ONNX Runtime's CPU kernels, or ``'tflite'``, for LiteRT's with XNNPACK.
        precision: one of `edgepress.compress.quantization.PRECISIONS`.
        device: what `edgepress devices` says of it.

    Returns:
        ``'fast'``, ``'as fp32'``, ``'perhaps'``, ``'slow'`` or ``'none'``, and the reason, which may be empty.

    Example:
        >>> expected_speed("onnx", "int8", {"cpu_features": ["avx2", "avx_vnni"]})
        ('fast', '')
        >>> expected_speed("tflite", "int16x8", {})
        ('slow', 'reference kernels')
    """
    speed, reason = _TABLE[format, precision]
    features = device.get("cpu_features") or ()
    if speed == "fast" and features and not set(features) & set(_DOTS):
        return "perhaps", _NO_DOT
    return speed, reason
