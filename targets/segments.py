"""A graph cut at some of its tensors, so that it can be run piece by piece, each operator once."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

__all__ = ["Segment", "segments"]

Tensor: TypeAlias = Any  # a name or a number
Operator: TypeAlias = tuple[Collection[Hashable], Collection[Hashable]]


@dataclass(frozen=True)
class Segment:
    """What lies between known tensors and the next one.

    Attributes:
        operators: numbers of those that it takes, in their order.
        inputs: the known tensors that they read.
        output: the tensor that they make.
        done: tensors that no later segment reads.
    """

    operators: tuple[int, ...]
    inputs: tuple[Tensor, ...]
    output: Tensor
    done: tuple[Tensor, ...] = ()


def segments(operators: Sequence[Operator], given: Collection[Hashable], cuts: Sequence[Hashable]) -> list[Segment]:
    """Cut a graph.

    Args:
        operators: what each reads and what it makes, constants left out, in an order in which they can run.
        given: the tensors that are known from the start.
        cuts: the tensors to cut at, in the order in which they are made; each is known from then on.

    Example:
        >>> chain = [(["x"], ["a"]), (["a"], ["b"]), (["b", "x"], ["c"]), (["c"], ["d"])]
        >>> for segment in segments(chain, ["x"], ["b", "d"]):
        ...     print(segment)
        Segment(operators=(0, 1), inputs=('x',), output='b', done=())
        Segment(operators=(2, 3), inputs=('b', 'x'), output='d', done=('b', 'x', 'd'))
    """
    known: set[Hashable] = set(given)
    found: list[Segment] = []
    for cut in cuts:
        needed, inputs = {cut}, set[Tensor]()
        taken: list[int] = []
        for number in reversed(range(len(operators))):
            reads, makes = operators[number]
            if needed & set(makes):
                taken.append(number)
                inputs |= set(reads) & known
                needed |= set(reads) - known
        found.append(Segment(tuple(reversed(taken)), tuple(sorted(inputs)), cut))
        known.add(cut)
    last = {segment.output: number for number, segment in enumerate(found)}
    last |= {name: number for number, segment in enumerate(found) for name in segment.inputs}
    return [
        replace(segment, done=tuple(name for name in (*segment.inputs, segment.output) if last[name] == number))
        for number, segment in enumerate(found)
    ]
