"""What edgepress itself costs: importing it, labelling a network, scoring its channels.

    EDGEPRESS_DATA=... python benchmarks/overheads.py

What the numbers mean: `import` is a fresh interpreter with `import edgepress` less one without, in the median of eleven pairs.
`labels` is the label analysis of ResNet-56, the least of five. `taylor` is the time of scoring with first-order Taylor over the
same forward and backward passes without it, in turns; its floor is 1. The goals are 0.3 s, 2 s and 1.2. The last line is JSON;
the exit code is 0 where they are met.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from statistics import median

import torch

import edgepress as ep
from edgepress.compress.pruning import analyse, channel_scores, channels_of
from edgepress.compress.task import labelled_loss, training_batches


def main() -> int:
    imports = median(_process("import edgepress") - _process("pass") for _ in range(11))
    task = ep.load_task("resnet56-cifar10")
    network = ep.trace(task.model, task.example_inputs)
    labels = min(_seconds(lambda: analyse(network)) for _ in range(5))
    ratios = _scoring(network, task)
    taylor = median(ratios)
    print(f"import edgepress        {imports:8.3f} s   goal 0.3")
    print(f"labels of ResNet-56     {labels:8.3f} s   goal 2")
    print(f"Taylor over plain       {taylor:8.3f} x   goal 1.2   ({min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns)")
    met = imports < 0.3 and labels < 2 and taylor <= 1.2
    print(json.dumps({"import_s": imports, "labels_s": labels, "taylor_ratio": taylor, "ratios": ratios, "met": met}))
    return 0 if met else 3


def _scoring(network: ep.Network, task: ep.Task, turns: int = 7, count: int = 8) -> list[float]:
    channels = channels_of(analyse(network))
    stream = training_batches(task, 0)
    batches = [next(stream) for _ in range(count)]

    def loss(outputs: object, targets: object) -> torch.Tensor:
        return labelled_loss(task, outputs, targets)

    def plain() -> None:
        for inputs, targets in batches:
            network.module.zero_grad(set_to_none=True)
            loss(network(*inputs), targets).backward()

    def scored() -> None:
        channel_scores(network, channels, ep.Taylor(), iter(batches), loss)

    plain()
    scored()
    found = []
    for turn in range(turns):
        pair = (plain, scored) if turn % 2 else (scored, plain)
        taken = {f: _seconds(f) for f in pair}
        found.append(taken[scored] / taken[plain])
    return found


def _seconds(run: object) -> float:
    started = time.perf_counter()
    run()  # type: ignore[operator]
    return time.perf_counter() - started


def _process(code: str) -> float:
    return _seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True))


if __name__ == "__main__":
    sys.exit(main())
