"""Rules of layers with weights: products, convolutions, normalisations, attention, embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import fx

from .call import Call, shape_of
from .labels import Axes, Axis, axis, fixed, size
from .table import Table, Unsupported, Value

if TYPE_CHECKING:
    from .analysis import Analysis
    from .rewrite import Cut

__all__ = ["KERNEL", "TABLE"]

TABLE = Table()
KERNEL = "the kernel of a convolution"


# ---- products


@TABLE.rule("linear")
def _linear(a: Analysis, c: Call) -> Value:
    x, weight = a.axes(c["input"]), a.axes(c["weight"])
    a.labels.unify(x[-1], weight[-1])
    a.contracts(c, c["weight"], len(weight) - 1)
    a.counts(c, [*x[:-1], *weight])
    out = weight[0] if len(weight) == 2 else ()
    if c["bias"] is not None:
        out = a.labels.unify(out, a.axes(c["bias"])[0])
    return (*x[:-1], out) if len(weight) == 2 else x[:-1]


def _matmul(a: Analysis, c: Call, left: fx.Node, right: fx.Node) -> Axes:
    x, y = a.axes(left), a.axes(right)
    vector_x, vector_y = len(x) == 1, len(y) == 1
    x = ((), *x) if vector_x else x
    a.contracts(c, right, 0 if vector_y else len(y) - 2)
    y = (*y, ()) if vector_y else y
    inner = a.labels.unify(x[-1], y[-2])
    lead = a.labels.broadcast([x[:-2], y[:-2]])
    a.counts(c, [*lead, x[-2], inner, y[-1]])
    return (*lead, *(() if vector_x else (x[-2],)), *(() if vector_y else (y[-1],)))


@TABLE.rule("matmul", "mm", "bmm", "mv", "dot")
def _product(a: Analysis, c: Call) -> Value:
    left, right = c.node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    return _matmul(a, c, left, right)


@TABLE.rule("inner", "outer", "tensordot")
def _tensor_product(a: Analysis, c: Call) -> Value:
    left, right = c.node.args[:2]
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    x, y = a.axes(left), a.axes(right)
    given = {"inner": ([-1], [-1]), "outer": ([], [])}.get(c.name) or (c["dims_self"], c["dims_other"])
    over, under = ([d % len(v) for d in dims] for dims, v in zip(given, (x, y), strict=True))
    for i, j in zip(over, under, strict=True):
        a.labels.unify(x[i], y[j])
        a.contracts(c, right, j)
    rest = [ax for d, ax in enumerate(y) if d not in under]
    a.counts(c, [*x, *rest])
    return (*[ax for d, ax in enumerate(x) if d not in over], *rest)


@TABLE.rule("addmm", "baddbmm")
def _product_plus(a: Analysis, c: Call) -> Value:
    first, second = ("mat1", "mat2") if c.name == "addmm" else ("batch1", "batch2")
    return a.labels.broadcast([_matmul(a, c, c[first], c[second]), a.axes(c["self"])])


@TABLE.rule("einsum")
def _einsum(a: Analysis, c: Call) -> Value:
    terms, out = _letters(c["equation"], [len(a.axes(operand)) for operand in c["tensors"]])
    joined: dict[str, Axis] = {}
    first: dict[str, tuple[fx.Node, int]] = {}
    for term, operand in zip(terms, c["tensors"], strict=True):
        if len(set(term)) != len(term):
            raise Unsupported("an einsum that takes a diagonal")
        for d, (letter, ax) in enumerate(zip(term, a.axes(operand), strict=True)):
            if ax:
                joined[letter] = a.labels.unify(joined[letter], ax) if joined.get(letter) else ax
                first.setdefault(letter, (operand, d))
            else:
                joined.setdefault(letter, ())
    for letter in joined.keys() - set(out):
        if letter in first:
            a.contracts(c, *first[letter])
    if len(c["tensors"]) == 2:
        a.counts(c, list(joined.values()))
    return tuple(joined[letter] for letter in out)


def _letters(equation: str, ranks: Sequence[int]) -> tuple[list[str], str]:
    """The terms of an einsum and its result, one letter for each axis: '...' spelled out, the result where it is implied.

    Example:
        >>> _letters("...c, ch -> ...h", [3, 2]), _letters("ij,jk", [2, 2])
        ((['αβc', 'ch'], 'αβh'), (['ij', 'jk'], 'ik'))
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        letters = left.replace(",", "").replace(".", "")
        out = ("..." if "..." in left else "") + "".join(sorted(x for x in set(letters) if letters.count(x) == 1))
    spread = [n - len(term.replace("...", "")) if "..." in term else 0 for term, n in zip(terms, ranks, strict=True)]
    dots = "αβγδεζηθικλμ"[: max(spread)]
    return [term.replace("...", dots[len(dots) - n :]) for term, n in zip(terms, spread, strict=True)], out.replace("...", dots)


@TABLE.rule("bilinear")
def _bilinear(a: Analysis, c: Call) -> Value:
    x, y, weight = a.axes(c["input1"]), a.axes(c["input2"]), a.axes(c["weight"])
    for dim, operand in ((1, x), (2, y)):
        a.labels.unify(operand[-1], weight[dim])
        a.contracts(c, c["weight"], dim)
    lead = a.labels.broadcast([x[:-1], y[:-1]])
    a.counts(c, [*lead, *weight])
    out = weight[0] if c["bias"] is None else a.labels.unify(weight[0], a.axes(c["bias"])[0])
    return (*lead, out)


@TABLE.rule("grouped_mm_fallback", "_grouped_mm")
def _grouped_product(a: Analysis, c: Call) -> Value:
    """Experts: rows ``[S, K]`` in consecutive parts, each times its own matrix of ``[E, K, N]``."""
    left, right, ends = c.node.all_input_nodes[:3]
    x, weight = a.axes(left), a.axes(right)
    if (len(x), len(weight)) != (2, 3):
        raise Unsupported("a grouped product of other ranks")
    a.labels.freeze_axes([x[0], weight[0], *a.axes(ends)], "the experts of a mixture")
    inner = a.labels.unify(x[1], weight[1])
    a.contracts(c, right, 1)
    a.counts(c, [x[0], inner, weight[2]])
    return (x[0], weight[2])


@TABLE.rule("cdist", "_cdist_forward")
def _cdist(a: Analysis, c: Call) -> Value:
    x, y = a.axes(c["x1"]), a.axes(c["x2"])
    a.labels.unify(x[-1], y[-1])
    a.contracts(c, c["x1"], len(x) - 1)
    a.contracts(c, c["x2"], len(y) - 1)
    return (*a.labels.broadcast([x[:-2], y[:-2]]), x[-2], y[-2])


@TABLE.rule("cosine_similarity", "linalg_vecdot")
def _cosine(a: Analysis, c: Call) -> Value:
    names = ("x1", "x2") if "x1" in c else ("x", "y")
    x, y = (a.axes(c[name]) for name in names)
    both = a.labels.broadcast([x, y])
    d = c["dim"] % len(both)
    for name, operand in zip(names, (x, y), strict=True):
        if len(operand) == len(both):
            a.contracts(c, c[name], d)
    return (*both[:d], *both[d + 1 :])


@TABLE.rule("scaled_dot_product_attention")
def _attention(a: Analysis, c: Call) -> Value:
    q, k, v = (list(a.axes(c[name])) for name in ("query", "key", "value"))
    if c["enable_gqa"] and size(q[-3]) != size(k[-3]):
        shared = a.labels.unify(k[-3], v[-3])
        k[-3] = v[-3] = q[-3] = a.labels.unify(q[-3], shared + axis(size(q[-3]) // size(shared)))
    lead = a.labels.broadcast([tuple(q[:-2]), tuple(k[:-2]), tuple(v[:-2])])
    inner = a.labels.unify(q[-1], k[-1])
    a.labels.freeze_axes([k[-2], v[-2]], "the keys of an attention")
    a.contracts(c, c["query"], len(q) - 1)
    a.counts(c, [*lead, q[-2], k[-2], inner])
    a.counts(c, [*lead, q[-2], k[-2], v[-1]])
    if c["attn_mask"] is not None:
        a.labels.broadcast([(*lead, q[-2], axis(size(k[-2]))), a.axes(c["attn_mask"])])
    return (*lead, q[-2], v[-1])


@_attention.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    width = cut.axes(c["query"])[-1]
    # The default scale follows the head's width: pin it to the width the weights were trained with.
    return {"scale": size(width) ** -0.5} if c["scale"] is None and cut.kept(width) != size(width) else {}


# ---- convolutions


def _groups(c: Call) -> int:
    if not isinstance(c["groups"], int):
        raise Unsupported("a number of groups that depends on the batch")
    return c["groups"]


def _space(a: Analysis, c: Call, x: Axes, weight: Axes) -> tuple[Axes, float]:
    """The spatial axes of a convolution's result, and by what its multiply-accumulates per position are to be taken times.

    A kernel of one position leaves them alone: such convolutions also mix channels that stand somewhere else.
    """
    rank, lead = len(weight) - 2, math.prod(c.shape[: 1 - len(weight)])
    plain = {"stride": 1, "padding": 0, "dilation": 1}
    if not any(weight[2:]) and all(set(c[k]) <= {n} for k, n in plain.items() if not isinstance(c[k], str)):
        return x[-rank:], lead
    a.labels.freeze_axes(x[-rank:], "spatial")
    a.labels.freeze_axes(weight[2:], KERNEL)
    return fixed(c.shape[-rank:]), lead


def _conv_of_each(a: Analysis, c: Call) -> Value:
    """A convolution with weights of its own for each example, as one with a group for each: ``[1, B * C, ...]``."""
    x, weight = a.axes(c["input"]), a.axes(c["weight"])
    groups = size(x[1]) // size(weight[1])
    if c["bias"] is not None or size(x[1]) % groups or size(weight[0]) % groups or not c.symbolic(1):
        raise Unsupported("a number of groups that depends on the batch")
    batch, channels = a.reshape([x[1]], [groups, size(x[1]) // groups], c.node)
    _, out = a.reshape([weight[0]], [groups, size(weight[0]) // groups], c.node)
    a.labels.unify(channels, weight[1])
    a.contracts(c, c["weight"], 1)
    space, factor = _space(a, c, x, weight)
    a.counts(c, [*weight, *space], factor)
    return (x[0], batch + out, *space)


@TABLE.rule("conv1d", "conv2d", "conv3d")
def _conv(a: Analysis, c: Call) -> Value:
    if not isinstance(c["groups"], int):
        return _conv_of_each(a, c)
    x, weight, groups = a.axes(c["input"]), a.axes(c["weight"]), c["groups"]
    rank = len(weight) - 2
    channels, out = x[-rank - 1], weight[0]
    space, factor = _space(a, c, x, weight)
    width = size(channels) // groups
    if groups == 1:
        a.labels.unify(channels, weight[1])
    elif width == 1:  # depthwise: each channel goes with the filters that read it
        labels = np.repeat(a.labels.positions(channels), size(out) // groups)
        out = a.labels.unify(axis(size(out), labels), out)
    else:  # the same positions in every group
        inside = a.labels.tie(a.labels.positions(channels), groups, width, keep="inner")
        a.labels.tie(a.labels.positions(out), groups, size(out) // groups, keep="inner")
        a.labels.unify(axis(width, inside), weight[1])
    if width > 1 or groups == 1:
        a.contracts(c, c["weight"], 1)
    a.counts(c, [*weight, *space], factor)
    return _with_bias(a, c, (*x[: -rank - 1], out, *space), rank)


@TABLE.rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transpose(a: Analysis, c: Call) -> Value:
    x, weight, groups = a.axes(c["input"]), a.axes(c["weight"]), _groups(c)
    rank = len(weight) - 2
    channels, out = x[-rank - 1], weight[1]
    spatial = math.prod(size(ax) for ax in x[-rank:])
    a.labels.freeze_axes(x[-rank:], "spatial")
    a.labels.freeze_axes(weight[2:], KERNEL)
    width = size(channels) // groups
    if groups == 1:
        a.labels.unify(channels, weight[0])
    elif width == 1:
        a.labels.freeze_axis(weight[1], "the filters of a depthwise transposed convolution")
        labels = a.labels.unify(channels, weight[0])
        out = axis(size(out) * groups, np.repeat(a.labels.positions(labels), size(out)))
    else:
        inside = a.labels.tie(a.labels.positions(channels), groups, width, keep="inner")
        a.labels.unify(axis(size(channels), np.tile(inside, groups)), weight[0])
        out = axis(size(out) * groups, np.tile(a.labels.positions(out), groups))
    if width > 1 or groups == 1:
        a.contracts(c, c["weight"], 0)
    a.counts(c, weight, spatial * math.prod(c.shape[: -rank - 1]))
    return _with_bias(a, c, (*x[: -rank - 1], out, *[axis(n) for n in c.shape[-rank:]]), rank)


def _with_bias(a: Analysis, c: Call, out: Axes, rank: int) -> Axes:
    if c["bias"] is None:
        return out
    at = len(out) - rank - 1
    return (*out[:at], a.labels.unify(out[at], a.axes(c["bias"])[0]), *out[at + 1 :])


@_conv.rewrites
@_conv_transpose.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    rank = len(cut.axes(c["weight"])) - 2
    channels = cut.axes(c["input"])[-rank - 1]
    depthwise = isinstance(c["groups"], int) and c["groups"] > 1 and c["groups"] == size(channels)
    return {"groups": cut.kept(channels)} if depthwise else {}


# ---- normalisations


@TABLE.rule("batch_norm", "instance_norm")
def _batch_norm(a: Analysis, c: Call) -> Value:
    x = a.axes(c["input"])
    channels = x[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        if c[name] is not None:
            channels = a.labels.unify(a.axes(c[name])[0], channels)
    if c["running_mean"] is None:  # the statistics are the input's own
        a.mixes(c, x[0], *x[2:])
    return (x[0], channels, *x[2:])


@TABLE.rule("layer_norm", "rms_norm")
def _layer_norm(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["input"]))
    rank = len(c["normalized_shape"])
    for name in ("weight", "bias"):
        if c.get(name) is not None:
            for d, ax in enumerate(a.axes(c[name]), start=len(x) - rank):
                x[d] = a.labels.unify(ax, x[d])
    a.mixes(c, *x[-rank:])
    return tuple(x)


@_layer_norm.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    x = cut.axes(c["input"])
    return {"normalized_shape": [cut.kept(ax) for ax in x[-len(c["normalized_shape"]) :]]}


@TABLE.rule("group_norm")
def _group_norm(a: Analysis, c: Call) -> Value:
    x, groups = a.axes(c["input"]), c["num_groups"]
    channels = x[1]
    for name in ("weight", "bias"):
        if c[name] is not None:
            channels = a.labels.unify(a.axes(c[name])[0], channels)
    labels = a.labels.flat(channels)
    if labels is not None and groups not in (1, len(labels)):
        a.labels.tie(labels, groups, len(labels) // groups, keep="inner")
    a.mixes(c, *x[2:], *([channels] if groups < size(channels) else []))
    return (x[0], channels, *x[2:])


@_group_norm.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    channels = cut.axes(c["input"])[1]
    return {"num_groups": cut.kept(channels)} if c["num_groups"] == size(channels) else {}


@TABLE.rule("_weight_norm")
def _weight_norm(a: Analysis, c: Call) -> Value:
    v, dim = a.axes(c["v"]), c["dim"] % len(a.axes(c["v"]))
    # The norm runs over all other axes: slicing them would change the weights that stay.
    a.labels.freeze_axes([ax for d, ax in enumerate(v) if d != dim], "weight normalisation runs over it: fold it first")
    return a.labels.broadcast([v, a.axes(c["g"])])


# ---- embeddings


@TABLE.rule("embedding_bag")
def _embedding_bag(a: Analysis, c: Call) -> Value:
    weight, rest = a.axes(c["weight"]), c.value[1:]
    a.labels.freeze_axis(weight[0], "the rows of an embedding")
    return [(axis(shape_of(c.value[0])[0]), *weight[1:]), *[fixed(shape_of(t)) for t in rest]]


@TABLE.rule("embedding")
def _embedding(a: Analysis, c: Call) -> Value:
    weight = a.axes(c["weight"])
    a.labels.freeze_axis(weight[0], "the rows of an embedding")
    return (*a.axes(c["indices"]), *weight[1:])
