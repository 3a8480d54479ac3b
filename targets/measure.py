"""Time files against each other on a device: interleaved rounds, raw samples kept, ratios with an interval.

The files take turns, A B C, B C A, ..., in an order that changes from round to round, so that whatever the machine does in the
meantime falls on all of them alike. What is timed is one `Runtime.run`: arrays in, arrays out, as a program that embeds
the runtime would call it.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from edgepress.compress.errors import DeviceError, UserError

from .artifact import Artifact
from .local import Local, Memory
from .runtimes import Runtime, random_feeds
from .stats import Ratio, noise_reasons, percentile, ratio_of_medians

__all__ = ["Device", "Measurement", "Plan", "Ratio", "find_device", "measure", "noise_warning", "ratio"]

_DEVICES = {"local": Local}
_TIMER_STEPS = 100  # a sample lasts at least so many steps of the clock: 1 % precision
_LEAST_ROUNDS = 5  # with fewer an interval says little
_SETTLED = 0.05  # two windows of the warm-up whose medians differ by less are alike
_LONG_NS = 1_000_000_000  # a run this long is taken once a round

Clock = Callable[[], int]


class Device(Protocol):
    """Where files run.

    Attributes:
        name: as the user calls it.
    """

    name: str

    def environment(self) -> dict[str, Any]:
        """What the timings depend on, as plain values."""
        ...

    def open(self, artifact: Artifact, threads: int) -> Runtime:
        """Load a file."""
        ...

    def peak_memory(self, artifact: Artifact, threads: int, feeds: Sequence[np.ndarray] | None, timeout_s: float) -> Memory:
        """Load and run a file in a process of its own."""
        ...

    def busy_s(self) -> float | None:
        """CPU seconds used by everything else so far, over all cores; None where unknown."""
        ...


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Args:
        rounds: turns that each file takes; the unit that intervals are computed from.
        min_round_s: a turn repeats the run until about this time is filled.
        max_samples: most samples in one turn.
        warmup_s: each file is run at least this long before, up to ten times as long until its times settle.
        budget_s: for all rounds of all files together; rounds are left out, down to five, where it would be exceeded.
        memory: whether peak memory is measured, in a process of its own.
        timeout_s: for that process.
        seed: of the random order of the files within each round, and of random inputs.

    Example:
        >>> Plan(rounds=10).rounds
        10
    """

    rounds: int = 20
    min_round_s: float = 0.05
    max_samples: int = 1000
    warmup_s: float = 0.3
    budget_s: float = 60.0
    memory: bool = True
    timeout_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.max_samples < 1:
            raise UserError("A measuring plan needs at least 2 rounds (for an interval) and 1 sample in each.")
        if min(self.min_round_s, self.warmup_s) < 0 or min(self.budget_s, self.timeout_s) <= 0:
            raise UserError("The times of a measuring plan must be positive.")


@dataclass(frozen=True)
class Measurement:
    """The raw samples of one file on one device; statistics are computed from them.

    Args:
        artifact: the file.
        device: where it ran.
        runtime: what ran it, ``'onnxruntime'`` or ``'litert'``.
        runtime_version: of the runtime.
        threads: that it was allowed.
        samples_ns: nanoseconds of one run, by round.
        loops: runs that each sample is the mean of; above 1 only where a run is too short for the clock.
        peak_bytes: most memory held by a process of its own that loads and runs the file; None where not measured.
        idle_bytes: the same process before it loaded the runtime and the file.
        environment: of the device; `other_cores` is how many cores everything else kept busy meanwhile.

    Example:
        >>> from pathlib import Path
        >>> file = Artifact(Path("a.onnx"), "onnx", "fp32", (), (), "", 0)
        >>> m = Measurement(file, "local", "onnxruntime", "1", 1, ((100, 101), (99, 100)))
        >>> m.p50_ns, m.noise
        (100.0, None)
    """

    artifact: Artifact
    device: str
    runtime: str
    runtime_version: str
    threads: int
    samples_ns: tuple[tuple[int, ...], ...]
    loops: int = 1
    peak_bytes: int | None = None
    idle_bytes: int | None = None
    environment: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def p50_ns(self) -> float:
        """Median nanoseconds of one run."""
        return percentile(self.samples_ns, 50)

    @property
    def p90_ns(self) -> float:
        """Nanoseconds that nine runs of ten stay below."""
        return percentile(self.samples_ns, 90)

    @property
    def p99_ns(self) -> float:
        """Nanoseconds that 99 runs of 100 stay below; next to the slowest sample where there are fewer than 100."""
        return percentile(self.samples_ns, 99)

    @property
    def mean_ns(self) -> float:
        """Mean nanoseconds of one run."""
        return sum(map(sum, self.samples_ns)) / sum(map(len, self.samples_ns))

    @property
    def noise_reasons(self) -> tuple[str, ...]:
        """What speaks against these samples, in words; empty where nothing does."""
        busy = _busy_reason(self.environment, self.threads)
        return (*noise_reasons(self.samples_ns), *([busy] if busy else []))

    @property
    def noise(self) -> str | None:
        """One sentence where the machine was too noisy for these samples to be trusted, else None."""
        return noise_warning([self]) if self.noise_reasons else None


def noise_warning(measured: Sequence[Measurement]) -> str | None:
    """One sentence about the measurements of one run that should not be trusted, and why; None where all may be."""
    noisy = [m for m in measured if m.noise_reasons]
    if not noisy:
        return None
    names = ", ".join(dict.fromkeys(m.artifact.path.name for m in noisy))
    reasons = "; ".join(dict.fromkeys(reason for m in noisy for reason in m.noise_reasons))
    return f"The machine was too noisy to trust the times of {names}: {reasons}."


def measure(
    artifacts: Sequence[Artifact],
    device: str | Device = "local",
    threads: int = 1,
    plan: Plan | None = None,
    feeds: Sequence[Sequence[np.ndarray]] | None = None,
) -> list[Measurement]:
    """Run files in turns on one device and keep every sample.

    Args:
        artifacts: the files; the same one may come twice.
        device: ``'local'``, or an object that is a `Device`.
        threads: how many each file may use.
        plan: how long and how often.
        feeds: for each file its inputs, in the file's own layout; random ones where None.

    Returns:
        One measurement for each file, in the same order, with equally many rounds.

    Raises:
        DeviceError: there is no such device, or a runtime is missing.
        FileError: a file cannot be loaded or run, or crashes its runtime.
        UserError: no files, or feeds that do not match them.
    """
    plan, place = plan or Plan(), find_device(device)
    _check(artifacts, threads, feeds)
    given = feeds if feeds is not None else [None] * len(artifacts)
    environment = place.environment()
    memories = _memories(place, artifacts, threads, given, plan)  # first: it shows whether a file crashes its runtime
    inputs = [random_feeds(a, plan.seed) if f is None else list(f) for a, f in zip(artifacts, given, strict=True)]
    with contextlib.ExitStack() as stack:
        turns = []
        for artifact, values in zip(artifacts, inputs, strict=True):
            turns.append(_Turn(place.open(artifact, threads), values))
            stack.callback(turns[-1].runtime.close)
        environment["other_cores"] = _interleave(turns, plan, place)
    return [
        Measurement(
            artifact=turn.runtime.artifact,
            device=place.name,
            runtime=turn.runtime.name,
            runtime_version=turn.runtime.version,
            threads=threads,
            samples_ns=tuple(turn.rounds),
            loops=turn.loops,
            peak_bytes=memory.peak_bytes if memory else None,
            idle_bytes=memory.idle_bytes if memory else None,
            environment=environment,
        )
        for turn, memory in zip(turns, memories, strict=True)
    ]


def ratio(baseline: Measurement, other: Measurement) -> Ratio:
    """How many times faster ``other`` is than ``baseline``: the ratio of their medians with a 95 % interval.

    Raises:
        UserError: they were not measured in one run, taking turns.

    Example:
        >>> from pathlib import Path
        >>> def taken(*samples):
        ...     file = Artifact(Path("a.onnx"), "onnx", "fp32", (), (), "", 0)
        ...     return Measurement(file, "local", "onnxruntime", "1", 1, tuple((s,) for s in samples))
        >>> print(ratio(taken(200, 202, 198), taken(100, 101, 99)))
        2.00x (2.00 to 2.00)
    """
    if baseline.environment != other.environment or len(baseline.samples_ns) != len(other.samples_ns):
        raise UserError(
            f"{baseline.artifact.path.name} and {other.artifact.path.name} were not measured in one run, and times of different "
            "moments do not compare: hand both to one measure()."
        )
    return ratio_of_medians(baseline.samples_ns, other.samples_ns)


def find_device(device: str | Device) -> Device:
    """The device of that name; a `Device` is returned as it is.

    Raises:
        DeviceError: there is none.

    Example:
        >>> find_device("local").name
        'local'
    """
    if not isinstance(device, str):
        return device
    if device not in _DEVICES:
        known = ", ".join(f"'{name}'" for name in _DEVICES)
        raise DeviceError(f"There is no device '{device}'; this version of edgepress measures on {known} only.")
    return _DEVICES[device]()


def _check(artifacts: Sequence[Artifact], threads: int, feeds: Sequence[Sequence[np.ndarray]] | None) -> None:
    if not artifacts:
        raise UserError("There is nothing to measure: name at least one file.")
    if threads < 1:
        raise UserError(f"{threads} threads cannot run a file: ask for 1 or more.")
    if feeds is not None and len(feeds) != len(artifacts):
        raise UserError(f"There are feeds for {len(feeds)} of {len(artifacts)} files: give a list of arrays for each.")


def _memories(
    device: Device,
    artifacts: Sequence[Artifact],
    threads: int,
    feeds: Sequence[Sequence[np.ndarray] | None],
    plan: Plan,
) -> list[Memory | None]:
    if not plan.memory:
        return [None] * len(artifacts)
    return [device.peak_memory(a, threads, f, plan.timeout_s) for a, f in zip(artifacts, feeds, strict=True)]


def _busy_reason(environment: dict[str, Any], threads: int) -> str | None:
    """Whether anything else left too few cores free while the files were timed."""
    cores, load = environment.get("cores") or 1, environment.get("load_average")
    others = environment.get("other_cores")
    if others is None and load:  # the second choice: it looks back a minute, into work of our own that came before
        others = load[0]
    if others is None or others <= max(cores - threads - 0.25, 0.25):
        return None
    return f"other work kept {others:.1f} of {cores} cores busy"


# ---- taking turns


@dataclass
class _Turn:
    """One file's part in the run."""

    runtime: Runtime
    feeds: list[np.ndarray]
    typical_ns: float = 0.0
    loops: int = 1
    repeats: int = 1
    rounds: list[tuple[int, ...]] = field(default_factory=list)

    def sample(self, clock: Clock) -> int:
        run, feeds = self.runtime.run, self.feeds
        start = clock()
        for _ in range(self.loops):
            run(feeds)
        return round((clock() - start) / self.loops)

    @property
    def settle(self) -> int:
        """Runs before a round's first sample: the neighbour has left its own data in the caches."""
        return max(1, min(50, self.repeats // 10))


def _interleave(turns: Sequence[_Turn], plan: Plan, device: Device, clock: Clock = time.perf_counter_ns) -> float | None:
    """Warm up, choose repeats, take turns. Returns how many cores everything else kept busy meanwhile."""
    for turn in turns:
        _warm_up(turn, plan, clock)
        _choose_repeats(turn, plan, clock)
    order = np.random.default_rng(plan.seed)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    start, busy = time.perf_counter(), device.busy_s()
    try:
        for _ in range(_rounds(turns, plan)):
            for i in order.permutation(len(turns)):
                _take_round(turns[i], clock)
    finally:
        if collecting:
            gc.enable()
    end, busy_end = time.perf_counter(), device.busy_s()
    if busy is None or busy_end is None:
        return None
    return round(max(busy_end - busy, 0.0) / max(end - start, 1e-9), 2)


def _warm_up(turn: _Turn, plan: Plan, clock: Clock) -> None:
    """Run until two windows in a row have like medians: caches, frequency and the runtime's own lazy work have settled."""
    window_ns = plan.warmup_s * 1e9 / 2
    start, before = clock(), math.inf
    while True:
        samples = [turn.sample(clock)]
        opened = clock()
        while clock() - opened < window_ns:
            samples.append(turn.sample(clock))
        turn.typical_ns = max(float(np.median(samples)), 1.0)
        if abs(turn.typical_ns / before - 1) < _SETTLED or clock() - start >= 10 * plan.warmup_s * 1e9:
            return
        before = turn.typical_ns


def _choose_repeats(turn: _Turn, plan: Plan, clock: Clock) -> None:
    step = min((b - a for a, b in _readings(clock) if b > a), default=1)
    turn.loops = max(1, math.ceil(_TIMER_STEPS * step / turn.typical_ns))
    wanted = math.ceil(plan.min_round_s * 1e9 / (turn.typical_ns * turn.loops))
    turn.repeats = min(max(wanted, 3 if turn.typical_ns < _LONG_NS else 1), plan.max_samples)


def _readings(clock: Clock) -> list[tuple[int, int]]:
    readings = [clock() for _ in range(500)]
    return list(itertools.pairwise(readings))


def _rounds(turns: Sequence[_Turn], plan: Plan) -> int:
    one_ns = sum(turn.typical_ns * turn.loops * (turn.repeats + turn.settle) for turn in turns)
    return min(plan.rounds, max(_LEAST_ROUNDS, int(plan.budget_s * 1e9 / one_ns)))


def _take_round(turn: _Turn, clock: Clock) -> None:
    for _ in range(turn.settle):
        turn.sample(clock)
    turn.rounds.append(tuple(turn.sample(clock) for _ in range(turn.repeats)))
