"""``.pt2`` programs in PyTorch: eager, Inductor, CUDA graphs, AOTInductor; on the CPU or on an NVIDIA GPU.

``EDGEPRESS_TORCH_DEVICE`` says where: ``cpu`` where it is not set. What is timed is the program alone: its inputs are on the
device before, its outputs stay there. On a GPU each run is timed by two CUDA events and waited for.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
import shutil
import tempfile
import time
import warnings
import weakref

from .frames import Failure
from .pt2 import examine
from .sessions import Session, silence

__all__ = ["Program", "import_torch", "load_program", "open_program", "session_of"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Any

_COMPILED = ("inductor", "max-autotune", "aoti")
_MODES = ("", "inductor", "max-autotune", "cudagraphs", "aoti")
_PRECISIONS = ("", "bf16", "fp16")
_LEAST = (2, 11)
_ON_DEVICE = __name__.startswith("edgepress_agent.")  # in a worker of an agent, whose process and folder are ours
_WARM_UP = 3  # runs before a CUDA graph is captured, as PyTorch's manual asks
_EVENT_STEP_NS = 500  # what a CUDA event resolves, by cudaEventElapsedTime's manual


def load_program(path: str, runtime: str, threads: int) -> Session:
    """Load a ``.pt2`` file of ``torch.export.save``.

    Args:
        path: the file.
        runtime: ``'torch'``, ``'torch:inductor'``, ``'torch:max-autotune'``, ``'torch:cudagraphs'`` or ``'torch:aoti'``, each
            also with weights and activations converted, ``'torch:inductor:bf16'``, ``'torch:fp16'``.
        threads: how many one run may use on the CPU.

    Raises:
        Failure: ``missing``, ``load``; its sessions raise ``run``.
    """
    return session_of(open_program(path, runtime, threads), runtime)


def session_of(program: Program, runtime: str) -> Session:
    """A program as the agent measures it."""
    session = Session(runtime, program.torch.__version__, program.run)
    session.stopwatch, session.compile_ns = program.stopwatch, lambda: program.compile_ns
    if program.device.type == "cuda":
        session.step_ns, session.memory_bytes = _EVENT_STEP_NS, program.memory_bytes
    return session


def open_program(path: str, runtime: str, threads: int) -> Program:
    """`load_program`, for who wants the callable itself."""
    mode, precision = _chosen(runtime)
    torch = import_torch()
    device = torch.device(os.environ.get("EDGEPRESS_TORCH_DEVICE", "cpu"))
    _check_mode(mode, device.type)
    _own_folder(os.path.dirname(path))
    with _failing("load"), _quiet():
        _check_archive(torch, path)
        program = torch.export.load(path)
        program._guards_code = []  # never evaluated
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        return Program(torch, program, device, dtype, mode, threads, os.path.dirname(path) if _ON_DEVICE else None)


def import_torch() -> Any:
    """PyTorch, with the GPU made ready where one is asked for.

    Raises:
        Failure: ``missing``: there is none, or an old one.
    """
    try:
        import torch
        import torch._export.serde.serialize  # what reading a file imports: seconds that are not the file's
        import torch.export.pt2_archive
    except ImportError as error:
        raise Failure("missing", "torch") from error
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _LEAST:
        raise Failure("missing", f"torch with version {_LEAST[0]}.{_LEAST[1]} or later ({torch.__version__} is)")
    if os.environ.get("EDGEPRESS_TORCH_DEVICE", "cpu") != "cpu":
        with _failing("load"):
            torch.zeros(1, device=os.environ["EDGEPRESS_TORCH_DEVICE"])
    return torch


def _chosen(runtime: str) -> tuple[str, str]:
    name, *options = runtime.split(":")
    if name == "torch" and len(options) < 3:
        mode = options[0] if options and options[0] in _MODES else ""
        rest = options[bool(mode) :]
        if len(rest) < 2 and (rest[0] if rest else "") in _PRECISIONS:
            return mode, rest[0] if rest else ""
    known = ", ".join(f"torch:{mode}" for mode in _MODES if mode)
    raise Failure(
        "load", f"a .pt2 file is run by torch, {known}, each also with :bf16 or :fp16 behind it", runtime=runtime or "Nothing"
    )


def _check_mode(mode: str, device: str) -> None:
    """Say what is missing before minutes are spent on finding out.

    Raises:
        Failure: ``missing``, ``load``.
    """
    if mode == "cudagraphs" and device != "cuda":
        raise Failure("load", "CUDA graphs need an NVIDIA GPU, the device 'cuda'", runtime="PyTorch")
    if mode not in _COMPILED:
        return
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++")):
        raise Failure("load", f"{mode} needs a C++ compiler (g++), and there is none", runtime="PyTorch")
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise Failure("missing", "triton")
    if device == "cuda" and mode == "aoti" and not _cuda_home():
        why = "aoti needs the headers of the CUDA toolkit to compile for a GPU, and there is none: set CUDA_HOME to its folder"
        raise Failure("load", why, runtime="PyTorch")


def _cuda_home() -> str | None:
    """Where PyTorch sees a CUDA toolkit."""
    from torch.utils.cpp_extension import CUDA_HOME

    return CUDA_HOME  # type: ignore[no-any-return,unused-ignore]


def _own_folder(folder: str) -> None:
    """On a device temporary files go where the file is: that folder is removed afterwards."""
    if _ON_DEVICE:
        os.environ["TMPDIR"] = tempfile.tempdir = os.path.join(folder, "tmp")
        os.makedirs(tempfile.tempdir, exist_ok=True)


def _check_archive(torch: Any, path: str) -> None:
    """As PyTorch's own reader sees the file: another one may see other entries in a made-up archive."""
    reader = torch._C.PyTorchFileReader(path)
    names = reader.get_all_records()
    examine(names, reader.get_record)
    if "data/sample_inputs/model.pt" in names and (content := reader.get_record("data/sample_inputs/model.pt")):
        try:
            torch.load(io.BytesIO(content), weights_only=True)
        except Exception as error:  # torch.export.load would go on and read it as any pickle
            raise ValueError("its sample inputs are a pickle, which could run code when it is read") from error


class Program:
    """A program on a device, compiled anew for each shape of inputs.

    Args:
        torch: the module.
        program: a ``torch.export.ExportedProgram``.
        device: a ``torch.device``.
        dtype: what floats are converted to; None leaves them.
        mode: one of ``_MODES``.
        threads: how many one run may use on the CPU.
        folder: where what is compiled is kept; temporary folders where None.

    Attributes:
        compile_ns: spent on compiling so far, the first run of what came of it included; None where nothing is compiled.
    """

    def __init__(self, torch: Any, program: Any, device: Any, dtype: Any, mode: str, threads: int, folder: str | None):
        self.torch, self.device, self.dtype, self.mode, self.threads = torch, device, dtype, mode, threads
        self.folder = folder
        self.spec = program.call_spec.in_spec
        self.module = _module(torch, program, device, dtype)
        self.ready: dict[Any, Callable[..., Any]] = {}
        self.compile_ns: int | None = None

    def run(self, feeds: Sequence[Any]) -> list[Any]:
        """Arrays in, arrays out."""
        with _failing("run"), self.settings():
            inputs = self.placed(feeds)
            outputs = self.torch.utils._pytree.tree_leaves(self.call_for(inputs)(*inputs))
            return [self._array(output) for output in outputs]

    def stopwatch(self, feeds: Sequence[Any]) -> Callable[[int], int]:
        """Nanoseconds that so many runs take, one after the other, each waited for."""
        with _failing("run"), self.settings():
            inputs = self.placed(feeds)
            if self.mode == "cudagraphs":
                self.ready.clear()  # the graph shall read these very inputs: a copy would be timed too
            call = self.call_for(inputs)
            call(*inputs)
        if self.device.type == "cuda":
            return self._by_events(call, inputs)

        def timed(runs: int) -> int:
            with _failing("run"), self.settings():
                start = time.perf_counter_ns()
                for _ in range(runs):
                    call(*inputs)
                return time.perf_counter_ns() - start

        return timed

    def _by_events(self, call: Callable[..., Any], inputs: Sequence[Any]) -> Callable[[int], int]:
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))

        def timed(runs: int) -> int:
            total_ms = 0.0
            with _failing("run"), self.settings():
                self.torch.cuda.synchronize(self.device)
                for _ in range(runs):
                    start.record()
                    call(*inputs)
                    end.record()
                    end.synchronize()
                    total_ms += start.elapsed_time(end)
            return round(total_ms * 1e6)

        return timed

    def memory_bytes(self) -> int:
        """The most that PyTorch had allocated on the GPU at one time, weights included; while compiling it may have been more.

        A package of AOTInductor has its weights outside of PyTorch's count. Those of the program that it was made of, which stay,
        are as many.
        """
        return int(self.torch.cuda.max_memory_allocated(self.device))

    # ---- pieces

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """How a run is made: so many threads, on the device, and nothing kept for gradients."""
        before = self.torch.get_num_threads()
        if before != self.threads:
            self.torch.set_num_threads(self.threads)
        cuda = self.device.type == "cuda"  # streams and events are the current GPU's
        try:
            with self.torch.inference_mode(), self.torch.cuda.device(self.device) if cuda else contextlib.nullcontext():
                yield
        finally:
            if before != self.threads and not _ON_DEVICE:
                self.torch.set_num_threads(before)  # this process is not ours alone

    def placed(self, feeds: Sequence[Any]) -> list[Any]:
        """Arrays as tensors on the device."""
        tensors = [self.torch.from_numpy(feed.copy()).to(self.device) for feed in feeds]
        return [t.to(self.dtype) if self.dtype and t.is_floating_point() else t for t in tensors]

    def _array(self, output: Any) -> Any:
        wide = self.dtype is not None and output.dtype == self.dtype
        return (output.float() if wide else output).cpu().numpy()

    def call_for(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        """What is called for inputs of these shapes."""
        key = tuple(tuple(value.shape) for value in inputs)
        if key not in self.ready:
            start = time.perf_counter_ns()
            with _quiet():
                self._own_cache()
                self.ready[key] = self._compiled(inputs)
            if self.mode in _COMPILED:
                self.compile_ns = (self.compile_ns or 0) + time.perf_counter_ns() - start
                if self.device.type == "cuda":
                    self.torch.cuda.reset_peak_memory_stats(self.device)  # the kernels that were tried need not stay
        return self.ready[key]

    def _own_cache(self) -> None:
        """On a device a cache for this file, mode and precision: what another one compiled would shorten the time of this one."""
        if self.folder is not None and self.mode in _COMPILED:
            cache = os.path.join(self.folder, f"{self.mode}-{self.dtype or 'as-is'}")
            os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = cache, os.path.join(cache, "triton")

    def _compiled(self, inputs: Sequence[Any]) -> Callable[..., Any]:
        plain = self._flat(self.module)
        if self.mode == "cudagraphs":
            return _captured(self.torch, plain, inputs)
        if _ON_DEVICE and self.mode in _COMPILED:
            config = self.torch._inductor.config  # headers compiled beforehand pay with the second file that is compiled
            config.cpp_cache_precompile_headers = config.aot_inductor.precompile_headers = False
        if self.mode == "aoti":
            return self._flat(self._package(inputs))
        if self.mode:
            mode = "default" if self.mode == "inductor" else self.mode
            plain = self._flat(self.torch.compile(self.module, mode=mode, fullgraph=True, dynamic=False))
            plain(*inputs)
        return plain

    def _flat(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """The program as a function of its inputs, however it takes them."""
        pytree, count = self.torch.utils._pytree, self.spec.num_leaves
        if pytree.tree_unflatten(list(range(count)), self.spec) == (tuple(range(count)), {}):
            return call

        def nested(*inputs: Any) -> Any:
            args, kwargs = pytree.tree_unflatten(list(inputs), self.spec)
            return call(*args, **kwargs)

        return nested

    def _package(self, inputs: Sequence[Any]) -> Any:
        """Compile ahead of time, and load what came of it."""
        args, kwargs = self.torch.utils._pytree.tree_unflatten(list(inputs), self.spec)
        shapes = "-".join("x".join(map(str, value.shape)) for value in inputs)
        path = os.path.join(self.folder or self._scratch(), f"{self.mode}-{self.dtype or 'as-is'}-{shapes}.pt2")
        if os.path.exists(path):  # the worker that checked the file made it
            return self.torch._inductor.aoti_load_package(path)
        with self.torch.inference_mode(False), self.torch.no_grad():
            program = self.torch.export.export(self.module, args, kwargs, strict=False)
            self.torch._inductor.aoti_compile_and_package(program, package_path=path)
            return self.torch._inductor.aoti_load_package(path)

    def _scratch(self) -> str:
        folder = tempfile.mkdtemp(prefix="edgepress-aoti-")
        weakref.finalize(self, shutil.rmtree, folder, True)
        return folder


def _captured(torch: Any, call: Callable[..., Any], inputs: Sequence[Any]) -> Callable[..., Any]:
    """The program's kernels as one CUDA graph, launched at once; it reads ``inputs``, and others are copied there first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(*inputs)

    def replay(*given: Any) -> Any:
        for mine, value in zip(inputs, given):
            if mine is not value:
                mine.copy_(value)
        graph.replay()
        return outputs

    return replay


def _module(torch: Any, program: Any, device: Any, dtype: Any) -> Any:
    """The program's graph with its weights on the device, converted where ``dtype`` is not None."""
    module = program.module(check_guards=False)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    if dtype is not None:  # before they are moved: the GPU shall not hold them twice
        module.to(dtype)
    module.to(device)
    moved = functools.partial(_moved, torch, device, dtype)
    for part in module.modules():
        if not isinstance(part, torch.fx.GraphModule):
            continue
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                converted = value.to(dtype) if dtype and value.is_floating_point() else value
                setattr(part, name, converted.to(device))
        for node in part.graph.nodes:
            if node.op == "call_function":
                node.args = torch.fx.node.map_aggregate(node.args, moved)
                node.kwargs = torch.fx.node.map_aggregate(node.kwargs, moved)
        part.recompile()
    return module


def _moved(torch: Any, device: Any, dtype: Any, argument: Any) -> Any:
    """An operator's argument: devices and types that the export wrote into the graph follow."""
    if isinstance(argument, torch.device):
        return device
    return dtype if dtype is not None and argument in (torch.float32, torch.float64) else argument


@contextlib.contextmanager
def _failing(kind: str) -> Iterator[None]:
    try:
        yield
    except (Failure, MemoryError):
        raise
    except Exception as error:
        cause = getattr(error, "inner_exception", None) or error  # the compiler's own, inside Dynamo's
        lines = str(cause).strip().splitlines()
        detail = lines[0].strip().rstrip(".") if lines else type(cause).__name__
        raise Failure(kind, detail, runtime="PyTorch") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Loading and compiling warn of much that nobody who measures can change."""
    with warnings.catch_warnings(), silence():
        warnings.simplefilter("ignore")
        yield
