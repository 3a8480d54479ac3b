"""The same network cut in several ways, then the same recovery: what accuracy and what time is left.

    EDGEPRESS_DATA=... python benchmarks/equal_recovery.py [--epochs 2] [--macs 0.476] [--seeds 1] [--cuts ...] [--out FOLDER]

ResNet-56 on CIFAR-10 (93.39 %). Cut to the same multiply-accumulates (2.1 times fewer by default) by torch-pruning (global
Taylor, inner channels only: it raises an IndexError on the padded shortcuts of the residual stream), by `Prune(macs=...)`
channel by channel, as torch-pruning does, and in steps of 8, which kernels want; and by `Prune(latency=..., depth=True)` to the
time that the clock gives the last of these. Every network is then trained on the labels alone, for the same epochs at the same
learning rate with the same batches, for each of `--seeds` seeds (order and augmentation of the images), and exported to int8.

What the numbers mean: accuracy of the int8 file on the 10,000 test images, run by its runtime, mean over the seeds and standard
deviation between them; times are p50 of the first seed's files at one thread, batch 1, all files interleaved in one run, as
ratios to the original's fp32 file in ONNX Runtime with a 95 % interval. What bounds them: a few epochs recover less than full
training would, and the cuts themselves do not vary with the seed. The last line is JSON. It needs torch-pruning 1.6.1
(pip install torch-pruning==1.6.1).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import edgepress as ep
from edgepress.compress.pruning import analyse, channels_of
from edgepress.compress.pruning.cost import Latency
from edgepress.compress.task import labelled_loss, training_batches
from edgepress.compress.train import Precision, Schedule, fastest_precision, fit

CUTS = ("torch-pruning, MACs", "Prune, MACs, one by one", "Prune, MACs", "Prune, time")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--macs", type=float, default=1 / 2.1, help="multiply-accumulates to keep")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--cuts", nargs="+", choices=CUTS, default=list(CUTS))
    parser.add_argument("--out", default="runs/equal-recovery", help="files of the same settings are not made again")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    task = ep.load_task("resnet56-cifar10")
    original = ep.trace(task.model, task.inputs).eval()
    clock = ep.LatencyTable("litert", "int8")
    makes = {
        CUTS[0]: lambda: _torch_pruning(task, arguments.macs, original.macs()),
        CUTS[1]: lambda: ep.Prune(macs=arguments.macs, multiple=1)(original, task),
        CUTS[2]: lambda: ep.Prune(macs=arguments.macs)(original, task),
        CUTS[3]: lambda: _by_time(original, task, clock, _predicted(cuts.get(CUTS[2]) or makes[CUTS[2]](), clock)),
    }
    cuts: dict[str, ep.Network] = {}
    for name in CUTS:
        if name in arguments.cuts:
            cuts[name] = makes[name]()

    precision = fastest_precision(original.copy(), next(training_batches(task, 0))[0])
    files = {("original", "fp32 onnx"): [ep.export(original, out / "original.onnx", "fp32")]}
    networks = {"original": original, **cuts}
    for name, cut in networks.items():
        for seed in range(1 if name == "original" else arguments.seeds):
            title = f"{name}, seed {seed}"
            run = "" if name == "original" else f", macs {arguments.macs:g}, epochs {arguments.epochs:g}, lr {arguments.lr:g}"
            stem = f"{title}{run}".replace(",", "").replace(" ", "-")
            paths = [out / f"{stem}.int8.{suffix}" for suffix in ("onnx", "tflite")]
            if not all(path.exists() for path in paths):
                schedule = Schedule(epochs=arguments.epochs, lr=arguments.lr, seed=seed)
                network = cut if name == "original" else _recovered(cut, task, schedule, precision, title)
                for path in paths:
                    ep.export(network, path, "int8", task.calibration_batches)
            for path in paths:
                files.setdefault((name, f"int8 {path.suffix[1:]}"), []).append(ep.read_artifact(path))

    measured = ep.measure([of_seeds[0] for of_seeds in files.values()], device="local", threads=1)
    rows = []
    print(f"{'cut':<24} {'file':<12} {'accuracy':>8} {'spread':>6} {'x':>6} {'95 %':>14} {'MACs':>6} {'predicted us':>12}")
    for ((name, kind), of_seeds), times in zip(files.items(), measured, strict=True):
        accuracies = [_accuracy(artifact, task) for artifact in of_seeds]
        faster = ep.ratio(measured[0], times)
        row = {
            "cut": name,
            "file": kind,
            "accuracies": accuracies,
            "p50_ns": times.p50_ns,
            "faster": faster.value,
            "low": faster.low,
            "high": faster.high,
            "macs": networks[name].macs() / original.macs(),
            "predicted_s": _predicted(networks[name], clock),
        }
        rows.append(row)
        spread = f"{np.std(accuracies, ddof=1):.2f}" if len(accuracies) > 1 else ""
        print(
            f"{name:<24} {kind:<12} {np.mean(accuracies):>8.2f} {spread:>6} {faster.value:>6.2f} {faster.low:>6.2f} to "
            f"{faster.high:.2f} {row['macs']:>6.3f} {row['predicted_s'] * 1e6:>12.1f}"
        )
    print(json.dumps({"epochs": arguments.epochs, "rows": rows}))
    return 0


def _recovered(cut: ep.Network, task: ep.Task, schedule: Schedule, precision: Precision, title: str) -> ep.Network:
    network = cut.copy().train()
    labelled = task.train_batches
    task = replace(task, train_batches=lambda epoch: labelled(epoch + 1_000_000 * schedule.seed))
    fit(network, task, lambda y, x, t: labelled_loss(task, y, t), schedule, precision=precision, title=title)
    return network.eval()


def _accuracy(artifact: ep.Artifact, task: ep.Task) -> float:
    runtime = ep.open_runtime(artifact, threads=2)
    accuracy = task.evaluate(runtime.predict)["accuracy"]
    runtime.close()
    return accuracy


def _by_time(original: ep.Network, task: ep.Task, clock: ep.LatencyTable, seconds: float) -> ep.Network:
    prune = ep.Prune(ep.Fisher(), latency=f"{seconds * 1e6:.3f} us", clock=clock, depth=True, rounds=8)
    return prune(original, task)


def _predicted(network: ep.Network, clock: ep.LatencyTable) -> float:
    """What the clock gives a whole network."""
    channels = channels_of(analyse(network))
    return float(Latency(channels, clock).total(np.array([len(g.channels) for g in channels.groups], float)))


def _torch_pruning(task: ep.Task, part: float, macs: int) -> ep.Network:
    """Global first-order Taylor pruning of the inner channels, in small steps until the budget is met."""
    import torch_pruning as tp

    model = copy.deepcopy(task.model).eval()
    for i, (inputs, targets) in enumerate(training_batches(task, 0)):
        if i == 16:
            break
        labelled_loss(task, model(*inputs), targets).backward()
    convs = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d) and not (n.startswith("layer") and "conv1" in n)
    ]
    pruner = tp.pruner.MetaPruner(
        model,
        task.inputs[0],
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=0.95,
        max_pruning_ratio=0.9,
        iterative_steps=50,
        ignored_layers=[*convs, model.linear],
    )
    for _ in range(50):
        pruner.step()
        if tp.utils.count_ops_and_params(model, task.inputs[0][:1])[0] <= part * macs:
            return ep.trace(model, task.inputs)
    raise SystemExit("torch-pruning does not reach the budget with the inner channels alone.")


if __name__ == "__main__":
    sys.exit(main())
