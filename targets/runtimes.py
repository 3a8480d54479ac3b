"""Run a file: ONNX Runtime for .onnx, LiteRT for .tflite, each imported only when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from edgepress.compress.errors import DeviceError, FileError, UserError

from .artifact import Artifact, Port
from .layout import real, stored
from .silence import silence

__all__ = ["LiteRt", "OnnxRuntime", "Runtime", "import_runtime", "open_runtime", "predict", "random_feeds"]

_INNER_SIZES = (1, 16, 64, 256, 1024)
"""Tried in this order for open sizes other than the batch: a signal of one sample is too short for many networks."""


class Runtime(Protocol):
    """A file made ready to run.

    Attributes:
        name: ``'onnxruntime'`` or ``'litert'``.
        version: of the runtime.
        artifact: the file.
    """

    name: str
    version: str
    artifact: Artifact

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once, in the file's own layout, types and batch size. This is what is timed."""
        ...

    def predict(self, *inputs: np.ndarray) -> Any:
        """Run in the network's layout at any batch size, quantized ports as floats: one array, or a tuple of several."""
        ...

    def close(self) -> None:
        """Give memory and threads back."""
        ...


def open_runtime(artifact: Artifact, threads: int = 1) -> Runtime:
    """Load a file into the runtime that runs its format, on the CPU.

    Args:
        artifact: what `read_artifact` or `export` gave.
        threads: how many threads one run may use.

    Raises:
        DeviceError: the runtime is not installed.
        FileError: the runtime refuses the file.
    """
    if threads < 1:
        raise UserError(f"{threads} threads cannot run a file: ask for 1 or more.")
    kinds: dict[str, type[OnnxRuntime] | type[LiteRt]] = {"onnx": OnnxRuntime, "tflite": LiteRt}
    return kinds[artifact.format](artifact, threads)


class OnnxRuntime:
    """An ONNX file in ONNX Runtime's CPU provider: operators one after the other, each on ``threads`` threads."""

    name = "onnxruntime"

    def __init__(self, artifact: Artifact, threads: int = 1):
        ort = import_runtime("onnxruntime", "onnxruntime")
        self.artifact = artifact
        self.version: str = ort.__version__
        self._names = [port.name for port in artifact.inputs]
        ort.disable_telemetry_events()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # errors are raised; warnings about a stranger's file help nobody here
        # idle threads must not burn the core that another file is being timed on
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            with silence():
                self._session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise FileError(f"ONNX Runtime cannot load {artifact.path}: {_first_line(error)}.") from error

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once, in the file's own layout, types and batch size.

        Raises:
            FileError: ONNX Runtime fails on the file, or the feeds do not fit it.
        """
        try:
            return list(self._session.run(None, dict(zip(self._names, feeds, strict=True))))
        except Exception as error:
            raise FileError(f"ONNX Runtime cannot run {self.artifact.path}: {_first_line(error)}.") from error

    def predict(self, *inputs: np.ndarray) -> Any:
        """Run in the network's layout; see `predict`."""
        return predict(self, *inputs)

    def close(self) -> None:
        """Drop the session."""
        self.__dict__.pop("_session", None)


class LiteRt:
    """A TFLite file in LiteRT's interpreter with its XNNPACK delegate."""

    name = "litert"

    def __init__(self, artifact: Artifact, threads: int = 1):
        litert = import_runtime("ai_edge_litert.interpreter", "ai-edge-litert")
        self.artifact = artifact
        self.version: str = import_runtime("ai_edge_litert", "ai-edge-litert").__version__
        try:
            with silence():
                self._interpreter = litert.Interpreter(model_path=str(artifact.path), num_threads=threads)
                self._interpreter.allocate_tensors()
        except Exception as error:
            raise FileError(f"LiteRT cannot load {artifact.path}: {_first_line(error)}.") from error
        self._inputs = [detail["index"] for detail in self._interpreter.get_input_details()]
        self._outputs = [detail["index"] for detail in self._interpreter.get_output_details()]
        self._shapes = [tuple(detail["shape"].tolist()) for detail in self._interpreter.get_input_details()]

    def run(self, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Run once, in the file's own layout, types and batch size; open sizes follow the feeds.

        Raises:
            FileError: LiteRT fails on the file, or the feeds do not fit it.
        """
        try:
            if [feed.shape for feed in feeds] != self._shapes:
                self._resize(feeds)
            for index, feed in zip(self._inputs, feeds, strict=True):
                self._interpreter.set_tensor(index, feed)
            self._interpreter.invoke()
            return [self._interpreter.get_tensor(index) for index in self._outputs]
        except Exception as error:
            raise FileError(f"LiteRT cannot run {self.artifact.path}: {_first_line(error)}.") from error

    def _resize(self, feeds: Sequence[np.ndarray]) -> None:
        for port, feed in zip(self.artifact.inputs, feeds, strict=True):
            if not _fits(feed.shape, port.shape):
                raise ValueError(f"'{port.name}' takes {_shape(port.shape)} and was given {_shape(feed.shape)}")
        with silence():
            for index, feed in zip(self._inputs, feeds, strict=True):
                self._interpreter.resize_tensor_input(index, list(feed.shape))
            self._interpreter.allocate_tensors()
        self._shapes = [feed.shape for feed in feeds]

    def predict(self, *inputs: np.ndarray) -> Any:
        """Run in the network's layout; see `predict`."""
        return predict(self, *inputs)

    def close(self) -> None:
        """Drop the interpreter."""
        self.__dict__.pop("_interpreter", None)


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
    pieces = [runtime.run(feeds)] if size is None else [_run_piece(runtime, feeds, at, size) for at in _starts(feeds, size)]
    outputs = tuple(
        real(values[0] if len(values) == 1 else np.concatenate(values), port)
        for values, port in zip(zip(*pieces, strict=True), artifact.outputs, strict=True)
    )
    return outputs[0] if len(outputs) == 1 else outputs


def random_feeds(artifact: Artifact, seed: int = 0) -> list[np.ndarray]:
    """Inputs in the file's own layout, types and batch, for timing a file whose data is not at hand.

    The batch is 1 where it is open. Other open sizes are 1 too, or the first of 16, 64, 256, 1024 that the file runs with.

    Args:
        artifact: the file.
        seed: of the random numbers: standard normal floats, the whole range of a quantized type, 0 and 1 as integers
            (small enough for any vocabulary).

    Raises:
        FileError: the file runs with none of those sizes.

    Example:
        >>> from pathlib import Path
        >>> port = Port("x", (None, 3), "float32")
        >>> [feed.shape for feed in random_feeds(Artifact(Path("a.onnx"), "onnx", "fp32", (port,), (), "", 0))]
        [(1, 3)]
    """
    if all(None not in port.shape[1:] or port.shape.count(None) == 1 for port in artifact.inputs):
        return _random(artifact, seed, 1)
    runtime, failure = open_runtime(artifact), FileError()
    try:
        for inner in _INNER_SIZES:
            feeds = _random(artifact, seed, inner)
            try:
                runtime.run(feeds)
            except FileError as error:
                failure = error
            else:
                return feeds
    finally:
        runtime.close()
    raise FileError(f"No size tried for the open dimensions of {artifact.path} runs; the last: {failure}") from failure


def _random(artifact: Artifact, seed: int, inner: int) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [_random_array(port, inner, generator) for port in artifact.inputs]


def _random_array(port: Port, inner: int, generator: np.random.Generator) -> np.ndarray:
    opened = [i for i, size in enumerate(port.shape) if size is None]
    # the first open size is the batch, also where it is not in front: the state of a recurrent layer
    shape = [size if size is not None else 1 if i == opened[0] else inner for i, size in enumerate(port.shape)]
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
        wanted = ", ".join(f"'{port.name}' {_shape(('N', *port.network_shape[1:]) if port.shape else ())}" for port in ports)
        raise UserError(
            f"{artifact.path.name} takes {len(ports)} input{'s' * (len(ports) != 1)} ({wanted}); "
            f"it was given {len(inputs)} of shape {given}."
        )
    if any(value.ndim and not len(value) for value in map(np.asarray, inputs)):
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


def _starts(feeds: Sequence[np.ndarray], size: int) -> range:
    counts = {len(feed) for feed in feeds if feed.ndim}
    if len(counts) > 1:
        raise UserError(f"The inputs have {' and '.join(map(str, sorted(counts)))} examples: one batch needs as many of each.")
    return range(0, counts.pop(), size)


def _run_piece(runtime: Runtime, feeds: Sequence[np.ndarray], at: int, size: int) -> list[np.ndarray]:
    """Run examples ``at`` to ``at + size``; the last piece is filled up with its last example, and the filling cut off."""
    cut = [feed[at : at + size] if feed.ndim else feed for feed in feeds]
    count = max(len(feed) for feed in cut if feed.ndim)
    full = [np.concatenate([c, np.repeat(c[-1:], size - count, 0)]) if c.ndim and count < size else c for c in cut]
    return [output[:count] for output in runtime.run(full)]


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
