"""Trains a tiny network in as many processes as it is started in; run by test_distributed.py through torchrun.

Writes, for each process, the weights after `fit` and after `Distill`, what they found, and the files it made.
"""

import os
import sys
from pathlib import Path

import torch
from torch import nn

from edgepress.compress.distill import Distill
from edgepress.compress.errors import TaskError
from edgepress.compress.network import trace
from edgepress.compress.progress import silenced
from edgepress.compress.task import Task
from edgepress.compress.train import Precision, Schedule, fastest_precision, fit


def batches(epoch):
    """Of an odd size, and smaller at the end."""
    for count in (33, 33, 33, 33, 33, 7):
        x = torch.randn(count, 1, 6, 6)
        yield x, (x.mean((1, 2, 3)) > 0).long()


def make_task():
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2)
    x = torch.randn(64, 1, 6, 6)
    labels = (x.mean((1, 2, 3)) > 0).numpy()

    def evaluate(predict):
        with (Path(os.environ["EVALUATED"]) / os.environ.get("RANK", "alone")).open("a") as file:
            file.write("x")
        return {"accuracy": float((predict(x.numpy()).argmax(1) == labels).mean())}

    return Task(nn.Sequential(*layers), torch.zeros(1, 1, 6, 6), evaluate, metric="accuracy", train_batches=batches)


def train(folder):
    task, plain = make_task(), Precision()
    found = {}

    def loss(outputs, inputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    schedule = Schedule(epochs=3, lr=0.1, accumulate=2, ema=0.9, patience=3, log=str(folder / "log.csv"))
    for turn in ("fit", "finished"):  # the second takes what the first left
        network = trace(task.model, task.inputs)
        found[f"{turn}-found"] = fit(network, task, loss, schedule, precision=plain, checkpoint=folder / "checkpoint")
        found[turn] = network.state_dict()
    student = trace(task.model, task.inputs)
    with torch.no_grad():
        student.module.get_parameter("0.weight").mul_(0.5)
    distilled = Distill(epochs=2, lr=0.1, precision=plain)(student, task)
    found["measured"] = fastest_precision(student, task.inputs)
    found["distill"] = distilled.state_dict()
    found["distill-found"] = distilled.history[-1]["found"]
    small = Task(task.model, task.inputs, task.evaluate, "accuracy", train_batches=[(task.inputs[0], torch.zeros(1).long())])
    try:
        fit(network, small, loss, Schedule(epochs=1))
    except TaskError as error:
        found["small"] = str(error)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with silenced():
        torch.save(train(folder), folder / f"found-{os.environ['RANK']}.pt")
