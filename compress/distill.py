"""Distillation: the student learns to give what its teacher gives."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import RecipeError
from .features import FEATURES, Features, Place, compared, matched, projections, watched
from .losses import (
    decoupled_distillation,
    detection_distillation,
    floats,
    logit_distillation,
    only,
    output_distance,
    output_distillation,
    token_distillation,
)
from .network import Network, trace
from .passes import describe
from .task import Task, labelled_loss, training_batches
from .teacher import Teacher, TeacherSource, check_teacher, fingerprint, open_teacher, teacher_network
from .teacher_cache import Remembered, outputs_folder
from .train import BatchLoss, Precision, Schedule, fastest_precision, fit

__all__ = ["Distill", "asked", "automatic", "blended", "logit_distillation", "output_distance", "output_distillation"]

_BATCH_NORM = torch.ops.aten.batch_norm.default
_UNNORMALISED = 0.01  # from the table in docs/training.md

Imitation = Literal["auto", "logits", "decoupled", "tokens", "outputs", "detection"]


@dataclass(frozen=True, kw_only=True)
class Distill(Schedule):
    """Train the network towards its teacher: recovery after pruning, with or without labels.

    Takes the fields of `Schedule` (epochs, minutes, optimizer, lr ...) and its own. What is minimised is ``(1 - labels) *
    imitation + labels * the task's own loss + feature_weight * features``; without labels, ``imitation + feature_weight *
    features``. A task without ``train_batches`` is trained on its ``calibration_batches``.

    Args:
        loss: how outputs are compared, each a function in `losses`: 'logits' (Hinton et al. 2015), 'decoupled' (Zhao et al.
            2022; without labels the teacher's first choice is the target), 'tokens' (classes along the last axis, padding left
            out: by an input called ``attention_mask``, or where the targets are -100), 'outputs' (every output, in units of the
            teacher's variance), 'detection' (boxes and scores). 'auto' is 'logits' for one tensor of logits and a task without a
            loss of its own, else 'outputs'.
        temperature: softens both sides' probabilities.
        labels: weight of the task's own loss where there are labels, from 0 (teacher alone) to 1 (labels alone).
        alpha: of 'decoupled': weight of the target class's part.
        beta: of 'decoupled': weight of the other classes' part.
        boxes: of 'detection': name or index of the output ``[N, A, 4]``; the one that ends in 4 where empty.
        scores: of 'detection': name or index of the output of logits ``[N, A, C]``; the other one where empty.
        background: of 'detection': the class that means nothing is there; None where each class has a sigmoid of its own.
        features: how inner tensors are compared too: 'hints' (Romero et al. 2015), 'attention' (Zagoruyko and Komodakis 2017),
            'similarity' (Tung and Mori 2019), 'relational' (Park et al. 2019).
        layers: whose outputs are compared, by module name: 'layer2, layer3', 'mine=theirs'; chosen by `features.matched` where
            empty.
        feature_weight: of the features; their authors' where None.
        teacher: what to follow, see `open_teacher`; the task's original where None.
        cache: keep the teacher's outputs on disk while the same examples come again, see `Remembered`; not in deterministic
            training, where an example's last bits may depend on the others of its batch.
        precision: how steps compute; the fastest on this machine where None.
        checkpoint: a file to go on from after an interruption.
        lr: as in `Schedule`; where None, 'sgd' has 0.05 for a network with batch normalisation and 0.01 for one without.
    """

    loss: Imitation = "auto"
    temperature: float = 4.0
    labels: float = 0.1
    alpha: float = 1.0
    beta: float = 8.0
    boxes: str = ""
    scores: str = ""
    background: int | None = None
    features: Features = "none"
    layers: str = ""
    feature_weight: float | None = None
    teacher: TeacherSource | None = field(default=None, repr=False)
    cache: bool = True
    precision: Precision | None = None
    checkpoint: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0 or not 0 <= self.labels <= 1:
            raise RecipeError("Distill needs a temperature above 0 and a labels weight from 0 to 1.")
        if self.features not in ("none", *FEATURES):
            raise RecipeError(f"Distill(features='{self.features}') is unknown: take one of none, {', '.join(FEATURES)}.")
        if self.loss not in ("auto", *_IMITATIONS):
            raise RecipeError(f"Distill(loss='{self.loss}') is unknown: take one of auto, {', '.join(_IMITATIONS)}.")
        if min(self.alpha, self.beta, self.feature_weight or 0.0) < 0:
            raise RecipeError("Distill needs alpha, beta and feature_weight of at least 0.")

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the trained network; ``network`` and the teacher stay as they were."""
        student = network.copy().eval()
        inputs, targets = next(training_batches(task, 0))
        precision = self.precision or self._fastest(student, inputs)
        schedule = replace(self, lr=_rate(self, student))
        with _lesson(self, student, task, precision, inputs) as lesson:
            found = fit(
                student,
                task,
                blended(task, self.labels, lesson.imitation, always=bool(lesson.pairs)),
                replace(schedule, compile=self.compile and not lesson.pairs),  # a compiled graph shows no inner tensors
                precision=precision,
                checkpoint=self.checkpoint,
                extra=lesson.projections.values(),
                title="Distill",
            )
        found |= {"labelled": targets is not None and self.labels > 0, "lr": schedule.peak, **lesson.found}
        return student.then(**{"pass": "Distill"}, **describe(self), found=found)

    def _fastest(self, student: Network, inputs: tuple[Tensor, ...]) -> Precision:
        if self.deterministic:
            return Precision()
        return fastest_precision(student, inputs)


Imitate = Callable[[Any, tuple[Tensor, ...], Any, float], Tensor]
"""The outputs, inputs and targets of a batch, and the weight of what is imitated of the outputs, to the loss."""


def blended(task: Task, labels: float, imitation: Imitate, *, always: bool = False) -> BatchLoss:
    """The loss of a pass with a teacher: ``labels`` of the task's own and the rest imitation; without labels imitation alone.

    Args:
        task: its loss is taken.
        labels: weight of the task's own loss, from 0 to 1.
        imitation: of the teacher, weighted already; not asked where its weight is 0.
        always: ask it then, too: it has a part whose weight is another.

    Example:
        >>> import torch
        >>> task = Task(torch.nn.Identity(), torch.ones(1, 2), lambda predict: {}, "a", loss=lambda y, t: (y - t).sum())
        >>> loss = blended(task, 0.25, lambda outputs, inputs, targets, part: torch.tensor(8.0 * part))
        >>> float(loss(torch.tensor([5.0]), (), torch.tensor([1.0]))), float(loss(torch.tensor([5.0]), (), None))
        (7.0, 8.0)
    """

    def loss(outputs: Any, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        if targets is None or labels == 0:
            return imitation(outputs, inputs, targets, 1.0)
        hard = labels * labelled_loss(task, outputs, targets)
        if labels == 1 and not always:
            return hard
        return hard + imitation(outputs, inputs, targets, 1 - labels)

    return loss


def _rate(schedule: Schedule, network: Network) -> float | None:
    """The learning rate that is given; where none is, steps of 'sgd' are shorter without batch normalisation."""
    if schedule.lr is not None or schedule.optimizer != "sgd":
        return schedule.lr
    return None if network.module.graph.find_nodes(op="call_function", target=_BATCH_NORM) else _UNNORMALISED


# ---- the teacher at work


@dataclass(frozen=True)
class _Lesson:
    """What a student is compared with.

    Attributes:
        imitation: outputs, inputs, targets and the weight of the outputs' part to the loss.
        pairs: inner tensors that are compared.
        projections: trained along, dropped afterwards.
        found: for the history; complete when the lesson is over.
    """

    imitation: Imitate
    pairs: list[tuple[Place, Place]]
    projections: dict[str, nn.Parameter]
    found: dict[str, Any]


@contextlib.contextmanager
def _lesson(
    distill: Distill, student: Network, task: Task, precision: Precision, inputs: tuple[Tensor, ...]
) -> Iterator[_Lesson]:
    """The teacher opened and checked; inside, the tensors that are compared can be seen."""
    device = student.device
    source = distill.teacher if distill.teacher is not None else trace(task.model, task.inputs)
    if distill.features != "none" and isinstance(source, nn.Module) and not isinstance(source, torch.jit.ScriptModule):
        source = trace(source, task.inputs)
    network = teacher_network(source)
    if network is not None:
        network = network.to(device).eval()
        precision.place(network)
    teacher = open_teacher(source, device) if network is None else (lambda batch: network(*batch))
    batch = precision.inputs(inputs, device)
    with torch.inference_mode():
        ours = student(*batch)
    ask = asked(teacher, precision, device)
    wanted = check_teacher(ask, batch, ours)
    look = _look(distill, student, task, ours)
    look(ours, wanted, batch, None)  # outputs that this loss cannot compare are named now
    weight = distill.feature_weight if distill.feature_weight is not None else FEATURES.get(distill.features, 0.0)
    with contextlib.ExitStack() as stack:
        pairs: list[tuple[Place, Place]] = []
        seen: dict[str, Tensor] = {}
        theirs: dict[str, Tensor] = {}
        found: dict[str, Any] = {}
        if distill.features != "none":
            pairs = _pairs(distill, student, network)
            seen = stack.enter_context(watched(student, [mine for mine, _ in pairs]))
            theirs = stack.enter_context(watched(network, [other for _, other in pairs]))  # type: ignore[arg-type]
            found["features"] = [mine.module for mine, _ in pairs]
        elif distill.cache and not distill.deterministic:
            name = fingerprint(source)
            name = f"{name} {precision} {device.type}" if name else ""
            ask = Remembered(ask, batch, wanted, name, outputs_folder(), _batches_of_an_epoch(task))
            stack.callback(lambda: found.update(teacher_batches=ask.close()))
        projected = projections(pairs, device, distill.seed) if distill.features == "hints" else {}

        def imitation(outputs: Any, inputs: tuple[Tensor, ...], targets: Any, part: float) -> Tensor:
            wanted = ask(inputs)
            total = part * look(outputs, wanted, inputs, targets)
            if pairs:
                total = total + weight * compared(distill.features, pairs, seen, _normal(theirs), projected)
            return total

        yield _Lesson(imitation, pairs, projected, found)


def _batches_of_an_epoch(task: Task) -> int | None:
    """Where it is known without reading them."""
    source: Any = task.train_batches if task.train_batches is not None else task.calibration_batches
    with contextlib.suppress(TypeError):  # a function, or a DataLoader over a stream
        return len(source)
    return None


def asked(teacher: Teacher, precision: Precision, device: torch.device) -> Teacher:
    """The teacher without gradients, its outputs as tensors that training may keep.

    Example:
        >>> import torch
        >>> ask = asked(lambda inputs: inputs[0] + 1, Precision(), torch.device("cpu"))
        >>> ask((torch.ones(1, requires_grad=True),)).requires_grad
        False
    """

    def ask(inputs: tuple[Tensor, ...]) -> Any:
        with torch.inference_mode(), precision.autocast(device):
            outputs = teacher(inputs)
        return _normal(outputs)

    return ask


def _normal(outputs: Any) -> Any:
    """Tensors of inference mode cannot be saved for a backward pass; their copies can."""
    return pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, outputs)


def _pairs(distill: Distill, student: Network, teacher: Network | None) -> list[tuple[Place, Place]]:
    if teacher is None:
        raise RecipeError(
            f"Distill(features='{distill.features}') looks inside the teacher, and this one shows its outputs alone: give "
            "a network, an ExportedProgram, a .pt2 file or a saved network, or take features: none."
        )
    return matched(student, teacher, distill.layers, same_positions=distill.features in ("hints", "attention"))


# ---- what is compared of the outputs

Look = Callable[[Any, Any, tuple[Tensor, ...], Any], Tensor]
"""The student's outputs, the teacher's, the inputs and the targets to the loss."""


def _look(distill: Distill, student: Network, task: Task, outputs: Any) -> Look:
    if distill.loss == "auto":
        return automatic(task, outputs, distill.temperature)
    return _IMITATIONS[distill.loss](distill, student, outputs)


def automatic(task: Task, outputs: Any, temperature: float) -> Look:
    """How outputs are compared where nobody says: as logits where that is what they are, else each in its own units.

    Args:
        task: one without a loss of its own is taken to classify.
        outputs: of the student, for a batch; logits are the one tensor of real numbers with an axis of classes.
        temperature: of the logits.

    Example:
        >>> import torch
        >>> task = Task(torch.nn.Identity(), torch.ones(1, 2), lambda predict: {}, "a")
        >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[3.0, 1.0]])
        >>> [round(float(automatic(task, y, 1.0)(y, wanted, (), None)), 2) for y, wanted in ((a, b), ((a, a), (b, b)))]
        [0.0, 1.0]
    """
    found = floats(outputs)
    if task.loss is None and len(found) == 1 and found[0].dim() >= 2:
        return lambda mine, theirs, inputs, targets: logit_distillation(only(mine), only(theirs), temperature)
    return lambda mine, theirs, inputs, targets: output_distillation(mine, theirs)


def _logits(distill: Distill, student: Network, outputs: Any) -> Look:
    return lambda mine, theirs, inputs, targets: logit_distillation(only(mine), only(theirs), distill.temperature)


def _decoupled(distill: Distill, student: Network, outputs: Any) -> Look:
    if only(outputs).shape[1] < 2:
        raise RecipeError("Distill(loss='decoupled') needs two classes or more along dim 1 of the network's output.")

    def look(mine: Any, theirs: Any, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        a, b = only(mine), only(theirs)
        given = isinstance(targets, Tensor) and targets.shape == a[:, 0].shape and not targets.is_floating_point()
        classes = targets if given else b.argmax(1)
        return decoupled_distillation(a, b, classes.long(), distill.temperature, distill.alpha, distill.beta)

    return look


def _tokens(distill: Distill, student: Network, outputs: Any) -> Look:
    names = [node.name for node in student.module.graph.nodes if node.op == "placeholder"]
    at = next((i for i, name in enumerate(names) if "attention_mask" in name), -1)

    def look(mine: Any, theirs: Any, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        a, b = only(mine), only(theirs)
        mask = inputs[at] if at >= 0 else targets != -100 if isinstance(targets, Tensor) else None
        if mask is not None and mask.shape != a.shape[:-1]:
            mask = None  # one label for the whole sequence, say
        return token_distillation(a, b, mask, distill.temperature)

    return look


def _outputs(distill: Distill, student: Network, outputs: Any) -> Look:
    return lambda mine, theirs, inputs, targets: output_distillation(mine, theirs)


def _detection(distill: Distill, student: Network, outputs: Any) -> Look:
    found = floats(outputs)
    boxes = _port(distill.boxes, outputs, [i for i, x in enumerate(found) if x.shape[-1] == 4], "boxes")
    scores = _port(distill.scores, outputs, [i for i in range(len(found)) if i != boxes and len(found) == 2], "scores")
    if found[boxes].shape[:-1] != found[scores].shape[:-1] or found[boxes].dim() != 3:
        shapes = f"{list(found[boxes].shape)} and {list(found[scores].shape)}"
        raise RecipeError(f"Distill(loss='detection') needs boxes [N, A, 4] and scores [N, A, C], not {shapes}.")
    classes = found[scores].shape[-1]
    if distill.background is not None and not 0 <= distill.background < classes:
        raise RecipeError(f"Distill(background={distill.background}) is none of the {classes} classes of the scores.")

    def look(mine: Any, theirs: Any, inputs: tuple[Tensor, ...], targets: Any) -> Tensor:
        a, b = floats(mine), floats(theirs)
        return detection_distillation(a[boxes], a[scores], b[boxes], b[scores], distill.temperature, distill.background)

    return look


def _port(name: str, outputs: Any, candidates: list[int], what: str) -> int:
    """Which of a network's outputs is meant, among its tensors of real numbers."""
    found = floats(outputs)
    if isinstance(outputs, Mapping) and name in outputs:
        return next(i for i, x in enumerate(found) if x is outputs[name])
    if name.isdigit() and int(name) < len(found):
        return int(name)
    if not name and len(candidates) == 1:
        return candidates[0]
    known = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else f"0 to {len(found) - 1}"
    raise RecipeError(f"Distill(loss='detection') does not know which output holds the {what}: name it, {what}: one of {known}.")


_IMITATIONS: dict[str, Callable[[Distill, Network, Any], Look]] = {
    "logits": _logits,
    "decoupled": _decoupled,
    "tokens": _tokens,
    "outputs": _outputs,
    "detection": _detection,
}
