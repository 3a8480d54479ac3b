"""Distillation: the student learns to give the teacher's outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import RecipeError
from .network import Network, trace
from .passes import describe
from .task import Task, labelled_loss, training_batches
from .train import Precision, Schedule, fastest_precision, fit

__all__ = ["Distill", "logit_distillation", "output_distance", "output_distillation"]


@dataclass(frozen=True, kw_only=True)
class Distill(Schedule):
    """Train the network towards its teacher: recovery after pruning, with or without labels.

    Takes the fields of `Schedule` (epochs, minutes, optimizer, lr ...) and its own:

    Args:
        temperature: softens both sides' probabilities (Hinton, Vinyals, Dean 2015).
        labels: weight of the task's own loss where there are labels, from 0 (teacher alone) to 1 (labels alone).
        teacher: the network to follow; the task's original where None.
        precision: how steps compute; the fastest on this machine where None.
        checkpoint: a file to go on from after an interruption.
    """

    temperature: float = 4.0
    labels: float = 0.1
    teacher: Network | None = field(default=None, repr=False)
    precision: Precision | None = None
    checkpoint: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 <= self.labels <= 1:
            raise RecipeError("Distill needs a temperature above 0 and a labels weight from 0 to 1.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the trained network; ``network`` and the teacher stay as they were."""
        student, device = network.copy(), network.device
        precision = self.precision or fastest_precision(student, next(training_batches(task, 0))[0])
        teacher = (self.teacher.copy() if self.teacher is not None else trace(task.model, task.inputs)).to(device).eval()
        precision.place(teacher)

        def loss(outputs: Any, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
            with torch.no_grad(), precision.autocast(device):
                wanted = teacher(*inputs)
            soft = self._towards(outputs, wanted, task)
            if targets is None or self.labels == 0:
                return soft
            return (1 - self.labels) * soft + self.labels * labelled_loss(task, outputs, targets)

        found = fit(student, task, loss, self, precision=precision, checkpoint=self.checkpoint, title="Distill")
        return student.then(**{"pass": "Distill"}, **describe(self), found=found)

    def _towards(self, outputs: Any, wanted: Any, task: Task) -> Tensor:
        if task.loss is None:
            return logit_distillation(_only(outputs), _only(wanted), self.temperature)
        return output_distillation(outputs, wanted)


def logit_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton, Vinyals and Dean (2015): ``T^2 KL(softmax(teacher / T) || softmax(student / T))``, mean over examples.

    Args:
        student: logits ``[N, C, ...]``, classes along dim 1.
        teacher: logits of the same shape.
        temperature: T.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
        >>> round(float(logit_distillation(a, b, 1.0)), 4), float(logit_distillation(a, a, 1.0))
        (1.5232, 0.0)
    """
    log_p = F.log_softmax(teacher.float() / temperature, dim=1)
    log_q = F.log_softmax(student.float() / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1).mean() * temperature**2


def output_distillation(student: Any, teacher: Any) -> Tensor:
    """Mean squared difference of each output in units of the teacher's variance, averaged over the outputs.

    Example:
        >>> import torch
        >>> round(float(output_distillation(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))), 4) > 0
        True
    """
    pairs = zip(_floats(student), _floats(teacher), strict=True)
    terms = [(a.float() - b.float()).square().mean() / b.float().var(correction=0).clamp_min(1e-6) for a, b in pairs]
    return torch.stack(terms).mean()


def output_distance(student: Any, teacher: Any) -> Tensor:
    """How far two networks' outputs are apart, without labels.

    Of one tensor of logits ``[N, C]``: the Kullback-Leibler divergence of the probabilities; of anything else:
    `output_distillation`.

    Example:
        >>> import torch
        >>> float(output_distance(torch.eye(3), torch.eye(3)))
        0.0
    """
    ours, theirs = _floats(student), _floats(teacher)
    if len(ours) == 1 and ours[0].dim() == 2 and ours[0].shape[1] > 1:
        return logit_distillation(ours[0], theirs[0], 1.0)
    return output_distillation(student, teacher)


def _floats(outputs: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def _only(outputs: Any) -> Tensor:
    found = _floats(outputs)
    if len(found) != 1 or found[0].dim() < 2:
        raise RecipeError(
            "The network's output is not one tensor of logits [N, C]: give the task a loss, and distillation follows all outputs."
        )
    return found[0]
