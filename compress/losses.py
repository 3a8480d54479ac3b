"""What a student is asked to imitate: pure functions of its tensors and the teacher's, each with its source.

Outputs: `logit_distillation`, `decoupled_distillation`, `token_distillation`, `output_distillation`,
`detection_distillation`. Inner tensors: `feature_hints`, `attention_transfer`, `similarity_preserving`, `relational`. All are
zero where student and teacher agree, compute in float32, and take gradients to the student alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import RecipeError

__all__ = [
    "attention_transfer",
    "decoupled_distillation",
    "detection_distillation",
    "feature_hints",
    "floats",
    "logit_distillation",
    "only",
    "output_distance",
    "output_distillation",
    "relational",
    "similarity_preserving",
    "token_distillation",
]


# ---- outputs


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
    return _divergence(student, teacher, temperature, 1).mean() * temperature**2


def decoupled_distillation(
    student: Tensor, teacher: Tensor, classes: Tensor, temperature: float, alpha: float = 1.0, beta: float = 8.0
) -> Tensor:
    """Zhao, Cui, Song, Qiu and Liang (2022), "Decoupled Knowledge Distillation": how sure, and what else it might be, apart.

    ``T^2 (alpha KL of [p(target), 1 - p(target)] + beta KL of the other classes among themselves)``, mean over examples. With
    ``beta = 1 - p(target)`` of the teacher it would be `logit_distillation`, which hides the others where the teacher is sure.

    Args:
        student: logits ``[N, C, ...]`` with C of at least 2, classes along dim 1.
        teacher: logits of the same shape.
        classes: index of the target class, ``[N, ...]``.
        temperature: T.
        alpha: weight of the target class's part.
        beta: weight of the other classes' part.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[2.0, 1.0, -1.0]])
        >>> target = torch.tensor([0])
        >>> round(float(decoupled_distillation(a, b, target, 1.0, 0.0, 1.0)), 4)
        0.3278
        >>> float(decoupled_distillation(b, b, target, 1.0))
        0.0
    """
    s, t = (x.float().movedim(1, -1).flatten(0, -2) / temperature for x in (student, teacher))
    target = F.one_hot(classes.flatten(), s.shape[1]).bool()
    others_s, others_t = (x[~target].view(len(x), -1) for x in (s, t))
    binary_s, binary_t = (
        torch.stack([x[target], o.logsumexp(1)], 1) - x.logsumexp(1, keepdim=True) for x, o in ((s, others_s), (t, others_t))
    )
    sure = (binary_t.exp() * (binary_t - binary_s)).sum(1).mean()
    return (alpha * sure + beta * _divergence(others_s, others_t, 1.0, 1).mean()) * temperature**2


def token_distillation(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """`logit_distillation` at every position of a sequence: classes along the last axis, padding left out.

    Word-level distillation of Kim and Rush (2016), "Sequence-Level Knowledge Distillation".

    Args:
        student: logits ``[N, ..., V]``.
        teacher: logits of the same shape.
        mask: ``[N, ...]``, not zero where there is a token; None where all are.
        temperature: T.

    Example:
        >>> import torch
        >>> a, b = torch.zeros(1, 2, 3), torch.tensor([[[2.0, 0.0, 0.0], [9.0, 0.0, 0.0]]])
        >>> round(float(token_distillation(a, b, torch.tensor([[1, 0]]), 1.0)), 4)
        0.433
    """
    each = _divergence(student, teacher, temperature, -1)
    if mask is None:
        return each.mean() * temperature**2
    kept = (mask != 0).float()
    return (each * kept).sum() / kept.sum().clamp_min(1.0) * temperature**2


def output_distillation(student: Any, teacher: Any) -> Tensor:
    """Mean squared difference of each output in units of the teacher's variance, averaged over the outputs.

    Example:
        >>> import torch
        >>> round(float(output_distillation(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))), 4) > 0
        True
    """
    pairs = zip(floats(student), floats(teacher), strict=True)
    return torch.stack([feature_hints(a, b) for a, b in pairs]).mean()


def output_distance(student: Any, teacher: Any) -> Tensor:
    """How far two networks' outputs are apart, without labels.

    Of one tensor of logits ``[N, C]``: the Kullback-Leibler divergence of the probabilities; of anything else:
    `output_distillation`.

    Example:
        >>> import torch
        >>> float(output_distance(torch.eye(3), torch.eye(3)))
        0.0
    """
    ours, theirs = floats(student), floats(teacher)
    if len(ours) == 1 and ours[0].dim() == 2 and ours[0].shape[1] > 1:
        return logit_distillation(ours[0], theirs[0], 1.0)
    return output_distillation(student, teacher)


def detection_distillation(
    boxes: Tensor,
    scores: Tensor,
    teacher_boxes: Tensor,
    teacher_scores: Tensor,
    temperature: float = 1.0,
    background: int | None = None,
) -> Tensor:
    """Boxes where the teacher sees something, scores everywhere.

    Smooth L1 of the boxes weighted by the teacher's confidence, and the divergence of the scores, both summed over the anchors
    and divided by the sum of the confidence: about the number of objects. After Chen, Choi, Yu, Han and Chandraker (2017),
    "Learning Efficient Object Detection Models with Knowledge Distillation", with the confidence in place of matched boxes.

    Args:
        boxes: ``[N, A, 4]``, in whatever units the network gives.
        scores: logits ``[N, A, C]``.
        teacher_boxes: as ``boxes``.
        teacher_scores: as ``scores``.
        temperature: of the scores.
        background: the class that says that nothing is there, where the scores go through a softmax; None where each class has
            a sigmoid of its own. Confidence is 1 - p(background), or the largest probability.

    Example:
        >>> import torch
        >>> boxes, scores = torch.zeros(1, 2, 4), torch.tensor([[[30.0], [-30.0]]])
        >>> round(float(detection_distillation(boxes + 3, scores, boxes, scores)), 4)
        2.5
    """
    s, t = scores.float(), teacher_scores.float()
    if background is None:
        confidence = t.sigmoid().amax(-1)
        wanted = (t / temperature).sigmoid()
        with torch.no_grad():
            least = F.binary_cross_entropy_with_logits(t / temperature, wanted, reduction="none")
        each = (F.binary_cross_entropy_with_logits(s / temperature, wanted, reduction="none") - least).sum(-1)
    else:
        confidence = 1 - t.softmax(-1)[..., background]
        each = _divergence(s, t, temperature, -1)
    apart = F.smooth_l1_loss(boxes.float(), teacher_boxes.float(), reduction="none").mean(-1)
    return ((confidence * apart).sum() + each.sum() * temperature**2) / confidence.sum().clamp_min(1.0)


# ---- inner tensors


def feature_hints(student: Tensor, teacher: Tensor) -> Tensor:
    """Romero et al. (2015), "FitNets: Hints for Thin Deep Nets": the mean squared difference.

    In units of the teacher's variance, so that a weight means the same in every layer.

    Args:
        student: of any shape, after the projection to the teacher's width.
        teacher: of the same shape.

    Example:
        >>> import torch
        >>> float(feature_hints(torch.tensor([3.0, 5.0]), torch.tensor([0.0, 2.0])))
        9.0
    """
    return (student.float() - teacher.float()).square().mean() / teacher.float().var(correction=0).clamp_min(1e-6)


def attention_transfer(student: Tensor, teacher: Tensor) -> Tensor:
    """Zagoruyko and Komodakis (2017), "Paying More Attention to Attention": where the two look, whatever their widths.

    The squares summed over the channels, as a vector of unit length for each example; the mean squared difference of those,
    as in the authors' code.

    Args:
        student: ``[N, C, ...]`` with at least one axis of positions.
        teacher: ``[N, C', ...]``, the same positions.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0], [0.0, 2.0]]])
        >>> float(attention_transfer(a, b)), float(attention_transfer(3 * a, a))
        (1.0, 0.0)
    """
    a, b = (F.normalize(x.float().square().sum(1).flatten(1)) for x in (student, teacher))
    return (a - b).square().mean()


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """Tung and Mori (2019), "Similarity-Preserving Knowledge Distillation": which examples of a batch are alike.

    Inner products of all pairs of examples, rows of unit length; squared differences, mean over the pairs.

    Args:
        student: ``[N, ...]``, of any shape behind.
        teacher: ``[N, ...]``, of any other.

    Example:
        >>> import torch
        >>> a, b = torch.eye(2), torch.ones(2, 2)
        >>> round(float(similarity_preserving(a, b)), 4), float(similarity_preserving(3 * a, a))
        (0.2929, 0.0)
    """
    a, b = (F.normalize(x @ x.T) for x in (student.float().flatten(1), teacher.float().flatten(1)))
    return (a - b).square().mean()


def relational(student: Tensor, teacher: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Park, Kim, Lu and Cho (2019), "Relational Knowledge Distillation": distances and angles between examples.

    Smooth L1 of the distances of all pairs in units of their mean, and of the cosines of all triples; memory grows with N^3.

    Args:
        student: ``[N, C, ...]``; positions are averaged first.
        teacher: ``[N, C', ...]``.
        distance: weight of the distances.
        angle: weight of the angles.

    Example:
        >>> import torch
        >>> a = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> line = torch.tensor([[0.0], [1.0], [2.0]])
        >>> round(float(relational(5 * a + 1, a)), 4), float(relational(line, a)) > 1
        (0.0, True)
    """
    a, b = (x.float().flatten(2).mean(2) if x.dim() > 2 else x.float() for x in (student, teacher))
    far_a, far_b = _distances(a), _distances(b)
    apart = F.smooth_l1_loss(far_a / _mean_distance(far_a), far_b / _mean_distance(far_b))
    return distance * apart + angle * F.smooth_l1_loss(_cosines(a), _cosines(b))


# ---- the pieces


def floats(outputs: Any) -> list[Tensor]:
    """The floating-point tensors among a network's outputs, in order.

    Example:
        >>> import torch
        >>> len(floats({"scores": torch.zeros(1), "count": torch.tensor(3)}))
        1
    """
    return [x for x in pytree.tree_leaves(outputs) if isinstance(x, Tensor) and x.is_floating_point()]


def only(outputs: Any) -> Tensor:
    """The one tensor of logits that a network gives.

    Raises:
        RecipeError: there are several outputs, or it has no axis of classes.
    """
    found = floats(outputs)
    if len(found) != 1 or found[0].dim() < 2:
        raise RecipeError(
            "The network's output is not one tensor of logits [N, C]: give the task a loss, and distillation follows all outputs."
        )
    return found[0]


def _divergence(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) along ``dim``."""
    log_p = F.log_softmax(teacher.float() / temperature, dim=dim)
    log_q = F.log_softmax(student.float() / temperature, dim=dim)
    return (log_p.exp() * (log_p - log_q)).sum(dim)


def _distances(x: Tensor) -> Tensor:
    """Euclidean distances of all pairs ``[N, N]``, with a gradient of 0 where two are the same."""
    squares = (x[:, None] - x[None]).square().sum(-1)
    return torch.where(squares > 0, squares.clamp_min(1e-12).sqrt(), 0.0)


def _mean_distance(distances: Tensor) -> Tensor:
    """Over the pairs that are apart."""
    return distances.sum() / (distances > 0).sum().clamp_min(1) + 1e-12


def _cosines(x: Tensor) -> Tensor:
    """Cosines of the angles at each example between each two others, ``[N, N, N]``."""
    directions = F.normalize(x[None] - x[:, None], dim=2)
    return directions @ directions.mT
