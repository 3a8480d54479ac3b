"""Score every channel, or every branch, of a network with a criterion: one vectorised pass for each batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..errors import RecipeError, TaskError
from ..network import Network
from .analysis import Analysis
from .call import Call, operator_name
from .criteria import Criterion, ElementCriterion, GateCriterion, RowCriterion, Scope
from .gates import Gates, branch_gates, channel_gates
from .groups import Channels
from .labels import Ids
from .rules_recurrent import RECURRENT

if TYPE_CHECKING:
    from ..shorten import Branch

__all__ = ["Scorer", "branch_scores", "channel_scores", "joint_scores", "label_free_loss"]

LossOf = Callable[[Any, Any], Tensor]


class Scorer:
    """Sums a criterion's elements over classes, with index tensors made once.

    Args:
        channels: of the network that is scored.
        criterion: scores single elements.
        device: where the weights are.
    """

    def __init__(self, channels: Channels, criterion: ElementCriterion, device: torch.device | str = "cpu"):
        self._criterion = criterion
        self._count = len(channels.classes)
        self._slots: list[tuple[str, int, Tensor]] = []
        self.counts = torch.zeros(self._count + 1, device=device)
        for name, dim, slot in _slots(channels, criterion.over):
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


def _slots(channels: Channels, over: Scope) -> list[tuple[str, int, Ids]]:
    """(weight, dim, the channel of each position or -1) of every trainable axis that counts."""
    analysis = channels.analysis
    readers, scales = analysis.readers, _scales(analysis) if over == "scales" else frozenset()
    found: list[tuple[str, int, Ids, NDArray[np.bool_]]] = []
    has = np.full(len(channels.classes) + 1, over == "scales")  # the last entry takes what must stay
    for name, parameter in analysis.parameters.items():
        if isinstance(parameter.tensor, nn.Parameter) and parameter.tensor.is_floating_point():
            for dim, ids in enumerate(parameter.labels):
                reads = np.isin(ids, readers)
                counts = {
                    "readers": reads,
                    "class": np.ones(len(ids), bool),
                    "filters": ~reads & (parameter.tensor.dim() > 1),
                    "scales": np.full(len(ids), not scales.isdisjoint(parameter.names)),
                }[over]
                index = channels.index(ids)
                found.append((name, dim, index, counts))
                has[index[counts]] = True
    kept = [(name, dim, np.where(counts | ~has[index], index, -1)) for name, dim, index, counts in found]
    return [(name, dim, index) for name, dim, index in kept if (index >= 0).any()]


def _scales(analysis: Analysis) -> frozenset[str]:
    """Names of the scales of all BatchNorm layers."""
    calls = [Call(n) for n in analysis.module.graph.nodes if operator_name(n.target) == "batch_norm"]
    return frozenset(str(c["weight"].target) for c in calls if isinstance(c["weight"], fx.Node))


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
        loss: ``loss(outputs, targets)``, a mean over examples; batches without targets have `label_free_loss`.

    Raises:
        TaskError: no batches, or gradients that are not finite.
        RecipeError: the criterion says nothing of such a network.
    """
    copy = network.copy().eval()
    if isinstance(criterion, RowCriterion):
        return _from_rows(copy, channels, criterion)
    if isinstance(criterion, ElementCriterion):
        return _from_elements(copy, channels, criterion, batches, loss)
    return _from_gates(copy, channel_gates(channels), criterion, batches, loss)


def branch_scores(
    network: Network, branches: Sequence[Branch], criterion: Criterion, batches: Iterable[tuple[Any, Any]], loss: LossOf
) -> Tensor:
    """The score of each residual branch, averaged over batches, ``[B]`` on the CPU, in the units of `channel_scores`.

    A branch is one gate on its operand of the addition. To first order it is the sum of the gates of what it adds, so that
    the same criterion's scores of channels and of branches can stand in one selection.

    Args:
        network: the network that ``branches`` were found in.
        branches: what is scored.
        criterion: one that scores gates: `Taylor`, `Fisher` or `Activation`.
        batches: as in `channel_scores`.
        loss: as in `channel_scores`.

    Raises:
        TaskError: no batches, or gradients that are not finite.
        RecipeError: the criterion looks at weights alone: a branch has no weight that stands for all of it.

    Example:
        >>> from edgepress.compress.network import trace
        >>> from edgepress.compress.shorten import branches
        >>> from .criteria import Fisher
        >>> class Block(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = torch.nn.Linear(1, 1, bias=False)
        ...         torch.nn.init.constant_(self.f.weight, 3.0)
        ...     def forward(self, x):
        ...         return x + self.f(x)
        >>> network = trace(Block(), torch.ones(1, 1))
        >>> batch = ((torch.tensor([[1.0], [2.0]]),), torch.zeros(1))
        >>> branch_scores(network, branches(network), Fisher(), [batch], lambda y, t: (y - t).mean())  # (3 ** 2 + 6 ** 2) / 4
        tensor([11.2500])
    """
    if not isinstance(criterion, GateCriterion):
        raise RecipeError(f"{type(criterion).__name__} cannot score whole branches: choose Taylor, Fisher or Activation.")
    copy = network.copy().eval()
    return _from_gates(copy, branch_gates(copy, branches), criterion, batches, loss)


def joint_scores(
    network: Network,
    channels: Channels,
    branches: Sequence[Branch],
    criterion: Criterion,
    batches: Iterable[tuple[Any, Any]],
    loss: LossOf,
) -> tuple[Tensor, Tensor]:
    """What `channel_scores` and `branch_scores` give, ``[C]`` and ``[B]``, in one pass over the batches where both are gates."""
    if not branches:
        return channel_scores(network, channels, criterion, batches, loss), torch.zeros(0)
    if isinstance(criterion, ElementCriterion) or not isinstance(criterion, GateCriterion):
        seen = list(batches)
        worth = branch_scores(network, branches, criterion, seen, loss)
        return channel_scores(network, channels, criterion, seen, loss), worth
    copy = network.copy().eval()
    both = channel_gates(channels).joined(branch_gates(copy, branches))
    scores = _from_gates(copy, both, criterion, batches, loss)
    return scores[: len(channels.classes)], scores[len(channels.classes) :]


def _from_rows(network: Network, channels: Channels, criterion: RowCriterion) -> Tensor:
    """Each group's channels as rows: all elements of theirs that count, side by side."""
    slots, scores, start = _slots(channels, criterion.over), [], 0
    for group in channels.groups:
        n = len(group.channels)
        rows = [torch.zeros(n, 0)]
        for name, dim, index in slots:
            at = np.flatnonzero((index >= start) & (index < start + n))
            at = at[np.argsort(index[at], kind="stable")]
            if len(at) and len(set(np.bincount(index[at] - start, minlength=n))) == 1:
                weight = network.module.get_parameter(name).detach().float().cpu()
                rows.append(weight.index_select(dim, torch.from_numpy(at)).movedim(dim, 0).reshape(n, -1))
        scores.append(criterion.rows(torch.cat(rows, 1)))
        start += n
    return torch.cat(scores) if scores else torch.zeros(0)


def _from_elements(
    network: Network, channels: Channels, criterion: ElementCriterion, batches: Iterable[tuple[Any, Any]], loss: LossOf
) -> Tensor:
    scorer = Scorer(channels, criterion, network.device)
    weights = {name: network.module.get_parameter(name).requires_grad_(True) for name in scorer.names}
    plain = {name: w.detach() for name, w in weights.items()}
    if not criterion.gradients:
        return scorer.score(plain, plain).cpu()

    def one(inputs: tuple[Tensor, ...], targets: Any, seed: int) -> Tensor:
        # all gradients by backward(): on ResNet-56 autograd.grad for the 55 that are read took 1.27 times plain training's time
        network.module.zero_grad(set_to_none=True)
        with _recurrent_backward(network):
            _loss(network(*inputs), targets, loss, seed).backward()
        return scorer.score(plain, {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()})

    return _mean(network, batches, one)


def _from_gates(
    network: Network, gates: Gates, criterion: GateCriterion, batches: Iterable[tuple[Any, Any]], loss: LossOf
) -> Tensor:
    gates = gates.to(network.device)
    network.module.requires_grad_(False)

    def one(inputs: tuple[Tensor, ...], targets: Any, seed: int) -> Tensor:
        nonlocal gates
        if not seed:
            with _recurrent_backward(network):
                gates = gates.checked(network, inputs)
        # The loss without labels is the sum of the examples' own over the root of their number, see `label_free_loss`.
        scale = len(inputs[0]) if targets is not None else len(inputs[0]) ** 0.5
        with _recurrent_backward(network):
            found = gates.contributions(network, inputs, targets, lambda y, t: _loss(y, t, loss, seed), scale)
        return criterion.gates(found, scale)

    return _mean(network, batches, one)


def _mean(
    network: Network, batches: Iterable[tuple[Any, Any]], score: Callable[[tuple[Tensor, ...], Any, int], Tensor]
) -> Tensor:
    """Scores averaged over batches; ``score(inputs, targets, number of the batch)`` gives those of one."""
    total, count = torch.zeros(()), 0
    for inputs, targets in batches:
        x, y = pytree.tree_map_only(Tensor, lambda t: t.to(network.device), (tuple(inputs), targets))
        total = score(x, y, count) + total.to(network.device)
        count += 1
    if not count:
        raise TaskError("The task's train_batches gave no batch: pruning by gradients needs some.")
    if not bool(torch.isfinite(total).all()):
        raise TaskError("The loss has gradients that are NaN or infinite on the training batches: check the data and the loss.")
    return (total / count).cpu()


def _loss(outputs: Any, targets: Any, loss: LossOf, seed: int) -> Tensor:
    return label_free_loss(outputs, seed) if targets is None else loss(outputs, targets)


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
