"""How a training step computes: number formats, memory format, compiled or not; and which is the fastest here."""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .distributed import join
from .errors import RecipeError
from .network import Network

__all__ = ["Precision", "compiled_where_faster", "fastest_precision", "twin"]

aten = torch.ops.aten

# operators that make a tensor of their own, which their backward pass does not read
_UNREAD = {
    aten.add.Tensor,
    aten.batch_norm.default,
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
}
_TURNS = 5
_GAIN = 0.95  # compiled steps must take less than this share of the plain ones' time


@dataclass(frozen=True)
class Precision:
    """How a training step computes.

    Args:
        bf16: bfloat16 autocast.
        channels_last: images with channels last in memory.
        fp16: float16 autocast with scaled gradients, on GPUs only.
        compiled: with ``torch.compile``.
    """

    bf16: bool = False
    channels_last: bool = False
    fp16: bool = False
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.bf16 and self.fp16:
            raise RecipeError("A precision is bf16 or fp16, not both.")

    def place(self, network: Network) -> None:
        """Give the weights the memory format, in place."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def inputs(self, inputs: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """Move a batch to the device, in the memory format."""
        moved = (x.to(device, non_blocking=True) for x in inputs)
        return tuple(x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x for x in moved)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.float16 if self.fp16 else torch.bfloat16, enabled=self.bf16 or self.fp16)

    def forward(self, network: Network) -> Callable[..., Any]:
        """What to call for a forward pass of ``network``, which is in training mode and stays so."""
        return torch.compile(twin(network)) if self.compiled else twin(network)  # type: ignore[no-any-return]


def twin(network: Network) -> fx.GraphModule:
    """A graph of its own for training, in the network's present mode, over the same parameters and buffers.

    It computes the same bits in less memory: a ReLU overwrites its input where nothing else reads that, the backward pass
    included.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Sequential(torch.nn.Conv1d(2, 1, 1), torch.nn.ReLU()), torch.zeros(1, 2, 3))
        >>> graph = twin(network)
        >>> getattr(graph, "0").weight is network.module.get_parameter("0.weight")
        True
        >>> [node.target for node in graph.graph.nodes if "relu" in node.name]
        [<OpOverload(op='aten.relu_', overload='default')>]
    """
    with warnings.catch_warnings():  # as in Network's copy
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
        graph = copy.deepcopy(network.module.graph)
    for node in graph.nodes:
        if node.target is aten.relu.default and node.args[0].target in _UNREAD and len(node.args[0].users) == 1:
            node.target = aten.relu_.default
    return fx.GraphModule(network.module, graph)


def fastest_precision(network: Network, inputs: tuple[Tensor, ...]) -> Precision:
    """Time training steps in each precision on this machine, in turn, and take the fastest; plain fp32 where nothing gains.

    A precision in which a step fails (some operators have no bfloat16 kernel), or that is far behind, drops out. float16 is
    tried on GPUs that compute no bfloat16. Processes that train together take what the first one finds.

    Args:
        network: not changed.
        inputs: of one batch.
    """
    images = any(x.dim() == 4 for x in inputs)
    half = "fp16" if network.device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False) else "bf16"
    layouts = (True, False) if images else (False,)
    candidates = [Precision(channels_last=last, **{half: low}) for low in (True, False) for last in layouts]

    def fastest() -> Precision:
        seconds = _timed(network, inputs, candidates)
        return min(seconds, key=lambda c: min(seconds[c]), default=Precision())

    return join(network.device).agree(fastest)


def compiled_where_faster(network: Network, inputs: tuple[Tensor, ...], precision: Precision) -> Precision:
    """``precision`` compiled, where that works here and its steps are faster; compiling takes a minute or more.

    Without a C++ compiler, or with an operator that ``torch.compile`` does not take, steps stay as they are.
    """
    candidate = replace(precision, compiled=True)
    seconds = _timed(network, inputs, [precision, candidate])
    best = {c: min(taken) for c, taken in seconds.items()}
    return candidate if best.get(candidate, math.inf) < _GAIN * best.get(precision, math.inf) else precision


def _timed(network: Network, inputs: tuple[Tensor, ...], candidates: list[Precision]) -> dict[Precision, list[float]]:
    """Seconds of steps by precision, of those that work."""
    trials = {candidate: network.copy().train() for candidate in candidates}
    calls: dict[Precision, Callable[..., Any]] = {}
    for candidate, trial in trials.items():
        candidate.place(trial)
        calls[candidate] = candidate.forward(trial)
    seconds: dict[Precision, list[float]] = {candidate: [] for candidate in candidates}
    with torch.random.fork_rng():
        for turn in range(_TURNS):
            for candidate in list(seconds):
                taken = _trial_step(calls[candidate], candidate, inputs, network.device)
                if taken is None:
                    del seconds[candidate]
                elif turn:  # the first step also allocates, or compiles
                    seconds[candidate].append(taken)
            best = min((min(s) for s in seconds.values() if s), default=math.inf)
            seconds = {c: s for c, s in seconds.items() if not s or min(s) < 1.5 * best}
    return seconds


def _trial_step(call: Callable[..., Any], precision: Precision, inputs: tuple[Tensor, ...], device: torch.device) -> float | None:
    """Seconds of one forward and backward pass; None where the precision does not work for this network."""
    batch = precision.inputs(inputs, device)
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            if precision.compiled:
                warnings.simplefilter("ignore")  # the compiler's own
            with precision.autocast(device):
                leaves = [x for x in tree_leaves(call(*batch)) if isinstance(x, Tensor) and x.is_floating_point()]
            torch.stack([x.float().square().mean() for x in leaves]).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        if precision.compiled or (
            isinstance(error, RuntimeError) and (precision.bf16 or precision.fp16 or precision.channels_last)
        ):
            return None
        raise
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
