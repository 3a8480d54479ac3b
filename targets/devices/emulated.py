"""An emulated Arm board: a folder with a root file system and qemu's user-mode emulator, made by ``tests/arm_board/board.sh``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from edgepress.compress.cache import cache_folder
from edgepress.compress.errors import DeviceError

from .link import BOOT, Piped

__all__ = ["CORES", "board_command", "board_folder", "emulated"]

CORES = ("cortex-a7", "cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "max")
"""The cores that the board can present; ``max`` has all that the emulator knows (i8mm, bf16, SVE).

``cortex-a7`` is a 32-bit one."""

_NARROW = ("cortex-a7",)
_CPU = {"max": "max,sme=off"}  # with SME, LiteRT's int8 results are wrong in qemu 7.2


def emulated(core: str) -> Piped:
    """A board with one such core. It says whether files run and what they answer, never how long they take.

    ``EDGEPRESS_BOARD`` names the board's folder; it is ``edgepress/board`` in the user's cache folder otherwise.

    Raises:
        DeviceError: there is no such core, or no board has been made.

    Example:
        >>> try:
        ...     emulated("pentium")
        ... except DeviceError as error:
        ...     print(error)
        There is no emulated 'pentium'; known: cortex-a7, cortex-a53, cortex-a72, cortex-a76, neoverse-n1, max.
    """
    name = f"emulated://{core}"
    return Piped(name, board_command(core, ["-c", BOOT]), lambda code, text: _explain(code, text, name))


def board_command(core: str, arguments: Sequence[str], plugin: str | None = None) -> list[str]:
    """The command that runs the board's python3 on this computer's files.

    Args:
        core: one of `CORES`.
        arguments: of python3.
        plugin: of the emulator: a library and its options.

    Raises:
        DeviceError: there is no such core, or no board has been made.
    """
    if core not in CORES:
        raise DeviceError(f"There is no emulated '{core}'; known: {', '.join(CORES)}.")
    board = board_folder()
    root, below = board / "roots" / core, board / "rootfs"
    made, setup, emulator = ("made32", "setup32", "qemu-arm") if core in _NARROW else ("made", "setup", "qemu-aarch64")
    if not (board / made).is_file():
        raise DeviceError(
            f"There is no emulated {core} in {board}: make one with tests/arm_board/board.sh {setup}, from edgepress's sources, "
            "or name the board's folder in EDGEPRESS_BOARD."
        )
    # the emulator is a program for this computer; its own libraries lie beside the board's
    libraries = below / "lib" / "x86_64-linux-gnu"
    environment = ["PYTHONHASHSEED=0", f"PYTHONPYCACHEPREFIX={below / 'pycache'}", "OPENBLAS_NUM_THREADS=1"]
    return [
        *("env", "-u", "PYTHONPATH", "-u", "PYTHONHOME", "-u", "LD_PRELOAD", "-u", "LD_LIBRARY_PATH", *environment),
        *(str(libraries / "ld-linux-x86-64.so.2"), "--library-path", f"{libraries}:{below / 'usr/lib/x86_64-linux-gnu'}"),
        *(str(below / "board" / emulator), "-cpu", _CPU.get(core, core), "-L", str(root)),
        *(("-plugin", plugin) if plugin else ()),
        *(str(root / "usr" / "bin" / "python3.11"), "-s", *arguments),
    ]


def board_folder() -> Path:
    """Where the board is, or would be."""
    named = os.environ.get("EDGEPRESS_BOARD")
    return (Path(named) if named else cache_folder() / "board").absolute()


def _explain(code: int, text: str, name: str) -> str:
    last = (text.splitlines() or ["it said nothing"])[-1].strip()
    return f"{name} does not run (exit code {code}): {last}."
