"""What the user hands over: a trained network, its data and the metric that decides."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import TaskError

__all__ = [
    "Batches",
    "Evaluate",
    "Loss",
    "Predict",
    "Task",
    "epoch_length",
    "input_batches",
    "labelled_loss",
    "metrics",
    "misfit",
    "score",
    "training_batches",
]

_FEW_EPOCHS = 3
_LOOK_AHEAD = 100  # batches

Predict = Callable[..., Any]
"""Input arrays, batch first, to one output array or a tuple of them: numpy in, numpy out, the network's own layout."""

Evaluate = Callable[[Predict], dict[str, float]]
"""Judges a predict function: metric name to value."""

Loss = Callable[[Any, Any], Tensor]
"""(outputs, targets) to a scalar."""

Batches = Iterable[Any] | Callable[..., Iterable[Any]]
"""An iterable that can be read more than once (a list, a DataLoader) or a function that returns a fresh one."""


@dataclass(frozen=True)
class Task:
    """A network with all that is needed to shrink it and to judge the result.

    Args:
        model: the trained network.
        example_inputs: one tensor or a tuple of tensors as the network takes them, batch first.
        evaluate: ``evaluate(predict) -> {"accuracy": 93.4, ...}``. The same function judges the PyTorch network, the ONNX
            file and the TFLite file: ``predict`` takes numpy arrays ``[N, ...]`` in the network's own layout and returns
            one array or a tuple of arrays. Every figure that is reported comes from it.
        metric: the key of ``evaluate``'s result that decides.
        higher_is_better: which way the metric is better.
        train_batches: labelled batches ``(inputs, targets)`` for recovery, or None: an iterable that can be read again, or a
            function of the epoch number that returns one. ``inputs`` is a tensor or a tuple of tensors.
        calibration_batches: unlabelled batches for calibration: a tensor, an array or a tuple of them each; an iterable
            that can be read again, or a function without arguments that returns one.
        validate: like ``evaluate`` on data that decisions may be taken on; ``evaluate`` serves where it is None.
        loss: ``loss(outputs, targets)``; cross-entropy where it is None.
        name: shown in reports.

    Example:
        >>> import torch
        >>> data = torch.eye(4)
        >>> def evaluate(predict):
        ...     return {"accuracy": 100.0 * float((predict(data.numpy()).argmax(1) == [0, 1, 2, 3]).mean())}
        >>> task = Task(torch.nn.Identity(), data, evaluate, metric="accuracy")
        >>> score(task, lambda x: x)
        100.0
    """

    model: nn.Module
    example_inputs: Tensor | tuple[Tensor, ...]
    evaluate: Evaluate
    metric: str
    higher_is_better: bool = True
    train_batches: Batches | None = None
    calibration_batches: Batches | None = None
    validate: Evaluate | None = None
    loss: Loss | None = None
    name: str = "task"

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise TaskError(f"Task.model is a {type(self.model).__name__}, not a torch.nn.Module: pass the trained network.")
        if isinstance(self.example_inputs, Tensor):
            object.__setattr__(self, "example_inputs", (self.example_inputs,))
        elif isinstance(self.example_inputs, list):
            object.__setattr__(self, "example_inputs", tuple(self.example_inputs))
        if not self.inputs or not all(isinstance(x, Tensor) and x.dim() > 0 for x in self.inputs):
            raise TaskError("Task.example_inputs must be one tensor or a tuple of tensors, batch first.")
        for field in ("evaluate", "validate", "loss"):
            value = getattr(self, field)
            if not callable(value) and not (value is None and field != "evaluate"):
                raise TaskError(f"Task.{field} is a {type(value).__name__}, not a function.")

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """The example inputs, always as a tuple."""
        return self.example_inputs  # type: ignore[return-value]

    def drop(self, reference: float, value: float) -> float:
        """How much worse ``value`` is than ``reference``, in the metric's own points; negative where it is better."""
        return reference - value if self.higher_is_better else value - reference


def _fresh(source: Batches, field: str, *args: Any) -> Iterator[Any]:
    """The batches of one reading, at least one; what the user's code raises becomes a `TaskError`."""
    if isinstance(source, Iterator):
        raise TaskError(f"Task.{field} is a generator, which can be read only once: pass the function that makes it, or a list.")
    empty = True
    batches: Any = source
    try:
        if callable(source):
            batches = source(*args[: len(inspect.signature(source).parameters)])
        iterator = iter(batches) if isinstance(batches, Iterable) else None
    except Exception as error:
        raise _raised(field, error) from error
    if iterator is None:
        raise TaskError(f"Task.{field} gave a {type(batches).__name__}, not an iterable of batches.")
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            break
        except Exception as error:
            raise _raised(field, error) from error
        empty = False
        yield batch
    if empty:
        raise TaskError(f"Task.{field} yielded no batch.")


def _raised(field: str, error: Exception) -> TaskError:
    return (
        error
        if isinstance(error, TaskError)
        else TaskError(f"Task.{field} raised {type(error).__name__}: {error}{_where(error)}.")
    )


def training_batches(task: Task, epoch: int) -> Iterator[tuple[tuple[Tensor, ...], Any]]:
    """Yield ``(inputs, targets)`` for one epoch; inputs always a tuple of tensors, targets None where there are none.

    Raises:
        TaskError: no batch, one that does not fit the network, or whatever the user's code raised.
    """
    if task.train_batches is None and task.calibration_batches is None:
        raise TaskError("The task has neither train_batches nor calibration_batches: give it one of them to train on.")
    if task.train_batches is None:
        for inputs in input_batches(task.calibration_batches):
            _check(task, inputs, "calibration_batches")
            yield inputs, None
        return
    for batch in _fresh(task.train_batches, "train_batches", epoch):
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TaskError("Task.train_batches must yield pairs (inputs, targets); unlabelled data: (inputs, None).")
        inputs = _tensors(batch[0], "train_batches")
        _check(task, inputs, "train_batches")
        yield inputs, batch[1]


def misfit(inputs: Sequence[Tensor | np.ndarray], examples: Sequence[Tensor]) -> str:
    """What is wrong with a batch for a network that takes ``examples``; empty where nothing is.

    Example:
        >>> import torch
        >>> misfit([torch.zeros(4, 3)], [torch.zeros(1, 2)])
        'Input 1 has the shape [4, 3]; the network takes [N, 2]'
    """
    if len(inputs) != len(examples):
        return f"There are {len(inputs)} inputs; the network takes {len(examples)}"
    for number, (x, example) in enumerate(zip(inputs, examples, strict=True), 1):
        if tuple(x.shape[1:]) != tuple(example.shape[1:]) or len(x.shape) != example.dim():
            wanted = ", ".join(["N", *map(str, example.shape[1:])])
            return f"Input {number} has the shape {list(x.shape)}; the network takes [{wanted}]"
        kind, wanted = (str(t.dtype).removeprefix("torch.") for t in (x, example))
        if kind != wanted:
            return f"Input {number} is {kind}; the network takes {wanted}"
    return ""


def _check(task: Task, inputs: tuple[Tensor, ...], field: str) -> None:
    if problem := misfit(inputs, task.inputs):
        raise TaskError(f"A batch of Task.{field} does not fit the network. {problem}, as example_inputs say.")


def epoch_length(task: Task, epochs: float, tell: Callable[[int], object] = lambda count: None) -> int | None:
    """Training batches in an epoch: as the source says, or counted where it is a generator.

    A schedule of one or two epochs needs it: without, the learning rate cannot fall before the first epoch has ended, and a
    fraction of an epoch has no end. So a generator is run to its end for fewer than three epochs. For more, the first hundred
    batches are looked at, a number that does not hang on how fast the machine is: training must come out alike on all.

    Args:
        task: the one that trains.
        epochs: how many passes there will be.
        tell: is called with the count so far.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2)
        >>> epoch_length(Task(torch.nn.Identity(), x, lambda predict: {}, "a", train_batches=[(x, None)] * 3), epochs=10)
        3
    """
    source = task.train_batches if task.train_batches is not None else task.calibration_batches
    if callable(source) and not isinstance(source, Sized):
        source = source(*(0,) * min(1, len(inspect.signature(source).parameters)))
        if inspect.isgenerator(source):
            return _counted(source, math.inf if epochs < _FEW_EPOCHS else _LOOK_AHEAD, tell)
    with contextlib.suppress(TypeError):  # a DataLoader has a length, but not over every data set
        return len(source) if isinstance(source, Sized) else None
    return None


def _counted(batches: Iterable[Any], most: float, tell: Callable[[int], object]) -> int | None:
    count = 0
    with contextlib.suppress(Exception):  # training meets it again, and says what it is
        for _ in batches:
            count += 1
            if count > most:
                return None
            tell(count)
        return count
    return None


def labelled_loss(task: Task, outputs: Any, targets: Any) -> Tensor:
    """The task's own loss in float32; cross-entropy over dim 1 where it names none.

    Raises:
        TaskError: the loss failed, on labels that do not fit say, or several outputs have no loss.
    """
    if task.loss is None and not isinstance(outputs, Tensor):
        raise TaskError(
            f"The network returns a {type(outputs).__name__}, not one tensor: give the task a loss(outputs, targets)."
        )
    try:
        return task.loss(outputs, targets) if task.loss is not None else F.cross_entropy(outputs.float(), targets)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        name = "loss" if task.loss is not None else "cross-entropy"
        raise TaskError(f"The task's {name} failed: {str(error).rstrip('.')}. Look at the targets of train_batches.") from error


def input_batches(source: Batches | None, field: str = "calibration_batches") -> Iterator[tuple[Tensor, ...]]:
    """Yield the unlabelled batches of ``source``, each as a tuple of tensors.

    Example:
        >>> import numpy as np
        >>> [x[0].shape for x in input_batches([np.zeros((2, 3), np.float32)])]
        [torch.Size([2, 3])]
    """
    if source is None:
        raise TaskError(f"The task has no {field}: give it some batches of typical inputs.")
    for batch in _fresh(source, field):
        yield _tensors(batch, field)


def _tensors(inputs: Any, field: str) -> tuple[Tensor, ...]:
    items = inputs if isinstance(inputs, tuple | list) else (inputs,)
    if not all(isinstance(x, Tensor | np.ndarray) for x in items):
        kinds = ", ".join(type(x).__name__ for x in items)
        raise TaskError(f"Task.{field} yielded ({kinds}); a batch's inputs must be tensors or numpy arrays.")
    return tuple(x if isinstance(x, Tensor) else torch.from_numpy(x) for x in items)


def score(task: Task, predict: Predict, *, validation: bool = False) -> float:
    """The metric that decides, of one predict function.

    Args:
        task: the task whose ``evaluate`` (or ``validate``, with ``validation``) is run.
        predict: numpy arrays to numpy arrays.
        validation: take ``task.validate`` where there is one.

    Raises:
        TaskError: the user's function raised, or gave no finite value for ``task.metric``.
    """
    return metrics(task, predict, validation=validation)[task.metric]


def metrics(task: Task, predict: Predict, *, validation: bool = False) -> dict[str, float]:
    """All metrics of one predict function, as plain floats; errors as in `score`."""
    judge = task.validate if validation and task.validate is not None else task.evaluate
    name = "validate" if judge is task.validate else "evaluate"
    try:
        result = judge(predict)
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(f"The task's {name} raised {type(error).__name__}: {error}{_where(error)}") from error
    if not isinstance(result, dict) or task.metric not in result:
        got = f"keys {sorted(result)}" if isinstance(result, dict) else f"a {type(result).__name__}"
        raise TaskError(f"The task's {name} must return a dict with the metric '{task.metric}'; it returned {got}.")
    values = {str(k): float(v) for k, v in result.items()}
    if not math.isfinite(values[task.metric]):
        raise TaskError(f"The task's {name} returned {values[task.metric]} for '{task.metric}': a number is needed.")
    return values


def _where(error: BaseException) -> str:
    """' (my_task.py, line 12)': the innermost frame of the user's own code."""
    here = os.path.dirname(__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename]
    own = [f for f in frames if os.path.dirname(f.filename) != here]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
