"""What a device is and what it is doing: CPU, memory, sensors, versions, load."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import sys
import time
from pathlib import Path

__all__ = [
    "Energy",
    "busy_s",
    "celsius",
    "emulated",
    "environment",
    "high_water",
    "memory_bytes",
    "mhz",
    "readings",
    "version_of",
]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_PACKAGES = ("edgepress", "onnxruntime", "onnxruntime-gpu", "ai-edge-litert", "tflite-runtime", "tensorflow", "torch", "numpy",
             "onnx", "litert-torch", "ai-edge-quantizer")  # fmt: skip
_SYS = Path("/sys")
_FEATURES = (
    # what decides which kernels a runtime picks: x86 first, then Arm
    "sse4_1", "avx", "avx2", "fma", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_int8", "amx_bf16", "neon", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2",
)  # fmt: skip


def environment() -> dict[str, Any]:
    """What a timing depends on: CPU, cores, instruction sets, governor, load, sensors, versions. No names of host or user.

    Returns:
        Plain values, ready for JSON; None where the system does not say.

    Example:
        >>> environment()["cores"] >= 1
        True
    """
    import platform

    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    versions = {name: version_of(name) for name in _PACKAGES}
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_features": [name for name in _FEATURES if name in flags],
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "virtual_machine": "hypervisor" in flags if _cpuinfo("flags") else None,
        "emulated": emulated(),
        "memory_bytes": memory_bytes(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: version for name, version in versions.items() if version != "unknown"},
        "timer_resolution_ns": min((b - a for a, b in readings(time.perf_counter_ns) if b > a), default=1),
        "celsius": celsius(),
        "mhz": mhz(),
        "power_sensor": Energy().source,
    }


def emulated() -> str | None:
    """Why this machine is taken for an emulated one; None for a real one. An emulated machine's time means nothing.

    What is said in ``/proc/cpuinfo`` may be made up. Emulators hide themselves in ``/proc/self``, not in ``/proc/thread-self``,
    and have one system call less than any kernel.
    """
    import platform

    with contextlib.suppress(OSError, ValueError, AttributeError):
        if json.loads(Path("/board/board.json").read_text(encoding="utf-8")).get("emulated"):
            return "board.json says so"
    with contextlib.suppress(OSError):
        if "qemu" in os.path.basename(os.readlink("/proc/thread-self/exe")):
            return "qemu runs this process"
        if len({_elf_machine("/proc/thread-self/exe"), _elf_machine(sys.executable)} - {None}) > 1:
            return "a program for another processor runs this process"
    if _lacks_robust_lists():
        return "it lacks a system call that every Linux has"
    if platform.machine() == "aarch64" and _read("/proc/cpuinfo") and not _cpuinfo("CPU implementer"):
        return "its /proc/cpuinfo is not an Arm CPU's"
    return None


def _elf_machine(path: str) -> bytes | None:
    """Which processor a program is for; None where the file is none."""
    with open(path, "rb") as file:
        start = file.read(20)
    return start[18:] if start.startswith(b"\x7fELF") else None


def _lacks_robust_lists() -> bool:
    """User-mode emulators cannot offer get_robust_list: the kernel would read the guest's list as the host's."""
    import platform

    wide = {"x86_64": 274, "aarch64": 100, "riscv64": 100}  # linux/arch/*/include
    narrow = {"i686": 312, "x86_64": 312, "armv7l": 339, "armv8l": 339, "aarch64": 339}
    number = (wide if sys.maxsize > 1 << 32 else narrow).get(platform.machine())
    if number is None or not sys.platform.startswith("linux") or hasattr(sys, "getandroidapilevel"):
        return False  # Android ends a program that makes an unusual call
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes

        call, head, size = ctypes.CDLL(None, use_errno=True).syscall, ctypes.c_void_p(), ctypes.c_size_t()
        refused = call(ctypes.c_long(number), ctypes.c_long(0), ctypes.byref(head), ctypes.byref(size))
        return refused == -1 and ctypes.get_errno() == errno.ENOSYS
    return False


def celsius() -> float | None:
    """The hottest thermal zone."""
    return max(_numbers(_SYS / "class/thermal", "thermal_zone*/temp", 1e-3), default=None)


def mhz() -> float | None:
    """The fastest core's clock just now."""
    return max(_numbers(_SYS / "devices/system/cpu", "cpu[0-9]*/cpufreq/scaling_cur_freq", 1e-3), default=None)


class Energy:
    """Joules drawn so far, from the first sensor that can be read; None where there is none.

    Intel and AMD count energy themselves (RAPL, whole package). Where there is only a power sensor (hwmon, INA chips on Jetson
    boards, a battery) its reading times the time since the last one is added up.

    Attributes:
        source: which sensor; None where there is none.
    """

    def __init__(self) -> None:
        self.total, self.at = 0.0, time.monotonic()
        self.source, self.factors, self.unit = _sensor()
        self.last = self._raw()

    def _raw(self) -> float | None:
        values = [_number(file) for file in self.factors]
        return None if not values or None in values else math.prod(v for v in values if v is not None) * self.unit

    def joules(self) -> float | None:
        """Joules since this object was made."""
        raw, now = self._raw(), time.monotonic()
        if raw is None or self.last is None:
            return None
        if self.source == "RAPL":
            span = (_number(self.factors[0].parent / "max_energy_range_uj") or 0) * self.unit
            self.total += raw - self.last if raw >= self.last else raw - self.last + span
        else:
            self.total += (raw + self.last) / 2 * (now - self.at)
        self.last, self.at = raw, now
        return self.total


def busy_s() -> tuple[float, float] | None:
    """CPU seconds that other processes used so far, over all cores, and those that a hypervisor took away."""
    try:
        ticks = [int(x) for x in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = ticks[3] + ticks[4]
    if not idle:  # some sandboxes show a file of zeros
        return None
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - idle) / tick - time.process_time(), ticks[7] / tick


def _sensor() -> tuple[str | None, list[Path], float]:
    """The best sensor: its name, the files whose product is its reading, and that in joules or watts."""
    for source, folder, patterns, unit in (
        ("RAPL", "class/powercap", ("*-rapl:[0-9]/energy_uj",), 1e-6),
        ("hwmon", "class/hwmon", ("hwmon*/power1_input",), 1e-6),
        ("INA", "bus/i2c/drivers/ina3221", ("*/hwmon/hwmon*/in1_input", "*/hwmon/hwmon*/curr1_input"), 1e-6),  # mV times mA
        ("battery", "class/power_supply", ("*/power_now",), 1e-6),
    ):
        files = [next((f for f in sorted((_SYS / folder).glob(p)) if _number(f) is not None), None) for p in patterns]
        if None not in files:
            return source, [f for f in files if f is not None], unit
    return None, [], 0.0


def _numbers(folder: Path, pattern: str, unit: float) -> list[float]:
    return [value * unit for file in folder.glob(pattern) if (value := _number(file)) is not None]


def _number(path: str | Path) -> int | None:
    text = _read(path) or ""
    return int(text) if text.lstrip("-").isdigit() else None


def _cpu_model() -> str:
    """The CPU's marketing name, or the board's where the CPU has none (Arm)."""
    import platform

    board = (_read("/proc/device-tree/model") or "").strip("\0")
    name = _cpuinfo("model name") or _cpuinfo("Model") or _cpuinfo("Hardware") or board
    return name or platform.processor() or platform.machine() or "unknown"


def _cpuinfo(key: str) -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def memory_bytes() -> int | None:
    """Physical memory; None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def high_water() -> int:
    """The most memory that this process has held, in bytes.

    ``ru_maxrss`` is the second choice: on Linux a child starts with its parent's figure.
    """
    for line in (_read("/proc/self/status") or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    import resource  # not on every system

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def readings(clock: Callable[[], int]) -> list[tuple[int, int]]:
    """Neighbouring readings of a clock: its smallest step is its precision."""
    times = [clock() for _ in range(500)]
    return list(zip(times, times[1:]))


def version_of(distribution: str) -> str:
    """Of an installed distribution; ``'unknown'`` where there is none."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(distribution)
    return "unknown"
