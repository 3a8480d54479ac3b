"""Write a network to a file that a device runs; the suffix says which format."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgepress.compress.errors import FileError, UserError
from edgepress.compress.fake import check_layers
from edgepress.compress.network import Network, export_program
from edgepress.compress.quantization import Quantization, quantization
from edgepress.compress.quantize import trained_ranges
from edgepress.compress.task import Batches

from .agent.pt2 import NOTES
from .artifact import METADATA_KEY, Artifact, read_artifact
from .calibration import pieces
from .matching import deployed_ranges

__all__ = ["FORMATS", "export", "write_file", "writer"]

FORMATS = (".onnx", ".tflite")

# how the converters name an operator that they cannot write
_OPERATOR = (
    r"(?:Lowering not found|No ONNX function found|No decompositions).*?\b(\w+[.:]{1,2}\w+)",
    r"failed to legalize operation '([\w.]+)'",
    r"\b(aten[.:]{1,2}\w+)",
)


def export(
    network: Network,
    path: str | os.PathLike[str],
    precision: str | Quantization = "fp32",
    calibration: Batches | None = None,
) -> Artifact:
    """Write an ``.onnx``, ``.tflite`` or ``.pt2`` file.

    An ONNX file has a dynamic batch and the network's layout. A TFLite file takes one example; its 4-D float inputs and
    outputs have the channels last, integers are 32-bit, and those of a quantized file may be integers: `predict` of the runtime
    takes and gives the network's own layout and real numbers for both. A ``.pt2`` file is ``torch.export.save``'s, for PyTorch
    itself on a GPU; it holds no pickle, and is fp32.

    Args:
        network: what `trace` or a pass gave. After `Quantize` the ranges that it trained are written.
        path: the file; an existing one is replaced, and only when the new one is whole.
        precision: one of `edgepress.compress.quantization.PRECISIONS` (``'fp32'``, ``'int8'``, ...), or a description
            that says more: a calibrator, other precisions for some layers.
        calibration: typical unlabelled inputs, as in ``Task.calibration_batches``; where activations are quantized
            beforehand (int8, int16x8, w4a8) they are needed. One batch is held at a time. A few hundred examples are enough.

    Raises:
        UserError: an unknown suffix or precision, one that the format lacks, or calibration data that is missing or does
            not fit.
        FileError: the folder cannot be written, or the converter refuses the network; the message names the operator
            where the converter does.

    Example:
        >>> import tempfile, torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(4, 2), torch.zeros(1, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     artifact = export(network, Path(folder) / "net.onnx")
        >>> artifact.format, artifact.precision, artifact.inputs[0].shape
        ('onnx', 'fp32', (None, 4))
    """
    path = Path(path)
    if path.suffix not in (*FORMATS, ".pt2"):
        raise UserError(f"{path.name} names no format that edgepress writes: end it in {' or '.join(FORMATS)}, or in .pt2.")
    how = quantization(precision)
    if how.name != "fp32" and path.suffix == ".pt2":
        raise UserError(f"A .pt2 file is fp32, and its runtimes convert it (torch:bf16): {how.name} needs .onnx or .tflite.")
    _check_folder(path)
    check_layers(network, how)
    if how.calibrated:
        if calibration is None:
            raise UserError(f"{how.name} needs calibration data: pass calibration=, some batches of typical inputs.")
        next(pieces(network, calibration, 1))  # a batch that does not fit is found out before minutes of work
    content = writer(network, path.suffix, calibration, how.name)(_as_trained(network, how))
    write_file(path, content)
    return read_artifact(path)


def _as_trained(network: Network, how: Quantization) -> Quantization:
    """With the layers in other precisions that training left so, where nothing else is asked for."""
    if not trained_ranges(network) or how.layers or network.history[-1]["precision"] != how.name:
        return how
    return replace(how, layers=network.history[-1].get("layers") or {})


def writer(
    network: Network, suffix: str, calibration: Batches | None = None, name: str = "fp32"
) -> Callable[[Quantization], bytes]:
    """Convert a network once, and write the file in as many precisions as are asked for.

    Args:
        network: as in `export`.
        suffix: ``'.onnx'``, ``'.tflite'`` or ``'.pt2'``.
        calibration: as in `export`.
        name: the precision, for a message about what cannot be converted.

    Returns:
        A function from a description to a file's content.
    """
    make = {".onnx": _onnx, ".tflite": _tflite, ".pt2": _pt2}[suffix]
    with _explained(suffix, name):
        write = make(network, calibration)

    def written(how: Quantization) -> bytes:
        with _explained(suffix, how.name):
            return write(how, _notes(network, how))

    return written


_Write = Callable[[Quantization, dict[str, Any]], bytes]


def _notes(network: Network, how: Quantization) -> dict[str, Any]:
    version = importlib.metadata.version(METADATA_KEY)
    settings = {"calibrator": how.calibrator} if how.calibrated else {}
    layers = {"layers": dict(how.layers)} if how.layers else {}
    return {"version": version, "precision": how.name, **settings, **layers, "history": list(network.history)}


def _onnx(network: Network, calibration: Batches | None) -> _Write:
    import onnx

    from .onnx_file import annotate_onnx, onnx_model
    from .onnx_tensors import onnx_tensors
    from .quantize_onnx import quantize_onnx

    plain = onnx_model(network)
    names = [value.name for value in plain.graph.input]

    def values(example: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        return onnx_tensors(plain)(dict(zip(names, example, strict=True)))

    def write(how: Quantization, notes: dict[str, Any]) -> bytes:
        if how.name == "fp32" and not how.layers:
            model = onnx.ModelProto()
            model.CopyFrom(plain)
        else:
            ranges = _trained(network, calibration, how, values)
            model = quantize_onnx(plain, lambda: pieces(network, calibration or [], 1), how, ranges)
        annotate_onnx(model, notes)
        return bytes(model.SerializeToString())

    return write


def _tflite(network: Network, calibration: Batches | None) -> _Write:
    from .quantize_tflite import feeds_of, quantize_tflite
    from .tflite_file import annotate_tflite, fed_ports, tflite_model
    from .tflite_tensors import tflite_tensors

    content, layout = tflite_model(network)
    plain = annotate_tflite(content, layout)
    ports = fed_ports(plain, layout)

    def values(example: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
        return tflite_tensors(plain)(next(feeds_of(ports, [example])))

    def write(how: Quantization, notes: dict[str, Any]) -> bytes:
        if how.name == "fp32" and not how.layers:
            return annotate_tflite(plain, layout, notes)
        ranges = _trained(network, calibration, how, values)
        examples = pieces(network, calibration, 1) if calibration is not None else None
        return annotate_tflite(quantize_tflite(plain, ports, examples, how, ranges), layout, notes)

    return write


def _trained(
    network: Network,
    calibration: Batches | None,
    how: Quantization,
    values: Callable[[tuple[np.ndarray, ...]], dict[str, np.ndarray]],
) -> dict[str, tuple[float, float]] | None:
    """The ranges that quantization-aware training learned, by the file's tensors; None where it was not the last pass."""
    if not how.calibrated or calibration is None or not trained_ranges(network):
        return None
    example = next(pieces(network, calibration, 1))
    return deployed_ranges(network, example, values(example))


def _pt2(network: Network, calibration: Batches | None) -> _Write:
    program, buffer = export_program(network), io.BytesIO()
    program._example_inputs = None  # they would be a pickle

    def write(how: Quantization, notes: dict[str, Any]) -> bytes:
        torch.export.save(program, buffer, extra_files={NOTES: json.dumps(notes, default=str)})
        return buffer.getvalue()

    return write


# ---- what can go wrong


@contextlib.contextmanager
def _explained(suffix: str, precision: str) -> Iterator[None]:
    """One sentence for whatever a converter raises."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        operator = _operator(error)
        what = f"the operator {operator} has no counterpart there" if operator else _first_line(error)
        other = next(name for name in FORMATS if name != suffix)
        raise FileError(
            f"The network cannot be written as {precision} {suffix}: {what}; replace that part of the model, or try {other}."
        ) from error


def _operator(error: BaseException | None) -> str | None:
    """The operator that a converter names, looked for along the chain of errors."""
    while error is not None:
        for pattern in _OPERATOR:
            if found := re.search(pattern, str(error)):
                return found[1]
        error = error.__cause__ or error.__context__
    return None


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].rstrip('.')[:300]}" if lines else type(error).__name__


def _check_folder(path: Path) -> None:
    """Find out before minutes of work."""
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Cannot make the folder {folder}: {error.strerror or error}.") from error
    if path.is_dir():
        raise FileError(f"Cannot write {path}: there is a folder of that name.")
    if not os.access(folder, os.W_OK):
        raise FileError(f"Cannot write to the folder {folder}: choose another or change its permissions.")


def write_file(path: Path, content: bytes) -> None:
    """Under a temporary name first: a file of that name is either the old one or the whole new one."""
    scratch: str | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            scratch = file.name
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)
        os.replace(scratch, path)
    except OSError as error:
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error
    finally:
        if scratch is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(scratch)
