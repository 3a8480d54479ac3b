"""DenseNet-40-12 for CIFAR-10 in a form without most of its normalisations, and its task.

G. Huang, Z. Liu, L. van der Maaten, K. Weinberger, "Densely Connected Convolutional Networks", CVPR 2017. In this training of it
BatchNorm stands only behind the first convolution and in the transitions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.compress.task import Task

from .cifar10 import RawCifar10
from .packs import data_folder
from .published import read_weights

__all__ = ["DenseNet", "densenet40_cifar10"]

_SOURCE = "https://github.com/titu1994/DenseNet (DenseNet-40-12)"


class DenseNet(nn.Module):
    """Three dense blocks on ``[N, 3, H, W]``; logits ``[N, classes]``.

    Args:
        depth: layers, 3n + 4.
        growth: channels that each convolution adds.
        classes: outputs.

    Example:
        >>> DenseNet(10, 4)(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 10])
    """

    def __init__(self, depth: int = 40, growth: int = 12, classes: int = 10):
        super().__init__()
        channels, layers = 16, (depth - 4) // 3
        self.stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.stem_bn = nn.BatchNorm2d(channels)
        self.blocks, self.trans = nn.ModuleList(), nn.ModuleList()
        for block in range(3):
            widths = [channels + growth * i for i in range(layers)]
            self.blocks.append(nn.ModuleList(nn.Conv2d(width, growth, 3, 1, 1, bias=False) for width in widths))
            channels += growth * layers
            if block < 2:
                conv = nn.Conv2d(channels, channels, 1, bias=False)
                self.trans.append(nn.Sequential(conv, nn.AvgPool2d(2), nn.BatchNorm2d(channels)))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]``, pixels from 0 to 255, to logits ``[N, classes]``."""
        x = self.stem_bn(self.stem(x))
        for block, transition in zip(self.blocks, [*self.trans, nn.Identity()], strict=True):
            for conv in block:  # type: ignore[attr-defined]
                x = torch.cat([x, conv(F.relu(x))], 1)
            x = transition(x)
        return self.fc(F.relu(x).mean((2, 3)))  # type: ignore[no-any-return]


def densenet40_cifar10(examples: int | None = None) -> Task:
    """The trained network on CIFAR-10, from the folder that ``EDGEPRESS_DATA`` names.

    Args:
        examples: judge by the first so many test images only.
    """
    model = DenseNet()
    model.load_state_dict(read_weights("densenet40_cifar10", _SOURCE))
    return RawCifar10.read(data_folder()).first(examples).task("densenet40-cifar10", model)
