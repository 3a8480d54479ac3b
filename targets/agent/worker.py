"""A process that loads files and runs them, so that what crashes takes only it along."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time

from .frames import Failure, arrays_of, receive, send
from .machine import high_water, memory_bytes
from .probes import Probes
from .sessions import Session, load, prepare, run_pieces
from .turns import Turn, interleave

__all__ = ["work"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_PROBES = Probes()


def work(requests: int, replies: int, folder: str) -> None:
    """Answer requests until the pipe closes."""
    sessions: dict[str, Session] = {}
    threading.Thread(target=_watch, args=(os.getppid(), folder), daemon=True).start()
    _limit_memory()
    while True:
        frame = receive(requests)
        if frame is None:
            return
        header, blob = frame
        try:
            answer, arrays = _answer(header, blob, folder, sessions, replies)
        except Failure as failure:
            answer, arrays = failure.fields, []
        except MemoryError:
            answer, arrays = {"error": "memory", "detail": ""}, []
        send(replies, answer, arrays)


def _watch(parent: int, folder: str) -> None:
    """A supervisor that was killed has left its folder, and a file that may run for ever, to us."""
    while os.getppid() == parent:
        time.sleep(1.0)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _answer(
    header: dict[str, Any], blob: bytes, folder: str, sessions: dict[str, Session], replies: int
) -> tuple[dict[str, Any], list[Any]]:
    arrays, do = arrays_of(header, blob), header["do"]
    if do == "run":
        return {"ok": True}, run_pieces(sessions["open"], arrays, header["piece"])
    if do == "open":
        _make_room(header["runtime"])
        sessions["open"] = load(os.path.join(folder, header["file"]), header["runtime"], header["threads"])
        return {"name": sessions["open"].name, "version": sessions["open"].version}, []
    if do == "check":
        return _check(folder, header, arrays)
    if do == "probe":
        return _PROBES.add(header, arrays), []
    if do == "times":
        return _PROBES.times(header), []
    turns, at = [], 0
    for entry in header["files"]:
        _make_room(entry["runtime"])
        session = load(os.path.join(folder, entry["file"]), entry["runtime"], header["threads"])
        turns.append(Turn(session, arrays[at : at + entry["inputs"]]))
        at += entry["inputs"]

    def begin(i: int) -> None:
        send(replies, {"event": "turn", "file": i})

    seen = interleave(turns, header["plan"], begin=begin)
    import numpy as np

    done = [{"loops": t.loops, "joules": t.joules, "runs": t.runs} for t in turns]
    # as arrays: a sustained run has millions of samples
    return {"files": done, "seen": seen}, [np.array(t.rounds, np.int64) for t in turns]


def _check(folder: str, header: dict[str, Any], arrays: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    """Load and run one file: does it run at all, how much memory it takes, how long the first answer takes."""
    idle = high_water()
    prepare(header["file"], header["runtime"])
    start = time.perf_counter_ns()
    _make_room(header["runtime"])
    session = load(os.path.join(folder, header["file"]), header["runtime"], header["threads"])
    loaded = time.perf_counter_ns()
    session.run(arrays)
    first = time.perf_counter_ns()
    for _ in range(header["runs"] - 1):
        session.run(arrays)
    times = {"load_ns": loaded - start, "first_ns": first - loaded, "compile_ns": session.compile_ns()}
    own = session.memory_bytes()
    memory = {"peak_bytes": high_water(), "idle_bytes": idle} if own is None else {"peak_bytes": own, "idle_bytes": 0}
    return {**times, **memory, "name": session.name, "version": session.version}, []


def _limit_memory() -> None:
    """A file that asks for more memory than the device has fails by itself, before the system has to choose a victim.

    It is the first victim too, should it come to that: there is a supervisor to tell of it. What crashes leaves no image of its
    memory on the disk.
    """
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))

        total = memory_bytes()
        if total and sys.maxsize > 1 << 32 and "CUDA_VISIBLE_DEVICES" not in os.environ:
            resource.setrlimit(resource.RLIMIT_AS, (total + (1 << 32), resource.getrlimit(resource.RLIMIT_AS)[1]))


def _make_room(runtime: str | None) -> None:
    """CUDA reserves more addresses than there is memory, as many as all GPUs and the host have together."""
    if runtime in ("onnxruntime:cuda", "onnxruntime:tensorrt"):
        with contextlib.suppress(ImportError, ValueError, OSError):
            import resource

            most = resource.getrlimit(resource.RLIMIT_AS)[1]
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
