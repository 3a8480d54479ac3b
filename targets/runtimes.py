"""Run a file in a runtime of this process, with the same code that an agent runs on a device."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from edgepress.compress.errors import DeviceError, FileError, UserError

from .agent import frames, sessions
from .artifact import Artifact, Port
from .layout import real, stored
from .limits import memory_share, plain

if TYPE_CHECKING:
    from .devices.base import Device

__all__ = ["RUNTIMES", "Runtime", "check_feeds", "explain", "import_runtime", "open_runtime", "predict", "random_feeds"]

_INNER_SIZES = (1, 16, 64, 256, 1024)
"""Tried in this order for open sizes other than the batch: a signal of one sample is too short for many networks."""

_NUMBERS = {"bool", *(f"{kind}int{bits}" for kind in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64"}
_DRAWN_BYTES = 8  # of a random number, before it is given the file's own type


RUNTIMES = {"onnx": ("onnxruntime",), "tflite": ("litert", "tflite-runtime", "tensorflow"), "pt2": ("torch",)}
"""What runs files of each format."""


class Runtime(Protocol):
    """A file made ready to run.

    Attributes:
        name: ``'onnxruntime'``, ``'litert'``, ``'tflite-runtime'`` or ``'tensorflow'``, with the choice within it behind a colon.
        version: of the runtime.
        artifact: the file.
    """

    name: str
    version: str
    artifact: Artifact

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once, in the file's own layout, types and batch size. This is what is timed."""
        ...

    def run_pieces(self, feeds: Sequence[np.ndarray], size: int | None) -> list[np.ndarray]:
        """Run a batch in pieces of ``size`` examples; at once where it is None."""
        ...

    def predict(self, *inputs: np.ndarray) -> Any:
        """Run in the network's layout at any batch size, quantized ports as floats: one array, or a tuple of several."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


def open_runtime(artifact: Artifact, threads: int = 1, runtime: str | None = None) -> Runtime:
    """Load a file into a runtime in this process.

    Args:
        artifact: what `read_artifact` or `export` gave.
        threads: how many threads one run may use.
        runtime: ``'onnxruntime'``, also with one of its execution providers (``'onnxruntime:xnnpack'``, ``'onnxruntime:cuda'``);
            ``'litert'``, ``'tflite-runtime'``, ``'tensorflow'``, each also without its delegate (``'litert:no-xnnpack'``). None
            takes the first installed one that runs the file's format.

    Raises:
        DeviceError: the runtime is not installed.
        FileError: the runtime refuses the file.
        UserError: there is no such runtime for this format, or no threads.
    """
    return _InProcess(artifact, threads, runtime)


class _InProcess:
    """A file in a runtime of this process."""

    def __init__(self, artifact: Artifact, threads: int, runtime: str | None):
        if threads < 1:
            raise UserError(f"{threads} threads cannot run a file: ask for 1 or more.")
        self.artifact = artifact
        with _sentences(artifact):
            self._session: sessions.Session | None = sessions.load(str(artifact.path), runtime, threads)
        self.name, self.version = self._session.name, self._session.version

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self.run_pieces(feeds, None)

    def run_pieces(self, feeds: Sequence[np.ndarray], size: int | None) -> list[np.ndarray]:
        if self._session is None:
            raise UserError(f"{self.artifact.path.name} was closed: open it again.")
        check_feeds(self.artifact, feeds, size)
        with _sentences(self.artifact):
            return sessions.run_pieces(self._session, feeds, size)

    def predict(self, *inputs: np.ndarray) -> Any:
        return predict(self, *inputs)

    def close(self) -> None:
        self._session = None


@contextlib.contextmanager
def _sentences(artifact: Artifact) -> Iterator[None]:
    try:
        yield
    except frames.Failure as failure:
        raise explain(failure.fields, artifact) from failure


def explain(fields: dict[str, Any], artifact: Artifact, device: str = "local") -> UserError:
    """The sentence for an agent's failure.

    Args:
        fields: of `frames.Failure`.
        artifact: the file it was about.
        device: where.

    Example:
        >>> from pathlib import Path
        >>> print(explain({"error": "died", "detail": "SIGSEGV"}, Artifact(Path("a.onnx"), "onnx", "fp32", (), (), "", 0)))
        a.onnx cannot be run: the runtime crashed (SIGSEGV).
    """
    kind, detail = str(fields.get("error")), plain(fields.get("detail"))
    at, runtime, name = "" if device == "local" else f" on {device}", plain(fields.get("runtime")), artifact.path
    if kind == "missing":
        where, package = "here" if device == "local" else f"on {device}", detail.split(" with ")[0]
        what = detail if detail in ("numpy", "triton") else f"The runtime {detail}"
        return DeviceError(f"{what} is not installed {where}: python3 -m pip install {package}")
    if kind == "fit":
        known = " or ".join(f"'{name}'" for name in RUNTIMES[artifact.format])
        return UserError(f"'{detail}' does not run {artifact.path.name}: a .{artifact.format} file is run by {known}.")
    if kind in ("load", "run"):
        return FileError(f"{runtime} cannot {kind} {name}{at}: {detail}.")
    if kind == "memory" or (kind == "died" and detail == "SIGKILL"):
        return FileError(
            f"{name} cannot be run{at}: something, perhaps a want of memory, ended the process ({detail or 'memory'})."
        )
    if kind == "died":
        return FileError(f"{name} cannot be run{at}: the runtime crashed ({detail}).")
    if kind == "timeout":
        return DeviceError(f"{artifact.path.name} did not finish in time{at}: it hangs, or the device is too slow for it.")
    if kind == "clock":
        return DeviceError(f"The clock of {device} went backwards while {artifact.path.name} was timed: measure again.")
    return DeviceError(f"The agent on {device} failed with {artifact.path.name}: {kind} {detail}".rstrip() + ".")


def check_feeds(artifact: Artifact, feeds: Sequence[np.ndarray], size: int | None = None) -> None:
    """Compare feeds with a file's inputs.

    Raises:
        FileError: their number or a shape does not fit the file.
    """
    if len(feeds) != len(artifact.inputs):
        raise FileError(f"{artifact.path} takes {len(artifact.inputs)} inputs and was given {len(feeds)}.")
    for port, feed in zip(artifact.inputs, feeds, strict=True):
        if not _fits(feed.shape, port.shape if size is None or not port.shape else (None, *port.shape[1:])):
            raise FileError(
                f"{artifact.path}: '{plain(port.name)}' takes {_shape(port.shape)} and was given {_shape(feed.shape)}."
            )


def predict(runtime: Runtime, *inputs: np.ndarray) -> Any:
    """Run a file as if it were the network.

    Inputs and outputs have the network's layout and real values; a file that takes one example at a time is run once for
    each, and a file with a fixed batch in pieces of that size.

    Args:
        runtime: an opened file.
        inputs: arrays ``[N, ...]``, one for each of the file's inputs.

    Returns:
        One array ``[N, ...]``, or a tuple where the file has several outputs.

    Raises:
        UserError: the number of inputs or a shape does not fit the file.
        FileError: the runtime fails on the file.
    """
    artifact = runtime.artifact
    _check(artifact, inputs)
    feeds = [stored(np.asarray(value), port) for value, port in zip(inputs, artifact.inputs, strict=True)]
    size = _piece(artifact, feeds)
    stored_outputs = runtime.run_pieces(feeds, size)
    outputs = tuple(real(value, port) for value, port in zip(stored_outputs, artifact.outputs, strict=True))
    return outputs[0] if len(outputs) == 1 else outputs


def random_feeds(artifact: Artifact, seed: int = 0, device: Device | None = None) -> list[np.ndarray]:
    """Inputs in the file's own layout, types and batch, for timing a file whose data is not at hand.

    The batch is 1 where it is open. Other open sizes are 1 too, or the first of 16, 64, 256, 1024 that the file runs with.

    Args:
        artifact: the file.
        seed: of the random numbers: standard normal floats, the whole range of a quantized type, 0 and 1 as integers
            (small enough for any vocabulary).
        device: where sizes are tried, in a process of its own; this computer where None.

    Raises:
        FileError: the file runs with none of those sizes, its inputs would fill the memory, or they are no numbers.
        DeviceError: the device, not the file, is at fault.

    Example:
        >>> from pathlib import Path
        >>> port = Port("x", (None, 3), "float32")
        >>> [feed.shape for feed in random_feeds(Artifact(Path("a.onnx"), "onnx", "fp32", (port,), (), "", 0))]
        [(1, 3)]
    """
    if all(None not in port.shape[1:] or port.shape.count(None) == 1 for port in artifact.inputs):
        return _random(artifact, seed, 1)
    from .devices.base import Failed, Job  # which import this
    from .devices.local import Local

    failure: UserError = FileError()
    with contextlib.ExitStack() as stack:
        place = device or stack.enter_context(contextlib.closing(Local()))
        for inner in _INNER_SIZES:
            feeds = _random(artifact, seed, inner)
            outcome = place.check(Job(artifact, feeds))
            if not isinstance(outcome, Failed):
                return feeds
            failure = outcome.error
            if not isinstance(failure, FileError):
                raise failure
    raise FileError(f"No size tried for the open dimensions of {artifact.path} runs; the last: {failure}") from failure


def _random(artifact: Artifact, seed: int, inner: int) -> list[np.ndarray]:
    generator, shapes = np.random.default_rng(seed), [_random_shape(port, inner) for port in artifact.inputs]
    for port in artifact.inputs:
        if port.dtype not in _NUMBERS:
            raise FileError(f"{artifact.path}: '{plain(port.name)}' takes {port.dtype}, and edgepress has only numbers to give.")
    if (wanted := sum(map(math.prod, shapes)) * _DRAWN_BYTES) > memory_share(0.25):
        size = f"{wanted / 1e9:,.0f} GB, more than a quarter of this computer's memory"
        raise FileError(f"The inputs of one run of {artifact.path} would take {size}.")
    return [_random_array(port, shape, generator) for port, shape in zip(artifact.inputs, shapes, strict=True)]


def _random_shape(port: Port, inner: int) -> list[int]:
    opened = [i for i, size in enumerate(port.shape) if size is None]
    # the first open size is the batch, also where it is not in front: the state of a recurrent layer
    return [size if size is not None else 1 if i == opened[0] else inner for i, size in enumerate(port.shape)]


def _random_array(port: Port, shape: Sequence[int], generator: np.random.Generator) -> np.ndarray:
    dtype = np.dtype(port.dtype)
    if dtype.kind == "f":
        return np.asarray(generator.standard_normal(shape), dtype)
    if port.scale is not None:
        limits = np.iinfo(dtype)
        return np.asarray(generator.integers(limits.min, limits.max, shape, endpoint=True), dtype)
    return np.asarray(generator.integers(0, 2, shape), dtype)


# ---- the network's arrays and the file's


def _check(artifact: Artifact, inputs: Sequence[np.ndarray]) -> None:
    ports = artifact.inputs
    given = ", ".join(_shape(np.shape(value)) for value in inputs) or "none"
    # a fixed size in front is the batch, and predict runs a file with a fixed batch in pieces
    fits = len(inputs) == len(ports) and all(
        _fits(np.shape(value), (None, *port.network_shape[1:]) if port.shape else ())
        for value, port in zip(inputs, ports, strict=True)
    )
    if not fits:
        wanted = ", ".join(
            f"'{plain(port.name)}' {_shape(('N', *port.network_shape[1:]) if port.shape else ())}" for port in ports
        )
        raise UserError(
            f"{artifact.path.name} takes {len(ports)} input{'s' * (len(ports) != 1)} ({wanted}); "
            f"it was given {len(inputs)} of shape {given}."
        )
    counts = {len(value) for value in map(np.asarray, inputs) if value.ndim}
    if len(counts) > 1:
        raise UserError(f"The inputs have {' and '.join(map(str, sorted(counts)))} examples: one batch needs as many of each.")
    if 0 in counts:
        raise UserError(f"{artifact.path.name} was given a batch without examples, of shape {given}.")


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w is None or w == s for s, w in zip(shape, wanted, strict=True))


def _shape(shape: Sequence[Any]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _piece(artifact: Artifact, feeds: Sequence[np.ndarray]) -> int | None:
    """How many examples one run takes; None where all of them go at once."""
    if artifact.format == "tflite" and all(port.shape and port.shape[0] is None for port in artifact.inputs):
        return 1  # such files say that any batch will do, but often hold reshapes for one example
    if all(_fits(feed.shape, port.shape) for feed, port in zip(feeds, artifact.inputs, strict=True)):
        return None
    return next(port.shape[0] for port in artifact.inputs if port.shape and port.shape[0] is not None)


def import_runtime(module: str, package: str) -> Any:
    """Import a runtime's module.

    Raises:
        DeviceError: ``package`` is not installed.

    Example:
        >>> import_runtime("onnxruntime", "onnxruntime").__name__
        'onnxruntime'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DeviceError(f"The runtime {package} is not installed here: pip install {package}") from error
