"""How fast the training loop is: images a second against a plain PyTorch loop in fp32, of the same networks in the same run.

    EDGEPRESS_DATA=... taskset -c 0 env OMP_NUM_THREADS=1 python benchmarks/training_speed.py --steps 6 --turns 3

What the numbers mean: the plain loop is what a tutorial writes (the user's module, `zero_grad`, `cross_entropy`, `backward`, SGD
with momentum and the same clipping of gradients); ours is `fit` with the precision that it finds the fastest on this machine,
which is not part of the time. Both get the same CIFAR-10 batches, prepared before, and take turns; a ratio is one turn's, and the
median counts. The clock runs from when the second batch is asked for until the last one is: the first step, where starting up
is, and the last one are out. With --cpu-time it counts the process's own time, for a machine that others use too. `pruned` is
ResNet-56 at half its multiply-accumulates, and the last figure is its MACs a second over those of ResNet-56 in our loop, turn by
turn: 1 says that a pruned network trains as fast per MAC as its original.

Memory is what training with one loop alone adds to a fresh process's resident set at its peak (Linux), with glibc told to give
each block above 1 MiB pages of its own: otherwise the holes in its heap count too, half as much again for either loop, and which
loop has more of them changes with what the process did before. The goals: 3 times as fast on CPUs with bfloat16 (avx512_bf16 or
AMX) and no slower elsewhere, memory no higher (5 % for noise), and 1 for each MAC. The last line is JSON; the exit code is 0
where all are met.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

import edgepress as ep
from edgepress.compress.progress import silenced
from edgepress.compress.task import labelled_loss, training_batches
from edgepress.compress.train import Precision, Schedule, fastest_precision, fit

NAMES = ("resnet20", "resnet56", "pruned")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each loop in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--cpu-time", action="store_true", help="of this process; with one thread")
    parser.add_argument("--without-memory", action="store_true")
    parser.add_argument("--alone", nargs=2, metavar=("NETWORK", "LOOP"), help="train with one loop and print the peak in MiB")
    arguments = parser.parse_args()
    if arguments.alone:
        print(_train_alone(*arguments.alone))
        return 0
    networks = {name: _network(name) for name in arguments.networks}
    with silenced():
        precisions = {name: fastest_precision(n, next(training_batches(t, 0))[0]) for name, (t, n) in networks.items()}
        clock = time.process_time if arguments.cpu_time else time.perf_counter
        speeds = _speeds(networks, precisions, arguments.steps, arguments.turns, clock)
    found: dict[str, Any] = {}
    for name, (_, network) in networks.items():
        ratios = [ours / plain for plain, ours in zip(speeds[name]["plain"], speeds[name]["ours"], strict=True)]
        found[name] = {"images_per_s": speeds[name], "ratio": median(ratios), "macs": network.macs(), "peak_mib": {}}
        plain, ours = (median(speeds[name][loop]) for loop in ("plain", "ours"))
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{name:9} plain {plain:7.1f} images/s   ours {ours:7.1f}   {median(ratios):5.2f} x {spread}   {precisions[name]}")
        if not arguments.without_memory:
            peaks = found[name]["peak_mib"] = {loop: _peak_mib(name, loop) for loop in ("plain", "ours")}
            print(f"{'':9} plain {peaks['plain']:7.0f} MiB        ours {peaks['ours']:7.0f}")
    goal = 3.0 if _has_bf16() else 1.0
    met = all(f["ratio"] >= goal and f["peak_mib"].get("ours", 0) <= 1.05 * f["peak_mib"].get("plain", 0) for f in found.values())
    if {"resnet56", "pruned"} <= found.keys():
        part = found["pruned"]["macs"] / found["resnet56"]["macs"]
        turns = zip(*(speeds[name]["ours"] for name in ("pruned", "resnet56")), strict=True)
        each = [pruned / whole * part for pruned, whole in turns]
        found["per_mac"] = each
        met = met and median(each) >= 1.0
        print(f"pruned    MACs a second over those of resnet56: {median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    print(json.dumps(found | {"goal": goal, "cpu_time": arguments.cpu_time, "met": met}))
    return 0 if met else 3


def _network(name: str) -> tuple[ep.Task, ep.Network]:
    task = ep.load_task(f"{'resnet20' if name == 'resnet20' else 'resnet56'}-cifar10")
    network = ep.trace(task.model, task.example_inputs)
    if name == "pruned":
        with silenced():
            network = ep.Prune(macs=0.5, criterion=ep.Magnitude(), rounds=1)(network, task)
    return task, network


def _speeds(
    networks: dict[str, tuple[ep.Task, ep.Network]],
    precisions: dict[str, Precision],
    steps: int,
    turns: int,
    now: Callable[[], float],
) -> dict[str, dict[str, list[float]]]:
    """Images a second by network and loop, one for each turn."""
    found: dict[str, dict[str, list[float]]] = {name: {"plain": [], "ours": []} for name in networks}
    for turn in range(turns):
        for name, (task, network) in networks.items():
            stream = training_batches(task, 0)
            batches = [(inputs[0], labels) for inputs, labels in (next(stream) for _ in range(steps + 2))]
            loops = ("plain", "ours") if turn % 2 == 0 else ("ours", "plain")
            for loop in loops:
                clock = _Clock(batches, now)
                _train(loop, replace(task, train_batches=clock.batches), network, precisions[name])
                found[name][loop].append(clock.images_per_s())
    return found


class _Clock:
    """Notes when each batch is asked for."""

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]], now: Callable[[], float]):
        self._batches, self._now, self._times = batches, now, [0.0]

    def batches(self, epoch: int) -> Iterator[Any]:
        self._times = []
        for batch in self._batches:
            self._times.append(self._now())
            yield batch

    def images_per_s(self) -> float:
        """Of the steps between the first and the last: a loop that knows an epoch's length does not ask whether it is over."""
        images = sum(len(x) for x, _ in self._batches[1:-1])
        return images / (self._times[-1] - self._times[1])


def _train(loop: str, task: ep.Task, network: ep.Network, precision: Precision) -> None:
    """One epoch on a copy of the network."""
    if loop == "ours":
        schedule = Schedule(epochs=1, lr=1e-3, warmup=0.0)
        fit(network.copy(), task, lambda y, x, t: labelled_loss(task, y, t), schedule, precision=precision)
        return
    module = network.copy().train().module if network.history else copy.deepcopy(task.model).train()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
    assert callable(task.train_batches)
    for images, labels in task.train_batches(0):
        optimizer.zero_grad()
        F.cross_entropy(module(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
        optimizer.step()


def _train_alone(name: str, loop: str) -> float:
    """What a few steps of one loop add to the resident memory at most, in MiB; Linux only."""
    task, network = _network(name)
    stream = training_batches(task, 0)
    batches = [(inputs[0], labels) for inputs, labels in (next(stream) for _ in range(4))]
    before = _resident_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of reading the data: forget it
    with silenced():
        # what is fast on CPUs of either kind: measuring it here would count as memory
        precision = Precision(bf16=_has_bf16(), channels_last=True)
        _train(loop, replace(task, train_batches=_Clock(batches, time.perf_counter).batches), network, precision)
    return _resident_mib("VmHWM") - before


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _peak_mib(name: str, loop: str) -> float:
    command = [sys.executable, __file__, "--alone", name, loop]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(done.stdout.split()[-1])


def _has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 numbers itself."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text() if path.is_file() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


if __name__ == "__main__":
    sys.exit(main())
