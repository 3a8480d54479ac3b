"""Where the time goes inside a file or a network: the time of each operator, told in the user's modules.

A runtime fuses, reorders and converts what a file says, so the rows are the operators that it really ran.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgepress.compress.errors import UserError

from .artifact import Artifact

__all__ = [
    "OpTime", "Profile", "Remark", "Timed", "alternate", "check_numbers", "finish", "join_modules", "kept", "profile",
    "typical_ns",
]  # fmt: skip

_WARM_UP = 10  # runs, and for at least so many seconds
_WARM_UP_S = 0.1
_HEAVY, _THIN, _THICK = 0.5, 0.75, 1.1  # beyond which a profile carries a caution
_BLOCK = 10  # runs with and without the profiler take turns in blocks of so many


@dataclass(frozen=True)
class OpTime:
    """One operator as the runtime ran it.

    Args:
        name: of the operator, or of what it gives, in the file or graph.
        operator: its type, ``'Conv'``, ``'CONV_2D'``, ``'aten.conv2d'``.
        module: of the user's network, ``'layer1.0.conv1'``; several that were fused are joined with ``' + '``; empty where the
            file does not say.
        median_ns: nanoseconds in one run, over the runs.
        share: of the sum of all rows, 0 to 1.
        kernel: what ran it: provider or delegate, its own name for the operator, the type of number.
    """

    name: str
    operator: str
    module: str
    median_ns: float
    share: float
    kernel: str


@dataclass(frozen=True)
class Remark:
    """An operator that deserves a look.

    Args:
        op: the row.
        reason: half a sentence.
    """

    op: OpTime
    reason: str


@dataclass(frozen=True)
class Profile:
    """Where the time of one run goes.

    Args:
        subject: name of the file, or ``'network'``.
        runtime: ``'onnxruntime'``, ``'litert'`` or ``'torch'``.
        version: of the runtime.
        threads: that it was allowed.
        runs: that the medians are over.
        rows: in the order in which they ran.
        plain_ns: median of a whole run without the profiler, as `measure` times it.
        profiled_ns: median of a whole run with the profiler.
        fallbacks: operators that an int8 file computes in floats, or that the fast kernels did not take.
        converts: operators that only change the type or the layout.
        method: one sentence: whose clock it is and what it cannot see.
    """

    subject: str
    runtime: str
    version: str
    threads: int
    runs: int
    rows: tuple[OpTime, ...]
    plain_ns: float
    profiled_ns: float
    fallbacks: tuple[Remark, ...]
    converts: tuple[Remark, ...]
    method: str

    @property
    def rows_ns(self) -> float:
        """Sum of the rows."""
        return sum(row.median_ns for row in self.rows)

    @property
    def overhead(self) -> float:
        """What profiling costs, relative to a plain run: 0.1 is 10 % longer."""
        return self.profiled_ns / self.plain_ns - 1

    @property
    def covered(self) -> float:
        """Sum of the rows relative to a plain run; the rest is spent between operators and on the way in and out."""
        return self.rows_ns / self.plain_ns

    @property
    def caution(self) -> str | None:
        """Why the rows should be read with care; None where nothing speaks against them."""
        reasons = []
        if self.overhead > _HEAVY:
            reasons.append(f"the profiler made a run {self.overhead:.0%} longer, so rows of a few µs say little")
        if self.covered < _THIN:
            reasons.append(
                f"the rows are {self.covered:.0%} of a run: the rest lies between operators, or other work interrupted it"
            )
        if self.covered > _THICK:
            reasons.append(f"the rows add up to {self.covered:.0%} of a run: some are too long")
        return "; ".join(reasons) or None

    def by_module(self, depth: int | None = None) -> list[tuple[str, float, float]]:
        """(module, nanoseconds, share), the slowest first.

        Args:
            depth: keep so many parts of a path: 2 makes ``'layer1.0'`` of ``'layer1.0.conv1'``; all of them where None.
        """
        return self._sums((join_modules(_cut(part, depth) for part in row.module.split(" + ")), row) for row in self.rows)

    def by_operator(self) -> list[tuple[str, float, float]]:
        """(operator, nanoseconds, share), the slowest first."""
        return self._sums((row.operator, row) for row in self.rows)

    def _sums(self, keyed: Iterable[tuple[str, OpTime]]) -> list[tuple[str, float, float]]:
        sums: dict[str, float] = defaultdict(float)
        for key, row in keyed:
            sums[key] += row.median_ns
        total = self.rows_ns or 1.0
        return sorted(((key, ns, ns / total) for key, ns in sums.items()), key=lambda entry: -entry[1])


def profile(artifact: Artifact, threads: int = 1, feeds: Sequence[np.ndarray] | None = None, runs: int = 50) -> Profile:
    """Time each operator of a file with its runtime's own profiler; of a .pt2 file, eager, on the CPU.

    Args:
        artifact: what `read_artifact` or `export` gave.
        threads: that a run may use.
        feeds: inputs in the file's own layout; random ones where None.
        runs: with the profiler, and as many without.

    Raises:
        UserError: fewer than 1 thread or 3 runs.
        FileError: the runtime refuses the file or the feeds, or cannot tell its operators apart.
        DeviceError: the runtime, or its profiler, is not installed.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from edgepress.compress.network import trace
        >>> from edgepress.targets.export import export
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Softmax(-1)), torch.zeros(1, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = profile(export(network, Path(folder) / "net.onnx"), runs=5)
        >>> [(row.operator, row.module) for row in found.rows]
        [('Gemm', '0'), ('Softmax', '1')]
    """
    check_numbers(threads, runs)
    if artifact.format == "onnx":
        from .profile_onnx import profile_onnx

        return profile_onnx(artifact, threads, feeds, runs)
    if artifact.format == "pt2":
        from .profile_torch import profile_pt2

        return profile_pt2(artifact, threads, feeds, runs)
    from .profile_tflite import profile_tflite

    return profile_tflite(artifact, threads, feeds, runs)


def check_numbers(threads: int, runs: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        UserError: fewer than 1 thread or 3 runs.
    """
    if threads < 1:
        raise UserError(f"{threads} threads cannot run a file: ask for 1 or more.")
    if runs < 3:
        raise UserError(f"{runs} runs make no median: ask for 3 or more.")


# ---- what the backends share


@dataclass(frozen=True)
class Timed:
    """An operator on its way to a row.

    Args:
        name: see `OpTime`; ``operator``, ``module`` and ``kernel`` too.
        samples_ns: of each run.
        fallback: why it is one; None where it is none.
        convert: likewise.
        floor_ns: that the clock itself adds.
    """

    name: str
    operator: str
    module: str
    kernel: str
    samples_ns: Sequence[float]
    fallback: str | None = None
    convert: str | None = None
    floor_ns: float = 0.0


def finish(timed: Sequence[Timed], tick_ns: int = 1, **fields: Any) -> Profile:
    """Make rows, shares and remarks of what was timed.

    Args:
        timed: in the order in which they ran.
        tick_ns: of the clock, see `typical_ns`.
        fields: the others of `Profile`.
    """
    medians = [max(typical_ns(t.samples_ns, tick_ns) - t.floor_ns, 0.0) for t in timed]
    total = sum(medians) or 1.0
    rows = tuple(OpTime(t.name, t.operator, t.module, ns, ns / total, t.kernel) for t, ns in zip(timed, medians, strict=True))
    pairs = list(zip(rows, timed, strict=True))
    return Profile(
        rows=rows,
        fallbacks=tuple(Remark(row, t.fallback) for row, t in pairs if t.fallback),
        converts=tuple(Remark(row, t.convert) for row, t in pairs if t.convert),
        **fields,
    )


def typical_ns(samples: Sequence[float], tick_ns: int = 1) -> float:
    """The median; of a clock that only counts whole ticks, rounded down, the median of data in classes.

    Ten operators of 0.9 µs would vanish if the ticks of a clock of 1 µs were taken as they are.

    Example:
        >>> typical_ns([3000, 3000, 3000, 3000], tick_ns=1000)
        3500.0
        >>> typical_ns([3000, 3000, 3000, 4000], tick_ns=1000) < typical_ns([3000, 4000, 4000, 4000], tick_ns=1000)
        True
    """
    if tick_ns == 1:
        return float(np.median(samples))
    return float(statistics.median_grouped([s / tick_ns for s in samples], 1) + 0.5) * tick_ns


def alternate(plain: Callable[[], object], profiled: Callable[[], object], runs: int) -> tuple[list[int], list[int]]:
    """Nanoseconds of runs without and with a profiler, in turns, after a warm-up of both; the warm-up's are left out."""
    for run in (plain, profiled):
        start = time.perf_counter()
        for _ in _until(start + _WARM_UP_S):
            run()
    times: tuple[list[int], list[int]] = ([], [])
    for at in range(0, runs, _BLOCK):
        for run, samples in zip((plain, profiled), times, strict=True):
            run()  # the other one has left its own data in the caches
            for _ in range(min(_BLOCK, runs - at)):
                start_ns = time.perf_counter_ns()
                run()
                samples.append(time.perf_counter_ns() - start_ns)
    return times


def _until(end: float) -> Iterator[None]:
    count = 0
    while (count < _WARM_UP and time.perf_counter() < end + 1) or time.perf_counter() < end:
        yield None
        count += 1


def kept(readings: Sequence[Any], runs: int) -> list[Any]:
    """Of what a profiler gave for every run that `alternate` made, the part of those that count."""
    blocks = [min(_BLOCK, runs - at) for at in range(0, runs, _BLOCK)]
    at = len(readings) - runs - len(blocks)
    found: list[Any] = []
    for size in blocks:
        found.extend(readings[at + 1 : at + 1 + size])
        at += 1 + size
    return found


def join_modules(paths: Iterable[str]) -> str:
    """Several module paths as one text, without those that hold another of them.

    Example:
        >>> join_modules(["layer1.0.conv1", "layer1.0", "layer1.0.bn1", ""])
        'layer1.0.conv1 + layer1.0.bn1'
    """
    unique = [path for path in dict.fromkeys(paths) if path]
    return " + ".join(path for path in unique if not any(other.startswith(path + ".") for other in unique))


def _cut(path: str, depth: int | None) -> str:
    return ".".join(path.split(".")[:depth])
