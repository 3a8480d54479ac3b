"""Where a value first stopped being a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from .network import Network

__all__ = ["trouble"]


class _Found(Exception):
    def __init__(self, what: str):
        super().__init__(what)
        self.what = what  # the interpreter adds to the message


def trouble(network: Network, inputs: tuple[Tensor, ...]) -> str:
    """The first thing that is not finite: an input, a weight, what a module gives, or a gradient that lies on the weights.

    Args:
        network: in the mode to look at it in; the statistics of its normalisations change as by any call.
        inputs: of one batch, on the network's device.

    Returns:
        What it is, as part of a sentence; '' where everything is finite.

    Example:
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)), torch.zeros(1, 1))
        >>> _ = network.module.get_parameter("0.weight").data.fill_(3e38)
        >>> trouble(network, (torch.full((1, 1), 100.0),))
        "what the module '0' gives"
    """
    for number, x in enumerate(inputs, 1):
        if _bad(x):
            return f"input {number} of the batch"
    for name, weight in network.module.named_parameters():
        if not bool(weight.isfinite().all()):
            return f"the weight '{name}'"
    try:
        with torch.no_grad():
            _Watch(network.module).run(*inputs)
    except _Found as found:
        return found.what
    return _gradient(network)


class _Watch(fx.Interpreter):
    """Runs a graph until a value is not finite."""

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at what it gives; minus infinity is what masks are made of."""
        result = super().run_node(n)
        if n.op == "call_function" and any(_bad(x) for x in tree_leaves(result) if isinstance(x, Tensor)):
            module = [path for path, _ in n.meta.get("nn_module_stack", {}).values()][-1:]
            raise _Found(f"what the module '{module[0]}' gives" if any(module) else f"what the operator '{n.name}' gives")
        return result


def _gradient(network: Network) -> str:
    """The gradient that came first on the way back: that of the weight which is used last."""
    place = {node: i for i, node in enumerate(network.module.graph.nodes)}
    used = {str(n.target): max((place[u] for u in n.users), default=0) for n in place if n.op == "get_attr"}
    bad = [name for name, p in network.module.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    return f"the gradient of '{max(bad, key=lambda name: used.get(name, 0))}'" if bad else ""


def _bad(x: Tensor) -> bool:
    return x.is_floating_point() and bool((x.isnan() | x.isposinf()).any())
