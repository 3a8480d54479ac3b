"""Labels on axis positions: a union-find over integers, and axes as tuples of labelled atoms.

An *atom* is a factor of an axis with at most one integer label for each of its positions; an *axis* is the tuple of atoms
whose sizes multiply to the dimension. ``view(batch * heads, 3)`` needs the two atoms of its first axis kept apart: one flat
array of labels could not say that only the heads can go. An atom without labels is fixed, and an axis of size one has no atom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Atom", "Axes", "Axis", "Freeze", "Ids", "Labels", "axis", "fixed", "size"]

Ids: TypeAlias = NDArray[np.int64]


class Atom(NamedTuple):
    """A factor of an axis: ``size`` positions, labelled one by one, or fixed where ``labels`` is None."""

    size: int
    labels: Ids | None


Axis: TypeAlias = tuple[Atom, ...]
Axes: TypeAlias = tuple[Axis, ...]


class Freeze(NamedTuple):
    """That some labels were frozen: by what (the context the driver set), why, and which."""

    context: Any
    reason: str
    labels: Ids


def axis(n: int, labels: Ids | None = None) -> Axis:
    """An axis of one atom.

    Example:
        >>> axis(1), axis(3)
        ((), (Atom(size=3, labels=None),))
    """
    return () if n == 1 else (Atom(n, labels),)


def fixed(shape: Sequence[int]) -> Axes:
    """The axes of a tensor of which nothing can go."""
    return tuple(axis(n) for n in shape)


def size(a: Axis) -> int:
    """The dimension that an axis stands for.

    Example:
        >>> size((Atom(2, None), Atom(5, None))), size(())
        (10, 1)
    """
    return math.prod(atom.size for atom in a)


class Labels:
    """Union-find over integer labels, on numpy arrays throughout, with a *frozen* flag for each class.

    Attributes:
        context: what is at work just now; it goes into the log of freezes.
        log: every `Freeze` so far that froze something which could have gone until then.

    Example:
        >>> labels = Labels()
        >>> a, b = labels.new(3), labels.new(3)
        >>> labels.union(a, b[::-1])
        >>> bool((labels.find(a) == labels.find(b[::-1])).all())
        True
        >>> labels.freeze(b[:1], "because")
        >>> [bool(x) for x in labels.frozen(a)]
        [False, False, True]
    """

    def __init__(self) -> None:
        self._parent: Ids = np.arange(1024)
        self._frozen = np.zeros(1024, bool)
        self._soft = np.zeros(1024, bool)
        self._count = 0
        self.context: Any = None
        self.log: list[Freeze] = []

    # ---- union-find

    def new(self, n: int, *, soft: bool = False) -> Ids:
        """``n`` fresh labels; *soft* ones come from constants (zeros, expand), which yield to real channels."""
        start, self._count = self._count, self._count + n
        while self._count > len(self._parent):
            self._parent = np.concatenate([self._parent, np.arange(len(self._parent), 2 * len(self._parent))])
            self._frozen = np.concatenate([self._frozen, np.zeros_like(self._frozen)])
            self._soft = np.concatenate([self._soft, np.zeros_like(self._soft)])
        self._soft[start : self._count] = soft
        return np.arange(start, self._count)

    def constant(self, n: int, reason: str) -> Ids:
        """``n`` fresh labels that are frozen from the start."""
        labels = self.new(n)
        self.freeze(labels, reason)
        return labels

    def find(self, labels: Ids) -> Ids:
        """The representative of each label: the smallest of its class."""
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                break
            roots = above
        self._parent[labels] = roots
        return roots

    def union(self, a: Ids, b: Ids) -> None:
        """Join ``a[i]`` and ``b[i]`` for every i; what joins a frozen class is frozen with it."""
        a, b = self.find(a), self.find(b)
        while (apart := a != b).any():
            frozen = self._frozen[a] | self._frozen[b]
            # Where several pairs share a root, minimum.at keeps one link; the next round finds the others again.
            np.minimum.at(self._parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
            a, b = self.find(a), self.find(b)
            self._frozen[a[frozen]] = True
            self._frozen[b[frozen]] = True

    def frozen(self, labels: Ids) -> NDArray[np.bool_]:
        """Which of the labels must stay."""
        return self._frozen[self.find(labels)]

    def freeze(self, labels: Ids, reason: str) -> None:
        """Freeze the classes of ``labels``; logged where that changes anything."""
        roots = self.find(labels)
        fresh = ~self._frozen[roots]
        if fresh.any():
            self.log.append(Freeze(self.context, reason, labels[fresh]))
            self._frozen[roots] = True

    # ---- axes

    def live(self, labels: Ids | None) -> bool:
        """Whether any position could go."""
        return labels is not None and not bool(self.frozen(labels).all())

    def freeze_axis(self, a: Axis, reason: str) -> None:
        """Freeze every position of an axis."""
        for atom in a:
            if atom.labels is not None:
                self.freeze(atom.labels, reason)

    def freeze_axes(self, axes: Sequence[Axis], reason: str) -> None:
        """Freeze every position of several axes."""
        for a in axes:
            self.freeze_axis(a, reason)

    def alive(self, a: Axis) -> bool:
        """Whether any position of the axis could go."""
        return any(self.live(atom.labels) for atom in a)

    def flat(self, a: Axis) -> Ids | None:
        """One label for each position of the whole axis; None where all is fixed.

        Two counts that could both shrink cannot share one flat axis: the larger one of real channels stays alive.
        """
        alive = [i for i, atom in enumerate(a) if self.live(atom.labels)]
        if not alive:
            return None
        keep = max(alive, key=lambda i: (not self._is_soft(a[i]), a[i].size))
        for i in alive:
            if i != keep:
                self.freeze_axis((a[i],), "another count that can shrink shares its axis")
        labels = a[keep].labels
        assert labels is not None
        return np.tile(np.repeat(labels, size(a[keep + 1 :])), size(a[:keep]))

    def _is_soft(self, atom: Atom) -> bool:
        return atom.labels is not None and bool(self._soft[self.find(atom.labels)].all())

    def positions(self, a: Axis) -> Ids:
        """One label for each position, with fresh frozen ones where the axis is fixed."""
        labels = self.flat(a)
        return self.constant(size(a), "stands beside channels that can go") if labels is None else labels

    def unify_labels(self, a: Ids | None, b: Ids | None) -> Ids | None:
        """Join two label arrays position by position; None is fixed and fixes the other."""
        if a is None or b is None:
            some = b if a is None else a
            if some is not None:
                self.freeze(some, "meets an axis of fixed size")
            return some
        self.union(a, b)
        return a

    def unify(self, a: Axis, b: Axis) -> Axis:
        """Join two axes of the same size position by position; where their atoms differ, the result is flat."""
        assert size(a) == size(b), f"axes of {size(a)} and {size(b)} positions cannot be joined"
        if [x.size for x in a] == [x.size for x in b]:
            return tuple(Atom(x.size, self.unify_labels(x.labels, y.labels)) for x, y in zip(a, b, strict=True))
        return axis(size(a), self.unify_labels(self.flat(a), self.flat(b)))

    def tie(self, labels: Ids, outer: int, inner: int, *, keep: str) -> Ids:
        """Read ``labels`` as ``[outer, inner]`` and join along the side that is not kept; the kept side's labels.

        Example:
            >>> labels = Labels()
            >>> x = labels.new(6)
            >>> labels.tie(x, 2, 3, keep="inner").tolist(), labels.find(x).tolist()
            ([0, 1, 2], [0, 1, 2, 0, 1, 2])
        """
        grid = labels.reshape(outer, inner)
        grid = grid if keep == "inner" else grid.T
        self.union(np.repeat(grid[:1], len(grid) - 1, 0).ravel(), grid[1:].ravel())
        return np.ascontiguousarray(grid[0])

    def broadcast(self, operands: Sequence[Axes]) -> Axes:
        """Join the axes of several tensors as elementwise operators do: aligned on the right, size one stretches."""
        rank = max((len(v) for v in operands), default=0)
        out: list[Axis] = []
        for d in range(rank):
            joined: Axis = ()
            for v in operands:
                k = d - (rank - len(v))
                if k >= 0 and v[k]:
                    joined = self.unify(joined, v[k]) if joined else v[k]
            out.append(joined)
        return tuple(out)

    # ---- reshape

    def reshape(self, axes: Sequence[Axis], shape: Sequence[int], side: Callable[[int], str]) -> tuple[Axes, dict[int, Ids]]:
        """Deal the atoms of ``axes`` out to the dimensions of ``shape``, splitting atoms where needed.

        Args:
            axes: of the tensor that is reshaped.
            shape: the new dimensions, with the same number of elements.
            side: for the i-th split of a labelled atom, 'outer' or 'inner': which factor keeps labels. The positions
                that differ only in the other one are joined.

        Returns:
            The new axes, and the labels that each split kept, by its number.
        """
        atoms = [atom for a in axes for atom in a][::-1]
        out: list[Axis] = []
        kept: dict[int, Ids] = {}
        splits = 0
        for n in shape:
            dealt: list[Atom] = []
            while n > 1:
                atom = atoms.pop()
                if n % atom.size == 0:
                    dealt.append(atom)
                    n //= atom.size
                elif atom.size % n == 0:
                    head, tail, labels = self._split(atom, n, partial(side, splits))
                    if labels is not None:
                        kept[splits] = labels
                    splits += 1
                    dealt.append(head)
                    atoms.append(tail)
                    n = 1
                else:
                    self.freeze_axes(axes, "reshaped across the boundaries of its factors")
                    return fixed(shape), {}
            out.append(tuple(dealt))
        return tuple(out), kept

    def _split(self, atom: Atom, outer: int, side: Callable[[], str]) -> tuple[Atom, Atom, Ids | None]:
        labels, inner = atom.labels, atom.size // outer
        if labels is None or not self.live(labels):
            return Atom(outer, None), Atom(inner, None), None
        grid = self.find(labels).reshape(outer, inner)
        if (grid == grid[:1]).all():  # already periodic: nothing to join
            return Atom(outer, None), Atom(inner, grid[0]), None
        if (grid == grid[:, :1]).all():
            return Atom(outer, np.ascontiguousarray(grid[:, 0])), Atom(inner, None), None
        if side() == "outer":
            kept = self.tie(labels, outer, inner, keep="outer")
            return Atom(outer, kept), Atom(inner, None), kept
        kept = self.tie(labels, outer, inner, keep="inner")
        return Atom(outer, None), Atom(inner, kept), kept
