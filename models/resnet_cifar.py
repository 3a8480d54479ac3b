"""He et al.'s residual networks for CIFAR (6n+2 layers, parameter-free 'option A' shortcuts) and their task.

K. He, X. Zhang, S. Ren, J. Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from edgepress.compress.errors import TaskError
from edgepress.compress.task import Task

from .cifar10 import Cifar10
from .packs import data_folder

__all__ = ["CifarResNet", "resnet_cifar10"]

_CHECKPOINTS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}
_SOURCE = "https://github.com/akamaster/pytorch_resnet_cifar10 (folder pretrained_models)"


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut that subsamples and pads with zero channels where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.padding = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` to ``[N, C', H / stride, W / stride]``."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """A residual network of ``depth`` = 6n + 2 layers on ``[N, 3, 32, 32]``; logits ``[N, classes]``.

    Example:
        >>> import torch
        >>> CifarResNet(20)(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, depth: int, classes: int = 10):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]``, normalised, to logits ``[N, classes]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet_cifar10(depth: int, examples: int | None = None) -> Task:
    """The trained ResNet of that depth (20, 32, 44 or 56) on CIFAR-10, from the folder that ``EDGEPRESS_DATA`` names.

    Args:
        depth: layers.
        examples: judge by the first so many test images only.
    """
    model = CifarResNet(depth)
    model.load_state_dict(_weights(depth))
    return Cifar10.read(data_folder()).first(examples).task(f"resnet{depth}-cifar10", model)


def _weights(depth: int) -> dict[str, Tensor]:
    folder = data_folder()
    packed = folder / "weights" / f"resnet{depth}_cifar10.safetensors"
    if packed.is_file():
        weights: dict[str, Tensor] = load_file(packed)
        return weights
    for original in (folder / "weights" / _CHECKPOINTS[depth], folder / _CHECKPOINTS[depth]):
        if original.is_file():
            state = torch.load(original, map_location="cpu", weights_only=True)["state_dict"]
            return {name.removeprefix("module."): value for name, value in state.items()}
    raise TaskError(
        f"The weights of ResNet-{depth} are missing: put {_CHECKPOINTS[depth]} from {_SOURCE} into {folder / 'weights'}."
    )
