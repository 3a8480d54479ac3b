"""Files in runtimes: one way to load and run them, here and on any device."""

from __future__ import annotations

import contextlib
import io
import os
import time

from .frames import Failure
from .machine import version_of

__all__ = ["Session", "failing", "interpreter_of", "load", "options_of", "prepare", "run_pieces", "silence"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any


class Session:
    """A file made ready to run.

    Args:
        name: of the runtime, with what was chosen of it: ``'litert'``, ``'onnxruntime:xnnpack'``.
        version: of the runtime.
        run: arrays in the file's own layout and types to the list of its outputs.

    Attributes:
        stopwatch: for a runtime that must time itself, because its work goes on after the call: takes the inputs where it wants
            them, gets ready, and returns a function from a number of runs to the nanoseconds that they took. None: the clock is
            put around ``run``.
        step_ns: the smallest step of that stopwatch; 0 where it is the device's clock.
        compile_ns: tells how long the runtime has compiled so far, in the time of loading or of the first run; None where it
            compiles nothing.
        memory_bytes: tells the most memory that runs took on an accelerator; None where the process's own memory counts.
    """

    def __init__(self, name: str, version: str, run: Callable[[Sequence[Any]], list[Any]]):
        self.name, self.version, self.run = name, version, run
        self.stopwatch: Callable[[Sequence[Any]], Callable[[int], int]] | None = None
        self.step_ns = 0
        self.compile_ns: Callable[[], int | None] = lambda: None
        self.memory_bytes: Callable[[], int | None] = lambda: None


def load(path: str, runtime: str | None = None, threads: int = 1) -> Session:
    """Load a file into a runtime.

    Args:
        path: an ``.onnx``, ``.tflite`` or ``.pt2`` file.
        runtime: ``'onnxruntime'`` or one of its execution providers, ``'onnxruntime:cuda'``; ``'litert'``, ``'tflite-runtime'``
            or ``'tensorflow'``, each also without XNNPACK, ``'litert:no-xnnpack'``; ``'torch'``, see `load_program`. None takes
            the first that is installed.
        threads: how many one run may use.

    Raises:
        Failure: ``missing``, ``load``; its sessions raise ``run``.
    """
    if path.endswith(".pt2"):
        from .torch_session import load_program

        return load_program(path, runtime or "torch", threads)
    onnx = path.endswith(".onnx")
    name, _, option = (runtime or ("onnxruntime" if onnx else "")).partition(":")
    if onnx != (name == "onnxruntime"):
        raise Failure("fit", runtime or name)
    return _onnxruntime(path, option, threads) if onnx else _tflite(path, name, option, threads)


def prepare(path: str, runtime: str | None) -> None:
    """Import what `load` will need, so that its time is the file's own."""
    if path.endswith(".onnx"):
        with contextlib.suppress(ImportError):
            import onnxruntime  # noqa: F401
    elif path.endswith(".pt2"):
        from .torch_session import import_torch

        import_torch()
    else:
        interpreter_of((runtime or "").partition(":")[0])


def _onnxruntime(path: str, option: str, threads: int) -> Session:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Failure("missing", "onnxruntime") from error
    ort.disable_telemetry_events()
    provider = _provider(ort.get_available_providers(), option)
    providers = [provider]
    if option in ("cuda", "tensorrt"):
        _preload(ort)
        providers = list(dict.fromkeys([provider, _provider(ort.get_available_providers(), "cuda")]))
    start = time.perf_counter_ns()
    with failing("load", "ONNX Runtime"), silence():
        session = ort.InferenceSession(path, options_of(ort, threads), providers=providers)
    if session.get_providers()[0] != provider:  # what it leaves out did not start; operators that it lacks go to the next one
        why = f"its {provider} does not start: a library that it needs is missing or has another version"
        raise Failure("load", why, runtime="ONNX Runtime")
    names = [port.name for port in session.get_inputs()]

    def run(feeds: Sequence[Any]) -> list[Any]:
        with failing("run", "ONNX Runtime"):
            return list(session.run(None, dict(zip(names, feeds))))

    made = Session("onnxruntime" + (f":{option}" if option else ""), ort.__version__, run)
    if option == "tensorrt":
        _count_building(made, time.perf_counter_ns() - start)
    return made


def _preload(ort: Any) -> None:
    """Let ONNX Runtime find the CUDA libraries that pip installed; what it prints of those that it misses is no help."""
    with contextlib.suppress(Exception), contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def _count_building(session: Session, loading_ns: int) -> None:
    """TensorRT builds its engine while a file is loaded, or in the first run where sizes are open: the two together."""
    run, spent = session.run, [loading_ns]

    def first(feeds: Sequence[Any]) -> list[Any]:
        start = time.perf_counter_ns()
        outputs = run(feeds)
        spent.append(time.perf_counter_ns() - start)
        session.run = run
        return outputs

    session.run, session.compile_ns = first, lambda: sum(spent)


def options_of(ort: Any, threads: int) -> Any:
    """One thing after the other, each on so many threads, and quiet."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4  # errors are raised; warnings about a stranger's file help nobody here
    # idle threads must not burn the core that another file is being timed on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _provider(available: Sequence[str], option: str) -> str:
    for provider in available:
        if provider.lower().replace("executionprovider", "") == (option or "cpu").lower():
            return provider
    raise Failure("missing", f"onnxruntime with the {option} execution provider")


_INTERPRETERS = {"litert": ("ai_edge_litert", "ai_edge_litert.interpreter", "ai-edge-litert"),
                 "tflite-runtime": ("tflite_runtime", "tflite_runtime.interpreter", "tflite-runtime"),
                 "tensorflow": ("tensorflow", "tensorflow.lite", "tensorflow")}  # fmt: skip


def _tflite(path: str, name: str, option: str, threads: int) -> Session:
    name, module, version = interpreter_of(name)
    more = {}
    if option == "no-xnnpack":
        resolver = getattr(module, "OpResolverType", None) or module.experimental.OpResolverType
        more["experimental_op_resolver_type"] = resolver.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    elif option:
        raise Failure("fit", f"{name}:{option}")
    with failing("load", _TITLES[name]), silence():
        interpreter = module.Interpreter(model_path=path, num_threads=threads, **more)
        interpreter.allocate_tensors()
    inputs = [detail["index"] for detail in interpreter.get_input_details()]
    outputs = [detail["index"] for detail in interpreter.get_output_details()]
    shapes = [tuple(int(n) for n in detail["shape"]) for detail in interpreter.get_input_details()]

    def run(feeds: Sequence[Any]) -> list[Any]:
        nonlocal shapes
        with failing("run", _TITLES[name]):
            if [feed.shape for feed in feeds] != shapes:
                with silence():
                    for index, feed in zip(inputs, feeds):
                        interpreter.resize_tensor_input(index, list(feed.shape))
                    interpreter.allocate_tensors()
                shapes = [feed.shape for feed in feeds]
            for index, feed in zip(inputs, feeds):
                interpreter.set_tensor(index, feed)
            interpreter.invoke()
            return [interpreter.get_tensor(index) for index in outputs]

    return Session(name + (f":{option}" if option else ""), version, run)


_TITLES = {"litert": "LiteRT", "tflite-runtime": "tflite-runtime", "tensorflow": "TensorFlow's interpreter"}


def interpreter_of(name: str) -> tuple[str, Any, str]:
    """The interpreter of that name, or the first that is installed: its name, module and version."""
    import importlib

    if name and name not in _INTERPRETERS:
        raise Failure("fit", name)
    for candidate in [name] if name else list(_INTERPRETERS):
        package, module, distribution = _INTERPRETERS[candidate]
        try:
            if candidate == "tensorflow":
                return candidate, importlib.import_module(package).lite, version_of(distribution)
            return candidate, importlib.import_module(module), version_of(distribution)
        except ImportError:
            continue
    raise Failure("missing", (name and _INTERPRETERS[name][2]) or "ai-edge-litert")


@contextlib.contextmanager
def failing(kind: str, runtime: str) -> Any:
    """What a runtime raises becomes a `Failure` of that kind."""
    try:
        yield
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise Failure(kind, lines[0].strip().rstrip(".") if lines else type(error).__name__, runtime=runtime) from error


@contextlib.contextmanager
def silence() -> Any:
    """Runtimes write to the standard error of the process; what they raise is enough."""
    try:
        saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:
        yield
        return
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def run_pieces(session: Session, arrays: Sequence[Any], size: int | None) -> list[Any]:
    """Run a batch in pieces of a fixed size; the last one is filled up with its last example, and the filling cut off."""
    import numpy as np

    if size is None:
        return [np.asarray(output) for output in session.run(arrays)]
    done = []
    for at in range(0, max(len(a) for a in arrays if a.ndim), size):
        cut = [a[at : at + size] if a.ndim else a for a in arrays]
        count = max(len(a) for a in cut if a.ndim)
        full = [np.concatenate([a, np.repeat(a[-1:], size - count, 0)]) if a.ndim and count < size else a for a in cut]
        done.append([np.asarray(output)[:count] for output in session.run(full)])
    return [np.concatenate(outputs) for outputs in zip(*done)]
