"""The one training loop: recovery after pruning and distillation are the same loop with another loss."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .errors import FileError, RecipeError, TaskError
from .network import Network
from .progress import bar
from .task import Task, epoch_length, score, training_batches

__all__ = ["Precision", "Schedule", "fastest_precision", "fit", "hold_zeros"]

BatchLoss = Callable[[Any, tuple[Tensor, ...], Any], Tensor]
"""(the network's outputs, the batch's inputs, its targets or None) to a scalar."""


@dataclass(frozen=True)
class Precision:
    """How a training step computes: bfloat16 autocast, and images with channels last in memory."""

    bf16: bool = False
    channels_last: bool = False

    def place(self, network: Network) -> None:
        """Give the weights the memory format, in place."""
        if self.channels_last:
            network.to(memory_format=torch.channels_last)

    def inputs(self, inputs: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
        """Move a batch to the device, in the memory format."""
        moved = (x.to(device, non_blocking=True) for x in inputs)
        return tuple(x.contiguous(memory_format=torch.channels_last) if self.channels_last and x.dim() == 4 else x for x in moved)

    def autocast(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context that forward passes run in."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


@dataclass(frozen=True)
class Schedule:
    """How long, and with which steps.

    Args:
        epochs: passes over the training data; a fraction is allowed where the data's length is known.
        minutes: where given, training ends after this time at the latest and the learning rate falls accordingly.
        optimizer: 'sgd' (Nesterov momentum 0.9) or 'adamw'.
        lr: the peak learning rate, reached after ``warmup`` (a fraction of the whole), then down to 0 along a cosine
            (Loshchilov and Hutter 2017, without restarts).
        weight_decay: on weights of two and more dimensions; biases and normalisations decay in no case.
        clip: largest norm of the gradient; steps in bfloat16 need it.
        seed: of everything random in the network, dropout say.
    """

    epochs: float = 10.0
    minutes: float | None = None
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.05
    warmup: float = 0.05
    weight_decay: float = 5e-4
    clip: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.lr <= 0 or not 0 <= self.warmup < 1 or (self.minutes is not None and self.minutes <= 0):
            raise RecipeError("Training needs epochs, lr and minutes above 0, and a warmup of at least 0 and below 1.")
        if self.optimizer not in ("sgd", "adamw"):
            raise RecipeError(f"The optimizer '{self.optimizer}' is unknown: take 'sgd' or 'adamw'.")

    def rate(self, progress: float) -> float:
        """The learning rate at ``progress`` from 0 to 1.

        Example:
            >>> s = Schedule(lr=0.1, warmup=0.1)
            >>> [round(s.rate(p), 3) for p in (0.05, 0.1, 0.55, 1.0)]
            [0.05, 0.1, 0.05, 0.0]
        """
        if progress < self.warmup:
            return self.lr * progress / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup))))


def fit(
    network: Network,
    task: Task,
    loss: BatchLoss,
    schedule: Schedule,
    *,
    precision: Precision | None = None,
    checkpoint: Path | None = None,
    title: str = "Train",
) -> dict[str, Any]:
    """Train ``network`` in place and leave it in evaluation mode.

    Args:
        network: trained on the device that its weights are on.
        task: its ``train_batches`` feed the loop, its metric is shown where evaluating is cheap against an epoch.
        loss: of the outputs, the inputs and the targets of a batch.
        schedule: how long, and with which steps.
        precision: where None, the fastest on this machine, measured on the first batch.
        checkpoint: a file written after every epoch; where it exists and fits, training goes on from it. It stays at the
            end: take it away when the result is safe.
        title: of the progress bar.

    Returns:
        What happened: epochs and steps run, seconds, the precision, the mean loss of every epoch.

    Raises:
        TaskError: no data, or a loss that is not finite.
    """
    torch.manual_seed(schedule.seed)
    if precision is None:
        precision = fastest_precision(network, next(training_batches(task, 0))[0])
    precision.place(network)
    run = _Run(network, _optimizer(network, schedule), schedule, epoch_length(task))
    if checkpoint is not None:
        run.resume(checkpoint)
    metric, metric_seconds = "", 0.0
    with bar(title) as update, hold_zeros(network):
        while run.progress() < 1.0:
            started = time.monotonic()
            steps, mean = _epoch(run, task, loss, precision, lambda done, text, metric=metric: update(done, f"{text}  {metric}"))
            if not steps:
                break
            run.end_epoch(steps, mean, time.monotonic() - started)
            if checkpoint is not None:
                run.save(checkpoint)
            if metric_seconds * 10 < time.monotonic() - started and run.progress() < 1.0:
                before = time.monotonic()
                network.eval()
                with precision.autocast(network.device):
                    metric = f"{task.metric} {score(task, network.predict, validation=True):.2f}"
                metric_seconds = time.monotonic() - before
    network.eval()
    if precision.channels_last:
        network.to(memory_format=torch.contiguous_format)
    return {
        "epochs": run.epoch,
        "steps": run.steps,
        "seconds": round(run.seconds, 1),
        "precision": asdict(precision),
        "losses": run.losses,
    }


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


def _epoch(run: _Run, task: Task, loss: BatchLoss, precision: Precision, show: Callable[..., None]) -> tuple[int, float]:
    """Train for one epoch, or until the run's time is up: steps taken, mean loss."""
    run.network.train()
    torch.manual_seed(run.schedule.seed + 7919 * run.epoch)
    total = recent = torch.zeros((), device=run.network.device)
    steps = 0
    for inputs, targets in training_batches(task, run.epoch):
        progress = run.progress(steps)
        if progress >= 1.0:
            break
        value = _step(run, loss, inputs, targets, precision, run.schedule.rate(progress))
        total = total + value
        recent = recent + (value - recent) * (0.02 if steps >= 50 else 1 / (steps + 1))
        steps += 1
        if steps % 20 == 0:
            show(progress, f"epoch {run.epoch + 1}  loss {_finite(recent, run.epoch, steps):.4f}")
    return steps, _finite(total / max(steps, 1), run.epoch, steps)


def fastest_precision(network: Network, inputs: tuple[Tensor, ...]) -> Precision:
    """Time training steps in each precision on this machine, in turn, and take the fastest; plain fp32 where nothing gains.

    A precision in which a step fails (some operators have no bfloat16 kernel), or that is far behind, drops out.
    """
    images = any(x.dim() == 4 for x in inputs)
    candidates = [Precision(bf16, last) for bf16 in (True, False) for last in ((True, False) if images else (False,))]
    trials = {candidate: network.copy().train() for candidate in candidates}
    for candidate, trial in trials.items():
        candidate.place(trial)
    seconds: dict[Precision, list[float]] = {candidate: [] for candidate in candidates}
    with torch.random.fork_rng():
        for turn in range(5):
            for candidate in list(seconds):
                taken = _trial_step(trials[candidate], candidate, inputs)
                if taken is None:
                    del seconds[candidate]
                elif turn:  # the first step also allocates
                    seconds[candidate].append(taken)
            best = min((min(s) for s in seconds.values() if s), default=math.inf)
            seconds = {c: s for c, s in seconds.items() if not s or min(s) < 1.5 * best}
    return min(seconds, key=lambda c: min(seconds[c]), default=Precision())


def _trial_step(trial: Network, precision: Precision, inputs: tuple[Tensor, ...]) -> float | None:
    """Seconds of one forward and backward pass; None where the precision does not work for this network."""
    device = trial.device
    batch = precision.inputs(inputs, device)
    started = time.perf_counter()
    try:
        with precision.autocast(device):
            leaves = [x for x in tree_leaves(trial(*batch)) if isinstance(x, Tensor) and x.is_floating_point()]
        torch.stack([x.float().square().mean() for x in leaves]).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        if precision == Precision():
            raise
        return None
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


class _Run:
    """Where a training run stands; what a checkpoint holds."""

    def __init__(self, network: Network, optimizer: torch.optim.Optimizer, schedule: Schedule, epoch_steps: int | None):
        self.network, self.optimizer, self.schedule = network, optimizer, schedule
        self.epoch = 0
        self.steps = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.epoch_steps = epoch_steps  # None: known after the first epoch
        self._since = time.monotonic()

    def progress(self, step: int = 0) -> float:
        """How much of the run is done, from 0 to 1."""
        inside = step / self.epoch_steps if self.epoch_steps else 0.0
        done = (self.epoch + inside) / self.schedule.epochs
        if self.schedule.minutes is not None:
            return max(done, (self.seconds + time.monotonic() - self._since) / (60 * self.schedule.minutes))
        if not self.epoch_steps:
            # the first epoch's length is not known: warm up over 100 steps, but no further than one epoch would get
            return min(step / 100, 1.0) * min(1.0 / self.schedule.epochs, self.schedule.warmup) * 0.99
        return done

    def end_epoch(self, steps: int, loss: float, seconds: float) -> None:
        self.epoch += 1
        self.steps += steps
        self.epoch_steps = self.epoch_steps or steps
        self.losses.append(round(loss, 5))
        self.seconds += seconds
        self._since = time.monotonic()

    def save(self, path: Path) -> None:
        """Weights, momenta and counters as safetensors, written beside and renamed."""
        tensors = {f"network.{k}": v.detach().contiguous().cpu() for k, v in self.network.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v).contiguous().cpu() for k, v in state.items()}
        state = {
            "epoch": self.epoch,
            "steps": self.steps,
            "seconds": self.seconds,
            "losses": self.losses,
            "epoch_steps": self.epoch_steps,
        }
        metadata = {"run": json.dumps(state), "schedule": json.dumps(_steps_of(self.schedule))}
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(_unshared(tensors), scratch, metadata)
            os.replace(scratch, path)
        except (OSError, SafetensorError) as error:
            raise FileError(f"Cannot write the checkpoint {path}: {getattr(error, 'strerror', None) or error}.") from error
        finally:
            scratch.unlink(missing_ok=True)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same schedule and the same shapes; another's is left alone and overwritten later."""
        if not path.is_file():
            return
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        current = self.network.state_dict()
        if metadata.get("schedule") != json.dumps(_steps_of(self.schedule)) or {k: v.shape for k, v in weights.items()} != {
            k: v.shape for k, v in current.items()
        }:
            return
        with torch.no_grad():
            for name, value in current.items():
                value.copy_(weights[name])
        momenta: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                momenta.setdefault(int(index), {})[name] = value
        described = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": momenta, "param_groups": described["param_groups"]})
        state = json.loads(metadata["run"])
        self.epoch, self.steps, self.seconds = state["epoch"], state["steps"], state["seconds"]
        self.losses, self.epoch_steps = state["losses"], state["epoch_steps"]
        self._since = time.monotonic()


def _steps_of(schedule: Schedule) -> dict[str, Any]:
    return {f.name: getattr(schedule, f.name) for f in fields(Schedule)}


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied weights appear under several names; safetensors wants each in memory of its own."""
    seen: set[int] = set()
    result = {}
    for name, value in tensors.items():
        result[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return result


def _optimizer(network: Network, schedule: Schedule) -> torch.optim.Optimizer:
    weights = [p for p in network.parameters() if p.requires_grad and p.dim() >= 2]
    rest = [p for p in network.parameters() if p.requires_grad and p.dim() < 2]
    if not weights and not rest:
        raise TaskError("The network has no trainable weight.")
    groups = [
        g
        for g in ({"params": weights, "weight_decay": schedule.weight_decay}, {"params": rest, "weight_decay": 0.0})
        if g["params"]
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.lr)
    return torch.optim.SGD(groups, lr=schedule.lr, momentum=0.9, nesterov=True)


def _step(run: _Run, loss: BatchLoss, inputs: tuple[Tensor, ...], targets: Any, precision: Precision, rate: float) -> Tensor:
    network, device = run.network, run.network.device
    batch = precision.inputs(inputs, device)
    with precision.autocast(device):
        outputs = network(*batch)
    targets = targets.to(device, non_blocking=True) if isinstance(targets, Tensor) else targets
    value = loss(outputs, batch, targets)
    run.optimizer.zero_grad(set_to_none=True)
    value.backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), run.schedule.clip)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    return value.detach()


def _finite(mean: Tensor, epoch: int, step: int) -> float:
    value = float(mean)
    if not math.isfinite(value):
        raise TaskError(
            f"The loss is {value} by step {step} of epoch {epoch + 1}: lower the learning rate (lr), or look for "
            "extreme values in the training data."
        )
    return value
