"""Time files against each other on a device: interleaved rounds, raw samples kept, ratios with an interval.

The files take turns, A B C, B C A, ..., in an order that changes from round to round, so that whatever the machine does in the
meantime falls on all of them alike. What is timed is one `Runtime.run`: arrays in, arrays out, as a program that embeds
the runtime would call it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgepress.compress.errors import FileError, UserError
from edgepress.compress.progress import bar

from .artifact import Artifact
from .devices import Device, Failed, Job, Outcome, find_device
from .runtimes import random_feeds
from .stats import Ratio, noise_reasons, paired_ratio, percentile

__all__ = ["Measurement", "Plan", "Ratio", "measure", "noise_warning", "ratio", "try_measure"]


@dataclass(frozen=True)
class Plan:
    """How long and how often to measure.

    Args:
        rounds: turns that each file takes; the unit that intervals are computed from.
        min_round_s: a turn repeats the run until about this time is filled.
        max_samples: most samples in one turn.
        warmup_s: each file is run at least this long before, up to ten times as long until its times settle.
        budget_s: for all rounds of all files together; rounds are left out, down to five, where it would be exceeded.
        sustained_s: rounds go on for so long, whatever ``rounds`` and ``budget_s`` say: some devices throttle only then.
        wait_s: how long to wait for another benchmark that holds the device.
        timeout_s: for one file, before it is given up.
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
    sustained_s: float = 0.0
    wait_s: float = 300.0
    timeout_s: float = 120.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.max_samples < 1:
            raise UserError("A measuring plan needs at least 2 rounds (for an interval) and 1 sample in each.")
        if min(self.min_round_s, self.warmup_s, self.sustained_s, self.wait_s) < 0 or min(self.budget_s, self.timeout_s) <= 0:
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
        load_ns: nanoseconds to load the file in that process, and
        first_ns: nanoseconds of its first run there: together the cold start. None where not measured.
        joules: drawn by one run, by the device's own sensor, everything else on it included; None where there is no sensor.
        environment: of the device; ``other_cores`` is how many cores everything else kept busy meanwhile, ``stolen_cores`` how
            many a hypervisor took away, ``trace`` seconds, MHz and degrees Celsius after each round.
        compile_ns: nanoseconds of ``load_ns`` and ``first_ns`` in which the runtime compiled the file (Inductor, AOTInductor,
            TensorRT); None where it compiles nothing.

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
    load_ns: int | None = None
    first_ns: int | None = None
    joules: float | None = None
    environment: dict[str, Any] = field(default_factory=dict, hash=False)
    compile_ns: int | None = None

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
    def per_second(self) -> float:
        """Runs in a second, one after the other."""
        return 1e9 / self.mean_ns

    @property
    def noise_reasons(self) -> tuple[str, ...]:
        """What speaks against these samples, in words; empty where nothing does."""
        return (*noise_reasons(self.samples_ns), *_meanwhile(self.environment, self.threads))

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
    runtimes: Sequence[str | None] | None = None,
) -> list[Measurement]:
    """Run files in turns on one device and keep every sample.

    Args:
        artifacts: the files; the same one may come twice.
        device: ``'local'``, ``'ssh://user@host'``, ``'adb://serial'``, or an object that is a `Device`.
        threads: how many each file may use.
        plan: how long and how often.
        feeds: for each file its inputs, in the file's own layout; random ones where None.
        runtimes: for each file what runs it there (see `open_runtime`); the first installed one where None.

    Returns:
        One measurement for each file, in the same order, with equally many rounds.

    Raises:
        DeviceError: there is no such device, it cannot be reached, or a runtime is missing there.
        FileError: a file cannot be loaded or run, or crashes its runtime.
        UserError: no files, or feeds that do not match them.
    """
    found = try_measure(artifacts, device, threads, plan, feeds, runtimes)
    for outcome in found:
        if isinstance(outcome, UserError):
            raise outcome
    return [outcome for outcome in found if isinstance(outcome, Measurement)]


def try_measure(
    artifacts: Sequence[Artifact],
    device: str | Device = "local",
    threads: int = 1,
    plan: Plan | None = None,
    feeds: Sequence[Sequence[np.ndarray]] | None = None,
    runtimes: Sequence[str | None] | None = None,
) -> list[Measurement | UserError]:
    """`measure`, but a file that fails has its error in the list and the others are measured."""
    plan, place = plan or Plan(), find_device(device)
    _check(artifacts, threads, feeds, runtimes)
    found: list[UserError | Job] = []
    try:
        environment = place.environment()
        for i, artifact in enumerate(artifacts):
            try:
                inputs = random_feeds(artifact, plan.seed, place) if feeds is None else list(feeds[i])
                found.append(Job(artifact, inputs, runtimes[i] if runtimes else None))
            except FileError as error:
                found.append(error)
        jobs = [item for item in found if isinstance(item, Job)]
        with bar("Measure") as update:
            outcomes, seen = place.measure(jobs, threads, dataclasses.asdict(plan), update)
    finally:
        if place is not device:
            place.close()
    environment |= seen | {"device": place.name}
    taken = iter([_measurement(j, outcome, place.name, threads, environment) for j, outcome in zip(jobs, outcomes, strict=True)])
    return [next(taken) if isinstance(item, Job) else item for item in found]


def _measurement(job: Job, outcome: Outcome, device: str, threads: int, environment: dict[str, Any]) -> Measurement | UserError:
    if isinstance(outcome, Failed):
        return outcome.error
    return Measurement(
        artifact=job.artifact,
        device=device,
        runtime=outcome.runtime,
        runtime_version=outcome.version,
        threads=threads,
        samples_ns=outcome.samples_ns,
        loops=outcome.loops,
        peak_bytes=outcome.peak_bytes,
        idle_bytes=outcome.idle_bytes,
        load_ns=outcome.load_ns,
        first_ns=outcome.first_ns,
        joules=outcome.joules / outcome.runs if outcome.joules is not None and outcome.runs else None,
        environment=environment,
        compile_ns=outcome.compile_ns,
    )


def ratio(baseline: Measurement, other: Measurement) -> Ratio:
    """How many times faster ``other`` is than ``baseline``: the ratio of their rounds' medians with a 95 % interval.

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
    return paired_ratio(baseline.samples_ns, other.samples_ns)


def _check(
    artifacts: Sequence[Artifact],
    threads: int,
    feeds: Sequence[Sequence[np.ndarray]] | None,
    runtimes: Sequence[str | None] | None,
) -> None:
    if not artifacts:
        raise UserError("There is nothing to measure: name at least one file.")
    if threads < 1:
        raise UserError(f"{threads} threads cannot run a file: ask for 1 or more.")
    if feeds is not None and len(feeds) != len(artifacts):
        raise UserError(f"There are feeds for {len(feeds)} of {len(artifacts)} files: give a list of arrays for each.")
    if runtimes is not None and len(runtimes) != len(artifacts):
        raise UserError(f"There are runtimes for {len(runtimes)} of {len(artifacts)} files: name one for each, or none at all.")


def _meanwhile(environment: dict[str, Any], threads: int) -> list[str]:
    """What else happened on the device while the files were timed."""
    cores, load = environment.get("cores") or 1, environment.get("load_average")
    others = environment.get("other_cores")
    if others is None and load:  # the second choice: it looks back a minute, into work of our own that came before
        others = load[0]
    reasons = []
    if others is not None and others > max(cores - threads - 0.25, 0.25):
        reasons.append(f"other work kept {others:.1f} of {cores} cores busy")
    if (stolen := environment.get("stolen_cores") or 0) > 0.05:
        reasons.append(f"a hypervisor took {stolen:.2f} of {cores} cores away")
    if abs(jump := environment.get("clock_jump_s") or 0) > 1:
        reasons.append(f"the clock of the device jumped by {jump:.0f} s")
    return reasons + _throttled(environment.get("trace") or [])


def _throttled(trace: Sequence[Sequence[float | None]]) -> list[str]:
    """Whether the CPU's clock fell, and how hot it was then."""
    clocks = [mhz for _, mhz, _ in trace if mhz]
    if len(clocks) < 4 or clocks[0] <= 0:
        return []
    quarter = max(len(clocks) // 4, 1)
    first, last = max(clocks[:quarter]), max(clocks[-quarter:])
    if last > 0.9 * first:
        return []
    heat = [celsius for _, _, celsius in trace if celsius is not None]
    at = f" at {max(heat):.0f} degrees Celsius" if heat else ""
    return [f"the CPU's clock fell from {first:.0f} to {last:.0f} MHz{at}"]
