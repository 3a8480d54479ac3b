"""Finished rounds on disk, so that an interrupted pass goes on after the last one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..network import Network

__all__ = ["Rounds"]


class Rounds:
    """The rounds of one pass on one network in a folder; only the last one is kept.

    Args:
        folder: where; nothing is kept where it is None.
        settings: of the pass. What was kept by other settings, or for another network, is not gone on from.
        network: that the pass starts from.

    Example:
        >>> import tempfile
        >>> from ..network import trace
        >>> network = trace(torch.nn.Linear(2, 2), torch.zeros(1, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     rounds = Rounds(Path(folder), {"rounds": 4}, network)
        ...     rounds.keep(network, [{"macs": 4}])
        ...     Rounds(Path(folder), {"rounds": 4}, network).last()[1], Rounds(Path(folder), {"rounds": 3}, network).last()[1]
        ([{'macs': 4}], [])
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any], network: Network):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for tensor in network.tensors():
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        self._key = digest.hexdigest()
        self._folder = folder
        self._network = network

    def last(self) -> tuple[Network, list[dict[str, Any]]]:
        """The network after the last finished round and what was found in each; the one started from where there is none."""
        found = self._network.copy().eval()
        if self._folder is None or not self._saved.is_dir():
            return found, []
        kept = Network.load(self._saved)
        *history, entry = kept.history
        if entry.get("key") != self._key:
            return found, []
        return Network(kept.module, kept.example_inputs, tuple(history), kept.kept).to(found.device), entry["rounds"]

    def keep(self, network: Network, rounds: list[dict[str, Any]]) -> None:
        """Write the network after a round in the place of the one before."""
        if self._folder is not None:
            network.then(**{"pass": "rounds"}, key=self._key, rounds=rounds).save(self._saved)

    def file(self, name: str) -> Path | None:
        """A file beside the rounds."""
        return None if self._folder is None else self._folder / name

    def clear(self) -> None:
        """Forget them all: the pass is done."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _saved(self) -> Path:
        assert self._folder is not None
        return self._folder / "round"
