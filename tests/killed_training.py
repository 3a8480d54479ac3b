"""Trains a tiny network in processes that are killed at random moments; run by test_resume.py in a process of its own.

Prints JSON: the steps that the checkpoint held at each kill, and whether the final weights are those of a run that nobody
disturbed.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgepress.compress.checkpoint import read_checkpoint
from edgepress.compress.network import trace
from edgepress.compress.progress import silenced
from edgepress.compress.task import Task
from edgepress.compress.train import Schedule, fit

KILLS = 6


def batches(epoch):
    """Random numbers of all three generators, and a buffer that holds on to some of them."""
    buffer = []
    for _ in range(14):
        x = torch.randn(16, 1, 6, 6) * float(np.random.uniform(0.5, 2.0))
        buffer.append((x, (x.mean((1, 2, 3)) > 0).long()))
        if len(buffer) > 3:
            yield buffer.pop(random.randrange(len(buffer)))
    yield from buffer


def make_task():
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 2)
    x = torch.randn(64, 1, 6, 6)
    labels = (x.mean((1, 2, 3)) > 0).numpy()

    def evaluate(predict):
        return {"accuracy": float((predict(x.numpy()).argmax(1) == labels).mean())}

    return Task(nn.Sequential(*layers), torch.zeros(1, 1, 6, 6), evaluate, metric="accuracy", train_batches=batches)


def train(task, network, folder, save_every):
    network = network.copy()
    projection = nn.Parameter(torch.ones(2, 2))

    def loss(outputs, inputs, targets):
        return nn.functional.cross_entropy(outputs @ projection, targets)

    schedule = Schedule(epochs=4, lr=0.05, accumulate=3, ema=0.9, patience=3, optimizer="adamw", deterministic=True)
    schedule = Schedule(**{**vars(schedule), "log": str(folder / "log.csv")})
    with silenced():
        fit(network, task, loss, schedule, checkpoint=folder / "checkpoint", extra=[projection], save_every=save_every)
    torch.save([*network.tensors(), projection.detach()], folder / "weights.pt")


def in_a_process(work, seconds=None):
    """Run ``work`` in a child; whether it was killed after ``seconds``."""
    child = os.fork()
    if not child:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), f"the training process ended with {status}"
    return status == signal.SIGKILL


def main(folder):
    torch.set_num_threads(1)
    task, rng = make_task(), random.Random(os.getpid())
    network = trace(task.model, task.inputs)
    whole, disturbed = folder / "whole", folder / "disturbed"
    whole.mkdir()
    disturbed.mkdir()
    started = time.monotonic()
    in_a_process(lambda: train(task, network, whole, 1e9))
    longest = 0.7 * (time.monotonic() - started)
    held: list[int] = []
    while len(held) < KILLS:
        if in_a_process(lambda: train(task, network, disturbed, 0.0), rng.uniform(0.1, 1.0) * longest):
            found = read_checkpoint(disturbed / "checkpoint")
            held.append(found[1]["at"]["batches"] + 100 * found[1]["at"]["epoch"] if found else 0)
        else:  # it came to its end before: a machine that was busy while the first one ran
            shutil.rmtree(disturbed)
            disturbed.mkdir()
            longest, held = 0.7 * longest, []
    in_a_process(lambda: train(task, network, disturbed, 0.0))
    a, b = (torch.load(f / "weights.pt") for f in (whole, disturbed))
    same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    logs = [[r.rsplit(",", 1)[0] for r in (f / "log.csv").read_text().splitlines()] for f in (whole, disturbed)]
    left = sorted(p.name for p in disturbed.iterdir())
    print(json.dumps({"held": held, "same": same, "same_log": logs[0] == logs[1], "left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
