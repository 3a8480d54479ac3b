"""Quantize: train the network with the rounding of the integer file, so that what is trained is what is deployed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from .distill import asked, automatic, blended
from .errors import RecipeError, UserError
from .fake import check_layers, faked, learned_ranges, on_grid, points, weights
from .fold import folded
from .network import Network, retrace, trace
from .passes import describe
from .quantization import Numbers, Quantization, quantization
from .rounding import grid_scale
from .task import Task, input_batches, training_batches
from .teacher import Teacher, TeacherSource, check_teacher, open_teacher
from .train import BatchLoss, Precision, Schedule, fit

__all__ = ["Quantize", "calibrated", "fake_quantized", "trained_ranges"]

Range = tuple[float, float]

_ACTIVATIONS = Numbers(8, symmetric=False)
_LEARNED_BITS = 4  # up to which the ends of the weights' grids are learned


@dataclass(frozen=True, kw_only=True)
class Quantize(Schedule):
    """Quantization-aware training: weights and activations are rounded as in the file, and the network learns to bear it.

    Batch normalisation is folded first. The result is a plain network in floats whose weights lie on the file's grid; the
    trained ranges of its activations stand in its history, and `export` writes them. A pass that changes the network
    afterwards makes them void. Takes the fields of `Schedule` (epochs, minutes, optimizer, lr ...) and its own:

    Args:
        precision: ``'int8'`` or ``'w4a8'``.
        layers: patterns of module names or operators to another of these or ``'fp32'``, as in `Quantization`.
        temperature: softens both sides' probabilities (Hinton, Vinyals, Dean 2015).
        labels: weight of the task's own loss where there are labels, from 0 (teacher alone) to 1 (labels alone).
        teacher: what to follow, see `open_teacher`; the task's original where None.
        examples: inputs on which the ranges are started.
        checkpoint: a file to go on from after an interruption.

    Example:
        >>> import torch
        >>> from .progress import silenced
        >>> model, x = torch.nn.Linear(3, 2), torch.ones(1, 3)
        >>> task = Task(model, x, lambda predict: {"score": 0.0}, "score", calibration_batches=[x])
        >>> with silenced():
        ...     network = Quantize(epochs=1)(trace(model, x), task)
        >>> network.history[-1]["found"]["ranges"]["input_1"]
        [0.0, 1.0]
    """

    epochs: float = 5.0
    lr: float = 0.002
    weight_decay: float = 1e-4
    precision: str = "int8"
    layers: Mapping[str, str] = field(default_factory=dict)
    temperature: float = 4.0
    labels: float = 0.1
    teacher: TeacherSource | None = field(default=None, repr=False)
    examples: int = 512
    checkpoint: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (self.precision, *self.layers.values()):
            how = quantization(name)
            if not (how.activations == _ACTIVATIONS and not how.dynamic) and (name == self.precision or name != "fp32"):
                raise RecipeError(
                    f"Quantize trains for 8-bit activations with fixed ranges, not for '{name}': take int8 or w4a8."
                )
        if self.temperature <= 0 or not 0 <= self.labels <= 1 or self.examples < 1:
            raise RecipeError("Quantize needs a temperature above 0, a labels weight from 0 to 1, and at least one example.")

    @property
    def how(self) -> Quantization:
        """What is stored in which numbers."""
        return quantization(self.precision, layers=dict(self.layers))

    def __call__(self, network: Network, task: Task) -> Network:
        """Return the trained network; ``network`` and the teacher stay as they were."""
        check_layers(network, self.how)
        plain = retrace(folded(network)).to(network.device)
        student = faked(plain, self.how, calibrated(plain, self.how, _inputs(task, self.examples)), _limits(plain, self.how))
        loss = self._loss(self._teacher(plain, task), task)
        found = fit(student, task, loss, self, precision=Precision(), checkpoint=self.checkpoint, title="Quantize")
        on_grid(plain, student, self.how)
        learned = learned_ranges(student)
        ranges = {name: list(learned[leader]) for name, leader in points(plain, self.how).items()}
        return plain.then(**{"pass": "Quantize"}, **describe(self), found={**found, "ranges": ranges})

    def _teacher(self, network: Network, task: Task) -> Teacher:
        """Opened, and checked on a batch."""
        source = self.teacher if self.teacher is not None else trace(task.model, task.inputs)
        ask = asked(open_teacher(source, network.device), Precision(), network.device)
        inputs, _ = next(training_batches(task, 0))
        inputs = tuple(x.to(network.device) for x in inputs)
        with torch.inference_mode():
            check_teacher(ask, inputs, network(*inputs))
        return ask

    def _loss(self, ask: Teacher, task: Task) -> BatchLoss:
        def imitation(outputs: Any, inputs: tuple[Tensor, ...], targets: Any, part: float) -> Tensor:
            return part * automatic(task, outputs, self.temperature)(outputs, ask(inputs), inputs, targets)

        return blended(task, self.labels, imitation)


def calibrated(network: Network, how: Quantization, batches: Iterator[tuple[Tensor, ...]]) -> dict[str, Range]:
    """The smallest and the largest value at each of the `points` that has a range of its own.

    Args:
        network: with its batch normalisations folded; its mode does not change.
        how: what is stored in which numbers.
        batches: inputs.
    """
    seen = _Extremes(network.module, set(points(network, how).values()))
    with torch.inference_mode():
        for batch in batches:
            seen.run(*(x.to(network.device) for x in batch))
    return seen.ranges


def trained_ranges(network: Network) -> dict[str, Range]:
    """The ranges of activations that `Quantize` trained, by graph node; empty where it did not, or a later pass voided them.

    Example:
        >>> import torch
        >>> trained_ranges(trace(torch.nn.ReLU(), torch.zeros(1, 2)))
        {}
    """
    if not network.history or network.history[-1]["pass"] != "Quantize":
        return {}
    return {name: (low, high) for name, (low, high) in network.history[-1]["found"]["ranges"].items()}


def fake_quantized(network: Network) -> Network:
    """The network with the rounding of the file that it was trained for: what the file computes, in torch.

    Args:
        network: from `Quantize`, saved and loaded or not.

    Raises:
        UserError: `Quantize` was not the last pass.
    """
    ranges = trained_ranges(network)
    if not ranges:
        raise UserError("The network has no trained ranges: Quantize must be the last pass that changed it.")
    entry = network.history[-1]
    how = quantization(entry["precision"], layers=entry.get("layers") or {})
    return faked(network, how, ranges).eval()


class _Extremes(fx.Interpreter):
    """Runs a graph and keeps the smallest and largest values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str]):
        super().__init__(module)
        self._names = names
        self.ranges: dict[str, Range] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and look at what it gave."""
        value = super().run_node(n)
        if n.name in self._names:
            low, high = float(value.min()), float(value.max())
            before = self.ranges.get(n.name, (0.0, 0.0))
            self.ranges[n.name] = min(before[0], low), max(before[1], high)
        return value


def _limits(network: Network, how: Quantization) -> dict[str, Tensor]:
    """Where the coarse grids of weights start to be learned: where rounding and clipping lose the least."""
    state = network.state_dict()
    return {
        name: grid_scale(state[name].movedim(axis, 0).flatten(1), top)[:, 0] * top
        for name, (top, axis) in weights(network, how).items()
        if top < 2 ** (_LEARNED_BITS - 1)
    }


def _inputs(task: Task, count: int) -> Iterator[tuple[Tensor, ...]]:
    """About ``count`` inputs: calibration batches where there are some, training batches otherwise."""
    source = (
        input_batches(task.calibration_batches)
        if task.calibration_batches is not None
        else (inputs for inputs, _ in training_batches(task, 0))
    )
    seen = 0
    for batch in source:
        yield tuple(x[: count - seen] for x in batch)
        seen += len(batch[0])
        if seen >= count:
            return
