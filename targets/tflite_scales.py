"""Operators that would ruin numbers if they computed in integers: they stay float."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from .tflite_recipe import Operator

__all__ = ["left_float"]

_MOVERS = {
    *("reshape", "transpose", "squeeze", "expand_dims", "slice", "strided_slice", "split", "split_v"),
    *("gather", "gather_nd", "pack", "unpack", "concat"),
}
_MASKING = {"add", "sub", "select", "select_v2", "maximum", "minimum"}
_ARITHMETIC = _MOVERS | {"add", "sub", "mul", "div", "exp"}
_LEVELS = 16  # fewer are left to an input: it has lost more than half of its bits


def left_float(
    operators: Sequence[Operator],
    bits: Sequence[int],
    ranges: Mapping[str, tuple[float, float]],
    outputs: Collection[str],
) -> set[int]:
    """The operators that would ruin numbers if they computed in integers.

    A detector that joins boxes of hundreds of pixels and scores below 1 in one tensor gives them one scale: of the scores
    nothing is left. Such a concatenation stays float with what moves its result to an output; where the tensor is computed
    with later, its reader needs that one scale anyway. And attention's masks add minus infinity, or minus a billion: no grid
    has both that and the scores, so what makes or reads such a tensor stays float. So does what turns a detector's results into
    boxes, told by its exponential: a face of ten pixels would be off by one where 320 share a scale. And LiteRT's integer kernel
    for divisions gives up where a divisor is rounded to zero. Last, a layer norm divides by the root of a variance: where the
    least variance would be a few steps of the grid, as beside a token that is constant, its module stays float.

    Args:
        operators: of a file, in the order in which they run.
        bits: what each computes with; 0 for floats.
        ranges: of its tensors; infinite where a value was.
        outputs: names of what the file gives.

    Example:
        >>> cat = Operator("concat", "head", "CONCATENATION", ("boxes", "scores"), ("found",))
        >>> left_float([cat], [8], {"boxes": (0, 640), "scores": (0, 1), "found": (0, 640)}, ["found"])
        {0}
        >>> left_float([cat], [8], {"boxes": (0, 2), "scores": (0, 1), "found": (0, 2)}, ["found"])
        set()
        >>> root = Operator("rsqrt", "norm", "RSQRT", ("variances",), ("roots",))
        >>> norm = [root, Operator("mul", "norm", "MUL", ("x", "roots"), ("y",)), Operator("add", "", "ADD", ("y", "x"), ("z",))]
        >>> [left_float(norm, [8, 8, 8], {"roots": (0.5, most)}, []) for most in (3.0, 1.5)]
        [{0, 1}, set()]
        >>> size = Operator("exp", "head", "EXP", ("sizes",), ("factors",))
        >>> left_float([size, Operator("mul", "head", "MUL", ("factors",), ("boxes",))], [8, 8], {}, ["boxes"])
        {0, 1}
    """
    arrives = _arriving(operators, bits, outputs)
    wide = {name for name, limits in ranges.items() if not np.isfinite(limits).all()}
    norms = {
        o.module for o, n in zip(operators, bits, strict=True) if o.kind == "rsqrt" and _least_variance(o, ranges, n) < _LEVELS
    }
    left = _decoding(operators, outputs)
    left |= {number for number, operator in enumerate(operators) if operator.kind == "div" or operator.module in norms}
    moved: set[str] = set()
    for number, operator in enumerate(operators):
        inputs, moves = set(operator.inputs), operator.kind in _MOVERS
        levels = _levels(operator, ranges, bits[number])
        if (operator.kind in _MASKING and levels < 1) or (moves and inputs & wide):
            wide.update(operator.outputs)
        joins = operator.kind == "concat" and levels < _LEVELS
        if moves and set(operator.outputs) & arrives and (joins or moved & inputs):
            moved.update(operator.outputs)
        if (inputs | set(operator.outputs)) & wide or set(operator.outputs) & moved:
            left.add(number)
    return {number for number in left if bits[number]}


def _decoding(operators: Sequence[Operator], outputs: Collection[str]) -> set[int]:
    """What computes, by arithmetic alone, an output that an exponential goes into."""
    ends: dict[str, set[str]] = {name: {name} for name in outputs}  # the outputs that a tensor comes to by arithmetic alone
    other: set[str] = set()  # tensors that something else reads
    found: dict[int, set[str]] = {}
    for number, operator in reversed(list(enumerate(operators))):
        reached = set().union(*(ends.get(name, set()) for name in operator.outputs))
        if operator.kind in _ARITHMETIC and reached and not set(operator.outputs) & other:
            found[number] = reached
            for name in operator.inputs:
                ends.setdefault(name, set()).update(reached)
        else:
            other.update(operator.inputs)
    exponential = set().union(*(reached for number, reached in found.items() if operators[number].kind == "exp"))
    return {number for number, reached in found.items() if reached & exponential}


def _arriving(operators: Sequence[Operator], bits: Sequence[int], outputs: Collection[str]) -> set[str]:
    """The tensors whose values come, moved at most, to an output or to an operator that computes in floats."""
    found = set(outputs)
    for number, operator in reversed(list(enumerate(operators))):
        if not bits[number] or (operator.kind in _MOVERS and found & set(operator.outputs)):
            found.update(operator.inputs)
    return found


def _levels(operator: Operator, ranges: Mapping[str, tuple[float, float]], bits: int) -> float:
    """How many steps of the result's grid the narrowest input covers; infinite where there is none to tell by."""
    widths = [_width(ranges[name]) for name in (*operator.outputs[:1], *operator.inputs) if name in ranges]
    known = [width for width in widths[1:] if width > 0]
    return min(known) / widths[0] * (2**bits - 1) if known and 0 < widths[0] < np.inf else np.inf


def _least_variance(root: Operator, ranges: Mapping[str, tuple[float, float]], bits: int) -> float:
    """How many steps of its grid the least variance is, by the reciprocal roots; infinite where nothing is known."""
    low, high = ranges.get(root.outputs[0], (0.0, 0.0))
    return (low / high) ** 2 * (2**bits - 1) if high > 0 else np.inf


def _width(limits: tuple[float, float]) -> float:
    """Of a range, which is widened to hold zero."""
    return max(limits[1], 0.0) - min(limits[0], 0.0)
