"""What every device has in common: what it is asked, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from edgepress.compress.errors import UserError

from ..artifact import Artifact
from ..runtimes import Runtime

__all__ = ["Device", "Failed", "Job", "Outcome", "Taken"]


@dataclass(frozen=True)
class Job:
    """One file to be measured.

    Args:
        artifact: the file.
        feeds: its inputs, in the file's own layout and types.
        runtime: see `open_runtime`.
    """

    artifact: Artifact
    feeds: Sequence[np.ndarray]
    runtime: str | None = None


@dataclass(frozen=True)
class Taken:
    """What a device found out about one file.

    Args:
        runtime: that ran it.
        version: of the runtime.
        peak_bytes: most memory held by a process of its own that loads and runs the file; on a GPU that of the GPU, None where
            the runtime does not tell it.
        idle_bytes: the same process before it loaded the runtime and the file.
        load_ns: nanoseconds to load the file there, the runtime's library being loaded already.
        first_ns: nanoseconds of its first run.
        samples_ns: nanoseconds of one run, by round.
        loops: runs that each sample is the mean of.
        runs: how many runs were timed in all.
        joules: drawn during those; None where there is no sensor.
        compile_ns: nanoseconds of those two that the runtime compiled; None where it compiles nothing.
    """

    runtime: str
    version: str
    peak_bytes: int | None
    idle_bytes: int | None
    load_ns: int
    first_ns: int
    samples_ns: tuple[tuple[int, ...], ...] = ()
    loops: int = 1
    runs: int = 0
    joules: float | None = None
    compile_ns: int | None = None


@dataclass(frozen=True)
class Failed:
    """A file that could not be measured, and why. The others were."""

    error: UserError


Outcome = Taken | Failed


class Device(Protocol):
    """Where files run.

    Attributes:
        name: as the user calls it.
    """

    name: str

    def environment(self) -> dict[str, Any]:
        """What timings depend on there, as plain values."""
        ...

    def check(self, job: Job, threads: int = 1, timeout_s: float = 120.0) -> Outcome:
        """Load and run one file in a process of its own: whether it runs at all, its memory, its first answer."""
        ...

    def measure(
        self, jobs: Sequence[Job], threads: int, plan: dict[str, Any], progress: Callable[[float], None] = ...
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """Run files in turns.

        Returns:
            For each job what was found, with equally many rounds for all that ran; and what was seen meanwhile (other load,
            clock frequency, temperature).

        Raises:
            DeviceError: the device, not a file, is at fault.
        """
        ...

    def open(self, artifact: Artifact, threads: int = 1, runtime: str | None = None) -> Runtime:
        """Load a file there, to run it on data."""
        ...

    def close(self) -> None:
        """Leave it as it was."""
        ...
