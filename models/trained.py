"""Networks that nobody published: trained on the spot from the data, once, and kept in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edgepress.compress.cache import cache_folder
from edgepress.compress.progress import bar

__all__ = ["trained"]

Batches = Callable[[int], Iterator[tuple[Tensor, Tensor]]]


def trained(name: str, build: Callable[[], nn.Module], batches: Batches, epochs: int, lr: float) -> nn.Module:
    """The network with the weights that training gives it; with those of the last time where nothing has changed.

    What counts as a change: the source file of ``build``, the first batch of the data, ``epochs``, ``lr``, PyTorch's
    version.

    Args:
        name: of the file in the cache folder.
        build: makes the network; its random weights are always the same.
        batches: labelled batches of an epoch.
        epochs: over the data, with AdamW and a one-cycle learning rate.
        lr: its highest learning rate.

    Example:
        >>> import unittest.mock
        >>> def batches(epoch):
        ...     x = torch.randn(64, 2, generator=torch.Generator().manual_seed(epoch))
        ...     return iter([(x, (x[:, 0] > 0).long())])
        >>> with tempfile.TemporaryDirectory() as folder, unittest.mock.patch.dict(os.environ, EDGEPRESS_CACHE=folder):
        ...     first = trained("signs", lambda: nn.Linear(2, 2), batches, 5, 0.1)
        ...     again = trained("signs", lambda: nn.Linear(2, 2), batches, 5, 0.1)
        ...     len(os.listdir(Path(folder) / "models")), torch.equal(first.weight, again.weight)
        (1, True)
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        path = _folder() / f"{name}-{_print(build, batches, epochs, lr)}.safetensors"
        try:
            model.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError):  # not there, or damaged: made again
            _train(name, model, batches, epochs, lr)
            _keep(model, path)
    return model.eval()


def _folder() -> Path:
    return cache_folder() / "models"


def _print(build: Callable[[], nn.Module], batches: Batches, epochs: int, lr: float) -> str:
    found = hashlib.sha256(repr((epochs, lr, torch.__version__)).encode())
    with contextlib.suppress(OSError, TypeError):  # a function without a source file
        found.update(Path(inspect.getsourcefile(build) or "").read_bytes())
    for tensor in next(batches(0)):
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:12]


def _train(name: str, model: nn.Module, batches: Batches, epochs: int, lr: float) -> None:
    steps = sum(1 for _ in batches(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=epochs * steps)
    model.train()
    with bar(f"Train {name}") as update:
        for epoch in range(epochs):
            for inputs, labels in batches(epoch):
                loss = F.cross_entropy(model(inputs), labels, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            update((epoch + 1) / epochs, f"loss {loss.item():.3f}")


def _keep(model: nn.Module, path: Path) -> None:
    """Under a temporary name first; a cache that cannot be written is done without."""
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
            save_file(model.state_dict(), Path(scratch) / "weights")
            os.replace(Path(scratch) / "weights", path)
