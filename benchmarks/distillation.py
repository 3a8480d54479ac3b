"""What a teacher is worth: networks that were pruned and networks from scratch, taught and not taught.

    EDGEPRESS_DATA=... python benchmarks/distillation.py [--pairs resnet20 resnet56-pruned ...] [--epochs 10] [--seeds 3]
        [--variants labels kd dkd hints attention similarity relational calibration] [--images 50000] [--tests 10000]

| pair | student | teacher | data |
|---|---|---|---|
| resnet20 | ResNet-20 from scratch | ResNet-56 | CIFAR-10 |
| resnet56-pruned | ResNet-56 cut to 1 / 2.1 of its MACs (`--macs`) | the original | CIFAR-10 |
| resnet8, resnet8-pruned | MLPerf Tiny's ResNet-8 from scratch; cut to 30 % | ResNet-20; the original | CIFAR-10 |
| keywords, keywords-pruned | MLPerf Tiny's DS-CNN from scratch; cut to 30 % | the original | 500 train, 500 others judge |
| sentiment, sentiment-pruned | one-layer Transformer from scratch; two layers cut to 30 % | the two layers | SST-2 |
| digits, digits-pruned | LSTM of 16 units from scratch; of 64 cut to 30 % | the 64 units | spoken digits |

Every variant of a pair starts from the same weights and sees the same batches for the same epochs at the same learning rate;
seeds change the initial weights (from scratch), the order and augmentation of the examples, and all else that is random.
`calibration` has the examples of the calibration stream alone, without labels, mixed anew, for as many steps of the same size.
Settings of `Distill` may follow a variant's name: `--variants labels:lr=0.01 kd:lr=0.01,temperature=2`.

What the numbers mean: accuracy of the PyTorch network on the test examples, which no variant trains on, mean over the seeds and
standard deviation between them. `decides` is the mean on other examples again, where the task has some, for choices of a learning
rate, say. `gain` is the mean of the differences from labels alone with the same seed and settings, with a 95 % interval from
Student's t (none with one seed); steps a second include the teacher. What bounds them: a few epochs are far from the 200 to 240
that published figures take, in which labels alone catch up or fall behind; nothing was tuned for any variant, weights are the
defaults that `docs/training.md` names, and DKD's beta of 2 is its authors' for ResNet-56 and ResNet-20. The interval is that of
the training, for these test examples: an accuracy near 90 % has a standard error of 0.3 points from 10,000 examples, of 0.7 from
the 1,821 sentences, of 1.3 from the 500 utterances and of 1.7 from the 300 digits. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
import yaml
from distillation_pairs import PAIRS, Pair
from torch import Tensor

import edgepress as ep
from edgepress.compress.distill import Distill
from edgepress.compress.task import input_batches, score, training_batches
from edgepress.compress.train import Precision, fastest_precision

VARIANTS: dict[str, dict[str, Any]] = {
    "labels": {"labels": 1.0},
    "kd": {},
    "dkd": {"loss": "decoupled", "beta": 2.0, "labels": 0.5},
    "hints": {"features": "hints"},
    "attention": {"features": "attention"},
    "similarity": {"features": "similarity"},
    "relational": {"features": "relational"},
    "calibration": {},
}
"""Name to settings of `Distill`; the features come on top of KD."""

T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
"""Student's t, 97.5 %, by degrees of freedom."""


def main() -> int:
    arguments = _arguments()
    results = []
    for name in arguments.pairs:
        pair = PAIRS[name](arguments)
        start = pair.start(0)
        before = {"teacher": score(pair.task, pair.teacher.predict), "start": score(pair.task, start.predict)}
        sizes = [sum(p.numel() for p in network.parameters()) for network in (start, pair.teacher)]
        said = (
            f"teacher {before['teacher']:.2f} %, {sizes[1]} numbers; student {before['start']:.2f} % before, {sizes[0]} numbers"
        )
        print(f"\n{name}: {said}", flush=True)
        precision = fastest_precision(start, next(training_batches(pair.task, 0))[0])
        rows = [_row(pair, v, seed, precision, arguments) for seed in range(arguments.seeds) for v in arguments.variants]
        _show(rows)
        results.append({"pair": name, "precision": str(precision), "parameters": sizes, **before, "rows": rows})
    print(json.dumps({**vars(arguments), "results": results}))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=["resnet20", "resnet56-pruned"])
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), help="NAME or NAME:setting=value,setting=value")
    parser.add_argument("--images", type=int, default=50_000, help="training images of CIFAR-10")
    parser.add_argument("--tests", type=int, default=10_000, help="test images of CIFAR-10")
    parser.add_argument("--macs", type=float, help="multiply-accumulates that a cut keeps")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        if variant.partition(":")[0] not in VARIANTS:
            parser.error(f"--variants {variant}: take some of {', '.join(VARIANTS)}")
    return arguments


def _row(pair: Pair, variant: str, seed: int, precision: Precision, arguments: argparse.Namespace) -> dict[str, Any]:
    """One training run: what it was, and what came out."""
    name, _, settings = variant.partition(":")
    own = dict(setting.split("=") for setting in settings.split(",") if setting)
    chosen = {**VARIANTS[name], **{key: yaml.safe_load(value) for key, value in own.items()}}
    if "features" in chosen:
        chosen = {**pair.inside, **chosen}
    source: Any = pair.task.train_batches

    def labelled(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return source(epoch + 1_000_000 * seed)  # type: ignore[no-any-return]

    def unlabelled(epoch: int) -> Iterator[tuple[Tensor, None]]:
        sizes = [len(inputs[0]) for inputs, _ in training_batches(pair.task, 0)]
        return ((x[: sizes[0]], None) for x in islice(_mixed(pair.task, sizes[0], epoch + 1_000_000 * seed), len(sizes)))

    task = replace(pair.task, train_batches=unlabelled if name == "calibration" else labelled)
    distill = Distill(epochs=arguments.epochs, seed=seed, teacher=pair.teacher, precision=precision)
    started = time.perf_counter()
    trained = replace(distill, **chosen)(pair.start(seed), task)
    seconds = time.perf_counter() - started
    found = trained.history[-1]["found"]
    row = {
        "variant": variant,
        "seed": seed,
        "accuracy": score(pair.task, trained.predict),
        "decides": score(pair.task, trained.predict, validation=True) if pair.task.validate else None,
        "steps": found["steps"],
        "steps_per_s": found["steps"] / seconds,
        "lr": found["lr"],
        "labelled": found["labelled"],
        "losses": found["losses"],
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def _mixed(task: ep.Task, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches of the calibration examples without end, in a new order each time."""
    examples = torch.cat([inputs[0] for inputs in input_batches(task.calibration_batches)])
    for turn in count():
        random = torch.Generator().manual_seed(seed + 10_000 * turn)
        for rows in torch.randperm(len(examples), generator=random).split(batch):
            if len(rows) == min(batch, len(examples)):
                yield examples[rows]


def _show(rows: list[dict[str, Any]]) -> None:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["variant"], []).append(row)
    wide = max(12, *map(len, found))
    print(f"{'':<{wide}} {'accuracy':>9} {'spread':>7} {'decides':>7} {'gain':>7} {'95 %':>18} {'steps/s':>8}")
    for variant, same in found.items():
        accuracies = [row["accuracy"] for row in same]
        spread = f"{statistics.stdev(accuracies):7.2f}" if len(same) > 1 else f"{'':7}"
        others = [row["decides"] for row in same if row["decides"] is not None]
        decides = f"{statistics.mean(others):7.2f}" if others else f"{'':7}"
        name, _, settings = variant.partition(":")
        plain = found.get(f"labels:{settings}") or found.get("labels")
        gain, interval = "", ""
        if plain and name != "labels":
            differences = [a - b["accuracy"] for a, b in zip(accuracies, plain, strict=True)]
            gain = f"{statistics.mean(differences):+.2f}"
            if len(differences) > 1:
                half = T95.get(len(differences) - 1, 2.0) * statistics.stdev(differences) / len(differences) ** 0.5
                interval = f"{statistics.mean(differences) - half:+.2f} to {statistics.mean(differences) + half:+.2f}"
        speed = statistics.median(row["steps_per_s"] for row in same)
        mean = statistics.mean(accuracies)
        print(f"{variant:<{wide}} {mean:9.2f} {spread} {decides} {gain:>7} {interval:>18} {speed:8.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
