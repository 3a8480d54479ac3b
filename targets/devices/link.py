"""A device at the other end of a pipe: start the agent there, send it files, have them measured or run."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import DeviceError, FileError
from edgepress.compress.progress import bar

from .. import agent
from ..agent import frames
from ..agent.supervisor import FILE_NAME
from ..artifact import Artifact
from ..limits import plain
from ..runtimes import check_feeds, explain, predict
from . import answers
from .base import Failed, Job, Outcome, Taken

__all__ = ["BOOT", "Link", "Piped", "Prober"]

BOOT = (
    "import sys;sys.path[:]=[p for p in sys.path if p];import json,types;f=sys.stdin.buffer;d=json.loads(f.read(int(f.read(8))));"
    'p=types.ModuleType("edgepress_agent");p.__path__=[];sys.modules[p.__name__]=p\n'
    'for n,s in d:m=types.ModuleType(p.__name__+"."+n);m.__package__=p.__name__;sys.modules[m.__name__]=m;'
    'setattr(p,n,m);exec(compile(s,n,"exec"),m.__dict__)\n'
    "p.supervisor.serve()"
)
"""What ``python3 -c`` is given on the device: it reads the agent's modules from standard input."""

_MODULES = ("frames", "machine", "sessions", "probes", "pt2", "torch_session", "turns", "worker", "supervisor")
"""Of the agent, each after those that it imports."""
_CHUNK = 1 << 20
_FRAME = 1 << 24  # inputs of one request to run
_SILENCE_S = 30.0  # the agent says something every two seconds
_START_S = 60.0

Explain = Callable[[int, str], str]
"""The sentence for a connection that could not be made or was lost, from the program's exit code and what it wrote."""


class Link:
    """A running agent and the pipe to it.

    Args:
        name: of the device, for messages.
        command: the program that ends in a ``python3 -c BOOT`` on the device.
        explain: what to say where it fails.

    Raises:
        DeviceError: there is no agent at the other end.
    """

    def __init__(self, name: str, command: Sequence[str], explain: Explain):
        self.name, self._explain = name, explain
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the link
        try:
            # in a session of its own: Ctrl-C is ours, and closing the pipe is how the agent learns of it
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, start_new_session=True
            )
        except FileNotFoundError as error:
            self._stderr.close()
            raise DeviceError(f"{name} cannot be reached: there is no program {command[0]} here. Install it first.") from error
        except OSError as error:
            self._stderr.close()
            raise DeviceError(f"{name} cannot be reached: {command[0]} does not start ({error.strerror or error}).") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        source = json.dumps([[name, _source(name)] for name in _MODULES]).encode()
        with self._talking(), _timed(self._process, _START_S):
            message = b"%8d" % len(source) + source
            while message:
                message = message[os.write(self._to, message) :]
            seen = b""
            while not seen.endswith(frames.GREETING):
                byte = os.read(self._from, 1)
                if not byte or len(seen) > 1 << 16:
                    raise ConnectionResetError
                seen += byte

    def ask(
        self,
        do: str,
        arrays: Sequence[np.ndarray] = (),
        event: Callable[[dict[str, Any]], None] = lambda _: None,
        **fields: Any,
    ) -> tuple[dict[str, Any], list[np.ndarray]]:
        """Send a request and wait for its answer.

        Raises:
            DeviceError: the connection was lost, or the answer makes no sense.
            frames.Failure: the agent says that it failed.
        """
        with self._talking():
            frames.send(self._to, {"do": do, **fields}, arrays)
            while True:
                frame = frames.receive(self._from, _SILENCE_S)
                if frame is None:
                    raise ConnectionResetError
                header, blob = frame
                if "event" in header:
                    event(header)
                    continue
                if "error" in header:
                    raise frames.Failure(str(header["error"]), str(header.get("detail", "")), **_rest(header))
                return header, frames.arrays_of(header, blob) if header.get("arrays") else []

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except (BrokenPipeError, ConnectionResetError) as error:
            raise DeviceError(self._lost()) from error
        except TimeoutError as error:
            raise DeviceError(f"The connection to {self.name} was lost: nothing came from it for {_SILENCE_S:.0f} s.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DeviceError(f"What {self.name} sent makes no sense, so it was not believed: is its python3 changed?") from error

    def _lost(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._stderr.seek(0)
        text = self._stderr.read()[-4000:].decode("utf-8", "replace").strip()
        return self._explain(self._process.returncode if self._process.returncode is not None else -1, text)

    def close(self) -> None:
        """Hang up; the agent removes what it has there. Safe to call twice."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()


@contextlib.contextmanager
def _timed(process: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Kill a program that does not come up: its pipe then closes."""
    import threading

    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _source(name: str) -> str:
    return (Path(agent.__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def _rest(header: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in header.items() if key not in ("error", "detail", "bytes", "arrays")}


class Piped:
    """A device reached through an agent; see `Device`.

    Args:
        name: as the user calls it.
        command: see `Link`.
        explain: see `Link`.
    """

    def __init__(self, name: str, command: Sequence[str], explain: Explain):
        self.name, self._command, self._explain = name, command, explain
        self._kept: Link | None = None
        self._sent: dict[str, str] = {}
        self._numbers = itertools.count()

    @property
    def _link(self) -> Link:
        if self._kept is None:
            self._kept = Link(self.name, self._command, self._explain)
        return self._kept

    def environment(self) -> dict[str, Any]:
        """What timings depend on there."""
        answer, _ = self._link.ask("hello")
        return answers.environment(answer, self.name)

    def check(self, job: Job, threads: int = 1, timeout_s: float = 120.0) -> Outcome:
        """See `Device.check`."""
        try:
            check_feeds(job.artifact, job.feeds)
            answer, _ = self._link.ask(
                "check", job.feeds, worker=0, file=self._put(job.artifact), runtime=job.runtime, threads=threads, runs=3,
                timeout_s=timeout_s * _patience(job.runtime),
            )  # fmt: skip
            return answers.checked(answer)
        except frames.Failure as failure:
            return Failed(explain(failure.fields, job.artifact, self.name))
        except FileError as error:
            return Failed(error)
        except (KeyError, ValueError, TypeError) as error:
            raise DeviceError(f"What {self.name} sent makes no sense, so it was not believed.") from error
        finally:
            with contextlib.suppress(frames.Failure, DeviceError):
                self._link.ask("stop", worker=0)

    def measure(
        self, jobs: Sequence[Job], threads: int, plan: dict[str, Any], progress: Callable[[float], None] = lambda _: None
    ) -> tuple[list[Outcome], dict[str, Any]]:
        """See `Device.measure`."""
        with self._locked(plan["wait_s"]):  # which an emulated device refuses, before any file is tried
            outcomes: list[Outcome] = [self.check(job, threads, plan["timeout_s"]) for job in jobs]
            while True:
                alive = [i for i, outcome in enumerate(outcomes) if not isinstance(outcome, Failed)]
                seen = self._taken(jobs, outcomes, alive, threads, plan, progress)
                if seen is not None:
                    return outcomes, seen

    def open(self, artifact: Artifact, threads: int = 1, runtime: str | None = None) -> _Far:
        """Load a file there, for `Runtime.predict`."""
        return _Far(self, artifact, threads, runtime)

    def close(self) -> None:
        """Hang up; nothing is left there."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
            self._sent.clear()

    # ---- pieces

    @contextlib.contextmanager
    def _locked(self, wait_s: float) -> Iterator[None]:
        end = time.monotonic() + wait_s
        while True:
            try:
                self._link.ask("lock")
                break
            except frames.Failure as failure:
                if failure.fields["error"] != "busy":
                    raise DeviceError(_not_held(failure.fields, self.name)) from failure
                if time.monotonic() > end:
                    raise DeviceError(
                        f"{self.name} is busy: another benchmark has held it for more than {wait_s:.0f} s. Wait until it has "
                        "ended, or stop it."
                    ) from failure
                time.sleep(0.5)
        try:
            yield
        finally:
            if self._kept is not None:
                with contextlib.suppress(DeviceError, frames.Failure):
                    self._kept.ask("unlock")

    def _put(self, artifact: Artifact) -> str:
        """Send a file with its data files, once, into a folder of its own; its name there is ours, and theirs are plain ones."""
        if artifact.sha256 in self._sent and artifact.sha256:
            return self._sent[artifact.sha256]
        number, main, done = next(self._numbers), f"model.{artifact.format}", 0
        files = {main: artifact.path, **_beside(artifact, main)}
        try:
            with bar(f"Send {artifact.path.name}") as update:
                for name, path in files.items():
                    with path.open("rb") as file:
                        while piece := file.read(_CHUNK):
                            self._link.ask("put", [np.frombuffer(piece, np.uint8)], file=f"{number}/{name}")
                            done += len(piece)
                            update(done / max(artifact.bytes, done))
        except OSError as error:
            raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
        except frames.Failure as failure:
            raise FileError(_no_room(failure.fields, artifact, self.name)) from failure
        self._sent[artifact.sha256 or str(number)] = f"{number}/{main}"
        return f"{number}/{main}"

    def _taken(
        self, jobs: Sequence[Job], outcomes: list[Outcome], alive: Sequence[int], threads: int, plan: dict[str, Any],
        progress: Callable[[float], None],
    ) -> dict[str, Any] | None:  # fmt: skip
        """Time the files that run; None where one of them broke off, which now counts as failed: once more without it."""
        if not alive:
            return {}
        turn = [0, 0]

        def event(header: dict[str, Any]) -> None:
            if header["event"] == "turn" and header.get("file") in range(len(alive)):
                turn[0], turn[1] = header["file"], turn[1] + 1
                progress(min(turn[1] / (len(alive) * (plan["rounds"] + 1)), 1.0))

        files = [
            {"file": self._put(jobs[i].artifact), "runtime": outcome.runtime, "inputs": len(jobs[i].feeds)}
            for i in alive
            if isinstance(outcome := outcomes[i], Taken)
        ]
        feeds = [feed for i in alive for feed in jobs[i].feeds]
        limit = plan["timeout_s"] * sum(_patience(jobs[i].runtime) for i in alive) + 2 * (plan["budget_s"] + plan["sustained_s"])
        try:
            answer, samples = self._link.ask(
                "measure", feeds, event, worker=1, files=files, threads=threads, plan=plan, timeout_s=limit
            )
            for i, entry, taken in zip(alive, answer["files"], samples, strict=True):
                outcomes[i] = answers.filled(outcomes[i], entry, taken)
            return answers.environment({"environment": answer["seen"]}, self.name)
        except frames.Failure as failure:
            if failure.fields["error"] == "emulated":
                raise DeviceError(_not_held(failure.fields, self.name)) from failure
            culprit = alive[turn[0]]
            outcomes[culprit] = Failed(explain(failure.fields, jobs[culprit].artifact, self.name))
            return None
        except (KeyError, ValueError, TypeError) as error:
            raise DeviceError(f"What {self.name} sent makes no sense, so it was not believed.") from error
        finally:
            with contextlib.suppress(frames.Failure, DeviceError):
                self._link.ask("stop", worker=1)


class _Far:
    """A file in a runtime on a device; a `Runtime`."""

    _last = 1

    def __init__(self, device: Piped, artifact: Artifact, threads: int, runtime: str | None):
        _Far._last += 1
        self.artifact, self._device, self._worker = artifact, device, _Far._last
        file = device._put(artifact)
        answer, _ = self._ask("open", file=file, runtime=runtime, threads=threads)
        self.name, self.version = answers.word(answer["name"]), answers.word(answer["version"])

    def _ask(self, do: str, arrays: Sequence[np.ndarray] = (), **fields: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
        try:
            return self._device._link.ask(do, arrays, worker=self._worker, **fields)
        except frames.Failure as failure:
            raise explain(failure.fields, self.artifact, self._device.name) from failure

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.run_pieces(feeds, None)

    def run_pieces(self, feeds: Sequence[np.ndarray], size: int | None) -> list[np.ndarray]:
        check_feeds(self.artifact, feeds, size)
        if size is None or any(not feed.ndim for feed in feeds):
            return self._ask("run", feeds, piece=size)[1]
        each = max(_FRAME // max(sum(feed[:1].nbytes for feed in feeds) * size, 1), 1) * size
        parts = [self._ask("run", [f[at : at + each] for f in feeds], piece=size)[1] for at in range(0, len(feeds[0]), each)]
        return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]

    def predict(self, *inputs: np.ndarray) -> Any:
        return predict(self, *inputs)

    def close(self) -> None:
        if self._device._kept is not None:
            with contextlib.suppress(DeviceError, frames.Failure):
                self._device._kept.ask("stop", worker=self._worker)


class Prober:
    """Tiny files that are timed against each other on a device; inside the block it is held.

    Args:
        device: where.
        format: of the files, ``'onnx'`` or ``'tflite'``.
        threads: that a run may use.
        wait_s: how long to wait for another benchmark that holds the device.
    """

    def __init__(self, device: Piped, format: str, threads: int, wait_s: float = 300.0):
        self._device, self._format, self._threads, self._wait_s = device, format, threads, wait_s
        self._count, self._held = 0, contextlib.ExitStack()

    def __enter__(self) -> Prober:
        self._held.enter_context(self._device._locked(self._wait_s))
        return self

    def __exit__(self, *_: object) -> None:
        with self._held, contextlib.suppress(DeviceError, frames.Failure):
            self._device._link.ask("stop", worker=0)

    def add(self, files: Sequence[tuple[bytes, bool]]) -> list[tuple[int, float | None]]:
        """Send files, each with whether a call is timed with its arrays in and out.

        Returns:
            For each file its number and the seconds of one run; None where the runtime refuses it.
        """
        if not files:
            return []
        contents = [np.frombuffer(content, np.uint8) for content, _ in files]
        whole = [bool(w) for _, w in files]
        answer = self._ask("probe", contents, format=self._format, threads=self._threads, whole=whole)
        seconds = [None if s is None else answers.amount(s) for s in answer["seconds"]]
        first, self._count = self._count, self._count + len(files)
        return list(zip(range(first, self._count), seconds, strict=True))

    def times(self, numbers: Sequence[int]) -> list[float]:
        """Nanoseconds of one run of each, by turns; the files are forgotten then."""
        self._count = 0
        found = [answers.amount(ns) for ns in self._ask("times", files=list(numbers))["ns"]]
        if len(found) != len(numbers):
            raise DeviceError(f"What {self._device.name} sent makes no sense, so it was not believed.")
        return found

    def _ask(self, do: str, arrays: Sequence[np.ndarray] = (), **fields: Any) -> dict[str, Any]:
        try:
            return self._device._link.ask(do, arrays, worker=0, **fields)[0]
        except frames.Failure as failure:
            kind, detail = failure.fields["error"], failure.fields["detail"]
            raise DeviceError(f"Layers cannot be timed on {self._device.name}: {kind} {detail}".rstrip() + ".") from failure


def _beside(artifact: Artifact, main: str) -> dict[str, Path]:
    """The data files by the names that the file itself calls them by."""
    named = {path.relative_to(artifact.path.parent).as_posix(): path for path in artifact.data}
    for name in named:
        if name == main or not re.fullmatch(FILE_NAME, name):
            shown, path = plain(name), artifact.path.name
            raise FileError(
                f"{path} has its weights in '{shown}', a name that is sent to no device: join the two with "
                f"onnx.save(onnx.load('{path}'), 'joined.onnx')."
            )
    return named


def _patience(runtime: str | None) -> int:
    """How many times as long a file may take that is compiled there first."""
    return 10 if {"inductor", "max-autotune", "aoti", "tensorrt"} & set((runtime or "").split(":")) else 1


def _not_held(fields: dict[str, Any], device: str) -> str:
    detail = plain(fields.get("detail"))
    if fields["error"] == "emulated":
        return (
            f"{device} is an emulated machine ({detail}), and its time means nothing: files can be checked there, and "
            "instructions counted, but not timed."
        )
    return f"{device} cannot be held for a benchmark: {detail}. Its owner, or root, may remove that file."


def _no_room(fields: dict[str, Any], artifact: Artifact, device: str) -> str:
    if fields["error"] == "full":
        free = fields.get("free")
        left = f"{free:,} bytes are free" if isinstance(free, int) else "it is full"
        return (
            f"{artifact.path.name} ({artifact.bytes:,} bytes) does not fit on {device}: in its temporary folder {left}. "
            "Free some there, or set TMPDIR to another folder."
        )
    return f"{artifact.path.name} cannot be written on {device}: {fields.get('detail') or fields['error']}."
