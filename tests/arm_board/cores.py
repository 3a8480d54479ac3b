"""Write, for each Arm core, the folder that its programs see as their root: the board's files, and that core's /proc and /sys.

Runtimes choose their kernels by /proc/cpuinfo and /sys/devices/system/cpu as well as by what the kernel tells every process.
"""

import json
import sys
from pathlib import Path

V7 = "half thumb fastmult vfp edsp neon vfpv3 tls vfpv4 idiva idivt vfpd32 lpae"
V8_0 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
V8_2 = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
ARM = 0x41
CORES = {
    # implementer, part, variant, revision (Arm's technical reference manuals, MIDR_EL1); features; data cache, second cache; kHz
    "cortex-a7": (ARM, 0xC07, 0, 5, V7, "32K", "512K", 900_000),
    "cortex-a53": (ARM, 0xD03, 0, 4, V8_0, "32K", "512K", 1_200_000),
    "cortex-a72": (ARM, 0xD08, 0, 3, V8_0, "32K", "1024K", 1_500_000),
    "cortex-a76": (ARM, 0xD0B, 4, 1, V8_2, "64K", "512K", 2_400_000),
    "neoverse-n1": (ARM, 0xD0C, 3, 1, V8_2, "64K", "1024K", 2_600_000),
    "max": (0, 0x051, 0, 0, V8_2 + " sve sve2 bf16 i8mm", "64K", "1024K", 2_000_000),
}
SHARED = ("bin", "etc", "lib", "sbin", "usr")
HIDDEN = ("thermal", "powercap", "hwmon", "power_supply")  # sensors of the computer below


def make(board: Path, core: str) -> None:
    """Make ``board/roots/<core>``: a board with one core."""
    root = board / "roots" / core
    for name in SHARED:
        root.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(Path("../../rootfs32" if core == "cortex-a7" else "../../rootfs") / name)
    for name in HIDDEN:
        (root / "sys/class" / name).mkdir(parents=True, exist_ok=True)
    for path, text in described(core).items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")


def described(core: str) -> dict[str, str]:
    """The files by which a Linux kernel describes a machine with one such core."""
    implementer, part, variant, revision, features, data, second, khz = CORES[core]
    cpuinfo = (
        f"processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: {features}\nCPU implementer\t: {implementer:#04x}\n"
        f"CPU architecture: {7 if features == V7 else 8}\nCPU variant\t: {variant:#x}\nCPU part\t: {part:#05x}\n"
        f"CPU revision\t: {revision}\n"
    )
    midr = implementer << 24 | variant << 20 | 0xF << 16 | part << 4 | revision
    one = {
        "regs/identification/midr_el1": f"0x{midr:016x}",
        "cpufreq/cpuinfo_max_freq": str(khz), "cpufreq/cpuinfo_min_freq": "600000", "cpufreq/scaling_cur_freq": "",
        "topology/physical_package_id": "0", "topology/core_id": "0", "topology/core_siblings_list": "0",
        "topology/cluster_cpus_list": "0", "topology/package_cpus_list": "0", "topology/thread_siblings_list": "0",
    }  # fmt: skip
    for i, (level, kind, size) in enumerate(((1, "Data", data), (1, "Instruction", data), (2, "Unified", second))):
        cache = {"level": level, "type": kind, "size": size, "shared_cpu_list": 0, "coherency_line_size": 64}
        one |= {f"cache/index{i}/{name}": str(value) for name, value in cache.items()}
    every = {"possible": "0", "present": "0", "online": "0", "kernel_max": "255"}
    return {
        "proc/cpuinfo": cpuinfo,
        "proc/device-tree/model": f"emulated {core}",
        "board/board.json": json.dumps({"emulated": True, "emulator": "qemu-user", "core": core}),
        **{f"sys/devices/system/cpu/{name}": text for name, text in every.items()},
        **{f"sys/devices/system/cpu/cpu0/{name}": text for name, text in one.items()},
    }


if __name__ == "__main__":
    for name in CORES:
        make(Path(sys.argv[1]), name)
