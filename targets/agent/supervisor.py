"""The process that owns the pipe and the folder, imports nothing heavy, and forks workers."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from .frames import GREETING, Failure, receive, send
from .machine import emulated, environment
from .worker import work

__all__ = ["FILE_NAME", "serve"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_HEARTBEAT_S = 2.0

FILE_NAME = r"(?:[A-Za-z0-9_][A-Za-z0-9_ .+-]{0,120}/){0,3}[A-Za-z0-9_][A-Za-z0-9_ .+-]{0,120}"
"""What a file may be called here: plain letters, in at most three folders, none of them hidden, so never ``..``."""


def serve() -> None:
    """Serve the host on standard input and output until it goes away."""
    requests, replies = os.dup(0), os.dup(1)
    os.dup2(2, 1)  # libraries that print must not end up in the frames
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to us too; the host decides
    _sweep()
    folder = tempfile.mkdtemp(prefix="edgepress-")
    with open(os.path.join(folder, "pid"), "w") as file:
        file.write(str(os.getpid()))
    workers: dict[int, tuple[int, int, int]] = {}
    state: dict[str, Any] = {"lock": None}
    try:
        os.write(replies, GREETING)
        while True:
            frame = receive(requests)
            if frame is None:
                return
            try:
                answer, blob = _handle(*frame, folder, workers, state, requests, replies)
            except Failure as failure:
                answer, blob = failure.fields, b""
            send(replies, answer, blob=blob)
    except (BrokenPipeError, ConnectionResetError):
        return  # the host is gone
    finally:
        for worker in list(workers):
            _stop(workers, worker)
        shutil.rmtree(folder, ignore_errors=True)


def _handle(
    header: dict[str, Any], blob: bytes, folder: str, workers: dict[int, tuple[int, int, int]],
    state: dict[str, Any], requests: int, replies: int,
) -> tuple[dict[str, Any], bytes]:  # fmt: skip
    do = header["do"]
    if do == "hello":
        return {"environment": environment()}, b""
    if do == "put":
        _put(folder, header["file"], blob)
        return {"ok": True}, b""
    if do == "lock":
        if why := emulated():  # whoever holds a device is about to take times
            raise Failure("emulated", why)
        state["lock"] = state["lock"] or _lock()
        return {"ok": True}, b""
    if do == "unlock":
        if state["lock"] is not None:
            os.close(state["lock"])
            state["lock"] = None
        return {"ok": True}, b""
    worker = header["worker"]
    if do == "stop":
        _stop(workers, worker)
        return {"ok": True}, b""
    if header["do"] == "measure" and (why := emulated()):
        raise Failure("emulated", why)
    if worker not in workers:
        workers[worker] = _fork(folder, [requests, replies, *(fd for w in workers.values() for fd in w[1:])], state)
    return _ask(header, blob, workers, worker, requests, replies)


def _put(folder: str, name: str, blob: bytes) -> None:
    """Append to one of an artifact's files, each artifact having a folder of its own, which a failure takes away."""
    number, _, inside = name.partition("/")
    if not re.fullmatch("[0-9]{1,9}", number) or not re.fullmatch(FILE_NAME, inside):
        raise Failure("name", name)
    path = os.path.join(folder, number, inside)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "ab") as file:
            file.write(blob)
    except OSError as error:
        shutil.rmtree(os.path.join(folder, number), ignore_errors=True)
        free = shutil.disk_usage(folder).free
        raise Failure(
            "full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "write", error.strerror or "", free=free
        ) from error


def _fork(folder: str, mine: Sequence[int], state: dict[str, Any]) -> tuple[int, int, int]:
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(to_read)
        os.close(from_write)
        return pid, to_write, from_read
    code = 1
    try:
        for fd in (*mine, to_write, from_read, *([state["lock"]] if state["lock"] is not None else [])):
            os.close(fd)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # sshd waits for whoever holds these
            os.dup2(null, fd)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        work(to_read, from_write, folder)
        code = 0
    finally:
        os._exit(code)  # nothing of the supervisor's may run here


def _ask(
    header: dict[str, Any], blob: bytes, workers: dict[int, tuple[int, int, int]], worker: int, requests: int, replies: int
) -> tuple[dict[str, Any], bytes]:
    """Hand a request to a worker and pass on what it says, until it answers, dies, or runs out of time."""
    _, to_worker, from_worker = workers[worker]
    deadline = time.monotonic() + header.get("timeout_s", 600.0)
    try:
        send(to_worker, header, blob=blob)
    except OSError:
        return _died(workers, worker), b""
    while True:
        ready = select.select([requests, from_worker], [], [], min(_HEARTBEAT_S, max(deadline - time.monotonic(), 0.01)))[0]
        if from_worker in ready:
            frame = receive(from_worker)
            if frame is None:
                return _died(workers, worker), b""
            if "event" not in frame[0]:
                return frame
            send(replies, *frame[:1], blob=frame[1])
        elif requests in ready:
            sys.exit(1)  # the host went away: it never speaks before it was answered
        else:
            send(replies, {"event": "alive"}, blob=b"")
        if time.monotonic() > deadline:
            _stop(workers, worker)
            return {"error": "timeout", "detail": ""}, b""


def _died(workers: dict[int, tuple[int, int, int]], worker: int) -> dict[str, Any]:
    pid, *pipes = workers.pop(worker)
    for fd in pipes:
        os.close(fd)
    status = os.waitpid(pid, 0)[1]
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    name = signal.Signals(number).name if number in set(signal.Signals) else f"exit code {status >> 8}"
    return {"error": "died", "detail": name}


def _stop(workers: dict[int, tuple[int, int, int]], worker: int) -> None:
    if worker in workers:
        with contextlib.suppress(ProcessLookupError):
            os.kill(workers[worker][0], signal.SIGKILL)
        _died(workers, worker)


def _lock() -> int:
    """Hold the device: one benchmark at a time, also between users and hosts.

    Raises:
        Failure: ``busy``; ``lock``: the file that all of them agree on cannot be opened.
    """
    import fcntl

    path = os.path.join("/tmp" if os.path.isdir("/tmp") else tempfile.gettempdir(), "edgepress-device.lock")
    flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    try:
        try:
            fd = os.open(path, flags)  # without O_CREAT: Linux refuses that for another user's file in /tmp
        except FileNotFoundError:
            fd = os.open(path, flags | os.O_CREAT, 0o666)
            with contextlib.suppress(OSError):
                os.fchmod(fd, 0o666)
    except OSError as error:
        raise Failure("lock", f"{path}: {error.strerror}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise Failure("busy") from error
    return fd


def _sweep() -> None:
    """Remove the folders of our own user's agents that were killed."""
    for folder in Path(tempfile.gettempdir()).glob("edgepress-*"):
        with contextlib.suppress(OSError, ValueError):
            pid = int((folder / "pid").read_text())
            if folder.stat().st_uid == os.getuid() and not folder.is_symlink():
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    shutil.rmtree(folder, ignore_errors=True)
