"""Times by operator from ONNX Runtime's profiler, told in the names of the file and of the network behind it."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .agent.sessions import options_of
from .artifact import Artifact
from .profile import Profile, Timed, alternate, finish, join_modules, kept, typical_ns
from .runtimes import import_runtime, open_runtime, random_feeds
from .silence import silence

__all__ = ["profile_onnx"]

_OPTIMIZED = "optimized.onnx"
_EMPTY = (2, 9)  # inputs of the operators in the file that shows what the profiler itself costs
_EMPTIES = 24  # such operators
_WITH_GRAPHS = ("If", "Loop", "Scan")
_TICK_NS = 1000  # the profiler counts whole microseconds, rounded down
_SUFFIX = "_kernel_time"
_PROVIDER = "CPUExecutionProvider"
_CONVERTS = {
    "QuantizeLinear": "float to integer", "DequantizeLinear": "integer to float", "DynamicQuantizeLinear": "float to integer",
    "Cast": "another type of number", "Transpose": "another order of axes", "ReorderInput": "into blocks of channels",
    "ReorderOutput": "out of blocks of channels",
}  # fmt: skip
_FLOATS = ("float", "float16", "double", "bfloat16")
_ADDED = re.compile(r"(_nchwc|_token_\d+|_quant|_dq)+$")
"""What ONNX Runtime's optimizer puts behind a name when it makes a new operator of an old one."""


def profile_onnx(artifact: Artifact, threads: int, feeds: Sequence[np.ndarray] | None, runs: int) -> Profile:
    """See `edgepress.targets.profile.profile`; ``artifact`` is an ONNX file."""
    arrays = list(feeds) if feeds is not None else random_feeds(artifact)
    named = dict(zip((port.name for port in artifact.inputs), arrays, strict=False))
    plain = open_runtime(artifact, threads)
    plain.run(arrays)  # feeds that do not fit are refused in its words
    with tempfile.TemporaryDirectory(prefix="edgepress-") as folder:
        session = _session(str(artifact.path), threads, Path(folder))
        times = alternate(lambda: plain.run(arrays), lambda: session.run(None, named), runs)
        readings = kept(list(_by_run(_events(session))), runs)
        written = Path(folder) / _OPTIMIZED
        names = _Names(_graph(artifact.path), _graph(written) if written.exists() else None)
        floor = _floor(Path(folder), threads, runs)
    plain.close()
    int8 = artifact.precision in ("int8", "mixed")
    keys = list(dict.fromkeys(key for reading in readings for key in reading))
    names.adopt(keys)
    return finish(
        [_timed(key, [reading.get(key, 0) for reading in readings], names, int8, floor) for key in keys], _TICK_NS,
        subject=artifact.path.name, runtime=plain.name, version=plain.version, threads=threads, runs=runs,
        plain_ns=float(np.median(times[0])), profiled_ns=float(np.median(times[1])),
        method=f"ONNX Runtime's profiler, in whole microseconds, less what it shows for operators on a single number "
        f"({floor(1) / 1e3:.1f} µs with one input); what the runtime does between operators is in no row.",
    )  # fmt: skip


def _session(model: str | bytes, threads: int, folder: Path) -> Any:
    """A session as files are timed in, that keeps a diary and writes down what it made of the file."""
    ort = import_runtime("onnxruntime", "onnxruntime")
    options = options_of(ort, threads)
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    # names that the optimizer makes up change from session to session: it has to be this one
    options.optimized_model_filepath = str(folder / _OPTIMIZED)
    with silence():
        try:
            return ort.InferenceSession(model, options, providers=[_PROVIDER])
        except Exception:  # of types of ONNX Runtime's own: it cannot write a graph of 2 GB and more
            options.optimized_model_filepath = ""
            return ort.InferenceSession(model, options, providers=[_PROVIDER])


def _events(session: Any) -> list[dict[str, Any]]:
    return list(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8", errors="replace")))


def _floor(folder: Path, threads: int, runs: int) -> Callable[[int], float]:
    """What the profiler shows for an operator that does next to nothing, by its number of inputs, in nanoseconds.

    It writes down the shapes of all inputs before it looks at the clock, and that takes longer than many an operator.
    """
    import onnx

    make, shape = onnx.helper, [1, 1, 1, 1]
    nodes = [make.make_node("Sum", [f"x{i}", *["one"] * (_EMPTY[i % 2] - 1)], [f"x{i + 1}"], f"sum{i}") for i in range(_EMPTIES)]
    ports = [make.make_tensor_value_info(f"x{i}", onnx.TensorProto.FLOAT, shape) for i in (0, len(nodes))]
    one = onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")
    graph = make.make_graph(nodes, "empty", ports[:1], ports[1:], [one])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=8)
    content, x = model.SerializeToString(), np.zeros(shape, np.float32)
    few, many = (min(found) for found in zip(*(_empty_ns(content, x, threads, folder, runs) for _ in range(3)), strict=True))
    return lambda inputs: few + (many - few) * (inputs - _EMPTY[0]) / (_EMPTY[1] - _EMPTY[0])


def _empty_ns(content: bytes, x: np.ndarray, threads: int, folder: Path, runs: int) -> list[float]:
    session = _session(content, threads, folder)
    for _ in range(runs):
        session.run(None, {"x0": x})
    readings = list(_by_run(_events(session)))
    times = {key: typical_ns([reading[key] for reading in readings], _TICK_NS) for key in readings[0]}
    return [float(np.median([ns for key, ns in times.items() if len(key.kinds) == count])) for count in _EMPTY]


def _graph(path: Path) -> Any:
    import onnx

    return onnx.load(path, load_external_data=False).graph


# ---- what the profiler says


@dataclass(frozen=True)
class _Key:
    """What tells the operators of a run apart; ``number`` is the runtime's own, ``kinds`` the types of its inputs."""

    name: str
    operator: str
    provider: str
    number: str
    kinds: tuple[str, ...]


def _by_run(events: Sequence[dict[str, Any]]) -> Iterator[dict[_Key, int]]:
    """The time of each operator in each run, in nanoseconds.

    Those with a graph inside are left out: the operators in there have rows of their own, and the rest is the profiler's work.
    """
    nodes = [e for e in events if e.get("cat") == "Node" and str(e.get("name", "")).endswith(_SUFFIX)]
    for run in (e for e in events if e.get("name") == "model_run"):
        sums: dict[_Key, int] = defaultdict(int)
        for event in nodes:
            if run["ts"] <= event["ts"] <= run["ts"] + run["dur"] and event["args"].get("op_name") not in _WITH_GRAPHS:
                sums[_key(event)] += event["dur"] * 1000
        yield dict(sums)


def _key(event: dict[str, Any]) -> _Key:
    args = event["args"]
    kinds = tuple(kind for shape in args.get("input_type_shape", ()) for kind in shape)
    number = str(args.get("node_index", ""))
    return _Key(event["name"].removesuffix(_SUFFIX), args.get("op_name", ""), args.get("provider", ""), number, kinds)


def _timed(key: _Key, samples: Sequence[int], names: _Names, int8: bool, floor: Callable[[int], float]) -> Timed:
    kind, provider = key.kinds[0] if key.kinds else "", key.provider
    convert, fallback = _CONVERTS.get(key.operator), None
    if convert:
        convert += "; in the file" if names.in_file(key.name) else "; put in by ONNX Runtime"
    elif provider not in ("", _PROVIDER):
        fallback = f"ran on {provider}"
    elif int8 and kind in _FLOATS:
        fallback = "computes in floats in an int8 file"
    kernel = " ".join(filter(None, (provider.removesuffix("ExecutionProvider"), names.domain(key.name), kind)))
    return Timed(key.name, key.operator, names.module(key.name), kernel, samples, fallback, convert, floor(len(key.kinds)))


# ---- from the optimizer's names to the file's, and to the user's modules


class _Names:
    """What an operator that ran was in the file.

    The optimizer keeps names where it can: of the operator, of what it gives, of its weights. Each is looked up, with and
    without what the optimizer puts behind it.
    """

    def __init__(self, original: Any, optimized: Any):
        self._by_name = {node.name: node for node in original.node if node.name}
        self._maker = {output: node for node in original.node for output in node.output if output}
        self._users: dict[str, list[Any]] = defaultdict(list)
        for node in original.node:
            for value in node.input:
                self._users[value].append(node)
        self._weights = {tensor.name for tensor in original.initializer}
        self._nodes = nodes = list((original if optimized is None else optimized).node)
        self._ran = {node.name: node for node in nodes if node.name}
        self._ran_maker = {output: node for node in nodes for output in node.output if output}
        self._ran_users = {value: node for node in reversed(nodes) for value in node.input}

    def adopt(self, keys: Sequence[_Key]) -> None:
        """Give operators without a name the one that the profiler made up; both are told in the order in which they ran."""
        for operator in {key.operator for key in keys}:
            unknown = [key.name for key in keys if key.operator == operator and key.name not in self._ran]
            nameless = [node for node in self._nodes if node.op_type == operator and not node.name]
            if len(unknown) == len(nameless):
                self._ran.update(zip(unknown, nameless, strict=True))

    def in_file(self, name: str) -> bool:
        """Whether the file has that operator."""
        node = self._ran.get(name)
        if node is None:
            return name in self._by_name
        makers = [self._maker[value] for value in node.output if value in self._maker]
        return name in self._by_name or any(maker.op_type == node.op_type for maker in makers)

    def domain(self, name: str) -> str:
        """The last part of the operator's domain, where it is not ONNX's own: ``'nchwc'``, ``'microsoft'``."""
        node = self._ran.get(name)
        return node.domain.rpartition(".")[2] if node is not None and node.domain not in ("", "ai.onnx") else ""

    def module(self, name: str) -> str:
        """The user's modules that the operator computes; for a conversion that is none of the file's, those of its neighbour."""
        node = self._ran.get(name)
        if node is None:
            return join_modules(self._of_file(self._found([name])))
        return join_modules(self._of(node)) or (join_modules(self._of_neighbour(node)) if node.op_type in _CONVERTS else "")

    def _of(self, node: Any) -> list[str]:
        weights = [module for value in node.input if (module := self._of_weight(value))]
        return weights + self._of_file(self._found([*node.output, node.name]))

    def _of_neighbour(self, node: Any) -> list[str]:
        before = [self._ran_maker[value] for value in node.input if value in self._ran_maker]
        after = [self._ran_users[value] for value in node.output if value in self._ran_users]
        return next((modules for other in before + after if (modules := self._of(other))), [])

    def _found(self, names: Sequence[str]) -> list[Any]:
        """Operators of the file that have one of these names, or give a tensor of such a name."""
        tried = [t for name in names for t in (name, _ADDED.sub("", name))]
        return [node for t in tried for node in (self._by_name.get(t), self._maker.get(t)) if node is not None]

    def _of_file(self, nodes: Sequence[Any]) -> list[str]:
        return [scope for node in nodes if (scope := self._scope(node))]

    def _scope(self, node: Any) -> str:
        """The module in an operator's name, ``'layer1.0.conv1/Conv_3'``; a conversion has that of what it converts."""
        start = node
        while "/" not in node.name and node.op_type in _CONVERTS and node.input and node.input[0] in self._maker:
            node = self._maker[node.input[0]]
        users = [] if "/" in node.name or not start.output else self._users[start.output[0]]  # of a weight's conversion
        named = next((n.name for n in (node, *users) if "/" in n.name), "")
        return str(named.strip("/").rpartition("/")[0])

    def _of_weight(self, value: str) -> str:
        """``'layer1.0.conv1'`` of ``'layer1.0.conv1.weight'``; nothing for constants of the converter's own."""
        users = self._users.get(value, [])
        scales = any(user.op_type in _CONVERTS and value not in user.input[:1] for user in users)
        if value not in self._weights or scales or "/" in value or ":" in value:
            return ""
        return value.removeprefix("q_output_").rpartition(".")[0]
