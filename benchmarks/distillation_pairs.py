"""What `distillation.py` trains: students, each with the teacher that it follows and the data it sees."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import edgepress as ep
from edgepress.models.cifar10 import Cifar10, RawCifar10
from edgepress.models.mlperf_tiny import DepthwiseSeparable, ResNet8
from edgepress.models.packs import data_folder
from edgepress.models.resnet_cifar import CifarResNet
from edgepress.models.sentiment import SentimentNet
from edgepress.models.spoken_digits import SpokenDigitsNet

__all__ = ["PAIRS", "Pair"]


@dataclass(frozen=True)
class Pair:
    """A student and its teacher.

    Attributes:
        task: the data and the metric; its training batches are a function of the epoch.
        teacher: what is followed.
        start: the student before training, by seed.
        inside: settings of `Distill` for the variants that look inside.
    """

    task: ep.Task
    teacher: ep.Network
    start: Callable[[int], ep.Network]
    inside: dict[str, Any] = field(default_factory=dict)


class _FromPixels(nn.Module):
    """A network for normalised images on pixels from 0 to 255."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to logits ``[N, 10]``."""
        return self.network(Cifar10.inputs(x))  # type: ignore[no-any-return]


def _cut(task: ep.Task, macs: float) -> Pair:
    """The task's network pruned to a part of its multiply-accumulates, taught by what it was."""
    teacher = ep.trace(task.model, task.inputs)
    smaller = ep.Prune(macs=macs)(teacher, task)
    return Pair(task, teacher, lambda seed: smaller)


def _fresh(task: ep.Task, build: Callable[[], nn.Module], teacher: nn.Module | None = None, layers: str = "") -> Pair:
    """A network from scratch, taught by the task's trained one, or by another."""

    def start(seed: int) -> ep.Network:
        torch.manual_seed(seed)
        return ep.trace(build(), task.inputs)

    return Pair(task, ep.trace((teacher or task.model).eval(), task.inputs), start, {"layers": layers})


def _cifar10(name: str, kind: type[Cifar10], arguments: argparse.Namespace) -> ep.Task:
    """The first training images train, the first test images judge, as many others decide."""
    data, tests = kind.read(data_folder()), arguments.tests
    data = replace(
        data,
        train_images=data.train_images[: arguments.images],
        train_labels=data.train_labels[: arguments.images],
        batch=min(data.batch, arguments.images),
    )
    others = replace(data, test_images=data.test_images[tests:][:tests], test_labels=data.test_labels[tests:][:tests])
    validate = others.evaluate if len(others.test_labels) else None
    return replace(data.first(tests).task(name, ep.load_task(name).model), validate=validate)


PAIRS: dict[str, Callable[[argparse.Namespace], Pair]] = {
    "resnet20": lambda a: _fresh(_cifar10("resnet56-cifar10", Cifar10, a), lambda: CifarResNet(20)),
    "resnet56-pruned": lambda a: _cut(_cifar10("resnet56-cifar10", Cifar10, a), a.macs or 1 / 2.1),
    "resnet8": lambda a: _fresh(
        _cifar10("mlperf-resnet8", RawCifar10, a),
        ResNet8,
        _FromPixels(ep.load_task("resnet20-cifar10").model),
        "b2=network.layer1, b4=network.layer2, b6=network.layer3",
    ),
    "resnet8-pruned": lambda a: _cut(_cifar10("mlperf-resnet8", RawCifar10, a), a.macs or 0.3),
    "keywords": lambda a: _fresh(ep.load_task("mlperf-kws"), DepthwiseSeparable),
    "keywords-pruned": lambda a: _cut(ep.load_task("mlperf-kws"), a.macs or 0.3),
    "sentiment": lambda a: _fresh(ep.load_task("sentiment"), lambda: SentimentNet(32, 1, 2)),
    "sentiment-pruned": lambda a: _cut(ep.load_task("sentiment"), a.macs or 0.3),
    "digits": lambda a: _fresh(ep.load_task("spoken-digits"), lambda: SpokenDigitsNet(16)),
    "digits-pruned": lambda a: _cut(ep.load_task("spoken-digits"), a.macs or 0.3),
}
"""Students by name; what ends in '-pruned' was cut from its teacher, the others begin with random weights."""
