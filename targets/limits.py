"""How much a stranger's file may ask of this process: a few bytes can stand for gigabytes once they are unpacked."""

from __future__ import annotations

from typing import Any

from .agent.machine import memory_bytes

__all__ = ["is_flatbuffer_bomb", "is_protobuf_bomb", "memory_share", "plain"]

_SMALL_BYTES = 1 << 23
_FIELDS = 5_000_000  # of a protobuf; large networks have a million
_MESSAGE_BYTES = 128  # that an empty message takes in memory, about; it takes two in a file
_VALUE_BYTES = 16
_TABLES = 200_000  # of a flatbuffer; large networks have some ten thousand
_TEXT_BYTES = 100_000_000  # of all names together
_VECTORS = {
    "Model": ("OperatorCodes", "Subgraphs", "Buffers", "Metadata", "SignatureDefs", "ExternalBufferGroups", "ExternalBuffers"),
    "SubGraph": ("Tensors", "Operators"),
    "Tensor": ("VariantTensors",),
    "SparsityParameters": ("DimMetadata",),
    "SignatureDef": ("Inputs", "Outputs"),
}
"""By table of a TFLite file, its vectors of further tables."""
_TEXTS = {
    "Model": ("Description",), "SubGraph": ("Name",), "Tensor": ("Name",), "OperatorCode": ("CustomCode",), "Metadata": ("Name",),
    "SignatureDef": ("SignatureKey",), "TensorMap": ("Name",), "ExternalBufferGroup": ("Name",), "ExternalBuffer": ("Packing",),
}  # fmt: skip


def memory_share(part: float) -> int:
    """Bytes in a part of this computer's memory; of 8 GiB where the system does not say how much there is.

    Example:
        >>> memory_share(0.25) < memory_share(0.5)
        True
    """
    return int((memory_bytes() or 1 << 33) * part)


def plain(text: object) -> str:
    """A stranger's words as one short line that a terminal shows as it is; the first where there are several.

    Example:
        >>> plain("x" + chr(27) + "[2J")
        'x[2J'
    """
    return "".join(c for c in str(text or "").split("\n", 1)[0][:300] if c.isprintable())


def is_protobuf_bomb(data: bytes, descriptor: Any) -> bool:
    """Whether parsing would take more than a quarter of the memory, or minutes; read from the lengths alone.

    What is no protobuf is none: the parser refuses it. What is small cannot do much.

    Args:
        data: the serialized message.
        descriptor: of its type.

    Example:
        >>> import onnx
        >>> is_protobuf_bomb(onnx.ModelProto(ir_version=8).SerializeToString(), onnx.ModelProto.DESCRIPTOR)
        False
    """
    limit, taken, fields = memory_share(0.25), 0, 0
    stack = [(0, len(data), _kinds(descriptor, {}))] if len(data) > _SMALL_BYTES else []
    while stack:
        at, end, kinds = stack.pop()
        while at < end:
            fields += 1
            if taken > limit or fields > _FIELDS:
                return True
            key, at = (data[at], at + 1) if data[at] < 0x80 else _varint(data, at)
            wire = key & 7
            if wire == 2:
                size, at = (data[at], at + 1) if at < end and data[at] < 0x80 else _varint(data, at)
                kind = kinds.get(key >> 3)
                if isinstance(kind, dict):
                    stack.append((at, min(at + size, end), kind))
                    taken += _MESSAGE_BYTES
                else:
                    taken += size * 8 if kind else _VALUE_BYTES
                at += size
            else:
                taken += _VALUE_BYTES
                at = _varint(data, at)[1] if wire == 0 else at + {1: 8, 5: 4}.get(wire, 0)
    return False


def _kinds(descriptor: Any, known: dict[str, dict[int, Any]]) -> dict[int, Any]:
    """By number of a field: a message's own such dictionary, True for numbers of varying length, False for all else."""
    if descriptor.full_name not in known:
        kinds = known[descriptor.full_name] = {}
        for field in descriptor.fields:
            numbers = (field.TYPE_INT32, field.TYPE_INT64, field.TYPE_UINT32, field.TYPE_UINT64, field.TYPE_ENUM)
            kinds[field.number] = _kinds(field.message_type, known) if field.message_type else field.type in numbers
    return known[descriptor.full_name]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where the next begins; past the end, the end."""
    value = shift = 0
    for i in range(at, min(at + 10, len(data))):
        byte = data[i]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i + 1
        shift += 7
    return value, len(data)


def is_flatbuffer_bomb(model: Any) -> bool:
    """Whether unpacking a TFLite file would take gigabytes or minutes, because many of its entries point at one place.

    Args:
        model: ``Model.GetRootAs(data)`` of its schema.

    Raises:
        Exception: of several types: an entry points outside the file.
    """
    stack, tables, text = [model], 0, 0
    while stack:
        table = stack.pop()
        kind = type(table).__name__
        for name in _TEXTS.get(kind, ()):
            text += len(getattr(table, name, bytes)() or b"")
        if text > _TEXT_BYTES:
            return True
        if kind == "Tensor" and (sparsity := table.Sparsity()) is not None:
            stack.append(sparsity)
            tables += 1
        for name in _VECTORS.get(kind, ()):
            count = getattr(table, f"{name}Length", int)()
            tables += count
            if tables > _TABLES:
                return True
            stack.extend(entry for i in range(count) if (entry := getattr(table, name)(i)) is not None)
    return False
