"""How well the times of single layers predict the time of whole pruned networks.

    python benchmarks/latency_prediction.py [--networks resnet56 mobilenet025] [--runtimes litert onnxruntime]
        [--precisions int8 fp32] [--count 20] [--multiple 8]

What the numbers mean: each network (trained where EDGEPRESS_DATA names the reference data, else with random weights: in a deep
int8 file these can send additions of unlike scales to slow kernels) is pruned at random `count` times, every
group to a random number of its channels in kernel-friendly steps. `predicted` is the sum that `Latency` gives before anything
is exported, from a table of single layers; `measured` is the p50 of the exported file at one thread, all files of a cell
interleaved in one run. `as is` is the mean of |predicted / measured - 1| over the prunings. A machine is not as fast today as
it was when the table was made, so `error` and `largest` are the same after one common factor, taken from another network,
neither the tested one nor pruned, in the same run: measured / predicted of ResNet-20 (of MobileNet-0.25 where ResNet-20 is
tested). `by MACs` is the error of a prediction in proportion to multiply-accumulates from the measured time of the unpruned
network, which is what pruning for MACs believes. The physical limit is the machine's noise: `twice` is the difference between
two measurements of the same file in that run. The last line is JSON; the exit code is 0 where every mean error is below 7 %.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgepress.compress.network import Network, trace
from edgepress.compress.pruning.analysis import analyse
from edgepress.compress.pruning.cost import Latency, Macs
from edgepress.compress.pruning.groups import Channels, channels_of
from edgepress.compress.pruning.rewrite import remove
from edgepress.models.resnet_cifar import CifarResNet
from edgepress.targets.artifact import Artifact
from edgepress.targets.export import export
from edgepress.targets.latency import LatencyTable
from edgepress.targets.measure import Plan, measure
from edgepress.tasks import load_task

GOAL = 0.07
COLUMNS = {"error": 6, "largest": 7, "as_is": 6, "by_macs": 7, "twice": 6}
SUFFIX = {"litert": ".tflite", "onnxruntime": ".onnx"}


class MobileNetV1(nn.Sequential):
    """Howard et al. 2017: a strided convolution and 13 pairs of depthwise and pointwise ones."""

    PLAN = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))

    def __init__(self, width: float, classes: int):
        channels = int(32 * width)
        layers = [self._unit(3, channels, 3, 2, 1)]
        for full, stride in self.PLAN:
            layers += [self._unit(channels, channels, 3, stride, channels), self._unit(channels, int(full * width), 1, 1, 1)]
            channels = int(full * width)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

    @staticmethod
    def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> nn.Sequential:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


NETWORKS = {
    "resnet20": lambda: (CifarResNet(20), (3, 32, 32)),
    "resnet56": lambda: (CifarResNet(56), (3, 32, 32)),
    "mobilenet025": lambda: (MobileNetV1(0.25, 2), (3, 96, 96)),
    "mobilenet075": lambda: (MobileNetV1(0.75, 1000), (3, 224, 224)),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=["resnet56", "mobilenet025"], choices=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=list(SUFFIX), choices=list(SUFFIX))
    parser.add_argument("--precisions", nargs="+", default=["int8", "fp32"], choices=["int8", "fp32"])
    parser.add_argument("--count", type=int, default=20, help="random prunings of each network")
    parser.add_argument("--multiple", type=int, default=8, help="channel counts stay multiples of this")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    cells = []
    print("network       runtime      int8/fp32      ms  error largest  as is by MACs  twice")
    for name in arguments.networks:
        network, channels = built(name, arguments.seed)
        anchor = built("mobilenet025" if name == "resnet20" else "resnet20", arguments.seed)
        prunings = list(random_prunings(channels, arguments.count, arguments.multiple, arguments.seed))
        counts = np.stack([kept for kept, _ in prunings], axis=1)
        pruned = [remove(network, channels.analysis, removed) for _, removed in prunings]
        for runtime in arguments.runtimes:
            for precision in arguments.precisions:
                cell = {"network": name, "runtime": runtime, "precision": precision}
                cell |= compared([network, *pruned], channels, counts, anchor, runtime, precision)
                cells.append(cell)
                figures = " ".join(f"{cell[key]:>{w}.1%}" for key, w in COLUMNS.items())
                print(f"{name:<13} {runtime:<12} {precision:<9} {cell['unpruned_ms']:>7.3f} {figures}", flush=True)
    print(json.dumps({"cells": cells}))
    return 0 if all(c["error"] < GOAL for c in cells) else 3


def built(name: str, seed: int) -> tuple[Network, Channels]:
    torch.manual_seed(seed)
    model, shape = NETWORKS[name]()
    if name.startswith("resnet") and os.environ.get("EDGEPRESS_DATA"):
        model = load_task(f"{name}-cifar10").model
    else:
        settled(model, shape)
    network = trace(model.eval(), torch.zeros(1, *shape))
    return network, channels_of(analyse(network))


def settled(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Give the normalisations the statistics of noise. Without, activations grow from block to block, the scales of a deep int8
    file with them, and XNNPACK leaves additions of too unlike scales to slow kernels."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the plain mean of what follows
    with torch.no_grad():
        for _ in range(4):
            model.train()(torch.randn(8, *shape))


def random_prunings(channels: Channels, count: int, multiple: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(channels left in each group, representatives that go), every group anywhere between one step and all."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        kept, removed = [], []
        for group in channels.groups:
            step = group.step(multiple)
            left = step * int(generator.integers(1, len(group.channels) // step + 1))
            kept.append(float(left))
            removed.append(generator.permutation(group.channels)[left:])
        yield np.array(kept), np.concatenate(removed)


def compared(
    networks: list[Network],
    channels: Channels,
    counts: np.ndarray,
    anchor: tuple[Network, Channels],
    runtime: str,
    precision: str,
) -> dict[str, object]:
    """Predicted and measured times of one cell (the unpruned network first), and what their differences are."""
    started = time.monotonic()
    table = LatencyTable(runtime, precision)
    every = np.column_stack([full(channels), counts])
    predicted_ms = Latency(channels, table).total(every) * 1e3
    anchor_ms = float(Latency(anchor[1], table).total(full(anchor[1]))) * 1e3
    table_s = time.monotonic() - started
    with tempfile.TemporaryDirectory() as folder:
        files = [exported(n, Path(folder) / f"{i}{SUFFIX[runtime]}", precision) for i, n in enumerate([anchor[0], *networks])]
        plan = Plan(rounds=15, min_round_s=0.01, warmup_s=0.02, budget_s=90)
        measured = measure([files[0], files[1], *files[1:]], plan=plan)
    anchor_measured, again, *measured_ms = [m.p50_ns * 1e-6 for m in measured]
    factor = anchor_measured / anchor_ms
    as_is = np.abs(predicted_ms / measured_ms - 1)
    errors = np.abs(factor * predicted_ms / measured_ms - 1)
    macs = Macs(channels).total(every)
    by_macs = np.abs(measured_ms[0] * macs / macs[0] / measured_ms - 1)
    return {
        "unpruned_ms": measured_ms[0],
        "unpruned_error": float(errors[0]),
        "error": float(errors[1:].mean()),
        "largest": float(errors[1:].max()),
        "as_is": float(as_is[1:].mean()),
        "by_macs": float(by_macs[1:].mean()),
        "factor": factor,
        "twice": abs(again / measured_ms[0] - 1),
        "table_s": table_s,
        "seconds": time.monotonic() - started,
        "predicted_ms": [round(float(x), 4) for x in predicted_ms],
        "measured_ms": [round(float(x), 4) for x in measured_ms],
    }


def full(channels: Channels) -> np.ndarray:
    return np.array([float(len(g.channels)) for g in channels.groups])


def exported(network: Network, path: Path, precision: str) -> Artifact:
    shape = network.example_inputs[0].shape[1:]
    return export(network, path, precision, [torch.randn(4, *shape)] if precision == "int8" else None)


if __name__ == "__main__":
    sys.exit(main())
