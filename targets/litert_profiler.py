"""LiteRT's profiler through the C interface of the library that ai-edge-litert brings, version 2."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from ctypes import byref, c_bool, c_char_p, c_int, c_int32, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import DeviceError, FileError

from .artifact import Artifact
from .runtimes import import_runtime

__all__ = ["ProfiledModel"]

_LIBRARY = "libLiteRt"
_CPU = 1  # a bit of LiteRtHwAcceleratorSet
_WRITE = 1  # of LiteRtTensorBufferLockMode
_TYPE_BYTES = 1024  # LiteRtRankedTensorType needs 76
_LAYOUT, _LAYOUT_BYTES = 4, 68  # where LiteRtLayout is in it: behind the type of number
_DIMENSIONS = 8  # where the sizes are in it: behind the rank


_free_nothing = ctypes.CFUNCTYPE(None, c_void_p)(lambda _: None)


class _Event(ctypes.Structure):
    """``ProfiledEventData`` of litert/c/litert_profiler_event.h, with the memory usage of tflite/profiling/memory_info.h."""

    _fields_ = [
        ("tag", c_char_p), ("type", c_int), ("start_us", c_uint64), ("elapsed_us", c_uint64), ("memory", c_int64 * 6),
        ("number", c_uint64), ("subgraph", c_uint64), ("source", c_int),
    ]  # fmt: skip


class ProfiledModel:
    """A TFLite file in LiteRT's compiled model on the CPU, that tells of every run what each operator took.

    A mistake in here, or a library with another interface, ends the process: use it in one of its own.

    Attributes:
        run_ns: of each run, without the reading of its events.

    Raises:
        DeviceError: ai-edge-litert is not installed, or has no profiler.
        FileError: LiteRT refuses the file.
    """

    def __init__(self, artifact: Artifact, threads: int):
        self._name = artifact.path.name
        self._library = _load()
        self._environment, self._model, self._compiled, self._profiler = c_void_p(), c_void_p(), c_void_p(), c_void_p()
        self._keep: list[Any] = []
        self._call("LiteRtCreateEnvironment", c_int(0), ctypes.create_string_buffer(256), byref(self._environment))
        path = str(artifact.path).encode()
        self._call("LiteRtCreateModelFromFile", self._environment, path, byref(self._model))
        self._call("LiteRtCreateCompiledModel", self._environment, self._model, self._options(threads), byref(self._compiled))
        self._call("LiteRtCompiledModelGetProfiler", self._compiled, byref(self._profiler))
        self.run_ns: list[int] = []
        self._inputs: Any = None
        self._outputs: Any = None

    def feed(self, feeds: Sequence[np.ndarray]) -> None:
        """Set the inputs of all runs, in the order of the file's inputs."""
        signature = c_void_p()
        self._call("LiteRtGetModelSignature", self._model, c_size_t(0), byref(signature))
        tensors = self._tensors(signature, "Input")
        for i, (tensor, feed) in enumerate(zip(tensors, self._ordered(tensors, feeds), strict=True)):
            if tuple(self._sizes(self._type(tensor), feed.ndim)) != feed.shape:
                sizes = (c_int * feed.ndim)(*feed.shape)
                self._call("LiteRtCompiledModelResizeInputTensorNonStrict", self._compiled, c_size_t(0), c_size_t(i), sizes,
                           c_size_t(feed.ndim))  # fmt: skip
        buffers = []
        for i, (tensor, feed) in enumerate(zip(tensors, self._ordered(tensors, feeds), strict=True)):
            buffers.append(self._buffer("Input", i, self._type(tensor, feed.shape)))
            self._write(buffers[-1], feed)
        self._inputs = (c_void_p * len(buffers))(*buffers)
        tensors = self._tensors(signature, "Output")
        layouts = ctypes.create_string_buffer(_LAYOUT_BYTES * len(tensors))  # after the inputs' sizes were set
        self._call("LiteRtGetCompiledModelOutputTensorLayouts", self._compiled, c_size_t(0), c_size_t(len(tensors)), layouts,
                   c_bool(True))  # fmt: skip
        outputs = []
        for i, tensor in enumerate(tensors):
            kind, at = self._type(tensor), i * _LAYOUT_BYTES
            kind[_LAYOUT : _LAYOUT + _LAYOUT_BYTES] = layouts[at : at + _LAYOUT_BYTES]
            outputs.append(self._buffer("Output", i, kind))
        self._outputs = (c_void_p * len(outputs))(*outputs)

    def run(self) -> list[tuple[str, int, int, int, int]]:
        """Run once and read the profiler's events: (name, type, nanoseconds, operator's number, subgraph's number) of each."""
        start = time.perf_counter_ns()
        self._call("LiteRtStartProfiler", self._profiler)
        self._call("LiteRtRunCompiledModel", self._compiled, c_size_t(0), c_size_t(len(self._inputs)), self._inputs,
                   c_size_t(len(self._outputs)), self._outputs)  # fmt: skip
        self._call("LiteRtStopProfiler", self._profiler)
        self.run_ns.append(time.perf_counter_ns() - start)
        count = c_int()
        self._call("LiteRtGetNumProfilerEvents", self._profiler, byref(count))
        events = (_Event * max(count.value, 1))()
        if count.value:
            self._call("LiteRtGetProfilerEvents", self._profiler, count, events)
        found = [
            (e.tag.decode("utf-8", "replace"), e.type, int(e.elapsed_us) * 1000, int(e.number), int(e.subgraph))
            for e in events[: count.value]
        ]
        self._call("LiteRtResetProfiler", self._profiler)
        return found

    def _options(self, threads: int) -> c_void_p:
        options = c_void_p()
        self._call("LiteRtCreateOptions", byref(options))
        self._call("LiteRtSetOptionsHardwareAccelerators", options, c_int(_CPU))
        for name, text in (
            (b"runtime_options_string", b"enable_profiling = true\n"),
            (b"xnnpack", b"num_threads = %d\n" % threads),
        ):
            content, opaque = ctypes.create_string_buffer(text), c_void_p()
            self._keep.append(content)  # it is ours, so there is nothing to free for the library
            self._call("LiteRtCreateOpaqueOptions", name, content, _free_nothing, byref(opaque))
            self._call("LiteRtAddOpaqueOptions", options, opaque)
        return options

    def _tensors(self, signature: c_void_p, kind: str) -> list[c_void_p]:
        count, found = c_size_t(), []
        self._call(f"LiteRtGetNumSignature{kind}s", signature, byref(count))
        for i in range(count.value):
            found.append(c_void_p())
            self._call(f"LiteRtGetSignature{kind}TensorByIndex", signature, c_size_t(i), byref(found[-1]))
        return found

    def _ordered(self, tensors: Sequence[c_void_p], feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A signature's order is its own; the file's is that of the graph's inputs."""
        graph, count = c_void_p(), c_size_t()
        self._call("LiteRtGetModelSubgraph", self._model, c_size_t(0), byref(graph))
        self._call("LiteRtGetNumSubgraphInputs", graph, byref(count))
        order = {}
        for i in range(count.value):
            tensor = c_void_p()
            self._call("LiteRtGetSubgraphInput", graph, c_size_t(i), byref(tensor))
            order[self._index(tensor)] = i
        return [feeds[order[self._index(tensor)]] for tensor in tensors]

    def _index(self, tensor: c_void_p) -> int:
        index = c_uint32()
        self._call("LiteRtGetTensorIndex", tensor, byref(index))
        return index.value

    def _type(self, tensor: c_void_p, shape: Sequence[int] | None = None) -> Any:
        kind = ctypes.create_string_buffer(_TYPE_BYTES)
        self._call("LiteRtGetRankedTensorType", tensor, kind)
        if shape is not None:
            self._sizes(kind, len(shape))[:] = list(shape)
        return kind

    def _sizes(self, kind: Any, rank: int) -> Any:
        return (c_int32 * rank).from_buffer(kind, _DIMENSIONS)

    def _buffer(self, kind: str, number: int, tensor_type: Any) -> c_void_p:
        needs, buffer = c_void_p(), c_void_p()
        self._call(f"LiteRtGetCompiledModel{kind}BufferRequirements", self._compiled, c_size_t(0), c_size_t(number), byref(needs))
        self._call("LiteRtCreateManagedTensorBufferFromRequirements", self._environment, tensor_type, needs, byref(buffer))
        return buffer

    def _write(self, buffer: c_void_p, feed: np.ndarray) -> None:
        size, address, data = c_size_t(), c_void_p(), np.ascontiguousarray(feed)
        self._call("LiteRtGetTensorBufferPackedSize", buffer, byref(size))
        if size.value != data.nbytes:
            raise FileError(f"{self._name} wants {size.value} bytes where {data.nbytes} were given.")
        self._call("LiteRtLockTensorBuffer", buffer, byref(address), c_int(_WRITE))
        ctypes.memmove(address, data.ctypes.data, data.nbytes)
        self._call("LiteRtUnlockTensorBuffer", buffer)

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise FileError(f"LiteRT's compiled model does not run {self._name}: {function} gave status {status}.")


def _load() -> ctypes.CDLL:
    package = import_runtime("ai_edge_litert", "ai-edge-litert")
    found = sorted(Path(package.__file__).parent.glob(f"{_LIBRARY}.*"))
    if not found:
        raise DeviceError("This ai-edge-litert has no profiler: pip install 'ai-edge-litert>=2.3'")
    library = ctypes.CDLL(str(found[0]))
    missing = [name for name in ("LiteRtCompiledModelGetProfiler", "LiteRtGetProfilerEvents") if not hasattr(library, name)]
    if missing:
        raise DeviceError("This ai-edge-litert has no profiler: pip install 'ai-edge-litert>=2.3'")
    return library
