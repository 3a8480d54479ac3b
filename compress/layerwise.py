"""Layers changed one after the other, each by what its inputs are: what SparseGPT and GPTQ share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from .errors import TaskError
from .network import Network
from .task import Task, training_batches

__all__ = ["LAYERS", "LayerByLayer", "examples", "kind", "patches", "some_batches"]

LAYERS = {"linear", "conv1d", "conv2d", "conv3d"}
"""Kinds of operators whose weights are rewritten."""

Rewrite = Callable[[Tensor, Tensor], Tensor]
"""(weights ``[O, K]``, ``X X^T`` of the inputs ``X [K, samples]``) to new weights ``[O, K]``."""


def patches(x: Tensor, kernel: tuple[int, ...], stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Tensor:
    """The inputs of every position of a convolution, channels last: ``[N, C, *size]`` to ``[prod(kernel) * C, positions]``.

    Example:
        >>> import torch
        >>> patches(torch.arange(4.0).view(1, 1, 4), (2,))
        tensor([[0., 1., 2.],
                [1., 2., 3.]])
    """
    stride, dilation = _each(stride, kernel), _each(dilation, kernel)
    if padding == "same":
        around = [((k - 1) * d // 2, (k - 1) * d - (k - 1) * d // 2) for k, d in zip(kernel, dilation, strict=True)]
    else:
        around = [(p, p) for p in _each(0 if padding == "valid" else padding, kernel)]
    x = F.pad(x, [n for pair in reversed(around) for n in pair])
    for i, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(2 + i, (k - 1) * d + 1, s)[..., ::d]
    places, taps = range(2, 2 + len(kernel)), range(2 + len(kernel), 2 + 2 * len(kernel))
    return x.permute(*taps, 1, 0, *places).flatten(0, len(kernel)).flatten(1)


def _each(value: Any, kernel: tuple[int, ...]) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * len(kernel) if len(values) == 1 else values


class LayerByLayer(fx.Interpreter):
    """Runs the graph on calibration inputs; each chosen weight is rewritten, in place, for what the changed layers before give.

    Args:
        network: in evaluation mode.
        chosen: calls of convolutions and linear layers to the names of their weights.
        rewrite: new weights of a layer; of a convolution with groups, it is asked for each group alone.
    """

    def __init__(self, network: Network, chosen: Mapping[fx.Node, str], rewrite: Rewrite):
        super().__init__(network.module)
        self._chosen, self._new = chosen, rewrite

    def run_node(self, n: fx.Node) -> Any:
        """Rewrite the weight of a chosen layer, then run it."""
        if n in self._chosen:
            self._rewrite(n, self.env[n.args[0]], self.module.get_parameter(self._chosen[n]))  # type: ignore[index, operator]
        return super().run_node(n)

    def _rewrite(self, n: fx.Node, x: Tensor, weight: Tensor) -> None:
        if kind(n) == "linear":
            flat = x.reshape(-1, x.shape[-1]).T
            weight.copy_(self._new(weight, (flat @ flat.T).double()))
            return
        kernel = tuple(weight.shape[2:])
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        call = dict(zip(names, n.args, strict=False)) | n.kwargs
        settings = {k: call[k] for k in ("stride", "padding", "dilation") if k in call}
        groups = int(call.get("groups", 1))  # type: ignore[arg-type]
        for mine, w in zip(x.chunk(groups, 1), weight.chunk(groups, 0), strict=True):
            hessian = torch.zeros(w[0].numel(), w[0].numel(), dtype=torch.double, device=w.device)
            for some in mine.split(8):
                seen = patches(some, kernel, **settings)
                hessian += seen @ seen.T
            last = w.movedim(1, -1)  # neighbours are input channels, as N:M wants them
            w.copy_(self._new(last.flatten(1), hessian).view(last.shape).movedim(-1, 1))


def kind(node: fx.Node) -> str:
    """The name of the operator that a node calls, ``conv2d``; empty where it calls none."""
    name = getattr(node.target, "_schema", None) and node.target._schema.name  # type: ignore[union-attr]
    return str(name).removeprefix("aten::") if node.op == "call_function" else ""


def some_batches(task: Task, count: int) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """The first ``count`` training batches."""
    seen = 0
    for batch in training_batches(task, 0):
        if seen == count:
            break
        seen += 1
        yield batch
    if not seen:
        raise TaskError("The task's data is empty: the weights are fitted to a batch at least.")


def examples(network: Network, task: Task, count: int) -> tuple[Tensor, ...]:
    """The inputs of the first ``count`` training batches, joined, on the network's device."""
    inputs = [inputs for inputs, _ in some_batches(task, count)]
    return tuple(torch.cat(column).to(network.device) for column in zip(*inputs, strict=True))
