"""A teacher's outputs on disk, found again by the examples themselves.

Data that come again, in whatever order, need the teacher once. Each example is known by a hash of its numbers; the outputs
stand in one file of equal records that is mapped into memory. Data that are augmented anew in each epoch never come again: that
is noticed after the first, and the file goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from .cache import cache_folder
from .teacher import Teacher

__all__ = ["LIMIT_BYTES", "Remembered", "example_keys", "outputs_folder"]

LIMIT_BYTES = 1 << 30
"""Of all files together; what does not fit is asked for again."""

_PATIENCE = 8
"""Batches after the first epoch in which something known must come."""

_UNKNOWN = 1 << 19
"""Examples until then, where nobody knows how long an epoch is; each takes some 150 bytes of memory."""

_MOST_ROWS = 1 << 22

_KEY = 16
_STALE_S = 24 * 3600.0


def outputs_folder() -> Path:
    """Where files are kept: ``teachers`` in `cache_folder`."""
    return cache_folder() / "teachers"


def example_keys(inputs: tuple[Tensor, ...]) -> list[bytes]:
    """A hash of 128 bits for each example of a batch: multilinear over its 32-bit words (Carter and Wegman 1979), on its device.

    Example:
        >>> import torch
        >>> a, b, c = example_keys((torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]]),))
        >>> a == c, a == b
        (True, False)
    """
    total: Tensor | None = None
    for number, x in enumerate(inputs):
        flat = x.detach().contiguous().reshape(len(x), math.prod(x.shape[1:]))
        words = flat.view(torch.int32 if flat.element_size() % 4 == 0 else torch.uint8).to(torch.int64)
        random = torch.Generator().manual_seed(7919 + number)
        factors = torch.randint(-(2**63), 2**63 - 1, (2, words.shape[1] + 1), generator=random).to(x.device)
        part = torch.stack([(words * f[1:]).sum(1) + words.shape[1] * f[0] for f in factors], 1)
        total = part if total is None else total + part
    assert total is not None
    return [row.tobytes() for row in total.cpu().numpy()]


class Remembered:
    """A teacher that is asked once for each example.

    Args:
        teacher: what is asked.
        inputs: the first batch.
        outputs: what the teacher gave for it: kinds and shapes.
        name: a fingerprint of the teacher and of how it computes; empty where the outputs cannot serve another run.
        folder: where the file is kept.
        epoch: batches in an epoch, where it is known.
    """

    def __init__(self, teacher: Teacher, inputs: tuple[Tensor, ...], outputs: Any, name: str, folder: Path, epoch: int | None):
        self._teacher, self._folder, self._epoch = teacher, folder, epoch
        leaves, self._spec = pytree.tree_flatten(outputs)
        count = len(inputs[0])
        # what depends on more than its own example cannot be kept by examples; deterministic mode asks for the same kernels
        # on the same batches, and another order of the data would give others
        self._on = (
            all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == count for x in leaves)
            and not torch.are_deterministic_algorithms_enabled()
        )
        self._layout = [(tuple(x.shape[1:]), x.dtype) for x in leaves] if self._on else []
        self._device = leaves[0].device if self._on else torch.device("cpu")
        self._bytes = _KEY + sum(torch.empty(shape, dtype=dtype, device="meta").nbytes for shape, dtype in self._layout)
        self._rows: dict[bytes, int] = {}
        self._map: NDArray[np.uint8] | None = None
        self._file: Any = None
        self._kept = False
        self.asked = self.found = 0
        digest = hashlib.sha256(b"".join(example_keys(inputs)) if self._on else b"")
        digest.update(f"{name} {self._layout} {torch.__version__}".encode())
        self._path = folder / f"{digest.hexdigest()[:32]}.outputs"
        self._scratch = self._path
        self._lasting = bool(name)
        if self._on and self._lasting:
            self._open()

    def __call__(self, inputs: tuple[Tensor, ...]) -> Any:
        """The outputs for a batch, from the file where every example is in it."""
        if not self._on or not len(inputs[0]) or torch.are_deterministic_algorithms_enabled():
            self.asked += 1
            return self._teacher(inputs)
        keys = example_keys(inputs)
        rows = [self._rows.get(key, -1) for key in keys]
        if min(rows) >= 0:
            self.found += 1
            return self._read(rows)
        self.asked += 1
        outputs = self._teacher(inputs)
        self._learn(keys, outputs, known=max(rows) >= 0)
        return outputs

    def close(self) -> dict[str, int]:
        """Keep the file if it has served and can serve again; how many batches were asked for and found."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self._file.fileno())
                self._file.close()
                if self.found and self._lasting:
                    os.replace(self._scratch, self._path)
                    _sweep(self._folder, self._path)
                self._scratch.unlink(missing_ok=True)
        self._on, self._map, self._file = False, None, None
        return {"asked": self.asked, "found": self.found}

    # ---- the file

    def _open(self) -> None:
        """What an earlier run kept."""
        with contextlib.suppress(OSError, ValueError):
            count = self._path.stat().st_size // self._bytes
            self._map = np.memmap(self._path, np.uint8, "r", shape=(count, self._bytes))
            self._rows = {row.tobytes(): i for i, row in enumerate(np.array(self._map[:, :_KEY]))}
            self._kept = True
            os.utime(self._path)

    def _learn(self, keys: list[bytes], outputs: Any, known: bool) -> None:
        """Append what is new; give up where nothing ever comes again, or the disk refuses."""
        if self._kept:
            return None
        leaves = pytree.tree_leaves(outputs)
        if [(tuple(x.shape[1:]), x.dtype) for x in leaves] != self._layout:
            return self._give_up()
        if not (self.found or known) and self._never():
            return self._give_up()
        new = [i for i, key in enumerate(keys) if key not in self._rows and key not in keys[:i]]
        rows = len(self._rows) + len(new)
        if rows * self._bytes > LIMIT_BYTES or rows > _MOST_ROWS:
            return None if self.found or known else self._give_up()
        parts = [np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY)]
        parts += [x.detach().cpu().contiguous().reshape(len(x), -1).view(torch.uint8).numpy() for x in leaves]
        try:
            if self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._folder)
                self._file, self._scratch = os.fdopen(handle, "wb"), Path(name)
            self._file.write(np.concatenate(parts, 1)[new].tobytes())
            self._file.flush()
        except OSError:  # a full disk, or none that can be written to: training goes on without
            return self._give_up()
        for i in new:
            self._rows[keys[i]] = len(self._rows)
        return None

    def _never(self) -> bool:
        """Whether something should have come again by now."""
        return self.asked > self._epoch + _PATIENCE if self._epoch is not None else len(self._rows) >= _UNKNOWN

    def _read(self, rows: list[int]) -> Any:
        if self._map is None or len(self._map) <= max(rows):
            self._map = np.memmap(self._scratch, np.uint8, "r", shape=(len(self._rows), self._bytes))
        found = torch.from_numpy(self._map[rows][:, _KEY:])
        leaves, at = [], 0
        for shape, dtype in self._layout:
            size = torch.empty(shape, dtype=dtype, device="meta").nbytes
            leaves.append(found[:, at : at + size].contiguous().view(dtype).reshape(len(rows), *shape).to(self._device))
            at += size
        return pytree.tree_unflatten(leaves, self._spec)

    def _give_up(self) -> None:
        self._on, self._rows, self._map = False, {}, None
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._scratch.unlink(missing_ok=True)
            self._file = None


def _sweep(folder: Path, keep: Path) -> None:
    """Take away what killed runs left, and the files used least recently while all together are too large."""
    for left in folder.glob(".*.outputs.*"):
        if time.time() - left.stat().st_mtime > _STALE_S:
            left.unlink(missing_ok=True)
    kept = sorted(folder.glob("*.outputs"), key=lambda p: p.stat().st_mtime, reverse=True)
    total = 0
    for path in kept:
        total += path.stat().st_size
        if total > LIMIT_BYTES and path != keep:
            path.unlink(missing_ok=True)
