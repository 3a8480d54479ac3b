"""Files against each other on a device: time, memory, cold start, energy, and what they answer there."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import UserError
from edgepress.compress.task import Task, metrics
from edgepress.targets.artifact import Artifact, read_artifact
from edgepress.targets.devices import Device, find_device
from edgepress.targets.devices.link import Piped
from edgepress.targets.devices.local import Local
from edgepress.targets.measure import Measurement, Plan, Ratio, ratio, try_measure
from edgepress.targets.runtimes import RUNTIMES, Runtime, random_feeds

from .tasks import load_task

__all__ = ["Benched", "bench"]

_EXAMPLES = 4
"""Random inputs on which a device's answers are compared with this computer's."""


@dataclass(frozen=True)
class Benched:
    """One file in one runtime.

    Args:
        artifact: the file.
        measurement: None where it failed.
        speedup: against the first file that ran; None where it failed.
        metrics: of the task, by this file on the device; None without a task.
        apart: the largest difference between what the file answers on the device and in the same runtime and version here, in
            the file's own types (0 is bit for bit); None where there is nothing to compare with.
        error: why it failed; empty where it did not.
    """

    artifact: Artifact
    measurement: Measurement | None = None
    speedup: Ratio | None = None
    metrics: dict[str, float] | None = None
    apart: float | None = None
    error: str = ""


def bench(
    files: Sequence[str | Path | Artifact],
    *,
    device: str | Device = "local",
    threads: int = 1,
    runtimes: Sequence[str] = (),
    task: Task | str | None = None,
    plan: Plan | None = None,
) -> list[Benched]:
    """Measure files in one interleaved run on a device, and have them judged there.

    Args:
        files: ``.onnx``, ``.tflite``, ``.pt2``; the first that runs is the baseline.
        device: see `find_device`.
        threads: of the runtimes.
        runtimes: what runs them (see `open_runtime`): each file is measured in each that runs its format. Where empty, in the
            first one that is installed on the device.
        task: whose `evaluate` judges what each file answers on the device.
        plan: how long and how often.

    Returns:
        A row for each file and runtime; one that failed says why, and the others are measured.

    Raises:
        UserError: a file is none, no runtime named runs it, or the device cannot be reached.
    """
    judge = load_task(task) if isinstance(task, str) else task
    artifacts = [f if isinstance(f, Artifact) else read_artifact(f) for f in files]
    pairs = list(itertools.chain.from_iterable(_pairs(artifact, runtimes) for artifact in artifacts))
    with contextlib.closing(find_device(device)) as place:
        measured = try_measure([a for a, _ in pairs], place, threads, plan, runtimes=[r for _, r in pairs])
        baseline = next((m for m in measured if isinstance(m, Measurement)), None)
        return [
            _row(artifact, outcome, baseline, place, judge, threads)
            for (artifact, _), outcome in zip(pairs, measured, strict=True)
        ]


def _pairs(artifact: Artifact, runtimes: Sequence[str]) -> list[tuple[Artifact, str | None]]:
    if not runtimes:
        return [(artifact, None)]
    fitting = [name for name in runtimes if name.partition(":")[0] in RUNTIMES[artifact.format]]
    if not fitting:
        raise UserError(f"{artifact.path.name} is run by {' or '.join(RUNTIMES[artifact.format])}, not by {', '.join(runtimes)}.")
    return [(artifact, name) for name in fitting]


def _row(
    artifact: Artifact, outcome: Measurement | UserError, baseline: Measurement | None, place: Device, task: Task | None,
    threads: int,
) -> Benched:  # fmt: skip
    if isinstance(outcome, UserError) or baseline is None:
        return Benched(artifact, error=str(outcome))
    speedup = ratio(baseline, outcome)
    if task is None and place.name == "local":
        return Benched(artifact, outcome, speedup)
    with contextlib.closing(place.open(artifact, threads, outcome.runtime)) as runtime:
        apart = _apart(runtime) if place.name != "local" else None
        try:
            found = metrics(task, runtime.predict) if task is not None else None
        except UserError as error:
            return Benched(artifact, outcome, speedup, None, apart, f"{artifact.path.name} could not be judged: {error}")
    return Benched(artifact, outcome, speedup, found, apart)


def _apart(far: Runtime) -> float | None:
    try:
        # in a process of its own: what the device runs may crash the same runtime here
        with contextlib.closing(Local()) as here, contextlib.closing(Piped.open(here, far.artifact, 1, far.name)) as near:
            if near.version != far.version:
                return None
            feeds: list[list[np.ndarray]] = [random_feeds(far.artifact, seed) for seed in range(_EXAMPLES)]
            return max(_difference(near.run(f), far.run(f)) for f in feeds)
    except UserError:  # the runtime is not installed here
        return None


def _difference(near: Sequence[Any], far: Sequence[Any]) -> float:
    return max(
        float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0.0)) for a, b in zip(near, far, strict=True)
    )
