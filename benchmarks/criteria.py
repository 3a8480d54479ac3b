"""Which criterion knows what a channel is worth: scores against the loss with each channel, or branch, really gone.

    EDGEPRESS_DATA=... python benchmarks/criteria.py

What the numbers mean: Spearman's rank correlation between the scores, from augmented training images, and the change of the mean
cross-entropy on test images when one channel, or one residual branch, is removed from the trained network and nothing else.
`change` is its absolute value, which is what criteria estimate (Molchanov et al. 2019 report 0.93 and more for theirs on
ImageNet); `rise` keeps its sign: what pruning would like to know. `layer` is the mean over groups of the correlation of
`change` within each, where more than four channels of it are in the sample. Scores that cannot be compared between layers are
divided by their group's mean first. Channels are a random sample, removed one by one. One channel changes the loss of few images,
so the truth is noisy: `half` is the correlation of `change` between every other image and the rest, and `ceiling`, the root of
what follows from it for all images (Spearman and Brown), is about what a perfect criterion would reach. The last line is JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import edgepress as ep
from edgepress.compress.pruning import (
    OBD,
    Activation,
    BatchNormScale,
    Channels,
    Criterion,
    Fisher,
    GeometricMedian,
    Lamp,
    Magnitude,
    Normalisation,
    Random,
    Taylor,
    analyse,
    branch_scores,
    channel_scores,
    channels_of,
    normalised,
)
from edgepress.compress.pruning.gates import Gates, branch_gates, channel_gates
from edgepress.compress.shorten import branches
from edgepress.compress.task import labelled_loss, training_batches
from edgepress.models.cifar10 import Cifar10
from edgepress.models.packs import data_folder

CRITERIA: dict[str, tuple[Criterion, Normalisation]] = {
    "Taylor()": (Taylor(), "none"),
    "Taylor(squared=False)": (Taylor(squared=False), "none"),
    "Taylor(over='class')": (Taylor(over="class"), "none"),
    "Activation()": (Activation(), "none"),
    "Activation(), l2": (Activation(), "l2"),
    "Fisher()": (Fisher(), "none"),
    "OBD()": (OBD(), "none"),
    "Magnitude(p=1)": (Magnitude(p=1), "mean"),
    "Magnitude(p=2)": (Magnitude(p=2), "mean"),
    "Magnitude(p=1, over='filters')": (Magnitude(p=1, over="filters"), "mean"),
    "BatchNormScale()": (BatchNormScale(), "none"),
    "Lamp()": (Lamp(), "none"),
    "GeometricMedian()": (GeometricMedian(), "mean"),
    "Random()": (Random(), "none"),
}
PLAN = {20: (2048, 120), 56: (1024, 64)}
"""Depth of the ResNet to how many images judge, and how many channels are removed: minutes on two cores."""
CHUNK, BATCHES = 128, 8


def main() -> int:
    data = Cifar10.read(data_folder())
    found: dict[str, Any] = {}
    for depth, (images, sample) in PLAN.items():
        started = time.perf_counter()
        task = ep.load_task(f"resnet{depth}-cifar10")
        network = ep.trace(task.model, task.example_inputs)
        judges = (data.inputs(data.test_images[:images]), data.test_labels[:images])
        found[task.name] = {"channels": _channels(network, task, *judges, sample), "branches": _branches(network, task, *judges)}
        _show(task.name, found[task.name], time.perf_counter() - started)
    print(json.dumps(found))
    return 0


def _channels(network: ep.Network, task: ep.Task, images: Tensor, labels: Tensor, sample: int) -> dict[str, Any]:
    channels = channels_of(analyse(network))
    count = len(channels.classes)
    chosen = np.sort(np.random.default_rng(0).permutation(count)[:sample])
    truth = removed(network, channel_gates(channels), chosen, images, labels)
    scores = {
        name: normalised(_scores(network, task, channels, criterion), channels, how)[chosen]
        for name, (criterion, how) in CRITERIA.items()
    }
    group = np.repeat(np.arange(len(channels.groups)), [len(g.channels) for g in channels.groups])[chosen]
    return _correlations(scores, truth, group)


def _branches(network: ep.Network, task: ep.Task, images: Tensor, labels: Tensor) -> dict[str, Any]:
    every = branches(network)
    truth = removed(network, branch_gates(network, every), np.arange(len(every)), images, labels)
    scores = {
        f"{name}": branch_scores(network, every, criterion, _batches(task), lambda y, t: labelled_loss(task, y, t))
        for name, criterion in (("Taylor()", Taylor()), ("Activation()", Activation()), ("Fisher()", Fisher()))
    }
    return _correlations(scores, truth, None)


def _scores(network: ep.Network, task: ep.Task, channels: Channels, criterion: Criterion) -> Tensor:
    return channel_scores(network, channels, criterion, _batches(task), lambda y, t: labelled_loss(task, y, t))


def _batches(task: ep.Task) -> Iterator[Any]:
    stream = training_batches(task, 0)
    return (next(stream) for _ in range(BATCHES))


# ---- the truth


def removed(network: ep.Network, gates: Gates, chosen: np.ndarray, images: Tensor, labels: Tensor) -> Tensor:
    """How much each image's loss rises when one gate is closed, ``[chosen, images]``."""
    rises = []
    with torch.inference_mode():
        for x, y in zip(images.split(CHUNK), labels.split(CHUNK), strict=True):
            whole = fx.Interpreter(network.module, garbage_collect_values=False)
            base = F.cross_entropy(whole.run(x), y, reduction="none")
            rises.append(torch.stack([_rise(network, gates, int(i), whole.env, base, y) for i in chosen]))
    return torch.cat(rises, 1)


def _rise(network: ep.Network, gates: Gates, gate: int, env: dict[fx.Node, Any], base: Tensor, labels: Tensor) -> Tensor:
    closed = _Closed(network.module, gates, gate)
    return F.cross_entropy(closed.run(initial_env=closed.prefix(env)), labels, reduction="none") - base


class _Closed(fx.Interpreter):
    """Runs a graph with one gate closed: whatever is read there is zero."""

    def __init__(self, module: fx.GraphModule, gates: Gates, gate: int):
        super().__init__(module)
        self._at = {p.node: p for p in gates.places if bool((p.index == gate).any())}
        self._gate = gate

    def prefix(self, env: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
        """What was computed before the first reader: the same with the gate open."""
        kept = {}
        for node in self.module.graph.nodes:
            if node.name in self._at:
                break
            kept[node] = env[node]
        return kept

    def run_node(self, n: fx.Node) -> Any:
        if n.name not in self._at:
            return super().run_node(n)
        place = self._at[n.name]
        values = {m: self._close(self.env[m], place) if m.name == place.operand else self.env[m] for m in n.all_input_nodes}
        args, kwargs = (fx.map_arg(x, lambda m: values[m]) for x in (n.args, n.kwargs))
        return n.target(*args, **kwargs)

    def _close(self, value: Tensor, place: Any) -> Tensor:
        if place.dim is None:
            return torch.zeros_like(value)
        return value.index_fill(place.dim, (place.index == self._gate).nonzero().flatten(), 0)


# ---- ranks


def _correlations(scores: dict[str, Tensor], truth: Tensor, group: np.ndarray | None) -> dict[str, Any]:
    rise = truth.mean(1)
    halves = spearman(truth[:, ::2].mean(1).abs(), truth[:, 1::2].mean(1).abs())
    ceiling = max(0.0, 2 * halves / (1 + halves)) ** 0.5
    found: dict[str, Any] = {"count": len(rise), "half": halves, "ceiling": ceiling, "criteria": {}}
    for name, mine in scores.items():
        entry = {"change": spearman(mine, rise.abs()), "rise": spearman(mine, rise)}
        parts = [] if group is None else [torch.from_numpy(group == g) for g in np.unique(group)]
        if layers := [spearman(mine[p], rise[p].abs()) for p in parts if int(p.sum()) > 4]:
            entry["layer"] = float(np.mean(layers))
        found["criteria"][name] = entry
    return found


def spearman(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of the ranks, of equals the mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].nan_to_num())


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[inverse]


def _show(title: str, found: dict[str, Any], seconds: float) -> None:
    for what in ("channels", "branches"):
        part = found[what]
        print(f"\n{title}, {part['count']} {what}, half {part['half']:.3f}, ceiling {part['ceiling']:.3f} ({seconds:.0f} s)")
        print(f"{'':34}{'change':>8}{'rise':>8}{'layer':>8}")
        for name, entry in sorted(part["criteria"].items(), key=lambda item: -item[1]["change"]):
            print(f"{name:34}" + "".join(f"{entry[k]:8.3f}" if k in entry else f"{'':8}" for k in ("change", "rise", "layer")))


if __name__ == "__main__":
    sys.exit(main())
