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
from pathlib import Path
from typing import Any

import torch

from edgepress.compress.errors import FileError, UserError
from edgepress.compress.network import Network, export_program
from edgepress.compress.task import Batches

from .agent.pt2 import NOTES
from .artifact import METADATA_KEY, Artifact, read_artifact
from .calibration import pieces

__all__ = ["FORMATS", "PRECISIONS", "export", "write_file"]

FORMATS = (".onnx", ".tflite")
PRECISIONS = ("fp32", "int8")

# how the converters name an operator that they cannot write
_OPERATOR = (
    r"(?:Lowering not found|No ONNX function found|No decompositions).*?\b(\w+[.:]{1,2}\w+)",
    r"failed to legalize operation '([\w.]+)'",
    r"\b(aten[.:]{1,2}\w+)",
)


def export(
    network: Network, path: str | os.PathLike[str], precision: str = "fp32", calibration: Batches | None = None
) -> Artifact:
    """Write an ``.onnx``, ``.tflite`` or ``.pt2`` file.

    An ONNX file has a dynamic batch and the network's layout. A TFLite file takes one example; its 4-D float inputs and
    outputs have the channels last, integers are 32-bit, and those of an int8 file may be int8: `predict` of the runtime takes
    and gives the network's own layout and real numbers for both. A ``.pt2`` file is ``torch.export.save``'s, for PyTorch itself
    on a GPU; it holds no pickle, and is fp32.

    Args:
        network: what `trace` or a pass gave.
        path: the file; an existing one is replaced, and only when the new one is whole.
        precision: ``'fp32'`` or ``'int8'``.
        calibration: typical unlabelled inputs, as in ``Task.calibration_batches``; int8 needs them. One batch is held at a
            time. A few hundred examples are enough.

    Raises:
        UserError: an unknown suffix or precision, or calibration data that is missing or does not fit.
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
    if precision not in PRECISIONS:
        raise UserError(f"'{precision}' is no precision that edgepress writes: choose {' or '.join(PRECISIONS)}.")
    if precision != "fp32" and path.suffix == ".pt2":
        raise UserError(f"A .pt2 file is fp32, and its runtimes convert it (torch:bf16): {precision} needs .onnx or .tflite.")
    if precision == "int8" and calibration is None:
        raise UserError("int8 needs calibration data: pass calibration=, some batches of typical inputs.")
    _check_folder(path)
    if precision == "int8" and calibration is not None:
        next(pieces(network, calibration, 1))  # a batch that does not fit is found out before minutes of work
    make: Callable[..., bytes] = {".onnx": _onnx, ".tflite": _tflite, ".pt2": _pt2}[path.suffix]
    with _explained(path.suffix, precision):
        content = make(network, precision, calibration, _notes(network, precision))
    write_file(path, content)
    return read_artifact(path)


def _notes(network: Network, precision: str) -> dict[str, Any]:
    version = importlib.metadata.version(METADATA_KEY)
    return {"version": version, "precision": precision, "history": list(network.history)}


def _onnx(network: Network, precision: str, calibration: Batches | None, notes: dict[str, Any]) -> bytes:
    from .onnx_file import annotate_onnx, onnx_model

    model = onnx_model(network)
    if precision == "int8" and calibration is not None:
        from .quantize_onnx import PIECE, quantize_onnx

        model = quantize_onnx(model, lambda: pieces(network, calibration, PIECE))
    annotate_onnx(model, notes)
    return bytes(model.SerializeToString())


def _tflite(network: Network, precision: str, calibration: Batches | None, notes: dict[str, Any]) -> bytes:
    from .tflite_file import annotate_tflite, fed_ports, tflite_model

    content, layout = tflite_model(network)
    content = annotate_tflite(content, layout)
    if precision == "int8" and calibration is not None:
        from .quantize_tflite import quantize_tflite

        content = quantize_tflite(content, fed_ports(content, layout), pieces(network, calibration, 1))
    return annotate_tflite(content, layout, notes)


def _pt2(network: Network, precision: str, calibration: Batches | None, notes: dict[str, Any]) -> bytes:
    program, buffer = export_program(network), io.BytesIO()
    program._example_inputs = None  # they would be a pickle
    torch.export.save(program, buffer, extra_files={NOTES: json.dumps(notes, default=str)})
    return buffer.getvalue()


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
