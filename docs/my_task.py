"""A network of one's own as an edgepress task: run it with `edgepress compress docs/my_task.py:build`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import edgepress as ep

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)


def network() -> nn.Module:
    """Stands for your own class and checkpoint: a small convolutional network, trained for a few seconds."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 10)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for epoch in range(4):
        for x, y in train(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


def train(epoch: int):
    """Labelled batches of one epoch."""
    order = torch.randperm(1400, generator=torch.Generator().manual_seed(epoch))
    for rows in order.split(64):
        yield images[rows], labels[rows]


def evaluate(predict) -> dict[str, float]:
    """Judge any file: `predict` takes and returns numpy arrays, images as the network takes them, [N, 1, 8, 8]."""
    logits = predict(images[1400:].numpy())
    return {"accuracy": 100.0 * float((logits.argmax(1) == labels[1400:].numpy()).mean())}


def build() -> ep.Task:
    """What edgepress calls."""
    return ep.Task(
        model=network(),
        example_inputs=images[:1],
        train_batches=train,
        calibration_batches=lambda: images[:256].split(32),
        evaluate=evaluate,
        metric="accuracy",
    )
