"""The computer that edgepress runs on, as a device: what it is, how busy it is, what a file costs it in memory."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress import errors
from edgepress.compress.errors import DeviceError, FileError, UserError

from .artifact import Artifact, Port
from .runtimes import Runtime, open_runtime, random_feeds

__all__ = ["Local", "Memory", "environment", "peak_memory"]

_PACKAGES = ("edgepress", "onnxruntime", "ai-edge-litert", "torch", "numpy", "onnx", "litert-torch", "ai-edge-quantizer", "nncf")
_FEATURES = (
    # what decides which kernels a runtime picks: x86 first, then Arm
    "sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip
_CHILD = "from edgepress.targets.local import _child; _child()"


@dataclasses.dataclass(frozen=True)
class Memory:
    """Peak resident memory of a process of its own, in bytes.

    Args:
        peak_bytes: after the file was loaded and run; interpreter, numpy and runtime library included.
        idle_bytes: the same process's peak before it imported the runtime and loaded the file.
    """

    peak_bytes: int
    idle_bytes: int


class Local:
    """This computer's CPU.

    Example:
        >>> Local().name
        'local'
    """

    name = "local"

    def environment(self) -> dict[str, Any]:
        """See `environment`."""
        return environment()

    def open(self, artifact: Artifact, threads: int) -> Runtime:
        """Load a file; errors as in `open_runtime`."""
        return open_runtime(artifact, threads)

    def peak_memory(self, artifact: Artifact, threads: int, feeds: Sequence[np.ndarray] | None, timeout_s: float) -> Memory:
        """See `peak_memory`."""
        return peak_memory(artifact, threads, feeds, timeout_s=timeout_s)

    def busy_s(self) -> float | None:
        """CPU seconds that other processes have used so far, over all cores; None where the system does not say."""
        try:
            ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        idle = ticks[3] + ticks[4]
        if not idle:  # some sandboxes show a file of zeros
            return None
        return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK") - time.process_time()


def environment() -> dict[str, Any]:
    """What a timing depends on: CPU, cores, instruction sets, governor, load, system, versions. No names of host or user.

    Returns:
        Plain values, ready for JSON; None where the system does not say.

    Example:
        >>> environment()["cores"] >= 1
        True
    """
    return {
        "device": "local",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": _cpu_features(),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual_machine": "hypervisor" in _cpuinfo("flags").split() if _cpuinfo("flags") else None,
        "memory_bytes": _memory_bytes(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": _versions(),
        "timer_resolution_ns": timer_resolution_ns(),
    }


def timer_resolution_ns() -> int:
    """The smallest step seen between two readings of the clock, its own cost included, in nanoseconds."""
    readings = [time.perf_counter_ns() for _ in range(2000)]
    steps = [b - a for a, b in itertools.pairwise(readings) if b > a]
    return min(steps, default=1)


def _cpu_model() -> str:
    """The CPU's marketing name, or the board's where the CPU has none (Arm)."""
    board = _read("/proc/device-tree/model")
    name = _cpuinfo("model name") or _cpuinfo("Model") or _cpuinfo("Hardware") or (board or "").strip("\0")
    return name or platform.processor() or platform.machine() or "unknown"


def _cpu_features() -> list[str]:
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [name for name in _FEATURES if name in flags]


def _cpuinfo(key: str) -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


# ---- memory, in a process of its own


def peak_memory(
    artifact: Artifact,
    threads: int = 1,
    feeds: Sequence[np.ndarray] | None = None,
    *,
    runs: int = 3,
    timeout_s: float = 120.0,
) -> Memory:
    """Load and run a file in a fresh process and read the most memory that it held.

    It also shows whether the file can be run at all: one that crashes its runtime takes only the child with it.

    Args:
        artifact: the file.
        threads: of the runtime.
        feeds: inputs in the file's own layout; random ones where None.
        runs: how often it is run.
        timeout_s: after which it is given up.

    Raises:
        FileError: the runtime refuses the file or crashes on it.
        DeviceError: the runtime is not installed, or there was no answer in time.
    """
    with tempfile.TemporaryDirectory(prefix="edgepress-") as folder:
        request: dict[str, Any] = {"artifact": dataclasses.asdict(artifact), "threads": threads, "runs": runs, "feeds": None}
        if feeds is not None:
            request["feeds"] = os.path.join(folder, "feeds.npz")
            np.savez(request["feeds"], *feeds)
        # the parent's working folder is kept off the child's path (-P): a user's folder may hold an `edgepress` or a `numpy`
        command = [sys.executable, "-P", "-c", _CHILD]
        try:
            done = subprocess.run(command, input=json.dumps(request, default=str), capture_output=True, text=True,
                                  errors="replace", timeout=timeout_s, check=False)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeviceError(
                f"{artifact.path.name} did not finish {runs} runs in {timeout_s:.0f} s in a process of its own: it hangs, or "
                "this machine is too slow for it."
            ) from error
        except OSError as error:
            raise DeviceError(f"Cannot start a process to measure memory in: {error.strerror or error}.") from error
    return _answer(artifact, done)


def _answer(artifact: Artifact, done: subprocess.CompletedProcess[str]) -> Memory:
    if done.returncode < 0:
        raise FileError(f"{artifact.path} cannot be measured: {_death(-done.returncode)} while it was loaded and run.")
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError) as error:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise DeviceError(f"The process that loads {artifact.path.name} failed (exit code {done.returncode}): {last}.") from error
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return Memory(peak_bytes=answer["peak_bytes"], idle_bytes=answer["idle_bytes"])


def _death(number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if name == "SIGKILL":
        return "something, perhaps a want of memory, killed the process (SIGKILL)"
    return f"the runtime crashed ({name})"


def _child() -> None:
    """Serve one request from stdin and answer on stdout."""
    request = json.load(sys.stdin)
    idle = _high_water()
    try:
        _load_and_run(request)
        answer: dict[str, Any] = {"idle_bytes": idle, "peak_bytes": _high_water()}
    except UserError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)


def _load_and_run(request: dict[str, Any]) -> None:
    # the parent has parsed the file already; parsing it here would bring in a library that no deployment needs
    artifact = _artifact(request["artifact"])
    if request["feeds"] is None:
        feeds = random_feeds(artifact)
    else:
        with np.load(request["feeds"], allow_pickle=False) as archive:
            feeds = [archive[name] for name in archive.files]
    runtime = open_runtime(artifact, request["threads"])
    for _ in range(request["runs"]):
        runtime.run(feeds)


def _artifact(fields: dict[str, Any]) -> Artifact:
    def ports(key: str) -> tuple[Port, ...]:
        return tuple(Port(**{**port, "shape": tuple(port["shape"])}) for port in fields[key])

    return Artifact(**{**fields, "path": Path(fields["path"]), "inputs": ports("inputs"), "outputs": ports("outputs")})


def _high_water() -> int:
    """The most memory that this process has held, in bytes.

    ``ru_maxrss`` is the second choice: on Linux a child starts with its parent's figure.
    """
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on every system

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
