"""Times by operator from LiteRT's own profiler.

LiteRT's Python packages have no way to it, but the library that they bring does: its C interface is called here, in a process of
its own, so that a version with another interface ends that process and not the caller's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress import errors
from edgepress.compress.errors import DeviceError, FileError, UserError

from .artifact import Artifact, read_artifact
from .partitions import aligned, partitions
from .profile import Profile, Timed, alternate, finish, join_modules, kept
from .runtimes import open_runtime, random_feeds

__all__ = ["profile_tflite"]

_CHILD = "from edgepress.targets.profile_tflite import _child; _child()"
_TICK_NS = 1000  # XNNPACK counts whole microseconds, rounded down
_OWN_KERNEL = 2  # types of the profiler's events: an operator that LiteRT runs itself, ...
_DELEGATED = (4, 8)  # ... and one inside a delegate
_CONVERTS = {
    "QUANTIZE": "to integer", "DEQUANTIZE": "integer to float", "CAST": "another type of number",
    "TRANSPOSE": "another order of axes",
}  # fmt: skip
_MOVES = {"Convert": "another type of number", "Transpose": "another order of axes", "Copy": "a copy"}
"""What XNNPACK puts in on its own account."""

_Event = tuple[str, int, int, int]
"""Name, type, nanoseconds, number of the operator in the file or in the delegate."""


def profile_tflite(
    artifact: Artifact, threads: int, feeds: Sequence[np.ndarray] | None, runs: int, timeout_s: float = 600.0
) -> Profile:
    """See `edgepress.targets.profile.profile`; ``artifact`` is a TFLite file."""
    arrays = list(feeds) if feeds is not None else random_feeds(artifact)
    answer = _ask(artifact, threads, arrays, runs, timeout_s)
    readings = kept(answer["events"], runs)
    shapes = [[(tag, kind, number) for tag, kind, _, number in reading] for reading in readings]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes):
        raise FileError(f"{artifact.path.name} did not run the same operators each time: its profile cannot be told.")
    if any(subgraph for subgraph in answer["subgraphs"]):
        raise FileError(f"{artifact.path.name} has loops or branches, whose operators LiteRT's profiler does not tell apart.")
    samples = [[reading[i][2] for reading in readings] for i in range(len(shapes[0]))]
    return finish(
        _timed(_operators(artifact), readings[0], samples, artifact.precision in ("int8", "mixed")), _TICK_NS,
        subject=artifact.path.name, runtime="litert", version=answer["version"], threads=threads, runs=runs,
        plain_ns=float(np.median(answer["plain"])), profiled_ns=float(np.median(answer["profiled"])),
        method="LiteRT's profiler and XNNPACK's within it, in whole microseconds; what lies between operators is in no row.",
    )  # fmt: skip


# ---- rows


@dataclass(frozen=True)
class _Operator:
    """One of the file: its type, the tensors that it reads and makes, its name and modules."""

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    name: str
    module: str
    floats: bool


def _operators(artifact: Artifact) -> list[_Operator]:
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(artifact.path.read_bytes(), 0)
    graph, kinds = model.subgraphs[0], {v: k for k, v in vars(schema.BuiltinOperator).items() if not k.startswith("_")}
    made = {int(index) for operator in graph.operators for index in operator.outputs}
    names = [(t.name.decode("utf-8", "replace") if isinstance(t.name, bytes) else t.name) or "" for t in graph.tensors]

    def read(operator: Any) -> _Operator:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        inputs = tuple(int(i) for i in (operator.inputs if operator.inputs is not None else ()) if i >= 0)
        outputs = tuple(int(i) for i in operator.outputs)
        constants = [i for i in inputs if i not in made and i not in set(graph.inputs)]
        modules = [m for i in (*constants, *outputs) if "#" in names[i] for m in names[i].rpartition("#")[0].split("+")]
        floats = bool(inputs) and graph.tensors[inputs[0]].type == schema.TensorType.FLOAT32
        return _Operator(kind, inputs, outputs, names[outputs[0]] if outputs else "", join_modules(modules), floats)

    return [read(operator) for operator in graph.operators]


def _timed(operators: list[_Operator], events: list[_Event], samples: list[list[int]], int8: bool) -> list[Timed]:
    own = {number for _, kind, _, number in events if kind == _OWN_KERNEL}
    parts = _delegated(operators, events, own)
    rows = []
    for (tag, kind, _, number), times, part in zip(events, samples, parts, strict=True):
        if kind == _OWN_KERNEL:
            rows.append(_own_row(operators[number], times, int8))
        else:
            rows.append(_delegated_row(part, tag, times, int8))
    return rows


def _own_row(operator: _Operator, samples: list[int], int8: bool) -> Timed:
    convert = f"{_CONVERTS[operator.kind]}; in the file" if operator.kind in _CONVERTS else None
    floats = ", in floats in an int8 file" if int8 and operator.floats and not convert else ""
    kernel = f"LiteRT {'float' if operator.floats else 'integer'}"
    fallback = f"not taken by XNNPACK{floats}"
    return Timed(operator.name, operator.kind, operator.module, kernel, samples, fallback, convert)


def _delegated_row(part: tuple[_Operator | None, bool], tag: str, samples: list[int], int8: bool) -> Timed:
    operator, exact = part
    stem = tag.partition(" (")[0]
    if operator is None:
        return Timed(
            stem, stem, "", f"XNNPACK {tag}", samples, None, f"{_MOVES[stem]}; put in by XNNPACK" if stem in _MOVES else None
        )
    convert = None
    if exact and operator.kind in _CONVERTS:
        convert = f"{_CONVERTS[operator.kind]}; in the file"
    elif not exact and stem in _MOVES:
        convert = f"{_MOVES[stem]}; put in by XNNPACK"
    floats = int8 and exact and convert is None and operator.floats
    fallback = "computes in floats in an int8 file" if floats else None
    return Timed(operator.name, operator.kind, operator.module, f"XNNPACK {tag}", samples, fallback, convert)


def _delegated(operators: list[_Operator], events: list[_Event], own: set[int]) -> list[tuple[_Operator | None, bool]]:
    """For each event the operator of the file behind it, and whether it is that operator's own kernel or one put in for it."""
    groups: list[list[int]] = []  # events of one part of the graph that the delegate took: their numbers start at 0
    for i, (_, kind, _, number) in enumerate(events):
        if kind in _DELEGATED:
            if number == 0 or not groups:
                groups.append([])
            groups[-1].append(i)
    taken = partitions([(o.inputs, o.outputs) for o in operators], own)
    if len(taken) != len(groups):  # another way of cutting: all of it as one
        groups, taken = [[i for group in groups for i in group]], [[i for part in taken for i in part]]
    found: list[tuple[_Operator | None, bool]] = [(None, False)] * len(events)
    for group, part in zip(groups, taken, strict=True):
        matches = aligned([events[i][0] for i in group], [operators[j].kind for j in part])
        before: _Operator | None = None
        for i, match in zip(group, matches, strict=True):
            before = operators[part[match]] if match is not None else before
            found[i] = (before, match is not None)
    return found


# ---- the process that runs the file


def _ask(artifact: Artifact, threads: int, feeds: list[np.ndarray], runs: int, timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="edgepress-") as folder:
        np.savez(os.path.join(folder, "feeds.npz"), *feeds)
        request = {"path": str(artifact.path.resolve()), "threads": threads, "runs": runs, "folder": folder}
        try:
            done = subprocess.run([sys.executable, "-P", "-c", _CHILD], input=json.dumps(request), capture_output=True, text=True,
                                  errors="replace", timeout=timeout_s, check=False)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DeviceError(f"{artifact.path.name} was not profiled in {timeout_s:.0f} s: ask for fewer runs.") from error
        except OSError as error:
            raise DeviceError(f"Cannot start a process to profile in: {error.strerror or error}.") from error
        try:
            answer: dict[str, Any] = json.loads((Path(folder) / "answer.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            how = f"signal {-done.returncode}" if done.returncode < 0 else last
            raise DeviceError(
                f"LiteRT's profiler failed on {artifact.path.name} ({how}): this version of ai-edge-litert may have another one."
            ) from error
    if "error" in answer:
        raise getattr(errors, answer["error"])(answer["message"])
    return answer


def _child() -> None:
    """Serve one request from stdin; the answer is a file, because the library writes to stdout and stderr."""
    request = json.load(sys.stdin)
    try:
        answer = _serve(**request)
    except UserError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    (Path(request["folder"]) / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


def _serve(path: str, threads: int, runs: int, folder: str) -> dict[str, Any]:
    from .litert_profiler import ProfiledModel

    with np.load(os.path.join(folder, "feeds.npz"), allow_pickle=False) as archive:
        feeds = [archive[name] for name in archive.files]
    artifact = read_artifact(path)
    plain = open_runtime(artifact, threads)
    plain.run(feeds)  # feeds that do not fit are refused in its words
    model = ProfiledModel(artifact, threads)
    model.feed(feeds)
    events: list[list[tuple[str, int, int, int, int]]] = []
    plain_ns, _ = alternate(lambda: plain.run(feeds), lambda: events.append(model.run()), runs)
    operators = [[e for e in run if e[1] == _OWN_KERNEL or e[1] in _DELEGATED] for run in events]
    return {
        "version": plain.version, "plain": plain_ns, "profiled": kept(model.run_ns, runs),
        "events": [[e[:4] for e in run] for run in operators],
        "subgraphs": sorted({e[4] for run in operators for e in run if e[1] == _OWN_KERNEL}),
    }  # fmt: skip
