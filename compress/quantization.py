"""One description of a quantization, which the writers of ONNX and TFLite files and training for them all read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, get_args

from .errors import RecipeError

__all__ = [
    "CALIBRATORS",
    "PRECISIONS",
    "Calibrator",
    "Numbers",
    "Quantization",
    "operator_kind",
    "operator_kinds",
    "quantization",
]

Calibrator: TypeAlias = Literal["minmax", "average", "percentile", "mse", "entropy"]
CALIBRATORS: tuple[str, ...] = get_args(Calibrator)


@dataclass(frozen=True)
class Numbers:
    """How the numbers of a tensor are stored.

    Attributes:
        bits: of each.
        kind: ``'int'`` with a scale, ``'float'`` (IEEE) or ``'bfloat'``.
        per: what shares a scale: the whole ``'tensor'``, each output ``'channel'``, or so many weights in a row (a block).
        symmetric: zero is in the middle of the range.
    """

    bits: int
    kind: Literal["int", "float", "bfloat"] = "int"
    per: Literal["tensor", "channel"] | int = "tensor"
    symmetric: bool = True

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest integer: symmetric ones leave out the most negative, as both runtimes' weights do.

        Example:
            >>> Numbers(8).limits, Numbers(8, symmetric=False).limits, Numbers(4).limits
            ((-127, 127), (-128, 127), (-7, 7))
        """
        top = 2 ** (self.bits - 1) - 1
        return (-top if self.symmetric else -top - 1), top


@dataclass(frozen=True)
class Quantization:
    """What of a network is stored in which numbers.

    Attributes:
        name: the precision it started from, one of `PRECISIONS`.
        weights: of convolutions, linear and recurrent layers; float32 where None. Biases follow from the others.
        activations: what operators compute with, by ranges from calibration data; float32 where None.
        dynamic: activations are quantized while the file runs, by the range that they have then.
        calibrator: how the range of an activation is taken from the calibration data, see `edgepress.targets.ranges`.
        layers: patterns of the user's module names (``'layer1.*'``) or of operators (``'op:linear'``) to another precision of
            those; of several that match, the last one holds.
    """

    name: str
    weights: Numbers | None = None
    activations: Numbers | None = None
    dynamic: bool = False
    calibrator: Calibrator = "mse"
    layers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise RecipeError(f"'{self.calibrator}' is no calibrator: take {' or '.join(CALIBRATORS)}.")
        for precision in self.layers.values():
            _known(precision)

    @property
    def calibrated(self) -> bool:
        """Whether it takes calibration data, for some layer at least."""
        own = self.activations is not None and not self.dynamic
        return own or any(_known(precision).calibrated for precision in self.layers.values())

    def of(self, module: str, operator: str) -> Quantization:
        """What holds for one layer.

        Args:
            module: the user's name of it, ``layer1.0.conv1``.
            operator: what it is, see `operator_kind`.

        Example:
            >>> q = quantization("int8", layers={"head*": "fp32"})
            >>> q.of("head.fc", "linear").name, q.of("stem", "conv").name
            ('fp32', 'int8')
        """
        chosen = self.name
        for pattern, precision in self.layers.items():
            if fnmatchcase(f"op:{operator}" if pattern.startswith("op:") else module, pattern):
                chosen = precision
        return replace(self if chosen == self.name else PRECISIONS[chosen], calibrator=self.calibrator, layers={})


_ACTIVATIONS = Numbers(8, symmetric=False)

PRECISIONS: Mapping[str, Quantization] = {
    q.name: q
    for q in (
        Quantization("fp32"),
        Quantization("fp16", Numbers(16, "float")),
        Quantization("bf16", Numbers(16, "bfloat")),
        Quantization("int8", Numbers(8, per="channel"), _ACTIVATIONS),
        Quantization("int8-dynamic", Numbers(8, per="channel"), _ACTIVATIONS, dynamic=True),
        Quantization("int16x8", Numbers(8, per="channel"), Numbers(16)),
        Quantization("w4a8", Numbers(4, per="channel"), _ACTIVATIONS),
        Quantization("int4", Numbers(4, per=32)),
    )
}
"""By name. ``fp16`` and ``bf16`` store weights in two bytes and compute in float32; ``int8`` is static; ``int16x8`` has 16-bit
activations; ``int4`` stores the weights of linear layers in blocks and leaves the arithmetic to the runtime."""


def quantization(precision: str | Quantization, **settings: Any) -> Quantization:
    """The description that a name stands for, with other settings where given.

    Raises:
        RecipeError: an unknown name.

    Example:
        >>> quantization("int8").weights.per, quantization("int8", calibrator="entropy").calibrator
        ('channel', 'entropy')
    """
    return replace(_known(precision) if isinstance(precision, str) else precision, **settings)


_KINDS: Mapping[str, str] = {
    name: kind
    for kind, names in {
        "conv": "conv1d conv2d conv3d conv_2d conv_3d",
        "depthwise": "depthwise_conv_2d",
        "conv_transpose": "conv_transpose1d conv_transpose2d conv_transpose3d convtranspose transpose_conv conv_3d_transpose",
        "linear": "gemm fully_connected",
        "matmul": "bmm mm batch_matmul",
        "embedding": "embedding_lookup",
        "concat": "cat concatenation",
        "pool": "max_pool1d max_pool2d max_pool2d_with_indices avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d "
        "maxpool averagepool globalaveragepool max_pool_2d average_pool_2d",
        "mean": "reducemean",
        "sum": "reducesum",
        "layer_norm": "layernormalization",
        "sigmoid": "logistic",
        "hardswish": "hard_swish",
        "leaky_relu": "leakyrelu",
    }.items()
    for name in names.split()
}


def operator_kind(name: str, depthwise: bool = False) -> str:
    """What ``op:`` patterns call an operator, whichever file it stands in.

    Args:
        name: PyTorch's, ONNX's or TFLite's, in small letters. What has no name of its own here keeps it.
        depthwise: of a convolution, whether each channel has weights of its own.

    Example:
        >>> operator_kind("conv2d"), operator_kind("conv_2d"), operator_kind("conv", depthwise=True), operator_kind("add")
        ('conv', 'conv', 'depthwise', 'add')
    """
    kind = _KINDS.get(name, name)
    return "depthwise" if depthwise and kind == "conv" else kind


def operator_kinds() -> frozenset[str]:
    """The names that stand for several names of operators, or for one that the formats call differently."""
    return frozenset(_KINDS.values())


def _known(precision: str) -> Quantization:
    if precision not in PRECISIONS:
        raise RecipeError(f"'{precision}' is no precision that edgepress knows: choose {' or '.join(PRECISIONS)}.")
    return PRECISIONS[precision]
