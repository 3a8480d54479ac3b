"""Rules of operators that move, cut and join positions, with the sizes and bounds they carry as constants."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from ..network import EXPORT_BATCH
from .call import Call, hint
from .labels import Axis, axis, fixed, size
from .table import Replacement, Table, Unsupported, Value

if TYPE_CHECKING:
    from .analysis import Analysis
    from .rewrite import Cut

__all__ = ["TABLE", "static"]

TABLE = Table()
aten = torch.ops.aten


# ---- reshaping


@TABLE.rule("view", "reshape", "_unsafe_view")
def _view(a: Analysis, c: Call) -> Value:
    if "size" not in c and "shape" not in c:
        raise Unsupported("reads the bits as another type")
    return a.reshape(a.axes(c["self"]), c.shape, c.node)


@_view.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    name = "size" if "size" in c else "shape"
    return {name: cut.sizes(c[name], cut.axes(c.node))}


@TABLE.rule("flatten", "unsqueeze", "atleast_1d", "atleast_2d", "atleast_3d")
def _flatten(a: Analysis, c: Call) -> Value:
    return a.reshape(a.axes(c["self"]), c.shape, c.node)


@TABLE.rule("view_as", "reshape_as")
def _view_as(a: Analysis, c: Call) -> Value:
    return a.labels.broadcast([a.reshape(a.axes(c["self"]), c.shape, c.node), a.axes(c["other"])])


@TABLE.rule("unflatten")
def _unflatten(a: Analysis, c: Call) -> Value:
    return a.reshape(a.axes(c["self"]), c.shape, c.node)


@_unflatten.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    d = c["dim"] % len(cut.axes(c["self"]))
    return {"sizes": cut.sizes(c["sizes"], cut.axes(c.node)[d : d + len(c["sizes"])])}


@TABLE.rule("squeeze")
def _squeeze(a: Analysis, c: Call) -> Value:
    return a.reshape(a.axes(c["self"]), c.shape, c.node)


@_squeeze.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any] | Replacement:
    x = cut.axes(c["self"])
    if not any(size(ax) > 1 and cut.kept(ax) == 1 for ax in x):
        return {}
    ones = [d for d in c.dims(len(x)) if size(x[d]) == 1]  # an axis that pruning left one position of stays an axis
    return Replacement(aten.squeeze.dims, (c["self"], ones))


@TABLE.rule("permute")
def _permute(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    return tuple(x[d] for d in c["dims"])


@TABLE.rule("transpose", "swapaxes", "swapdims")
def _transpose(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    i, j = c.node.args[1:3]
    assert isinstance(i, int)
    assert isinstance(j, int)
    x[i], x[j] = x[j], x[i]
    return tuple(x)


@TABLE.rule("t", "numpy_T", "mT", "adjoint")
def _matrix_transpose(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    return x[::-1] if c.name == "numpy_T" else (*x[:-2], *x[-2:][::-1])


@TABLE.rule("movedim", "moveaxis")
def _movedim(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    source, destination = c.dims(len(x), "source"), c.dims(len(x), "destination")
    moved = {to: x[at] for at, to in zip(source, destination, strict=True)}
    rest = iter(ax for d, ax in enumerate(x) if d not in source)
    return tuple(moved[d] if d in moved else next(rest) for d in range(len(x)))


@TABLE.rule("diagonal")
def _diagonal(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    i, j = c["dim1"] % len(x), c["dim2"] % len(x)
    if c["offset"] or size(x[i]) != size(x[j]):
        a.labels.freeze_axes([x[i], x[j]], "a diagonal of a part")
        both = axis(c.shape[-1])
    else:
        both = a.labels.unify(x[i], x[j])
    return (*[ax for d, ax in enumerate(x) if d not in (i, j)], both)


@TABLE.rule("diag_embed")
def _diag_embed(a: Analysis, c: Call) -> Value:
    *x, last = a.axes(c["self"])
    rank = len(x) + 2
    if c["offset"]:
        a.labels.freeze_axis(last, "a diagonal of a part")
    for d in sorted((c["dim1"] % rank, c["dim2"] % rank)):
        x.insert(d, axis(c.shape[d]) if c["offset"] else last)
    return tuple(x)


# ---- making and repeating


def _fresh(a: Analysis, c: Call, d: int) -> Axis:
    """An axis of a constant: it follows whatever it meets, and its size is rewritten. A batch hides other counts behind it."""
    n = c.shape[d]
    batch, rest = (EXPORT_BATCH, n // EXPORT_BATCH) if c.symbolic(d) and n % EXPORT_BATCH == 0 else (1, n)
    if (c.symbolic(d) and batch == 1) or rest == 1:
        return axis(n)
    return axis(batch) + axis(rest, a.labels.new(rest, soft=True))


@TABLE.rule("expand", "broadcast_to")
def _expand(a: Analysis, c: Call) -> Value:
    x, shape = a.axes(c["self"]), c.shape
    x = ((),) * (len(shape) - len(x)) + x
    return tuple(ax if size(ax) == n else _fresh(a, c, d) for d, (ax, n) in enumerate(zip(x, shape, strict=True)))


@TABLE.rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "randn", "rand")
def _constant(a: Analysis, c: Call) -> Value:
    return tuple(_fresh(a, c, d) for d in range(len(c.shape)))


@_expand.rewrites
@_constant.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    return {"size": cut.sizes(c["size"], cut.axes(c.node))}


@TABLE.rule("expand_as")
def _expand_as(a: Analysis, c: Call) -> Value:
    return a.labels.broadcast([a.axes(c["self"]), a.axes(c["other"])])


@TABLE.rule("repeat", "tile")
def _repeat(a: Analysis, c: Call) -> Value:
    x, shape = a.axes(c["self"]), c.shape
    x = ((),) * (len(shape) - len(x)) + x
    out: list[Axis] = []
    for d, (ax, n) in enumerate(zip(x, shape, strict=True)):
        out.append(axis(n // size(ax)) + ax if ax else _fresh(a, c, d))
    return tuple(out)


@_repeat.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    name = "repeats" if "repeats" in c else "dims"
    x, out, times = cut.axes(c["self"]), cut.axes(c.node), list(c[name])
    for d in range(1, len(times) + 1):
        if d > len(x) or not x[-d]:  # one position repeated: the count is the size
            times[-d] = cut.sizes([times[-d]], [out[-d]])[0]
    return {name: times}


@TABLE.rule("repeat_interleave")
def _repeat_interleave(a: Analysis, c: Call) -> Value:
    if not isinstance(c.get("repeats"), int) or c.get("dim") is None:
        raise Unsupported("repeats each position its own number of times")
    x = list(a.axes(c["self"]))
    x[c["dim"]] = x[c["dim"]] + axis(c["repeats"])
    return tuple(x)


# ---- joining


@TABLE.rule("cat", "concat", "concatenate", "hstack", "vstack", "column_stack")
def _cat(a: Analysis, c: Call) -> Value:
    shape = c.shape
    dim = c.get("dim", 0 if c.name == "vstack" or len(shape) == 1 else 1) % len(shape)
    parts = [v for v in (a.axes(n) for n in c["tensors"]) if len(v) == len(shape)]  # an old habit: empty 1-d tensors
    out = list(a.labels.broadcast([(*v[:dim], (), *v[dim + 1 :]) for v in parts]))
    if c.symbolic(dim):
        a.labels.freeze_axes([v[dim] for v in parts], "joined along the batch")
    if any(a.labels.alive(v[dim]) for v in parts):
        out[dim] = axis(shape[dim], np.concatenate([a.labels.positions(v[dim]) for v in parts]))
    else:
        out[dim] = axis(shape[dim])
    return tuple(out)


@TABLE.rule("stack")
def _stack(a: Analysis, c: Call) -> Value:
    out = list(a.labels.broadcast([a.axes(n) for n in c["tensors"]]))
    out.insert(c["dim"] % (len(out) + 1), axis(len(c["tensors"])))
    return tuple(out)


@TABLE.rule("pad", "constant_pad_nd")
def _pad(a: Analysis, c: Call) -> Value:
    x, amounts = list(a.axes(c["self"])), c["pad"]
    for i in range(len(amounts) // 2):
        before, after = amounts[2 * i : 2 * i + 2]
        at = len(x) - 1 - i
        if (before, after) == (0, 0):
            continue
        constant = c.get("mode", "constant") == "constant"
        if constant and _is_count(before) and _is_count(after) and a.labels.alive(x[at]):
            # Padded positions are constants: they go with whatever they are added to or read by.
            sides = [a.labels.new(n, soft=True) for n in (before, after)]
            x[at] = axis(c.shape[at], np.concatenate([sides[0], a.labels.positions(x[at]), sides[1]]))
        else:
            a.labels.freeze_axis(x[at], "padded")
            x[at] = axis(c.shape[at])
    return tuple(x)


@_pad.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    x, out, amounts = cut.axes(c["self"]), cut.axes(c.node), list(c["pad"])
    for i in range(len(amounts) // 2):
        before, n = amounts[2 * i], size(x[-1 - i])
        kept = cut.mask(out[-1 - i])
        if not kept.all():
            amounts[2 * i : 2 * i + 2] = int(kept[:before].sum()), int(kept[before + n :].sum())
    return {"pad": amounts}


def _is_count(n: Any) -> bool:
    return isinstance(n, int) and n >= 0


# ---- cutting


@TABLE.rule("slice")
def _slice(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    d, start, stop, step = c["dim"] % len(x), c["start"] or 0, c["end"], c["step"]
    bounded = isinstance(start, int) and (stop is None or isinstance(stop, int))
    if not bounded or not static(c["self"], d):
        if (start, step) != (0, 1) or not (stop is None or (isinstance(stop, int) and stop >= 2**62)):
            a.labels.freeze_axis(x[d], "sliced at a bound that depends on the batch")
            x[d] = axis(c.shape[d])
        return tuple(x)
    start, stop, _ = slice(start, stop).indices(size(x[d]))
    x[d] = a.take(x[d], start, stop, step)
    return tuple(x)


@_slice.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    x = cut.axes(c["self"])
    d = c["dim"] % len(x)
    kept = cut.mask(x[d])
    if kept.all() or not static(c["self"], d):
        return {}
    if c["step"] != 1:  # whole steps go
        return {"end": len(kept)}
    start, stop, _ = slice(c["start"], c["end"]).indices(len(kept))
    return {"start": int(kept[:start].sum()), "end": int(kept[:stop].sum())}


@TABLE.rule("narrow")
def _narrow(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    d, start, length = c["dim"] % len(x), c["start"], c["length"]
    if not isinstance(start, int) or not isinstance(length, int) or not static(c["self"], d):
        raise Unsupported("sliced at a bound that depends on the batch")
    start %= size(x[d])
    x[d] = a.take(x[d], start, start + length)
    return tuple(x)


@_narrow.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    x = cut.axes(c["self"])
    kept = cut.mask(x[c["dim"]])
    start = c["start"] % len(kept)
    return {"start": int(kept[:start].sum()), "length": int(kept[start : start + c["length"]].sum())}


@TABLE.rule("select")
def _select(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    gone = x.pop(c["dim"] % len(x))
    labels = a.labels.flat(gone)
    if labels is not None:
        one = isinstance(c["index"], int)
        a.labels.freeze(labels[[c["index"]]] if one else labels, "a single position is taken out")
    return tuple(x)


@_select.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any]:
    kept = cut.mask(cut.axes(c["self"])[c["dim"]])
    return {} if kept.all() else {"index": int(kept[: c["index"] % len(kept)].sum())}


@TABLE.rule("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes")
def _split(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    d, at, out = c["dim"] % len(x), 0, []
    if not static(c["self"], d):
        a.labels.freeze_axis(x[d], "split along the batch")
    for part in c.value:
        n = hint(part.shape[d])
        out.append((*x[:d], a.take(x[d], at, at + n), *x[d + 1 :]))
        at += n
    return list(out)


@_split.rewrites
def _(cut: Cut, c: Call) -> dict[str, Any] | Replacement:
    d = c["dim"] % len(cut.axes(c["self"]))
    if cut.mask(cut.axes(c["self"])[d]).all():
        return {}
    sizes = [cut.kept(part[d]) for part in cut.parts(c.node)]
    return Replacement(aten.split_with_sizes.default, (c["self"], sizes, d))


@TABLE.rule("unbind")
def _unbind(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    a.labels.freeze_axis(x.pop(c["dim"] % len(x)), "taken apart position by position")
    return [tuple(x) for _ in c.value]


@TABLE.rule("glu")
def _glu(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    d = c["dim"] % len(x)
    half = size(x[d]) // 2
    x[d] = a.labels.unify(a.take(x[d], 0, half), a.take(x[d], half, 2 * half))
    return tuple(x)


# ---- windows and shuffles


@TABLE.rule("unfold")
def _unfold(a: Analysis, c: Call) -> Value:
    x = list(a.axes(c["self"]))
    d = c["dimension"] % len(x)
    a.labels.freeze_axis(x[d], "windowed")
    x[d] = axis(c.shape[d])
    return (*x, axis(c.shape[-1]))


@TABLE.rule("im2col")
def _im2col(a: Analysis, c: Call) -> Value:
    x, kernel = a.axes(c["self"]), c["kernel_size"]
    a.labels.freeze_axes(x[-2:], "windowed")
    return (*x[:-3], x[-3] + axis(kernel[0] * kernel[1]), axis(c.shape[-1]))


@TABLE.rule("col2im")
def _col2im(a: Analysis, c: Call) -> Value:
    x, shape, kernel = a.axes(c["self"]), c.shape, c["kernel_size"]
    a.labels.freeze_axis(x[-1], "windowed")
    labels = a.labels.flat(x[-2])
    if labels is not None:
        labels = a.labels.tie(labels, shape[-3], kernel[0] * kernel[1], keep="outer")
        if len(labels) == 1:
            a.labels.freeze(labels, "an axis of one position")
    return (*x[:-2], axis(shape[-3], labels), *fixed(shape[-2:]))


@TABLE.rule("pixel_shuffle")
def _pixel_shuffle(a: Analysis, c: Call) -> Value:
    x, shape = a.axes(c["self"]), c.shape
    a.labels.freeze_axes(x[-2:], "spatial")
    labels = a.labels.flat(x[-3])
    if labels is not None:
        labels = a.labels.tie(labels, shape[-3], c["upscale_factor"] ** 2, keep="outer")
    return (*x[:-3], axis(shape[-3], labels), *fixed(shape[-2:]))


@TABLE.rule("pixel_unshuffle")
def _pixel_unshuffle(a: Analysis, c: Call) -> Value:
    x = a.axes(c["self"])
    a.labels.freeze_axes(x[-2:], "spatial")
    return (*x[:-3], x[-3] + axis(c["downscale_factor"] ** 2), *fixed(c.shape[-2:]))


@TABLE.rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(a: Analysis, c: Call) -> Value:
    x, groups = a.axes(c["self"]), c["groups"]
    labels = a.labels.flat(x[1])
    if labels is None:
        return x
    a.labels.tie(labels, groups, len(labels) // groups, keep="inner")
    return (x[0], axis(len(labels), labels.reshape(groups, -1).T.ravel().copy()), *x[2:])


def static(node: fx.Node, d: int) -> bool:
    """Whether an operand's size along ``d`` is a number, whatever the batch."""
    return isinstance(node.meta["val"].shape[d], int)
