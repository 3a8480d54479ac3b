"""Instructions that an emulated Arm core executes for one inference: exact, repeatable, and no time."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import DeviceError

from .. import agent
from ..artifact import Artifact
from ..runtimes import check_feeds, random_feeds
from .base import Job
from .emulated import board_command, board_folder, emulated

__all__ = ["CLASSES", "InstructionCount", "count_instructions"]

CLASSES = {
    "dot_i8": "four int8 products summed into each int32 lane (SDOT, UDOT, USDOT)",
    "mmla_i8": "int8 matrix products (SMMLA, UMMLA, USMMLA)",
    "fmla_f32": "fused multiply-add of floats in vectors (FMLA)",
    "fmla_f16": "the same of half floats",
    "bf16": "products of bfloat16 (BFDOT, BFMMLA)",
    "mul_long": "products into lanes twice as wide (SMULL, SMLAL)",
    "add_long": "neighbours added into lanes twice as wide (SADALP)",
    "sve": "scalable vectors",
    "sme": "matrix tiles",
    "simd_other": "all else of vectors and floating point",
    "load_store": "memory",
    "branch_system": "branches, calls, system",
    "integer": "integers and addresses",
    "other": "none of these",
}
"""Classes of instructions, in the order in which the plugin tries them."""

_MOST_SPREAD = 0.005
_RUN = "import sys; sys.path.append(sys.argv[1]); from agent import marks; marks.main(*sys.argv[2:5], int(sys.argv[5]))"


@dataclass(frozen=True)
class InstructionCount:
    """How many instructions one inference takes. There is no field for a time: an emulator has none to give.

    Args:
        artifact: the file.
        core: that the emulator presented.
        runtime: that ran it.
        version: of the runtime.
        per_inference: instructions of one run with one thread, the call from Python included; the mean over the repeats.
        by_class: the same by class, see `CLASSES`; classes that did not occur are left out.
        repeats: processes that were counted.
        spread: largest less smallest count of the repeats, as a share of the mean.
    """

    artifact: Artifact
    core: str
    runtime: str
    version: str
    per_inference: int
    by_class: Mapping[str, int] = field(hash=False)
    repeats: int
    spread: float


def count_instructions(
    artifact: Artifact,
    core: str,
    runtime: str | None = None,
    feeds: Sequence[np.ndarray] | None = None,
    repeats: int = 2,
    runs: int = 4,
    timeout_s: float = 300.0,
) -> InstructionCount:
    """Count the instructions of one inference on an emulated core.

    A process on the board runs the file N times between two marks and then 2N times. The difference is N runs: what the start,
    the loading and the marks take cancels.

    Args:
        artifact: the file.
        core: one of `edgepress.targets.devices.emulated.CORES`.
        runtime: see `edgepress.open_runtime`.
        feeds: its inputs, in the file's own layout and types; random ones where None.
        repeats: processes that each count anew.
        runs: N.
        timeout_s: for each of them.

    Raises:
        DeviceError: there is no such core or no board, or the repeats differ by more than 0.5 %.
        FileError: the runtime refuses the file, or its inputs do not fit.

    Example:
        >>> "per_inference" in InstructionCount.__annotations__, any("_ns" in name for name in InstructionCount.__annotations__)
        (True, False)
    """
    if core == "cortex-a7":
        raise DeviceError("Instructions are counted on 64-bit cores only: cortex-a53 is the nearest to a cortex-a7.")
    feeds = random_feeds(artifact) if feeds is None else feeds
    check_feeds(artifact, feeds)
    with tempfile.TemporaryDirectory(prefix="edgepress-count-") as folder:
        inputs, marks = Path(folder, "feeds.npz"), Path(folder, "marks")
        np.savez(inputs, *feeds)
        plugin = f"{board_folder() / 'rootfs/board/instructions.so'},out={marks}"
        arguments = [str(artifact.path.absolute()), runtime or "", str(inputs), str(runs)]
        command = board_command(core, ["-c", _RUN, str(Path(agent.__file__).parents[1]), *arguments], plugin)
        counted = []
        for _ in range(repeats):
            said = _run(command, Job(artifact, feeds, runtime), core, timeout_s)
            counted.append(_difference(marks, runs, artifact))
    totals = [sum(classes.values()) for classes in counted]
    mean = sum(totals) / repeats
    spread = (max(totals) - min(totals)) / mean
    if spread > _MOST_SPREAD:
        raise DeviceError(
            f"{artifact.path.name} takes {min(totals):,} instructions on an emulated {core} in one process and {max(totals):,} "
            "in another: its work depends on chance, so one count means nothing."
        )
    by_class = {name: round(sum(classes[name] for classes in counted) / repeats) for name in CLASSES}
    occurring = {name: count for name, count in by_class.items() if count}
    return InstructionCount(artifact, core, said["name"], said["version"], round(mean), occurring, repeats, spread)


def _run(command: list[str], job: Job, core: str, timeout_s: float) -> dict[str, str]:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{job.artifact.path.name} did not finish in {timeout_s:.0f} s on an emulated {core}.") from error
    if done.returncode:
        _explain(job, core)
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(f"{job.artifact.path.name} cannot be counted on an emulated {core}: {last}.")
    said: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return said


def _explain(job: Job, core: str) -> None:
    """Let the agent say what is wrong with a file."""
    device = emulated(core)
    try:
        outcome = device.check(job)
    finally:
        device.close()
    error = getattr(outcome, "error", None)
    if error is not None:
        raise error


def _difference(marks: Path, runs: int, artifact: Artifact) -> dict[str, float]:
    """Instructions of one run by class: 2N runs less N runs, over N."""
    lines: list[dict[str, Any]] = [json.loads(line) for line in marks.read_text().splitlines()]
    os.unlink(marks)
    if [line["mark"] for line in lines] != [0, 1, 2, 3]:
        raise DeviceError(f"{artifact.path.name} was not counted: the emulator's plugin did not see its marks.")
    first, second, third, fourth = (line["classes"] for line in lines)
    return {name: ((fourth[name] - third[name]) - (second[name] - first[name])) / runs for name in CLASSES}
