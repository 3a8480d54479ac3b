"""An Android phone over adb, with a python3 on it: Termux's, say."""

from __future__ import annotations

import os
import re
import shlex

from edgepress.compress.errors import DeviceError

from .link import BOOT, Piped

__all__ = ["adb"]

_TERMUX = "/data/data/com.termux/files/usr"


def adb(serial: str) -> Piped:
    """A phone by the serial number that ``adb devices`` shows.

    The python3 of the shell's path is used, or Termux's through ``run-as``. The environment variable ``EDGEPRESS_ADB`` replaces
    the program.

    Raises:
        DeviceError: the serial number makes no sense.

    Example:
        >>> adb("emulator-5554").name
        'adb://emulator-5554'
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.:-]*", serial):
        raise DeviceError(f"'adb://{serial}' is no serial number: take one that `adb devices` shows.")
    boot = shlex.quote(BOOT)
    path = f"export PATH={_TERMUX}/bin:$PATH LD_LIBRARY_PATH={_TERMUX}/lib TMPDIR={_TERMUX}/tmp HOME={_TERMUX}/../home"
    script = (
        f"if command -v python3 >/dev/null; then export TMPDIR=${{TMPDIR:-/data/local/tmp}}; exec python3 -c {boot}; "
        f"else exec run-as com.termux sh -c {shlex.quote(f'{path}; exec python3 -c {boot}')}; fi"
    )
    command = [*shlex.split(os.environ.get("EDGEPRESS_ADB", "adb")), "-s", serial, "shell", "-T", script]
    name = f"adb://{serial}"
    return Piped(name, command, lambda code, text: _explain(code, text, name))


def _explain(code: int, text: str, name: str) -> str:
    last = (text.splitlines() or ["it said nothing"])[-1].strip()
    if "unauthorized" in text:
        return f"{name} has not allowed this computer: unlock the phone and accept its question, then try again."
    if "not found" in text and "device" in text:
        return f"{name} cannot be reached: adb does not see it. `adb devices` lists what it sees."
    if "offline" in text:
        return f"{name} is offline: plug it in again."
    if "run-as" in text or "python3" in text or code == 127:
        return f"There is no python3 on {name} that adb may run: install Termux with its python and numpy packages."
    return f"The connection to {name} was lost (exit code {code}): {last}."
