"""The one training loop: recovery after pruning, distillation and quantization-aware training are it with another loss."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .average import Average
from .checkpoint import fingerprint, read_checkpoint, write_checkpoint
from .distributed import World, join, synchronised
from .errors import RecipeError, TaskError
from .network import Network
from .nonfinite import trouble
from .passes import describe
from .precision import Precision, compiled_where_faster, fastest_precision, twin
from .progress import bar, silenced
from .randomness import deterministic, kept_random, reproducible
from .schedule import Schedule
from .task import Task, epoch_length, score, training_batches
from .training_log import Note, open_log

__all__ = ["BatchLoss", "Precision", "Schedule", "fastest_precision", "fit", "hold_zeros"]

BatchLoss = Callable[[Any, tuple[Tensor, ...], Any], Tensor]
"""(the network's outputs, the batch's inputs, its targets or None) to a scalar."""

_EVERY = 20  # steps between rows of the log, words on the bar and copies of good weights


def fit(
    network: Network,
    task: Task,
    loss: BatchLoss,
    schedule: Schedule,
    *,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
    extra: Iterable[nn.Parameter] = (),
    save_every: float = 60.0,
    title: str = "Train",
) -> dict[str, Any]:
    """Train ``network`` in place and leave it in evaluation mode.

    Started by ``torchrun``, all its processes train this one network; the first alone evaluates and writes.

    Args:
        network: trained on the device that its weights are on.
        task: its ``train_batches`` feed the loop, its metric is shown where evaluating is cheap against an epoch.
        loss: of the outputs, the inputs and the targets of a batch; a mean over its examples.
        schedule: how long, and with which steps.
        precision: where None, the fastest on this machine, measured on the first batch.
        checkpoint: a file; where it is of this run, training goes on from it, to the weights of a run without interruption. It
            stays at the end: take it away when the result is safe.
        extra: parameters trained along that are no part of the network, projections of features say; checkpoints hold them.
        save_every: seconds between checkpoints inside an epoch; at its end there is always one.
        title: of the progress bar.

    Returns:
        What happened: epochs and steps run, seconds, the precision, the mean loss of every epoch.

    Raises:
        TaskError: no data, or a loss that is not finite; the network then has the last good weights.
        FileError: the checkpoint or the log cannot be written or read.
    """
    started, world = time.monotonic(), join(network.device)
    with contextlib.ExitStack() as held:
        held.enter_context(kept_random())
        held.enter_context(deterministic(schedule.deterministic))
        held.enter_context(hold_zeros(network))
        start = fingerprint(network.tensors()) if checkpoint is not None else ""
        kept = world.agree(lambda: _kept(checkpoint, start, schedule))
        precision = _precision(precision, kept[1] if kept else None, network, task, schedule, world)
        precision.place(network)
        run = _Run(network, loss, schedule, precision, world, list(extra), started)
        saver = _Saver(run, checkpoint if world.first else None, start, save_every)
        if kept is not None:
            run.restore(*kept)
        if not world.first:
            held.enter_context(silenced())
        update = held.enter_context(bar(title))
        if kept is None:
            tell = partial(_counting, update)
            run.at.epoch_batches = world.agree(lambda: epoch_length(task, schedule.epochs, tell))
        note = held.enter_context(open_log(schedule.log if world.first else None, run.at.rows, run.at.steps))
        while not run.finished():
            _epoch(run, task, saver, update, note)
        run.deliver()
    network.eval()
    if precision.channels_last:
        network.to(memory_format=torch.contiguous_format)
    return run.found()


def _counting(update: Callable[..., None], count: int) -> None:
    update(0.0, f"counting the batches of an epoch: {count}")


def _kept(checkpoint: Path | None, start: str, schedule: Schedule) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """A checkpoint of this very run; one of another is left alone and overwritten later."""
    found = read_checkpoint(checkpoint) if checkpoint is not None else None
    return found if found and (found[1].get("start"), found[1].get("schedule")) == (start, _settings(schedule)) else None


def _settings(schedule: Schedule) -> str:
    """What two runs must share to be one: all that the schedule, or the pass that is one, says."""
    return json.dumps({name: value for name, value in describe(schedule).items() if name != "log"}, default=str)


def _precision(
    given: Precision | None, kept: dict[str, Any] | None, network: Network, task: Task, schedule: Schedule, world: World
) -> Precision:
    """As given, as before the interruption, or the fastest."""
    before = Precision(**kept["precision"]) if kept is not None else None
    if given is not None:
        chosen = replace(given, compiled=given.compiled or (before is not None and before.compiled))
    elif before is not None:
        chosen = before
    elif schedule.deterministic:
        chosen = Precision()
    else:
        chosen = fastest_precision(network, next(training_batches(task, 0))[0])
    if chosen.fp16 and network.device.type != "cuda":
        raise RecipeError("Training in fp16 needs a GPU, where gradients are scaled; take bf16 here.")
    if world.size > 1:
        return replace(chosen, compiled=False)
    if schedule.compile and before is None and not chosen.compiled:
        return compiled_where_faster(network, next(training_batches(task, 0))[0], chosen)
    return chosen


@contextlib.contextmanager
def hold_zeros(network: Network) -> Iterator[None]:
    """Inside, the weights that `Sparsify` set to zero get no gradient, so that they stay zero.

    Which they are, the history and the weights say: this holds for copies, loaded networks and those pruned since. A fresh
    optimizer, or one resumed from a run inside, leaves a weight at zero that has no gradient.

    Example:
        >>> import torch
        >>> from edgepress.compress.network import trace
        >>> network = trace(torch.nn.Linear(2, 1), torch.zeros(1, 2))
        >>> network.module.get_parameter("weight").data[0, 1] = 0.0
        >>> network = network.then(**{"pass": "Sparsify"}, found={"layers": [{"weight": "weight"}]})
        >>> with hold_zeros(network):
        ...     network(torch.ones(1, 2)).sum().backward()
        >>> network.module.get_parameter("weight").grad
        tensor([[1., 0.]])
    """
    parameters = dict(network.module.named_parameters(remove_duplicate=False))
    passes = [entry for entry in network.history if entry["pass"] == "Sparsify"]
    names = {layer["weight"] for entry in passes for layer in entry["found"]["layers"]}
    masks = {name: parameters[name].detach() != 0 for name in names if name in parameters and parameters[name].requires_grad}
    handles = [parameters[name].register_hook(lambda g, mask=mask: g * mask) for name, mask in masks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _epoch(run: _Run, task: Task, saver: _Saver, update: Callable[..., None], note: Note) -> None:
    """Train for the rest of an epoch, or until the run's time is up; judge, and save."""
    at, schedule = run.at, run.schedule
    started = time.monotonic()
    run.network.train()
    stream = reproducible(lambda: training_batches(task, at.epoch), schedule.seed + 7919 * at.epoch)
    stream = itertools.islice(stream, at.batches, None)
    while run.progress() < 1.0 and (batches := list(itertools.islice(stream, schedule.accumulate))):
        run.step(batches)
        if at.steps % _EVERY == 0:
            metric = f"  {task.metric} {at.metrics[-1][1]:.2f}" if at.metrics else ""
            update(run.progress(), f"epoch {at.epoch + 1}  loss {at.recent:.4f}{metric}")
            note(run.row(None))
        saver.now_and_then()
    run.end_epoch()
    took = time.monotonic() - started
    done = run.progress()
    due = schedule.patience is not None or (run.judging_s * 10 < took and done < 1.0)
    judged = run.judge(task) if run.world.agree(lambda: due) else None
    note(run.row(judged))
    saver.save()


@dataclass
class _At:
    """Where a run stands: what a checkpoint holds besides tensors."""

    epoch: int = 0
    batches: int = 0  # done of this epoch
    updates: int = 0  # of this epoch
    total: float = 0.0  # loss of this epoch
    recent: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    metrics: list[list[float]] = field(default_factory=list)  # [epoch, value]
    epoch_batches: int | None = None  # None: known after the first epoch
    best: float | None = None
    waited: int = 0  # epochs since the best one
    rows: int = 0  # of the log
    lr: float = 0.0  # of the last step


class _Run:
    """A network in training: its optimizer, its averages and where it stands."""

    def __init__(
        self,
        network: Network,
        loss: BatchLoss,
        schedule: Schedule,
        precision: Precision,
        world: World,
        extra: list[nn.Parameter],
        started: float,
    ):
        self.network, self.loss, self.schedule, self.precision, self.world = network, loss, schedule, precision, world
        self.extra = extra
        self.trained = [p for p in (*network.parameters(), *extra) if p.requires_grad]
        self.optimizer = _optimizer(self.trained, schedule)
        self.scaler = torch.amp.GradScaler(network.device.type, enabled=precision.fp16)
        world.align([*network.tensors(), *extra])
        self.average = Average(network, schedule.ema) if schedule.ema is not None else None
        self.best: list[Tensor] = []
        self.good = (0, [t.detach().clone() for t in network.tensors()])
        network.train()
        self.forward = synchronised(twin(network)) if world.size > 1 else precision.forward(network)
        self.at = _At()
        self.judging_s = 0.0
        self._started = started

    # ---- how far

    def seconds(self) -> float:
        """Of training and its preparation, before interruptions too."""
        return self.at.seconds + time.monotonic() - self._started

    def progress(self) -> float:
        """How much of the run is done, from 0 to 1."""
        at, schedule = self.at, self.schedule
        inside = min(at.batches / at.epoch_batches, 1.0) if at.epoch_batches else 0.0
        done = (at.epoch + inside) / schedule.epochs
        if schedule.minutes is not None:
            return max(done, self.world.agree(self.seconds) / (60 * schedule.minutes))
        if not at.epoch_batches:
            # the first epoch's length is not known: warm up over 100 steps, but no further than one epoch would get
            return min(at.batches / 100, 1.0) * min(1.0 / schedule.epochs, schedule.warmup) * 0.99
        return done

    def finished(self) -> bool:
        """Whether the end is reached, or patience, and the last epoch is judged."""
        return not self.at.batches and (self.progress() >= 1.0 or self.at.waited >= (self.schedule.patience or math.inf))

    def end_epoch(self) -> None:
        """Count it."""
        at = self.at
        at.losses.append(round(at.total / max(at.updates, 1), 5))
        at.epoch_batches = at.epoch_batches or at.batches
        at.epoch, at.batches, at.updates, at.total = at.epoch + 1, 0, 0, 0.0

    # ---- steps

    def step(self, batches: list[tuple[tuple[Tensor, ...], Any]]) -> None:
        """One step of the optimizer on the mean over all examples of the batches."""
        at, world = self.at, self.world
        at.lr = self.schedule.rate(self.progress())
        torch.manual_seed((self.schedule.seed + 1) * 1_000_003 + at.steps * world.size + world.rank)
        examples = sum(len(inputs[0]) for inputs, _ in batches)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.network.device)
        for inputs, targets in batches:
            total += self._backward(inputs, targets, examples)
        self.scaler.unscale_(self.optimizer)
        world.add([total, *(p.grad for p in self.trained if p.grad is not None)])
        norm = nn.utils.clip_grad_norm_(self.trained, self.schedule.clip)
        value, length = torch.stack([total, norm.to(total)]).tolist()
        if not math.isfinite(value) or not (math.isfinite(length) or self.precision.fp16):  # fp16 skips such steps itself
            self._stop(batches, *(("gradient", length) if math.isfinite(value) else ("loss", value)))
        if at.steps % _EVERY == 0:
            self.good = (at.steps, [old.copy_(t.detach()) for old, t in zip(self.good[1], self.network.tensors(), strict=True)])
        for group in self.optimizer.param_groups:
            group["lr"] = at.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update()
        at.recent += (value - at.recent) * (0.02 if at.updates >= 50 else 1 / (at.updates + 1))
        at.total += value
        at.steps, at.updates, at.batches = at.steps + 1, at.updates + 1, at.batches + len(batches)

    def _backward(self, inputs: tuple[Tensor, ...], targets: Any, examples: int) -> Tensor:
        """Add this process's part of a batch to the gradients; its part of the mean loss."""
        inputs, targets = self._own(inputs, targets)
        with self.precision.autocast(self.network.device):
            outputs = self.forward(*inputs)
        if len(inputs[0]) == 1 and any(bool(b.isnan().any()) for b in self.network.module.buffers()):
            self._take_back()
            raise TaskError(
                "A batch of a single example has no variance for batch normalisation to learn: leave it out of the training "
                "batches (drop_last=True in a DataLoader), or give larger ones."
            )
        part = self.loss(outputs, inputs, targets) * (len(inputs[0]) / examples)
        self.scaler.scale(part).backward()  # type: ignore[no-untyped-call]
        return part.detach()

    def _own(self, inputs: tuple[Tensor, ...], targets: Any) -> tuple[tuple[Tensor, ...], Any]:
        device = self.network.device
        inputs, targets = self.world.share(inputs, targets)
        moved = tree_map(lambda x: x.to(device, non_blocking=True) if isinstance(x, Tensor) else x, targets)
        return self.precision.inputs(inputs, device), moved

    def _stop(self, batches: list[tuple[tuple[Tensor, ...], Any]], what: str, value: float) -> None:
        """Find out where it began, take the last good weights back, and say so."""
        where = ""
        with self.precision.autocast(self.network.device):
            for batch in batches:
                where = where or trouble(self.network, self._own(*batch)[0])
        where = self.world.gathered(where) or f"the {what} as a whole"
        self._take_back()
        raise TaskError(
            f"The {what} is {value} at step {self.at.updates + 1} of epoch {self.at.epoch + 1}, and the first that is not finite "
            f"is {where}. The network has its weights of {self.good[0]} steps again: lower the learning rate (lr), or look for "
            "extreme values in the training data."
        )

    @torch.no_grad()
    def _take_back(self) -> None:
        """Give the network the last good weights."""
        for tensor, good in zip(self.network.tensors(), self.good[1], strict=True):
            tensor.copy_(good)
        self.network.eval()

    # ---- judging

    def judge(self, task: Task) -> float:
        """The task's metric of what would be delivered now; the best weights so far are kept where there is patience."""
        at, before = self.at, time.monotonic()
        self.network.eval()
        with self.average.swapped() if self.average is not None else contextlib.nullcontext():
            with self.precision.autocast(self.network.device):
                value = self.world.agree(lambda: score(task, self.network.predict, validation=True))
            at.waited += 1
            if at.best is None or task.drop(at.best, value) < 0:
                at.best, at.waited = value, 0
                if self.schedule.patience is not None:
                    self.best = [t.detach().clone() for t in self.network.tensors()]
        at.metrics.append([at.epoch, value])
        self.judging_s = time.monotonic() - before
        return value

    @torch.no_grad()
    def deliver(self) -> None:
        """Give the network the weights that count: the best epoch's, the average, or the last ones."""
        chosen = self.best or (self.average.tensors if self.average is not None else [])
        for tensor, value in zip(self.network.tensors(), chosen, strict=False):
            tensor.copy_(value)
        self.world.align(self.network.tensors())

    # ---- what is written

    def row(self, metric: float | None) -> dict[str, Any]:
        """The next one of the log."""
        at = self.at
        at.rows += 1
        row = {"step": at.steps, "epoch": at.epoch + bool(at.batches), "lr": at.lr, "loss": round(at.recent, 5)}
        return row | {"metric": metric, "seconds": round(self.seconds(), 1)}

    def found(self) -> dict[str, Any]:
        """What `fit` returns."""
        at = self.at
        found: dict[str, Any] = {"epochs": at.epoch, "steps": at.steps, "seconds": round(self.seconds(), 1)}
        found |= {"precision": asdict(self.precision), "losses": at.losses}
        found |= {"best": at.best} if self.schedule.patience is not None else {}
        return found | ({"processes": self.world.size} if self.world.size > 1 else {})

    def tensors(self) -> dict[str, Tensor]:
        """All that training has changed, or will need."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"extra.{i}": p for i, p in enumerate(self.extra)}
        tensors |= {f"average.{i}": t for i, t in enumerate(self.average.tensors if self.average is not None else [])}
        tensors |= {f"best.{i}": t for i, t in enumerate(self.best)}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in state.items() if v is not None}
        return tensors

    def state(self) -> dict[str, Any]:
        """What belongs to the tensors."""
        at = replace(self.at, seconds=self.seconds())
        updates = self.average.updates if self.average is not None else 0
        return {"at": asdict(at), "updates": updates, "scaler": self.scaler.state_dict(), "precision": asdict(self.precision)}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from what `tensors` and `state` gave."""
        groups: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, name = key.split(".", 1)
            groups.setdefault(kind, {})[name] = value
        for name, value in self.network.state_dict().items():
            value.copy_(groups["network"][name])
        for i, parameter in enumerate(self.extra):
            parameter.copy_(groups["extra"][str(i)])
        for i, average in enumerate(self.average.tensors if self.average is not None else []):
            average.copy_(groups["average"][str(i)])
        best = groups.get("best", {})
        self.best = [best[str(i)].to(self.network.device) for i in range(len(best))]
        momenta: dict[int, dict[str, Tensor]] = {}
        for key, value in groups.get("optimizer", {}).items():
            index, name = key.split(".", 1)
            momenta.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict({"state": momenta, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.scaler.load_state_dict(state["scaler"])
        self.at = _At(**state["at"])
        if self.average is not None:
            self.average.updates = state["updates"]
        self.good = (self.at.steps, [t.detach().clone() for t in self.network.tensors()])


class _Saver:
    """Writes the checkpoints of a run, now and then."""

    def __init__(self, run: _Run, path: Path | None, start: str, every: float):
        self._run, self._path, self._start, self._every = run, path, start, every
        self._last = time.monotonic()

    def now_and_then(self) -> None:
        """Save where the last time is long enough ago."""
        if time.monotonic() - self._last >= self._every:
            self.save()

    def save(self) -> None:
        """Save; nothing where there is no path."""
        if self._path is not None:
            named = {"start": self._start, "schedule": _settings(self._run.schedule)}
            write_checkpoint(self._path, self._run.tensors(), named | self._run.state())
        self._last = time.monotonic()


def _optimizer(trained: list[nn.Parameter], schedule: Schedule) -> torch.optim.Optimizer:
    weights = [p for p in trained if p.dim() >= 2]
    rest = [p for p in trained if p.dim() < 2]
    if not trained:
        raise TaskError("The network has no trainable weight.")
    groups = [
        g
        for g in ({"params": weights, "weight_decay": schedule.weight_decay}, {"params": rest, "weight_decay": 0.0})
        if g["params"]
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.peak)
    return torch.optim.SGD(groups, lr=schedule.peak, momentum=0.9, nesterov=True)
