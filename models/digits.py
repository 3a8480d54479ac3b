"""The embedded default: a small residual network on scikit-learn's bundled digits, trained on the spot.

1,797 handwritten digits of 8x8 pixels (E. Alpaydin, C. Kaynak 1998, UCI "Optical Recognition of Handwritten Digits"),
enlarged to 32x32. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from edgepress.compress.progress import bar
from edgepress.compress.task import Evaluate, Predict, Task

__all__ = ["DigitsNet", "digits"]

_EPOCHS, _BATCH = 8, 64


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, with a 1x1 convolution in it where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H / stride, W / stride]``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """``[N, 1, 32, 32]`` to logits ``[N, 10]``: a stem, three stages of two blocks, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        shapes = [(32, 32, 1), (32, 32, 1), (32, 48, 2), (48, 48, 1), (48, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(Block(*shape) for shape in shapes))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 1, 32, 32]`` in 0..1 to logits ``[N, 10]``."""
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))  # type: ignore[no-any-return]


def digits() -> Task:
    """Train the network (some seconds) and return the task; 1,097 images train it, 200 decide, 500 judge."""
    source = load_digits()
    images = F.interpolate(torch.tensor(source.images, dtype=torch.float32)[:, None] / 16, size=(32, 32), mode="bilinear")
    labels = torch.tensor(source.target, dtype=torch.int64)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(images)))
    train, held_out, test = order[:1097], order[1097:1297], order[1297:]

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.Generator().manual_seed(epoch)
        for rows in train[torch.randperm(len(train), generator=random)].split(_BATCH):
            shift = torch.randint(-2, 3, (2,), generator=random).tolist()
            yield torch.roll(images[rows], shift, (2, 3)), labels[rows]

    model = DigitsNet()
    _train(model, batches)
    return Task(
        model=model,
        example_inputs=images[:2],
        train_batches=batches,
        calibration_batches=lambda: images[train[:256]].split(32),
        evaluate=_accuracy(images[test], labels[test]),
        validate=_accuracy(images[held_out], labels[held_out]),
        metric="accuracy",
        name="digits",
    )


def _accuracy(images: Tensor, labels: Tensor) -> Evaluate:
    def evaluate(predict: Predict) -> dict[str, float]:
        return {"accuracy": 100.0 * float((predict(images.numpy()).argmax(1) == labels.numpy()).mean())}

    return evaluate


def _train(model: nn.Module, batches: Callable[[int], Iterator[tuple[Tensor, Tensor]]]) -> None:
    with torch.random.fork_rng(), bar("Train digits") as update:
        torch.manual_seed(0)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
        steps = _EPOCHS * -(-1097 // _BATCH)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
        model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        for epoch in range(_EPOCHS):
            for images, labels in batches(epoch):
                loss = F.cross_entropy(model(images.contiguous(memory_format=torch.channels_last)), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            update((epoch + 1) / _EPOCHS, f"loss {loss.item():.3f}")
        model.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
