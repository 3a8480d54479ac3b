"""Checkpoints: tensors and plain values in one file, which is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import FileError

__all__ = ["fingerprint", "read_checkpoint", "write_checkpoint"]


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write safetensors beside ``path``, onto the disk, and rename: whoever is killed on the way leaves the one before.

    Args:
        path: of the file; its folder is made.
        tensors: on any device; copied where two share memory.
        state: what JSON can hold. Floats come back bit for bit.

    Raises:
        FileError: no room, or no right to write. The checkpoint before is as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_checkpoint(Path(folder) / "run", {"w": torch.ones(2)}, {"steps": 3})
        ...     read_checkpoint(Path(folder) / "run")
        ({'w': tensor([1., 1.])}, {'steps': 3})
    """
    scratch = path.with_name(f".{path.name}.part")  # a folder: safetensors too writes beside what it writes
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    try:
        scratch.mkdir(parents=True)
        save_file(_apart(tensors), scratch / path.name, {"state": json.dumps(state)})
        with (scratch / path.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch / path.name, path)
    except (OSError, SafetensorError) as error:
        before = "; the one written before is as it was" if path.is_file() else ""
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ")
        raise FileError(
            f"Cannot write the checkpoint {path} ({reason}){before}: make room or take another folder, and start again to go on."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_checkpoint` wrote, on the CPU; None where there is no file.

    Raises:
        FileError: the file is damaged, or something else.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads((file.metadata() or {})["state"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise FileError(f"{path} is no checkpoint of a training run, or damaged: delete it to start over.") from error


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Says whether weights are the same, bit for bit.

    Example:
        >>> fingerprint([torch.zeros(2)]) == fingerprint([torch.zeros(2)]), fingerprint([torch.ones(2)])[:8]
        (True, '80b8fd6d')
    """
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous on the CPU; tied weights appear under several names, and safetensors wants each in memory of its own."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        result[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(plain.data_ptr())
    return result
