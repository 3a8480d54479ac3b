"""Devices by name: this computer, its NVIDIA GPU, a board over SSH, a phone over adb, an emulated board."""

from __future__ import annotations

from edgepress.compress.errors import DeviceError

from .adb import adb
from .base import Device, Failed, Job, Outcome, Taken
from .cuda import cuda
from .emulated import emulated
from .local import Local
from .ssh import ssh

__all__ = ["KINDS", "Device", "Failed", "Job", "Outcome", "Taken", "find_device"]

KINDS = {
    "local": "this computer",
    "cuda": "an NVIDIA GPU of this computer; cuda:1 is the second",
    "ssh://user@host:port": "a board that ssh reaches without a question; ?python=venv/bin/python names its interpreter",
    "adb://serial": "an Android phone with a python3, such as Termux's",
    "emulated://cortex-a76": "an emulated Arm board: correctness and instruction counts, never a time",
}
"""How devices are named, and what each is."""


def find_device(device: str | Device) -> Device:
    """The device of that name; a `Device` is returned as it is. Nothing is contacted yet.

    Raises:
        DeviceError: there is no such kind of device, or the name makes no sense.

    Example:
        >>> find_device("local").name
        'local'
        >>> find_device("ssh://pi@board:2222").name
        'ssh://pi@board:2222'
    """
    if not isinstance(device, str):
        return device
    if device == "local":
        return Local()
    if device.partition(":")[0] == "cuda":
        return cuda(device)
    kind, separator, rest = device.partition("://")
    kinds = {"ssh": ssh, "adb": adb, "emulated": emulated}
    if not separator or kind not in kinds:
        raise DeviceError(f"There is no device '{device}'; devices are named {', '.join(KINDS)}.")
    return kinds[kind](rest)
