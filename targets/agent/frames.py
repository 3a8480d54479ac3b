"""What goes over the pipe: a length, a JSON object, arrays. Nothing is ever unpickled.

A frame is four bytes of length (big endian), a JSON object, and as many bytes of array data as its ``bytes`` says;
``arrays`` lists dtype and shape of each array in them.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import struct

__all__ = ["GREETING", "Failure", "arrays_of", "receive", "send"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

GREETING = b"\nedgepress agent 1\n"
"""What the agent writes first; a login shell's own words before it are skipped."""

_HEADER_BYTES = 1 << 24


class Failure(Exception):
    """Something that the host turns into a sentence: ``kind`` says what it is, ``detail`` what the runtime or system said."""

    def __init__(self, kind: str, detail: str = "", **more: Any):
        super().__init__(kind, detail)
        self.fields = {"error": kind, "detail": detail, **more}


def send(fd: int, header: dict[str, Any], arrays: Sequence[Any] = (), blob: bytes | None = None) -> None:
    """Write one frame: a header with arrays, or with a blob that already holds them."""
    if blob is None:
        blob = b"".join(a.tobytes() for a in arrays)
        header = {**header, "arrays": [[a.dtype.str, list(a.shape)] for a in arrays]}
    text = json.dumps({**header, "bytes": len(blob)}).encode()
    view = memoryview(struct.pack(">I", len(text)) + text + blob)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int, timeout_s: float | None = None, limit: int = 1 << 32) -> tuple[dict[str, Any], bytes] | None:
    """Read one frame; None where the pipe was closed before it.

    Raises:
        TimeoutError: no byte came for ``timeout_s`` seconds.
        ValueError: what came is no frame.
    """
    start = _exactly(fd, 4, timeout_s)
    if start is None:
        return None
    (size,) = struct.unpack(">I", start)
    if size > _HEADER_BYTES:
        raise ValueError("no frame")
    text = _exactly(fd, size, timeout_s)
    header = json.loads(text) if text else None
    if not isinstance(header, dict) or not isinstance(header.get("bytes"), int) or not 0 <= header["bytes"] <= limit:
        raise ValueError("no frame")
    blob = _exactly(fd, header["bytes"], timeout_s)
    return None if blob is None else (header, blob)


def arrays_of(header: dict[str, Any], blob: bytes) -> list[Any]:
    """The arrays of a frame.

    Raises:
        ValueError: they are not what the header says.
        Failure: ``missing``: there is no numpy.
    """
    try:
        import numpy as np
    except ImportError as error:
        raise Failure("missing", "numpy") from error

    arrays, at = [], 0
    for name, shape in header["arrays"]:
        if not re.fullmatch(r"[<>|][fiub][1248]", name) or any(not isinstance(n, int) or n < 0 for n in shape):
            raise ValueError("no array")
        dtype, count = np.dtype(name), math.prod(shape)
        arrays.append(np.frombuffer(blob, dtype, count, at).reshape(shape))
        at += count * dtype.itemsize
    if at != len(blob):
        raise ValueError("arrays do not fill their frame")
    return arrays


def _exactly(fd: int, count: int, timeout_s: float | None) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        if timeout_s is not None and not select.select([fd], [], [], timeout_s)[0]:
            raise TimeoutError
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
