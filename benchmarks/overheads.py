"""What edgepress itself costs: importing it, labelling a network, scoring its channels.

    EDGEPRESS_DATA=... python benchmarks/overheads.py

What the numbers mean: `import` is a fresh interpreter with `import edgepress` less one without, in the median of eleven pairs.
`labels` is the label analysis of ResNet-56, the least of five. `taylor` and `fisher` are the times of scoring to first order on
weights and to second order on the gates of every example, over those of plain forward and backward passes on the same batches;
the three take turns, the medians of the ratios count. Gates need no gradients of weights, a third of the plain passes' work, so
their floor is about 2/3. The goals are 0.3 s, 2 s, 1.2 and 2.5. The last line is JSON; the exit code is 0 where they are met.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median

import torch

import edgepress as ep
from edgepress.compress.pruning import Criterion, Fisher, Taylor, analyse, channel_scores, channels_of
from edgepress.compress.task import labelled_loss, training_batches


def main() -> int:
    imports = median(_process("import edgepress") - _process("pass") for _ in range(11))
    task = ep.load_task("resnet56-cifar10")
    network = ep.trace(task.model, task.example_inputs)
    labels = min(_seconds(lambda: analyse(network)) for _ in range(5))
    ratios = _scoring(network, task)
    taylor, fisher = (median(ratios[name]) for name in ("taylor", "fisher"))
    print(f"import edgepress        {imports:8.3f} s   goal 0.3")
    print(f"labels of ResNet-56     {labels:8.3f} s   goal 2")
    print(f"Taylor over plain       {taylor:8.3f} x   goal 1.2   {_range(ratios['taylor'])}")
    print(f"Fisher over plain       {fisher:8.3f} x   goal 2.5   {_range(ratios['fisher'])}")
    met = imports < 0.3 and labels < 2 and taylor <= 1.2 and fisher <= 2.5
    found = {
        "import_s": imports,
        "labels_s": labels,
        "taylor_ratio": taylor,
        "fisher_ratio": fisher,
        "ratios": ratios,
        "met": met,
    }
    print(json.dumps(found))
    return 0 if met else 3


def _scoring(network: ep.Network, task: ep.Task, turns: int = 7, count: int = 4) -> dict[str, list[float]]:
    channels = channels_of(analyse(network))
    stream = training_batches(task, 0)
    batches = [next(stream) for _ in range(count)]

    def loss(outputs: object, targets: object) -> torch.Tensor:
        return labelled_loss(task, outputs, targets)

    def plain() -> None:
        for inputs, targets in batches:
            network.module.zero_grad(set_to_none=True)
            loss(network(*inputs), targets).backward()

    def scored(criterion: Criterion) -> None:
        channel_scores(network, channels, criterion, iter(batches), loss)

    runs = {"plain": plain, "taylor": lambda: scored(Taylor()), "fisher": lambda: scored(Fisher())}
    for run in runs.values():
        run()
    found: dict[str, list[float]] = {"taylor": [], "fisher": []}
    for turn in range(turns):
        names = list(runs)[turn % 3 :] + list(runs)[: turn % 3]  # each comes first in turn
        taken = {name: _seconds(runs[name]) for name in names}
        for name, ratios in found.items():
            ratios.append(taken[name] / taken["plain"])
    return found


def _range(ratios: list[float]) -> str:
    return f"({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns)"


def _seconds(run: object) -> float:
    started = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - started


def _process(code: str) -> float:
    return _seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))


if __name__ == "__main__":
    sys.exit(main())
