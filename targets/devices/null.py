"""A device that runs nothing: it answers with times it was told, for tests of what comes after measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..artifact import Artifact
from ..runtimes import Runtime, open_runtime
from .base import Job, Outcome, Taken

__all__ = ["Null"]


class Null:
    """Times by file name, in nanoseconds; see `Device`.

    Example:
        >>> Null({"a.onnx": 1000}).environment()["cpu"]
        'none'
    """

    name = "null"

    def __init__(self, times_ns: Mapping[str, int]):
        self._times_ns = dict(times_ns)

    def environment(self) -> dict[str, Any]:
        """Of no machine."""
        return {"device": "null", "cpu": "none", "cores": 4, "usable_cores": 4, "load_average": [0.0, 0.0, 0.0]}

    def check(self, job: Job, threads: int = 1, timeout_s: float = 120.0) -> Outcome:
        """Every file is fine."""
        return Taken("null", "1", 2, 1, 1, 1)

    def measure(
        self, jobs: Sequence[Job], threads: int, plan: dict[str, Any], progress: Callable[[float], None] = lambda _: None
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """The times it was told, one sample a round."""
        rounds = plan["rounds"]
        times = [self._times_ns[job.artifact.path.name] for job in jobs]
        return [Taken("null", "1", 2, 1, 1, 1, ((t,),) * rounds, 1, rounds) for t in times], {"other_cores": 0.0}

    def open(self, artifact: Artifact, threads: int = 1, runtime: str | None = None) -> Runtime:
        """In this process."""
        return open_runtime(artifact, threads, runtime)

    def close(self) -> None:
        """Nothing to leave."""
