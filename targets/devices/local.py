"""The computer that edgepress runs on."""

from __future__ import annotations

import sys

from ..artifact import Artifact
from ..runtimes import Runtime, open_runtime
from .link import BOOT, Piped

__all__ = ["Local"]


class Local(Piped):
    """This computer's CPU; files are measured in processes of their own.

    Example:
        >>> Local().name
        'local'
    """

    def __init__(self) -> None:
        super().__init__("local", [sys.executable, "-c", BOOT], _explain)

    def open(self, artifact: Artifact, threads: int = 1, runtime: str | None = None) -> Runtime:  # type: ignore[override]
        """Load a file in this process; errors as in `open_runtime`."""
        return open_runtime(artifact, threads, runtime)


def _explain(code: int, text: str) -> str:
    last = (text.splitlines() or ["it said nothing"])[-1]
    return f"The process that runs the files was ended (exit code {code}): {last}."
