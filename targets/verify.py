"""Run a file and hold it against the network that it was made from."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgepress.compress.errors import DeviceError
from edgepress.compress.network import Network
from edgepress.compress.pruning.call import user_line
from edgepress.compress.randomness import draws

from .artifact import Artifact, read_artifact
from .devices import Device, find_device

__all__ = ["Parity", "drawing", "output_error", "verify"]

_RANDOM = 8
"""Random examples beside the network's own: enough to see a wrong layout or a lost operator."""


@dataclass(frozen=True)
class Parity:
    """How far a file's outputs are from the network's.

    Attributes:
        max_abs: the largest absolute difference; NaN where nothing could be compared.
        max_rel: the same over the largest absolute value of the network's output, the worst of several outputs.
        examples: how many examples were run.
        ok: of fp32, that ``max_rel`` is within the tolerance; of other precisions, that the file runs and gives finite
            values of the right shapes. What int8 costs is for the task's metric to say.
        reason: why it is not ok; empty where it is.
        error: `output_error` of the file's outputs; NaN where nothing could be compared.
    """

    max_abs: float
    max_rel: float
    examples: int
    ok: bool
    reason: str = ""
    error: float = float("nan")


def verify(
    artifact: Artifact,
    network: Network,
    inputs: np.ndarray | Tensor | Sequence[np.ndarray | Tensor] | None = None,
    tolerance: float = 1e-3,
    device: str | Device = "local",
) -> Parity:
    """Run a file and compare it with the network. A bad file gives ``ok=False`` and the reason, never an exception.

    Args:
        artifact: what `export` gave.
        network: what it was exported from.
        inputs: one array or one per input ``[N, ...]``, in the network's layout. Where it is None: the network's example
            inputs, and eight random ones of the same mean and deviation (integers: drawn from the example's values).
        tolerance: the largest relative difference that an fp32 file may have.
        device: where the file is run.

    Raises:
        UserError: ``inputs`` do not fit the network.
        DeviceError: the device cannot be reached, or has no runtime for the file.
    """
    arrays = _typical(network) if inputs is None else _arrays(inputs)
    wanted = _tuple(network.predict(*arrays))
    count = len(arrays[0])
    try:
        # from disk, not from memory: the file may have changed since it was described
        fresh = read_artifact(artifact.path)
        place = find_device(device)
        try:
            with contextlib.closing(place.open(fresh)) as runtime:
                got = _tuple(runtime.predict(*arrays))
        finally:
            if place is not device:
                place.close()
    except DeviceError:
        raise
    except Exception as error:
        return Parity(float("nan"), float("nan"), count, False, str(error) or type(error).__name__)
    if reason := _mismatch(wanted, got):
        return Parity(float("nan"), float("nan"), count, False, f"{artifact.path.name} {reason}.")
    max_abs, max_rel = _difference(wanted, got)
    ok = fresh.precision != "fp32" or max_rel <= tolerance
    reason = f"{artifact.path.name} differs from the network by {max_rel:.2g} of its largest output (allowed: {tolerance:.2g})."
    reason = "" if ok else f"{reason} {drawing(network)}".strip()
    return Parity(max_abs, max_rel, count, ok, reason, output_error(got, wanted))


def drawing(network: Network) -> str:
    """A sentence about a network that draws random numbers; '' where it draws none.

    Example:
        >>> from edgepress.compress.network import trace
        >>> drawing(trace(torch.nn.Dropout(0.5), torch.zeros(1, 2)))
        ''
    """
    found = draws(network.module)
    if not found:
        return ""
    line = user_line(found[0])
    return (
        f"The network draws random numbers{f' at {line}' if line else ''}, so no file can give what it gives: let forward "
        "return what they are drawn by, such as a mean, or take them as an input."
    )


def _arrays(inputs: Any) -> tuple[np.ndarray, ...]:
    items = inputs if isinstance(inputs, tuple | list) else (inputs,)
    return tuple(x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in items)


def _tuple(outputs: Any) -> tuple[np.ndarray, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _typical(network: Network) -> tuple[np.ndarray, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.cat([x, _like(x, generator)]).numpy() for x in network.example_inputs)


def _like(example: Tensor, generator: torch.Generator) -> Tensor:
    """``[8, ...]`` random examples of the same statistics."""
    shape = (_RANDOM, *example.shape[1:])
    if not example.is_floating_point():
        values = example.flatten()
        return values[torch.randint(len(values), shape, generator=generator)]
    values = example.float()
    deviation = values.std(correction=0)
    if not deviation > 0:  # zeros or ones as an example say nothing of the data
        deviation = torch.tensor(1.0)
    return (torch.randn(shape, generator=generator) * deviation + values.mean()).to(example.dtype)


def output_error(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The squared difference of outputs over their variance, mean of the float outputs: 1 is as bad as knowing only their mean.

    Example:
        >>> output_error([np.float32([0, 3])], [np.float32([0, 2])])
        0.5
    """
    pairs = [(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(got, wanted, strict=True) if b.dtype.kind == "f"]
    return float(np.mean([np.mean((a - b) ** 2) / max(float(b.var()), 1e-12) for a, b in pairs])) if pairs else 0.0


def _mismatch(wanted: tuple[np.ndarray, ...], got: tuple[np.ndarray, ...]) -> str:
    if len(wanted) != len(got):
        return f"gives {len(got)} outputs where the network gives {len(wanted)}"
    for w, g in zip(wanted, got, strict=True):
        if w.shape != g.shape:
            return f"gives an output of shape {list(g.shape)} where the network gives {list(w.shape)}"
        if np.isfinite(w).all() and not np.isfinite(g).all():
            return "gives NaN or infinite values where the network does not"
        if not np.isfinite(w).all():
            return "cannot be compared: the network itself gives NaN or infinite values"
    return ""


def _difference(wanted: tuple[np.ndarray, ...], got: tuple[np.ndarray, ...]) -> tuple[float, float]:
    apart = [float(np.abs(w.astype(np.float64) - g.astype(np.float64)).max(initial=0)) for w, g in zip(wanted, got, strict=True)]
    largest = [float(np.abs(w.astype(np.float64)).max(initial=0)) for w in wanted]
    relative = [a / m if m else (0.0 if not a else float("inf")) for a, m in zip(apart, largest, strict=True)]
    return max(apart, default=0.0), max(relative, default=0.0)
