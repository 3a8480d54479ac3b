"""The process that runs strangers' files in TensorFlow Lite Micro (TFLM) and in LiteRT's reference kernels, and compares them.

TFLM says what it misses and how much memory it takes in its log only, so that is read.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import DeviceError, FileError, UserError

from .runtimes import import_runtime
from .silence import silence

__all__ = ["FLOAT_TOLERANCE", "MOST_ARENA", "REFERENCE", "TFLM", "distance", "load", "operator_kinds", "serve"]

TFLM, REFERENCE = "TFLM", "LiteRT's reference kernels"
FLOAT_TOLERANCE = 1e-5
"""Of float outputs, of the largest one: two orders of summation."""
MOST_ARENA = 64 << 20
"""Bytes that are tried at most: the external memory of the largest microcontrollers."""

_MOST_MEMORY = 8 << 30  # of this process's address space: a damaged file may ask for anything
_ALIGNMENT = 16  # of an arena, and so the step in which its size is looked for
_WORKS, _REFUSED, _LACKS_KERNEL = 0, 1, 2


def serve() -> None:
    """Serve one request from stdin; each finding is a line of JSON on stdout, so that a crash loses only what came after."""
    out = os.fdopen(os.dup(1), "w")  # `silence` diverts the first one

    def say(**facts: Any) -> None:
        print(json.dumps(facts), file=out, flush=True)

    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on every system

        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _serve(json.load(sys.stdin), say)
    except UserError as error:
        say(error=type(error).__name__, message=str(error))
    except MemoryError:
        say(refused="it asks for more memory than this computer gives")


def _serve(request: dict[str, Any], say: Callable[..., None]) -> None:
    say(stage=TFLM)
    tflm = _imported()
    say(version=str(getattr(tflm, "__version__", "")))
    data, folder = Path(request["path"]).read_bytes(), request["folder"]
    if hashlib.sha256(data).hexdigest() != request["sha256"]:
        raise FileError(f"{request['path']} is not the file that was described: read it again.")
    kinds = operator_kinds(data)
    say(operators=list(dict.fromkeys(kinds)))
    runs = [[np.asarray(feed) for feed in run] for run in zip(*load(folder, "input", request["inputs"]), strict=True)]
    interpreter, complaint = _open(tflm, data, MOST_ARENA)
    if interpreter is None:
        say(refused=complaint)
        _find_missing(tflm, data, complaint, say)
        return
    arena = _smallest_arena(tflm, data, _used_arena(interpreter, runs[0] if runs else []))
    say(arena_bytes=arena)
    interpreter, complaint = _open(tflm, data, arena)
    got, complaint = ([], complaint) if interpreter is None else _run_tflm(interpreter, runs)
    if complaint:
        say(refused=complaint)
        return
    say(stage=REFERENCE)
    try:
        wanted = _run_reference(data, runs)
    except (RuntimeError, ValueError) as error:
        say(refused=_told(str(error)))
        return
    if odd := _odd(wanted, got):
        say(stage=TFLM, refused=odd)
        return
    for name, outputs in (("tflm", got), ("reference", wanted)):
        for i, values in enumerate(outputs):
            np.save(os.path.join(folder, f"{name}-{i}.npy"), values, allow_pickle=False)
    say(outputs=len(wanted))
    if any(distance(w, g) for w, g in zip(wanted, got, strict=True)):
        with contextlib.suppress(RuntimeError, ValueError):  # a file that runs may still not run taken apart
            say(differing=_differing(tflm, data, runs))


def _imported() -> Any:
    with silence():
        try:
            return import_runtime("tflite_micro", "tflite-micro")
        except DeviceError as error:
            cause = error.__cause__
            if isinstance(cause, ModuleNotFoundError) and cause.name == "tflite_micro":
                raise
            # some releases import tensorflow, or are built for another version of Python than their name says
            raise DeviceError(
                f"The package tflite-micro is installed and cannot be imported ({cause}): pip install --upgrade tflite-micro"
            ) from error


def _told(log: str) -> str:
    """Lines of a log as part of a sentence, without the places in TFLM's own source."""
    lines = [re.sub(r"^(\S*/)?[\w.]+\.(cc|h)(:\d+)?:? ", "", line.strip()).rstrip(".") for line in log.splitlines()]
    return "; ".join(line for line in lines if line)[:300]


def _open(tflm: Any, data: bytes, arena: int, **options: Any) -> tuple[Any, str]:
    """An interpreter, or None and what TFLM had to say."""
    with silence() as log:
        try:
            return tflm.runtime.Interpreter.from_bytes(data, arena_size=arena, **options), ""
        except RuntimeError as error:
            log.seek(0)
            return None, _told(log.read().decode("utf-8", "replace")) or _told(str(error))


def _tried(tflm: Any, data: bytes, arena: int) -> int:
    """What comes of opening a file, in a process of its own: in some arenas that are too small TFLM crashes."""
    child = os.fork()
    if not child:
        code = _REFUSED
        try:
            interpreter, complaint = _open(tflm, data, arena)
            code = _WORKS if interpreter is not None else _LACKS_KERNEL if _lacks_kernel(complaint) else _REFUSED
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_tflm(interpreter: Any, runs: Sequence[Sequence[np.ndarray]]) -> tuple[list[np.ndarray], str]:
    """Outputs, ``[runs, ...]`` each, or what TFLM had to say."""
    taken: list[list[np.ndarray]] = []
    with silence() as log:
        try:
            for feeds in runs or [[]]:
                _invoke_tflm(interpreter, feeds)
                taken.append(_tflm_outputs(interpreter))
        except (RuntimeError, ValueError) as error:
            log.seek(0)
            return [], _told(log.read().decode("utf-8", "replace")) or _told(str(error))
    return [np.stack(values) for values in zip(*taken, strict=True)], ""


def _invoke_tflm(interpreter: Any, feeds: Sequence[np.ndarray]) -> None:
    interpreter.reset()  # examples have nothing to do with each other, also where the file keeps a state
    for i, feed in enumerate(feeds):
        interpreter.set_input(feed, i)
    interpreter.invoke()


def _tflm_outputs(interpreter: Any) -> list[np.ndarray]:
    outputs: list[np.ndarray] = []
    with contextlib.suppress(IndexError, ValueError, RuntimeError):  # the interpreter does not say how many there are
        while True:
            interpreter.get_output_details(len(outputs))
            outputs.append(np.array(interpreter.get_output(len(outputs))))
    return outputs


def _used_arena(interpreter: Any, feeds: Sequence[np.ndarray]) -> int:
    """Bytes of the arena that are taken once everything is in place, by TFLM's own count; 0 where it does not say."""
    with silence() as log:
        with contextlib.suppress(RuntimeError, ValueError):
            _invoke_tflm(interpreter, feeds)
        interpreter.print_allocations()
        log.seek(0)
        found = re.search(rb"Arena allocation total (\d+)", log.read())
    return int(found[1]) if found else 0


def _smallest_arena(tflm: Any, data: bytes, used: int) -> int:
    """The smallest arena, in steps of 16 bytes, in which the file is set up: planning may take more than what stays in use."""

    def works(size: int) -> bool:
        return _tried(tflm, data, size) == _WORKS

    high = max(-(-used // _ALIGNMENT) * _ALIGNMENT, _ALIGNMENT)
    low = high - _ALIGNMENT
    while high < MOST_ARENA and not works(high):
        low, high = high, min(high + max(high // 8 // _ALIGNMENT, 1) * _ALIGNMENT, MOST_ARENA)
    while high - low > _ALIGNMENT:
        middle = (low + high) // 2 // _ALIGNMENT * _ALIGNMENT
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _odd(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> str:
    """How the outputs differ in number, shape or type; empty where they do not."""
    described = [", ".join(f"{x.dtype} {list(x.shape[1:])}" for x in outputs) for outputs in (wanted, got)]
    return "" if described[0] == described[1] else f"it gives {described[1]} where LiteRT gives {described[0]}"


def _run_reference(data: bytes, runs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    interpreter = _reference(data)
    taken = []
    with silence():
        for feeds in runs or [[]]:
            _invoke_reference(interpreter, feeds)
            taken.append([interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()])
    return [np.stack(values) for values in zip(*taken, strict=True)]


def _reference(data: bytes) -> Any:
    litert = import_runtime("ai_edge_litert.interpreter", "ai-edge-litert")
    with silence():
        interpreter = litert.Interpreter(
            model_content=data, num_threads=1, experimental_op_resolver_type=litert.OpResolverType.BUILTIN_REF
        )
        interpreter.allocate_tensors()
    return interpreter


def _invoke_reference(interpreter: Any, feeds: Sequence[np.ndarray]) -> None:
    interpreter.reset_all_variables()
    for detail, feed in zip(interpreter.get_input_details(), feeds, strict=True):
        interpreter.set_tensor(detail["index"], feed)
    interpreter.invoke()


# ---- operators


def _model(data: bytes) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromPackedBuf(data, 0)


def _kind(code: Any) -> str:
    from ai_edge_litert import schema_py_generated as schema

    number = max(code.builtinCode, code.deprecatedBuiltinCode)
    if number == schema.BuiltinOperator.CUSTOM:
        custom = code.customCode
        return custom.decode("utf-8", "replace") if isinstance(custom, bytes) else str(custom or "CUSTOM")
    names = (name for name, value in vars(schema.BuiltinOperator).items() if value == number and not name.startswith("_"))
    return next(names, f"operator {number}")


def operator_kinds(data: bytes) -> list[str]:
    """Of every operator, in the order of the file."""
    model = _model(data)
    kinds = [_kind(code) for code in model.operatorCodes]
    return [kinds[operator.opcodeIndex] for graph in model.subgraphs for operator in graph.operators or ()]


def _find_missing(tflm: Any, data: bytes, complaint: str, say: Callable[..., None]) -> None:
    """Say every operator that TFLM lacks; its complaint names the first one only.

    Each kind is tried in a copy of the file in which all others are a kind that TFLM has. Those copies do not run, but it
    looks for the kernels before it finds that out.
    """
    if not _lacks_kernel(complaint):
        return
    missing: list[str] = []
    for index, code in enumerate(_model(data).operatorCodes):
        kind = _kind(code)
        if kind not in missing and _tried(tflm, _with_only(data, index), MOST_ARENA) == _LACKS_KERNEL:
            missing.append(kind)
            say(missing=missing)


def _lacks_kernel(complaint: str) -> bool:
    return "Failed to get registration" in complaint


def _with_only(data: bytes, index: int) -> bytes:
    """The file with all kinds of operators but one replaced by LOGISTIC, which reads no options."""
    from ai_edge_litert import schema_py_generated as schema

    model = _model(data)
    for i, code in enumerate(model.operatorCodes):
        if i != index:
            code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.LOGISTIC
    return _packed(model)


def _packed(model: Any) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _differing(tflm: Any, data: bytes, runs: Sequence[Sequence[np.ndarray]]) -> list[list[Any]]:
    """Place, kind, largest difference, and whether that is in steps, of each operator that differs on the same inputs.

    Empty where operators cannot be looked at one by one: they hold a state or call other graphs, or all tensors together are too
    much for an arena.
    """
    keep = tflm.runtime.InterpreterConfig.kPreserveAllTensors
    micro, _ = _open(tflm, data, MOST_ARENA, intrepreter_config=keep)
    graphs = _model(data).subgraphs
    if micro is None or len(graphs) > 1 or any(tensor.isVariable for tensor in graphs[0].tensors):
        return []
    content, fed = _taken_apart(data)
    litert = _reference(content)
    places = [(i, index) for i, operator in enumerate(graphs[0].operators) for index in operator.outputs]
    worst: dict[int, list[Any]] = {}
    for feeds in runs:
        with silence():
            _invoke_tflm(micro, feeds)
            details = litert.get_input_details()
            inputs = [_kept(micro, i).reshape(detail["shape"]) for i, detail in zip(fed, details, strict=True)]
            _invoke_reference(litert, inputs)
        for (i, index), detail in zip(places, litert.get_output_details(), strict=True):
            wanted = litert.get_tensor(detail["index"])
            apart, integers = distance(wanted, _kept(micro, index).reshape(wanted.shape)), wanted.dtype.kind != "f"
            if apart > (0 if integers else FLOAT_TOLERANCE) and apart > worst.get(i, [0])[0]:
                worst[i] = [apart, integers]
    kinds = operator_kinds(data)
    return [[i, kinds[i], *worst[i]] for i in sorted(worst)]


def _taken_apart(data: bytes) -> tuple[bytes, list[int]]:
    """The file with every operator on its own, and the tensors that the inputs of that graph stand for.

    All that an operator reads and that is no weight becomes an input of the graph, and all that it writes an output.
    """
    model = _model(data)
    graph = model.subgraphs[0]
    fed: list[int] = []
    first = len(graph.tensors)
    for operator in graph.operators:
        operator.inputs = list(operator.inputs)
        for place, index in enumerate(operator.inputs):
            if index < 0 or model.buffers[graph.tensors[index].buffer].data is not None:
                continue
            tensor = copy.copy(graph.tensors[index])
            tensor.name, tensor.buffer, tensor.shapeSignature = f"fed {len(fed)}", 0, None
            graph.tensors.append(tensor)
            operator.inputs[place] = len(graph.tensors) - 1
            fed.append(int(index))
    graph.inputs = list(range(first, len(graph.tensors)))
    graph.outputs = [index for operator in graph.operators for index in operator.outputs]
    model.signatureDefs = model.metadata = None
    return _packed(model), fed


def _kept(interpreter: Any, index: int) -> np.ndarray:
    value = interpreter.GetTensor(index, 0)
    return np.asarray(value["tensor_data"] if isinstance(value, dict) else value)


# ---- arrays


def load(folder: str, name: str, count: int) -> list[np.ndarray]:
    """Read the arrays that are handed between the two processes: ``name-0.npy``, ``name-1.npy`` ...."""
    return [np.load(os.path.join(folder, f"{name}-{i}.npy"), allow_pickle=False) for i in range(count)]


def distance(wanted: np.ndarray, got: np.ndarray) -> float:
    """The largest difference of two arrays of one shape: of integers in steps, of floats over the largest one.

    It is infinite where only one is not a number.
    """
    if wanted.dtype.kind != "f":
        return int(np.abs(wanted.astype(np.int64) - got.astype(np.int64)).max(initial=0))
    same = (wanted == got) | (np.isnan(wanted) & np.isnan(got))
    with np.errstate(invalid="ignore"):
        apart = np.abs(np.where(same, 0, wanted.astype(np.float64) - got)).max(initial=0)
    if not np.isfinite(apart):
        return float("inf")
    return float(apart / (np.abs(wanted[np.isfinite(wanted)]).max(initial=0) or 1))
