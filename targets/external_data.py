"""The files beside an ONNX file that hold its weights, as ``torch.onnx.export`` and ``onnx.save`` write them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from edgepress.compress.errors import FileError

from .limits import plain

__all__ = ["data_files"]

_LOCATION = re.compile(r"(?!/|[A-Za-z]:)[^\\*\x00-\x1f\x7f]{1,1000}")
"""No star: ONNX Runtime reads its own memory where a location is ``*/_ORT_MEM_ADDR_/*``."""


def data_files(path: Path, model: Any) -> tuple[Path, ...]:
    """The data files of an ONNX file, sorted by their names.

    Args:
        path: of the file.
        model: its ``onnx.ModelProto``, without the data.

    Raises:
        FileError: a data file is missing, lies outside the file's own folder, or is shorter than the file says.

    Example:
        >>> import onnx
        >>> data_files(Path("net.onnx"), onnx.ModelProto())
        ()
    """
    sizes: dict[str, int] = {}
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        if location not in sizes:
            sizes[location] = _size(path, location)
        _check_extent(path, location, entries, sizes[location])
    return tuple(sorted({path.parent / PurePosixPath(location) for location in sizes}))


def _tensors(model: Any) -> Iterator[Any]:
    """Every tensor whose data lies outside, also those in operators' attributes, in branches, loops and functions."""
    nodes = [node for function in model.functions for node in function.node]
    attributes = [attribute for function in model.functions for attribute in function.attribute_proto]
    graphs = [model.graph, *(g for part in model.training_info for g in (part.initialization, part.algorithm))]
    while graphs or nodes or attributes:
        found = []
        if attributes:
            attribute = attributes.pop()
            found = [attribute.t, *attribute.tensors]
            sparse = [attribute.sparse_tensor, *attribute.sparse_tensors]
            graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
        elif nodes:
            attributes += nodes.pop().attribute
            continue
        else:
            graph = graphs.pop()
            found, sparse = list(graph.initializer), graph.sparse_initializer
            nodes += graph.node
        found += [part for tensor in sparse for part in (tensor.values, tensor.indices)]
        yield from (tensor for tensor in found if tensor.data_location == tensor.EXTERNAL)


def _size(path: Path, location: str) -> int:
    """Bytes of a data file, once it is sure that it is one and lies where it may."""
    shown, parts = plain(location), PurePosixPath(location).parts
    if not _LOCATION.fullmatch(location) or not parts or ".." in parts:
        raise FileError(f"{path} keeps weights in '{shown}', which is no plain path inside its own folder: it was not read.")
    beside = path.parent / PurePosixPath(location)
    try:
        real = beside.resolve(strict=True)
        # a file that is itself a link, into a store of downloads, has its data there too
        homes = {path.parent.resolve(), path.resolve().parent}
        if not any(real.is_relative_to(home) for home in homes):
            raise FileError(f"{path} keeps weights in '{shown}', a link that leads out of its own folder: it was not read.")
        if not real.is_file() or os.path.samefile(real, path):
            raise FileError(f"{path} keeps weights in '{shown}', which is no file beside it.")
        return real.stat().st_size
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise FileError(f"{path} keeps weights in '{shown}', which is missing: the two files belong in one folder.") from error


def _check_extent(path: Path, location: str, entries: dict[str, str], size: int) -> None:
    texts = entries.get("offset", "0"), entries.get("length", "0")
    if not all(re.fullmatch("[0-9]{1,18}", text) for text in texts) or sum(map(int, texts)) > size:
        shown = plain(location)
        raise FileError(f"{path} wants more of '{shown}' than its {size:,} bytes: one of the two is truncated or damaged.")
