"""Rules of operators that treat every position alike, and of reductions over whole axes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .call import Call, hint, shape_of
from .labels import Axes, axis, fixed, size
from .table import Replacement, Table, Unsupported, Value

if TYPE_CHECKING:
    from .analysis import Analysis
    from .rewrite import Cut

__all__ = ["TABLE", "elementwise"]

TABLE = Table()


# Operators that PyTorch does not tag as pointwise; those it does come here by themselves (see `rules.rule_of`).
@TABLE.rule(
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "contiguous", "clone", "alias", "detach", "to",
    "_to_copy", "lift_fresh_copy", "copy", "masked_fill", "where", "zeros_like", "ones_like", "full_like", "empty_like",
    "rand_like", "randn_like", "bernoulli", "addcmul", "addcdiv", "fill", "zero", "hardtanh", "relu6", "hardswish",
    "hardsigmoid", "leaky_relu", "selu", "rrelu", "logical_not", "softplus", "float", "multiply", "subtract", "divide",
    "true_divide", "square", "absolute", "negative", "clip", "float_power", "greater", "greater_equal", "less", "less_equal",
    "not_equal", "nan_to_num", "isclose", "isfinite", "isinf", "log_sigmoid", "arccos", "arccosh", "arcsin", "arcsinh", "arctan",
    "arctan2", "arctanh", "fix", "conj", "real", "imag", "complex", "polar", "special_expit",
    "floor_divide", "__and__", "__or__", "__xor__",
)  # fmt: skip
def elementwise(a: Analysis, c: Call) -> Value:
    """Joins all operands position by position, broadcasting."""
    operands = [a.values.get(n) for n in c.node.all_input_nodes]
    return a.labels.broadcast([v for v in operands if isinstance(v, tuple)])


@TABLE.rule("type_as")
def _type_as(a: Analysis, c: Call) -> Value:
    return a.axes(c["self"])


@TABLE.rule("_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range", "sym_constrain_range_for_size")
def _nothing(a: Analysis, c: Call) -> Value:
    return None


@TABLE.rule("sym_size")
def _sym_size(a: Analysis, c: Call) -> Value:
    return None


@_sym_size.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any] | Replacement:
    # A size that is read at run time shrinks by itself; all that is computed from it is written for what it was.
    ax = cut.axes(c["self"])[c["dim"]]
    kept, full = cut.kept(ax), size(ax)
    if kept == full:
        return {}
    read = cut.inserted(c.node, c.node.target, *c.node.args)
    return Replacement(operator.floordiv, (cut.inserted(c.node, operator.mul, read, full), kept))


@TABLE.rule("prelu")
def _prelu(a: Analysis, c: Call) -> Value:
    x, weight = a.axes(c["self"]), a.axes(c["weight"])
    if not weight or not weight[0]:
        return x
    return (x[0], a.labels.unify(x[1], weight[0]), *x[2:])


# ---- reductions


def _reduced(c: Call, x: Axes, dims: list[int]) -> Value:
    def one(t: Tensor) -> Axes:
        if t.dim() == len(x):
            return tuple(() if d in dims else ax for d, ax in enumerate(x))
        return tuple(ax for d, ax in enumerate(x) if d not in dims)

    return [one(t) for t in c.value] if isinstance(c.value, tuple | list) else one(c.value)


@TABLE.rule(
    "mean", "nanmean", "amax", "amin", "aminmax", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "linalg_norm",
    "norm", "logsumexp", "prod", "any", "all",
)  # fmt: skip
def _statistic(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    dims = c.dims(len(x))
    a.mixes(c, *[x[d] for d in dims])
    return _reduced(c, x, dims)


@TABLE.rule("sum", "nansum")
def _sum(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    dims = c.dims(len(x))
    for d in dims:
        if a.labels.alive(x[d]):
            a.contracts(c, c["self"], d)
    return _reduced(c, x, dims)


@TABLE.rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def _softmax(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    a.mixes(c, x[c["dim"]])
    return x


# ---- along one axis, which is frozen


def _along(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    if c.get("dim") is None:
        raise Unsupported("runs over the flattened tensor")
    d = c["dim"] % len(x)
    a.labels.freeze_axis(x[d], "its order or its index matters")

    def one(t: Tensor) -> Axes:
        if len(t.shape) == len(x):
            return tuple(axis(hint(t.shape[d])) if i == d else ax for i, ax in enumerate(x))
        return tuple(ax for i, ax in enumerate(x) if i != d)

    return [one(t) for t in c.value] if isinstance(c.value, tuple | list) else one(c.value)


for _name in (
    "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "argmax", "argmin", "sort", "argsort", "kthvalue", "mode", "topk",
    "diff",
):  # fmt: skip
    TABLE.rule(_name)(_along)


@TABLE.rule("max", "min", "median", "nanmedian")
def _extreme(a: Analysis, c: Call) -> Value:
    if "other" in c:
        return elementwise.relate(a, c)
    where = [n for n in c.node.users if n.target is operator.getitem and n.args[1] == 1 and n.users]  # which position it was
    return _along(a, c) if where else _statistic.relate(a, c)


@TABLE.rule("bucketize", "searchsorted")
def _bucketed(a: Analysis, c: Call) -> Value:
    borders = a.axes(c["boundaries" if c.name == "bucketize" else "sorted_sequence"])
    if len(borders) != 1:
        raise Unsupported("borders of their own for each position")
    a.labels.freeze_axis(borders[0], "its order or its index matters")
    return a.axes(c["self"])


@TABLE.rule("pairwise_distance")
def _pairwise_distance(a: Analysis, c: Call) -> Value:
    both = a.labels.broadcast([a.axes(c["x1"]), a.axes(c["x2"])])
    a.mixes(c, both[-1])
    return (*both[:-1], ()) if c["keepdim"] else both[:-1]


@TABLE.rule("cross", "linalg_cross")
def _cross(a: Analysis, c: Call) -> Value:
    both = a.labels.broadcast([a.axes(c["self"]), a.axes(c["other"])])
    a.labels.freeze_axis(both[-1 if c["dim"] is None else c["dim"]], "the three coordinates of a vector")
    return both


# ---- spatial operators: the last axes are mixed and fixed, the others pass


def _spatial(rank: int) -> Callable[[Analysis, Call], Value]:
    def relate(a: Analysis, c: Call) -> Value:
        x = a.axes(c.node.args[0])
        a.labels.freeze_axes(x[-rank:], "spatial")

        def one(t: Tensor) -> Axes:
            return (*x[:-rank], *[axis(n) for n in shape_of(t)[-rank:]])

        return [one(t) for t in c.value] if isinstance(c.value, tuple | list) else one(c.value)

    return relate


for _rank in (1, 2, 3):
    for _kind in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "reflection_pad", "replication_pad"):
        TABLE.rule(f"{_kind}{_rank}d")(_spatial(_rank))
    for _kind in ("_adaptive_avg_pool", "upsample_nearest", "_upsample_nearest_exact"):
        TABLE.rule(f"{_kind}{_rank}d")(_spatial(_rank))
    TABLE.rule(f"max_pool{_rank}d_with_indices")(_spatial(_rank))
TABLE.rule("upsample_linear1d")(_spatial(1))
TABLE.rule("upsample_trilinear3d")(_spatial(3))
for _name in ("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
    TABLE.rule(_name)(_spatial(2))


@TABLE.rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def _grid_sampler(a: Analysis, c: Call) -> Value:
    x = a.axes(c["input"])
    a.labels.freeze_axes([*x[2:], *a.axes(c["grid"])], "sampled at places")
    return (*x[:2], *fixed(c.shape[2:]))


# ---- complex numbers and spectra


@TABLE.rule("view_as_complex")
def _view_as_complex(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    a.labels.freeze_axis(x[-1], "the parts of a complex number")
    return x[:-1]


@TABLE.rule("view_as_real")
def _view_as_real(a: Analysis, c: Call) -> Value:
    return (*a.axes(c["self"]), axis(2))


def _spectrum(a: Analysis, c: Call) -> Value:
    x, shape = list(a.axes(c["self"])), c.shape
    for d in c.dims(len(x)):
        a.labels.freeze_axis(x[d], "transformed")
        x[d] = axis(shape[d])
    return tuple(x)


for _kind in ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft"):
    for _dims in ("", "2", "n"):
        TABLE.rule(f"fft_{_kind}{_dims}")(_spectrum)
for _name in ("fft_fftshift", "fft_ifftshift"):
    TABLE.rule(_name)(_spectrum)


@TABLE.rule("tril", "triu")
def _triangle(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    a.labels.freeze_axes(x[-2:], "a triangle is cut out")
    return x


@TABLE.rule("flip", "fliplr", "flipud")
def _flip(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    for d in {"fliplr": [1], "flipud": [0]}.get(c.name) or c.dims(len(x), "dims"):
        labels = a.labels.flat(x[d])
        x[d] = x[d] if labels is None else axis(len(labels), labels[::-1].copy())
    return tuple(x)


@TABLE.rule("roll")
def _roll(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    if not c["dims"]:
        raise Unsupported("runs over the flattened tensor")
    for d, shift in zip(c.dims(len(x), "dims"), c["shifts"], strict=True):
        if c.symbolic(d) or not isinstance(shift, int):
            a.labels.freeze_axis(x[d], "rolled along the batch")
        elif (labels := a.labels.flat(x[d])) is not None:
            x[d] = axis(len(labels), np.roll(labels, shift))
    return tuple(x)


@_roll.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    x, shifts = cut.axes(c["self"]), list(c["shifts"])
    for i, d in enumerate(c.dims(len(x), "dims")):
        kept = cut.mask(x[d])
        if not kept.all():
            shifts[i] = int(kept[len(kept) - shifts[i] % len(kept) :].sum())  # as many as come round from the end
    return {"shifts": shifts}
