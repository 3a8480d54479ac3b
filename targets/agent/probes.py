"""Tiny files timed against each other, as close to the kernels as a runtime lets one: what a layer takes on this device."""

from __future__ import annotations

import math
import random
import time

from .frames import Failure
from .machine import emulated
from .sessions import failing, options_of, silence

__all__ = ["Probes"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

_ROUNDS = 24
_TURN_S = 0.75e-3  # each file runs about this long in a round
_QUANTILE = 0.1  # of the samples: what interrupts a run only ever adds to it


class Probes:
    """Files that were sent to be timed, in the order in which they came."""

    def __init__(self) -> None:
        self._runs: list[Callable[[], object]] = []

    def add(self, header: dict[str, Any], contents: Sequence[Any]) -> dict[str, Any]:
        """Load files: seconds of one run each, None where the runtime refuses it. A refused file keeps its number."""
        if why := emulated():
            raise Failure("emulated", why)
        seconds: list[float | None] = []
        for content, whole in zip(contents, header["whole"]):
            try:
                run = _OPEN[header["format"]](content.tobytes(), header["threads"], whole)
                self._runs.append(run)
                seconds.append(_typical_s(run))
            except Failure as failure:
                if failure.fields["error"] == "missing":
                    raise
                self._runs.append(_nothing)
                seconds.append(None)
        return {"seconds": seconds}

    def times(self, header: dict[str, Any]) -> dict[str, Any]:
        """Nanoseconds of each file that is asked for, by its number; all are forgotten then."""
        runs = [self._runs[i] for i in header["files"]]
        self._runs = []
        return {"ns": interleaved(runs)}


def interleaved(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Nanoseconds of each: a low quantile of samples from rounds in which all take turns, in an order that changes."""
    repeats = [max(2, int(_TURN_S / _typical_s(run))) for run in runs]
    samples: list[list[int]] = [[] for _ in runs]
    order, clock = random.Random(0), time.perf_counter_ns
    for _ in range(_ROUNDS):
        for i in order.sample(range(len(runs)), len(runs)):
            run = runs[i]
            run()  # the neighbour has left its own data in the caches
            for _ in range(repeats[i]):
                start = clock()
                run()
                samples[i].append(clock() - start)
    return [_quantile(sorted(s)) for s in samples]


def _quantile(ordered: Sequence[int]) -> float:
    at = _QUANTILE * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _typical_s(run: Callable[[], object]) -> float:
    run()
    start = time.perf_counter()
    run()
    run()
    return max((time.perf_counter() - start) / 2, 1e-7)


def _nothing() -> None:
    pass


def _onnx(content: bytes, threads: int, whole: bool) -> Callable[[], object]:
    try:
        import numpy as np
        import onnxruntime as ort
    except ImportError as error:
        raise Failure("missing", "onnxruntime") from error
    with failing("load", "ONNX Runtime"), silence():
        session = ort.InferenceSession(content, options_of(ort, threads), providers=["CPUExecutionProvider"])
        generator = np.random.default_rng(1)
        feeds = {i.name: generator.standard_normal([int(n) for n in i.shape]).astype(np.float32) for i in session.get_inputs()}
        if whole:
            return lambda: session.run(None, feeds)
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        for output in session.get_outputs():
            binding.bind_output(output.name, "cpu")
        session.run_with_iobinding(binding)
    return lambda: session.run_with_iobinding(binding)


def _tflite(content: bytes, threads: int, whole: bool) -> Callable[[], object]:
    from .sessions import interpreter_of

    _, module, _ = interpreter_of("")
    with failing("load", "LiteRT"), silence():
        interpreter = module.Interpreter(model_content=content, num_threads=threads)
        interpreter.allocate_tensors()
        feeds = [(d["index"], _noise(d["shape"], d["dtype"])) for d in interpreter.get_input_details()]
        for index, value in feeds:
            interpreter.set_tensor(index, value)
        interpreter.invoke()
    if not whole:
        return interpreter.invoke  # type: ignore[no-any-return]
    (port, value), output = feeds[0], interpreter.get_output_details()[0]["index"]

    def call() -> object:
        interpreter.set_tensor(port, value)
        interpreter.invoke()
        return interpreter.get_tensor(output)

    return call


def _noise(shape: Sequence[int], dtype: Any) -> Any:
    import numpy as np

    generator, count = np.random.default_rng(1), math.prod(int(n) for n in shape)
    values = generator.integers(-127, 128, count) if np.dtype(dtype).kind == "i" else generator.standard_normal(count)
    return values.astype(dtype).reshape([int(n) for n in shape])


_OPEN = {"onnx": _onnx, "tflite": _tflite}
