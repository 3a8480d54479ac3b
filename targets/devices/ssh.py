"""A board over SSH: the system's own ``ssh`` program, with the user's keys, configuration and known hosts."""

from __future__ import annotations

import os
import re
import shlex
from urllib.parse import parse_qsl

from edgepress.compress.errors import DeviceError

from .link import BOOT, Piped

__all__ = ["ssh"]

_OPTIONS = (
    "BatchMode=yes", "StrictHostKeyChecking=yes", "ConnectTimeout=10", "ConnectionAttempts=3", "ServerAliveInterval=5",
    "ServerAliveCountMax=3", "ClearAllForwardings=yes", "PermitLocalCommand=no", "RequestTTY=no",
)  # fmt: skip
_PLACE = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][\w.-]*)@)?(?P<host>[A-Za-z0-9_][\w.-]*|\[[0-9a-fA-F:.]+\])(?::(?P<port>[0-9]{1,5}))?"
)


def ssh(address: str) -> Piped:
    """A board at ``user@host:port``, also as ``~/.ssh/config`` calls it.

    ``?python=venv/bin/python`` names the interpreter there, seen from the login folder; it is the path's ``python3`` otherwise.
    The environment variable ``EDGEPRESS_SSH`` replaces the program, with options: ``ssh -F other_config``.

    Raises:
        DeviceError: the address makes no sense.

    Example:
        >>> ssh("pi@board?python=venv/bin/python").name
        'ssh://pi@board'
        >>> ssh("-oProxyCommand=x")
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.DeviceError: 'ssh://-oProxyCommand=x' is no address: write ssh://user@host or ssh://user@host:port.
    """
    place, _, query = address.partition("?")
    found = _PLACE.fullmatch(place)
    options = dict(parse_qsl(query))
    if found is None or options.keys() - {"python"}:
        raise DeviceError(f"'ssh://{address}' is no address: write ssh://user@host or ssh://user@host:port.")
    command = [*shlex.split(os.environ.get("EDGEPRESS_SSH", "ssh")), "-T"]
    for option in _OPTIONS:
        command += ["-o", option]
    if found["port"]:
        command += ["-p", found["port"]]
    if found["user"]:
        command += ["-l", found["user"]]
    host = found["host"].strip("[]")
    python = options.get("python", "python3")
    # the one text that a shell on the board sees: a constant, and the interpreter's path, both quoted
    command += ["--", host, f"exec {shlex.quote(python)} -c {shlex.quote(BOOT)}"]
    name = f"ssh://{place}"
    return Piped(name, command, lambda code, text: _explain(code, text, name, python))


def _explain(code: int, text: str, name: str, python: str) -> str:
    last = (text.splitlines() or ["it said nothing"])[-1].strip()
    if "HOST IDENTIFICATION HAS CHANGED" in text:
        return (
            f"The host key of {name} has changed since the last connection: another machine may be answering in its place. "
            "If the board was set up anew, remove its old key with ssh-keygen -R, then connect once with ssh."
        )
    if "Host key verification failed" in text:
        return f"The host key of {name} is not known here: connect once with ssh, compare the key and accept it."
    if "Permission denied" in text or "Too many authentication failures" in text:
        return f"{name} refuses the login: no key of yours is accepted there. Copy one with ssh-copy-id, then try again."
    if code == 255 and re.search("resolve|refused|timed out|route|unreachable|Connection closed by", text):
        return f"{name} cannot be reached: {last}."
    if code == 127 or code == 126:
        return f"There is no {python} on {name}: install Python 3.9 or later, or name it with ?python=PATH."
    if "Error" in last:
        return f"{python} on {name} cannot run the agent: {last}."
    return f"The connection to {name} was lost (exit code {code}): {last}."
