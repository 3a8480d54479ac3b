"""Which operators of a TFLite file are behind what a delegate ran: the parts of the graph that it took, in order."""

from __future__ import annotations

from collections.abc import Collection, Sequence

__all__ = ["aligned", "partitions"]

_BAND = 200  # how far kernels and operators may drift apart: a delegate leaves out and puts in, but not without end
_OTHER_NAMES = {
    "convolution": {"conv2d", "depthwiseconv2d"}, "deconvolution": {"transposeconv"}, "fullyconnected": {"conv2d", "batchmatmul"},
    "batchmatrixmultiply": {"batchmatmul"}, "subtract": {"sub"}, "multiply": {"mul"}, "divide": {"div"}, "negate": {"neg"},
    "maxpooling": {"maxpool2d"}, "averagepooling": {"averagepool2d", "mean"}, "pad": {"padv2"},
    "mean": {"averagepool2d"}, "sum": {"mean"}, "reshape": {"squeeze", "expanddims"}, "fusedims": {"reshape"},
    "splitdims": {"reshape"}, "expanddims": {"reshape"}, "copy": {"reshape", "concatenation", "squeeze", "expanddims", "split"},
    "slice": {"stridedslice", "split"}, "convert": {"quantize", "dequantize", "cast"},
    "clamp": {"relu", "relu6", "relun1to1", "relu0to1"}, "sigmoid": {"logistic"}, "squareroot": {"sqrt"},
    "reciprocalsquareroot": {"rsqrt"}, "ceiling": {"ceil"}, "bankdersrounding": {"round"}, "approxgelu": {"gelu"},
    "cosine": {"cos"},
    "sine": {"sin"}, "power": {"pow"},
}  # fmt: skip
"""XNNPACK's names and the format's, where they differ in more than spelling."""


def partitions(operators: Sequence[tuple[Sequence[int], Sequence[int]]], left: Collection[int]) -> list[list[int]]:
    """The parts of a graph that went to the delegate, in the order in which they run.

    LiteRT collects operators of one kind, delegated or not, for as long as their inputs are there, then changes to the other
    kind (``PartitionGraphIntoIndependentNodeSubsets``).

    Args:
        operators: the tensors that each reads and makes.
        left: numbers of those that the delegate did not take.

    Example:
        >>> partitions([([0], [1]), ([1], [2]), ([2], [3])], left=[1])
        [[0], [2]]
    """
    waiting = list(range(len(operators)))
    missing = {index for _, outputs in operators for index in outputs}
    found: list[list[int]] = []
    while waiting:
        part: list[int] = []
        kind: bool | None = None
        again = True
        while again:
            again, rest = False, []
            for number in waiting:
                inputs, outputs = operators[number]
                if missing.isdisjoint(inputs) and kind in (None, number in left):
                    kind, again = number in left, True
                    part.append(number)
                    missing.difference_update(outputs)
                else:
                    rest.append(number)
            waiting = rest
        if not part:  # operators that wait for each other: no file that runs has them
            break
        if not kind:
            found.append(sorted(part))
    return found


def aligned(kernels: Sequence[str], operators: Sequence[str]) -> list[int | None]:
    """For each kernel that ran the operator that it computes; None for those that the delegate put in.

    Both are in order, so the longest common subsequence is looked for (Wagner and Fischer 1974).

    Args:
        kernels: XNNPACK's names, ``'Convolution (NHWC, QC8) IGEMM'``.
        operators: the format's, ``'CONV_2D'``.

    Example:
        >>> aligned(["Convolution (NHWC, F32) IGEMM", "Clamp (NC)", "Add (ND)"], ["PAD", "CONV_2D", "ADD"])
        [1, None, 2]
    """
    rows, columns = len(kernels), len(operators)
    stems = [_plain(name.partition(" (")[0]) for name in kernels]
    names = [_plain(name) for name in operators]
    best: list[dict[int, int]] = [{} for _ in range(rows + 1)]

    def score(i: int, j: int) -> int:
        return best[i].get(j, 0)

    for i in range(rows - 1, -1, -1):
        middle = i * columns // max(rows, 1)
        for j in range(min(columns, middle + _BAND) - 1, max(0, middle - _BAND) - 1, -1):
            best[i][j] = max(score(i + 1, j), score(i, j + 1), _likeness(stems[i], names[j]) + score(i + 1, j + 1))
    found: list[int | None] = [None] * rows
    i = j = 0
    while i < rows and j < columns:
        like = _likeness(stems[i], names[j])
        if like and score(i, j) == like + score(i + 1, j + 1):
            found[i] = j
            i, j = i + 1, j + 1
        elif score(i, j) == score(i + 1, j):
            i += 1
        else:
            j += 1
    return found


def _likeness(kernel: str, operator: str) -> int:
    """2 for equal names, 1 for one that the delegate has for it, 0 for another operator."""
    if kernel == operator:
        return 2
    return int(operator in _OTHER_NAMES.get(kernel, ()))


def _plain(name: str) -> str:
    for word in ("static ", "constant ", "dynamic "):
        name = name.lower().removeprefix(word)
    return name.replace(" ", "").replace("_", "")
