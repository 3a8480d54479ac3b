"""A deployable file: its format, precision, named and shaped inputs and outputs, its SHA-256 and its history."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress.errors import FileError

from .external_data import data_files
from .limits import is_flatbuffer_bomb, is_protobuf_bomb, memory_share, plain

__all__ = ["METADATA_KEY", "Artifact", "Port", "deflated_bytes", "inline", "read_artifact", "tflite_ports"]

METADATA_KEY = "edgepress"
"""The key under which a file of ours carries its metadata, as JSON: in ONNX's metadata_props and in TFLite's metadata buffers."""

_ONNX_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"}
_TFLITE_CASTS = {"QUANTIZE", "DEQUANTIZE"}
_MOST_METADATA = 1 << 24


@dataclass(frozen=True)
class Port:
    """One named input or output of a file.

    Args:
        name: as the file calls it.
        shape: in the file's own layout; None where a size is open.
        dtype: numpy's name, ``'float32'``, ``'int8'``, ``'int64'``.
        channels_last: the file's layout is the network's with dimension 1 moved to the end.
        scale: of a quantized port: ``real = (stored - zero_point) * scale``.
        zero_point: see ``scale``.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str
    channels_last: bool = False
    scale: float | None = None
    zero_point: int | None = None

    @property
    def network_shape(self) -> tuple[int | None, ...]:
        """The shape in the network's layout.

        Example:
            >>> Port("image", (1, 32, 32, 3), "float32", channels_last=True).network_shape
            (1, 3, 32, 32)
        """
        return (self.shape[0], self.shape[-1], *self.shape[1:-1]) if self.channels_last else self.shape


@dataclass(frozen=True)
class Artifact:
    """A file that a runtime runs.

    Args:
        path: where it is.
        format: ``'onnx'``, ``'tflite'`` or ``'pt2'``.
        precision: ``'fp32'``, ``'fp16'``, ``'int8'``, or ``'mixed'`` where a stranger's file computes in several.
        inputs: in the order in which a runtime takes them.
        outputs: in the order in which a runtime gives them.
        sha256: of the whole file, in hexadecimal; where there are data files, of it and of their names, sizes and contents.
        bytes: size of the whole file and of its data files.
        history: the passes that made the network; empty for strangers' files.
        data: the files beside it that hold its weights; only an ONNX file may have some.
    """

    path: Path
    format: str
    precision: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sha256: str
    bytes: int
    history: tuple[dict[str, Any], ...] = field(default=(), hash=False)
    data: tuple[Path, ...] = ()


def deflated_bytes(artifact: Artifact) -> int:
    """Bytes of the file, and of its data files, once compressed with deflate, as zip, gzip and app packages store it.

    They are measured on the files as they are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "zeros").write_bytes(bytes(100_000))
        ...     deflated_bytes(Artifact(Path(folder) / "zeros", "onnx", "fp32", (), (), "", 100_000)) < 200
        True
    """
    total = 0
    for path in (artifact.path, *artifact.data):
        packer = zlib.compressobj()
        total += sum(len(packer.compress(piece)) for piece in _pieces(path)) + len(packer.flush())
    return total


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                yield piece
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


@dataclass(frozen=True)
class _Content:
    precision: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    history: tuple[dict[str, Any], ...]
    data: tuple[Path, ...] = ()


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """Describe any ``.onnx`` or ``.tflite`` file, made by edgepress or not, without running it.

    The weights of an ONNX file may lie in data files beside it. Files may come from strangers: nothing outside their folder is
    read, and one that would fill the memory once unpacked is refused.

    Raises:
        FileError: the file, or a data file of its, is missing, truncated, damaged or too large; or it is neither ONNX nor TFLite.

    Example:
        >>> read_artifact("missing.onnx")
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.FileError: There is no file missing.onnx.
    """
    path = Path(path)
    readers = {".onnx": _read_onnx, ".tflite": _read_tflite, ".pt2": _read_pt2}
    data = _whole(path, known=path.suffix.lower() in readers)
    try:
        content = readers[path.suffix.lower()](path, data)
    except MemoryError as error:
        raise FileError(f"{path} cannot be read: it wants more memory than this computer has.") from error
    sizes = [_size(beside) for beside in content.data]
    if sum(sizes) > memory_share(1):
        raise FileError(f"{path} has {sum(sizes):,} bytes of data beside it, more than this computer's memory.")
    return Artifact(
        path=path,
        format=path.suffix.lower().removeprefix("."),
        precision=content.precision,
        inputs=content.inputs,
        outputs=content.outputs,
        sha256=_digest(path, data, content.data, sizes),
        bytes=len(data) + sum(sizes),
        history=content.history,
        data=content.data,
    )


def _whole(path: Path, known: bool) -> bytes:
    """What is in a file, whatever it turns out to be: a pipe would never end, nor would some of the system's files."""
    try:
        if not path.is_file():
            raise FileError(f"There is no file {path}.")
        if not known:
            raise FileError(f"{path} is none of .onnx, .tflite and .pt2, by its name.")
        size = path.stat().st_size
        if size > memory_share(0.5):
            raise FileError(f"{path} has {size:,} bytes: it does not fit into this computer's memory twice, as reading it takes.")
        with path.open("rb") as file:
            return file.read(size)
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


def _digest(path: Path, content: bytes, data: Sequence[Path], sizes: Sequence[int]) -> str:
    digest = hashlib.sha256(content)
    for beside, size in zip(data, sizes, strict=True):
        digest.update(json.dumps([beside.relative_to(path.parent).as_posix(), size]).encode())
        for piece in _pieces(beside):
            digest.update(piece)
    return digest.hexdigest()


def _metadata(text: str | bytes | None) -> dict[str, Any]:
    """What edgepress wrote into the file; empty for a stranger's, and where a stranger wrote something else there."""
    if not text or len(text) > _MOST_METADATA:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    history = value.get("history")
    passes = [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    precision = value.get("precision")
    return {**value, "history": passes, "precision": precision if _is_word(precision) else None}


def _is_word(value: object) -> bool:
    return isinstance(value, str) and value.isascii() and value.replace("-", "").isalnum() and len(value) <= 16


def _precision(kinds: set[str]) -> str:
    return next(iter(kinds)) if len(kinds) == 1 else "mixed" if kinds else "fp32"


# ---- ONNX


def _read_onnx(path: Path, data: bytes) -> _Content:
    import onnx

    if is_protobuf_bomb(data, onnx.ModelProto.DESCRIPTOR):
        raise FileError(f"{path} is refused: it would unpack to many times its own size.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
        return _content_onnx(path, model)
    except (FileError, MemoryError):
        raise
    except Exception as error:  # DecodeError, UnicodeDecodeError in a name, KeyError of an unknown type ...
        raise FileError(f"{path} is truncated or not an ONNX file: it cannot be parsed.") from error


def _content_onnx(path: Path, model: Any) -> _Content:
    # a cut between two fields parses: the operator sets, which every file names, come after the graph
    if not model.graph.node or not model.graph.output or not model.opset_import:
        raise FileError(f"{path} is truncated or not an ONNX file: its graph, outputs or operator sets are missing.")
    notes = _metadata(next((p.value for p in model.metadata_props if p.key == METADATA_KEY), None))
    weights = {tensor.name for tensor in model.graph.initializer}
    return _Content(
        precision=notes.get("precision") or _precision_onnx(model.graph),
        inputs=tuple(_onnx_port(path, value) for value in model.graph.input if value.name not in weights),
        outputs=tuple(_onnx_port(path, value) for value in model.graph.output),
        history=tuple(notes.get("history", ())),
        data=data_files(path, model),
    )


def _onnx_port(path: Path, value: Any) -> Port:
    import onnx

    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.elem_type:
        shown = plain(value.name)
        raise FileError(f"{path}: '{shown}' is not a tensor; edgepress runs files whose inputs and outputs are tensors.")
    sizes = tuple(d.dim_value if d.WhichOneof("value") == "dim_value" else None for d in kind.shape.dim)
    # an exporter that does not know a size may write 0 or -1
    shape = tuple(size if size and size > 0 else None for size in sizes)
    return Port(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _precision_onnx(graph: Any) -> str:
    import onnx

    kinds = set()
    if any(node.op_type in _ONNX_QUANTIZED for node in graph.node):
        kinds.add("int8")
    elif any(tensor.data_type == onnx.TensorProto.FLOAT16 for tensor in graph.initializer):
        kinds.add("fp16")
    return _precision(kinds)


# ---- TFLite


def _read_tflite(path: Path, data: bytes) -> _Content:
    from ai_edge_litert import schema_py_generated as schema

    if data[4:8] != b"TFL3":
        raise FileError(f"{path} is truncated or not a TFLite file: its identifier is missing.")
    try:
        if is_flatbuffer_bomb(schema.Model.GetRootAs(data, 0)):
            raise FileError(f"{path} is refused: it would unpack to many times its own size.")
        # walks every table, so that an offset or a length outside the file raises here and not inside a runtime
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        graph = model.subgraphs[0]
        for buffer in model.buffers:
            inline(buffer, data)
        notes = _metadata(_tflite_metadata(model))
        content = _Content(
            precision=notes.get("precision") or _precision_tflite(model),
            inputs=tflite_ports(graph, graph.inputs, notes.get("inputs", ())),
            outputs=tflite_ports(graph, graph.outputs, notes.get("outputs", ())),
            history=tuple(notes.get("history", ())),
        )
    except (FileError, MemoryError):
        raise
    except Exception as error:  # flatbuffers has no error of its own: struct.error, TypeError, IndexError, ValueError ...
        raise FileError(f"{path} is truncated or damaged: its tables point outside the file.") from error
    if not content.outputs or not graph.operators:
        raise FileError(f"{path} is truncated or damaged: it has no operators or no outputs.")
    return content


def inline(buffer: Any, content: bytes) -> None:
    """Read a buffer that a large file keeps behind its tables, in place; others have their data already.

    Raises:
        ValueError: the file ends before the buffer does.
    """
    if buffer.data is None and buffer.size:
        buffer.data = np.frombuffer(content, np.uint8, buffer.size, buffer.offset)
        buffer.offset = buffer.size = 0


def _tflite_metadata(model: Any) -> bytes | None:
    for entry in model.metadata or ():
        if _text(entry.name) == METADATA_KEY:
            return bytes(model.buffers[entry.buffer].data)
    return None


def _text(value: str | bytes | None) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""


def tflite_ports(graph: Any, indices: Sequence[int], notes: Sequence[dict[str, Any]] = ()) -> tuple[Port, ...]:
    """Describe tensors of a flatbuffer's graph; ``notes`` is what edgepress's metadata says of them, in order."""
    known = notes if len(notes) == len(indices) else [{}] * len(indices)
    return tuple(_tflite_port(graph.tensors[index], note) for index, note in zip(indices, known, strict=True))


def _tflite_port(tensor: Any, note: dict[str, Any]) -> Port:
    signature = tensor.shapeSignature if tensor.shapeSignature is not None else tensor.shape
    sizes = () if signature is None else tuple(int(size) for size in signature)
    found = getattr(tensor.quantization, "scale", None)
    scales = () if found is None else tuple(found)
    return Port(
        name=str(note.get("name") or _text(tensor.name)),
        shape=tuple(size if size > 0 else None for size in sizes),
        dtype=_tflite_dtype(tensor.type),
        channels_last=bool(note.get("channels_last", False)),
        scale=float(scales[0]) if scales else None,
        zero_point=int(tensor.quantization.zeroPoint[0]) if scales else None,
    )


def _enum_name(enum: type, value: int) -> str:
    return next(name for name, number in vars(enum).items() if number == value and not name.startswith("_"))


def _tflite_dtype(kind: int) -> str:
    from ai_edge_litert import schema_py_generated as schema

    return _enum_name(schema.TensorType, kind).lower()


def _precision_tflite(model: Any) -> str:
    return _precision({kind for graph in model.subgraphs for kind in _computed_in(model, graph)})


def _computed_in(model: Any, graph: Any) -> Iterator[str]:
    """The precision of each operator that computes; those that only change the type do not count."""
    from ai_edge_litert import schema_py_generated as schema

    known = {"float32": "fp32", "float16": "fp16", "int8": "int8", "uint8": "int8", "int16": "int16"}
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        name = _enum_name(schema.BuiltinOperator, max(code.builtinCode, code.deprecatedBuiltinCode))
        if name in _TFLITE_CASTS:
            continue
        for index in operator.outputs:
            kind = _tflite_dtype(graph.tensors[index].type)
            if kind in known:
                yield known[kind]


# ---- torch.export


def _read_pt2(path: Path, data: bytes) -> _Content:
    from .agent.pt2 import describe

    try:
        found = describe(data)
    except ValueError as error:
        raise FileError(f"{path} is refused: {plain(str(error))}.") from error
    notes = _metadata(found["notes"])
    inputs, outputs = (tuple(Port(*port) for port in found[key]) for key in ("inputs", "outputs"))
    return _Content(notes.get("precision") or found["precision"], inputs, outputs, tuple(notes.get("history", ())))
