"""Score every channel of a network with a criterion: one vectorised pass over the weights for each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import TaskError
from ..network import Network
from .call import operator_name
from .criteria import Criterion
from .groups import Channels
from .labels import Ids
from .rules_recurrent import RECURRENT

__all__ = ["Scorer", "channel_scores", "label_free_loss"]

LossOf = Callable[[Any, Any], Tensor]


class Scorer:
    """Sums a criterion's elements over classes, with index tensors made once.

    Args:
        channels: of the network that is scored.
        criterion: scores single elements.
        device: where the weights are.
    """

    def __init__(self, channels: Channels, criterion: Criterion, device: torch.device | str = "cpu"):
        self._criterion = criterion
        self._count = len(channels.classes)
        self._slots: list[tuple[str, int, Tensor]] = []
        self.counts = torch.zeros(self._count + 1, device=device)
        for name, dim, slot in _slots(channels, criterion.readers_only):
            # what must stay, or does not count, is summed into a last entry that nobody reads
            index = torch.from_numpy(slot).to(device).remainder(self._count + 1)
            self._slots.append((name, dim, index))
            elements = channels.analysis.parameters[name].tensor.numel() / len(slot)
            self.counts.index_add_(0, index, torch.full((len(slot),), elements, device=device))
        self.names = list(dict.fromkeys(name for name, _, _ in self._slots))

    def sums(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        """Sum of the criterion's elements over each channel's class, ``[C]``."""
        total = torch.zeros_like(self.counts)
        elements: dict[str, Tensor] = {}
        for name, dim, slot in self._slots:
            if name not in elements:
                elements[name] = self._criterion.element(weights[name], gradients[name]).float()
            e = elements[name]
            total.index_add_(0, slot, e.sum([d for d in range(e.dim()) if d != dim]) if e.dim() > 1 else e)
        return total[: self._count]

    def score(self, weights: dict[str, Tensor], gradients: dict[str, Tensor]) -> Tensor:
        """One batch's score of each channel, ``[C]``."""
        return self._criterion.score(self.sums(weights, gradients), self.counts[: self._count])


def _slots(channels: Channels, readers_only: bool) -> list[tuple[str, int, Ids]]:
    """(weight, dim, the channel of each position or -1) of every trainable axis that counts."""
    readers = channels.analysis.readers
    found: list[tuple[str, int, Ids, NDArray[np.bool_]]] = []
    read = np.zeros(len(channels.classes) + 1, bool)  # the last entry takes what must stay
    for name, parameter in channels.analysis.parameters.items():
        if isinstance(parameter.tensor, nn.Parameter) and parameter.tensor.is_floating_point():
            for dim, ids in enumerate(parameter.labels):
                index, reads = channels.index(ids), np.isin(ids, readers)
                found.append((name, dim, index, reads))
                read[index[reads]] = True
    if readers_only:
        found = [(name, dim, np.where(reads | ~read[index], index, -1), reads) for name, dim, index, reads in found]
    return [(name, dim, index) for name, dim, index, _ in found if (index >= 0).any()]


def channel_scores(
    network: Network, channels: Channels, criterion: Criterion, batches: Iterable[tuple[Any, Any]], loss: LossOf
) -> Tensor:
    """The score of each channel, averaged over batches, ``[C]`` in the order of ``channels.classes``, on the CPU.

    The network runs in evaluation mode (BatchNorm uses what it learned), on a copy, and stays as it was.

    Args:
        network: the network that ``channels`` were found in.
        channels: what is scored.
        criterion: how; without gradients no batch is run.
        batches: ``(inputs, targets)`` with a tuple of inputs; targets may be None.
        loss: ``loss(outputs, targets)``, for batches that have targets; `label_free_loss` serves the others.

    Raises:
        TaskError: no batches, or gradients that are not finite.
    """
    copy = network.copy().eval()
    scorer = Scorer(channels, criterion, copy.device)
    weights = {name: copy.module.get_parameter(name).requires_grad_(True) for name in scorer.names}
    plain = {name: w.detach() for name, w in weights.items()}
    if not criterion.gradients:
        return scorer.score(plain, plain).cpu()
    total = torch.zeros(len(channels.classes), device=copy.device)
    count = 0
    for inputs, targets in batches:
        # all gradients by backward(): on ResNet-56 autograd.grad for the 55 that are read took 1.27 times plain training's time
        copy.module.zero_grad(set_to_none=True)
        with _recurrent_backward(copy):
            _loss(copy, inputs, targets, loss, count).backward()
        gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
        total += scorer.score(plain, gradients)
        count += 1
    if not count:
        raise TaskError("The task's train_batches gave no batch: pruning by gradients needs some.")
    if not bool(torch.isfinite(total).all()):
        raise TaskError("The loss has gradients that are NaN or infinite on the training batches: check the data and the loss.")
    return (total / count).cpu()


def _loss(network: Network, inputs: tuple[Tensor, ...], targets: Any, loss: LossOf, seed: int) -> Tensor:
    device = network.device
    outputs = network(*[x.to(device) for x in inputs])
    if targets is None:
        return label_free_loss(outputs, seed)
    return loss(outputs, pytree.tree_map_only(Tensor, lambda t: t.to(device), targets))


def label_free_loss(outputs: Any, seed: int) -> Tensor:
    """A loss for batches without targets: the outputs, each with a random sign, summed.

    The natural choice, the divergence from the network's own outputs, has no gradient where the network stands. What
    counts there is its second-order term, the squared change of the outputs ``|J dw| ** 2``, and the squared first-order
    change of a sum with random signs is that in expectation (Hutchinson's estimator): Taylor scores of this loss
    estimate how far the outputs move when a channel goes. Each output is in units of its own root mean square.

    Args:
        outputs: whatever the network returns; its floating-point tensors count.
        seed: of the signs.

    Example:
        >>> y = torch.tensor([[3.0, -4.0]], requires_grad=True)
        >>> label_free_loss(y, 0).backward()
        >>> bool((y.grad.abs() == y.grad.abs()[0, 0]).all())
        True
    """
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor) and t.is_floating_point()]
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros((), device=tensors[0].device)
    for t in tensors:
        signs = torch.randint(0, 2, t.shape, generator=generator).to(t).mul_(2).sub_(1)
        scale = t.detach().float().square().mean().sqrt().clamp(min=1e-12)
        total = total + (t.float() * signs.float()).sum() / (scale * t.numel() ** 0.5)
    return total


def _recurrent_backward(network: Network) -> contextlib.AbstractContextManager[Any]:
    """cuDNN refuses the backward pass of a recurrent layer in evaluation mode; PyTorch's own kernels do it."""
    if any(operator_name(n.target) in RECURRENT for n in network.module.graph.nodes if n.op == "call_function"):
        return torch.backends.cudnn.flags(enabled=False)
    return contextlib.nullcontext()
