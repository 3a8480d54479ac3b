"""What several test files share: the reference data, and a tiny task."""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from edgepress.compress.progress import silenced
from edgepress.compress.task import Task

# a shell that runs the tests in the background has told them to ignore Ctrl-C, and what they start would inherit it
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)  # two make the many tiny networks here slower, not faster

DATA = Path(os.environ.get("EDGEPRESS_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture
def reference_data(monkeypatch):
    if not (DATA / "cifar10.npz").is_file():
        pytest.skip("needs the reference data: set EDGEPRESS_DATA (docs/reference-data.md)")
    monkeypatch.setenv("EDGEPRESS_DATA", str(DATA))
    return DATA


@pytest.fixture(autouse=True)
def _no_progress():
    with silenced():
        yield


class Blob(nn.Module):
    """A residual network on 8x8 images, small enough to train in a second."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        )
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.block(x))
        return self.head(self.drop(x.mean((2, 3))))


def blobs(count, seed):
    """Images of three kinds: horizontal stripes, vertical stripes, none."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=random)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)
    patterns = torch.stack([stripes[:, None].expand(8, 8), stripes[None, :].expand(8, 8), torch.zeros(8, 8)])
    return patterns[labels][:, None] + torch.randn(count, 1, 8, 8, generator=random), labels


def blob_batches(epoch):
    images, labels = blobs(512, 100 + epoch)
    return list(zip(images.split(64), labels.split(64), strict=True))


def accuracy(predict):
    images, labels = blobs(300, 7)
    return {"accuracy": 100.0 * float((predict(images.numpy()).argmax(1) == labels.numpy()).mean())}


@pytest.fixture(scope="session")
def trained_blob():
    torch.manual_seed(0)
    model = Blob()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for epoch in range(6):
        for images, labels in blob_batches(epoch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


@pytest.fixture
def task(trained_blob):
    return Task(
        model=trained_blob,
        example_inputs=torch.zeros(1, 1, 8, 8),
        train_batches=blob_batches,
        calibration_batches=lambda: blobs(128, 3)[0].split(32),
        evaluate=accuracy,
        metric="accuracy",
        name="blobs",
    )
