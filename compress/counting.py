"""Multiply-accumulates of a graph, by torch's counter."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_macs", "count_node_macs"]


def count_macs(module: fx.GraphModule, inputs: Sequence[Tensor]) -> int:
    """Multiply-accumulates of convolutions, matrix products, recurrent layers and attention in one run.

    Example:
        >>> count_macs(fx.symbolic_trace(torch.nn.Linear(4, 2)), [torch.zeros(3, 4)])
        24
    """
    with _counter() as counter, torch.no_grad():
        module(*inputs)
    return int(counter.get_total_flops() // 2)


def count_node_macs(module: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[str, int]:
    """The same by graph node; nodes without any are left out."""
    counting = _Counting(module)
    with torch.no_grad():
        counting.run(*inputs)
    return counting.macs


class _Counting(fx.Interpreter):
    """Runs a graph node by node under the counter."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.macs: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and note what it multiplied."""
        with _counter() as counter:
            result = super().run_node(n)
        if counter.get_total_flops():
            self.macs[n.name] = int(counter.get_total_flops() // 2)
        return result


@contextlib.contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Torch's counter; fused LSTMs and attention, for which it has no formula, run as the products that they consist of."""
    with contextlib.ExitStack() as stack:
        with warnings.catch_warnings():  # oneDNN's flags speak of a GPU's
            warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN", category=UserWarning)
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield stack.enter_context(FlopCounterMode(display=False))
