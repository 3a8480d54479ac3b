"""MobileNetV1 at a width of 0.75, trained on ImageNet, and its task: 1,000 photos, one of each class.

A. Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision Applications", 2017.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from edgepress.compress.task import Predict, Task

from .examples import Examples
from .published import read_data, read_photos, read_weights

__all__ = ["MobileNetV1", "imagenet_photos", "mobilenetv1_imagenet"]

# (channels at full width, stride) of the 13 pairs of depthwise and pointwise convolutions
_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
_SOURCE = "https://github.com/tangmingsh/ml5featureExtractormodel (mobilenet_v1_0.75_224)"
_PHOTOS = "https://github.com/EliSchwartz/imagenet-sample-images"


class MobileNetV1(nn.Module):
    """``[N, 3, H, W]`` to logits ``[N, classes]``; strided convolutions pad on the right and below, as TensorFlow's do.

    Args:
        width: of 1.0: the factor on all channel counts.
        classes: outputs.
        bias: convolutions have biases in front of their normalisations.
        activation: ReLU6 as published, ReLU in MLPerf Tiny's.

    Example:
        >>> MobileNetV1(0.25, 2)(torch.zeros(1, 3, 96, 96)).shape
        torch.Size([1, 2])
    """

    def __init__(self, width: float, classes: int, bias: bool = False, activation: type[nn.Module] = nn.ReLU6):
        super().__init__()
        channels = int(32 * width)
        layers = [*_unit(3, channels, 3, 2, 1, bias), activation()]
        for full, stride in _PAIRS:
            layers += [*_unit(channels, channels, 3, stride, channels, bias), activation()]
            layers += [*_unit(channels, int(full * width), 1, 1, 1, bias), activation()]
            channels = int(full * width)
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, H, W]``, prepared as the weights want it, to logits ``[N, classes]``."""
        return self.classifier(self.features(x).mean((2, 3)))  # type: ignore[no-any-return]


def _unit(inputs: int, outputs: int, kernel: int, stride: int, groups: int, bias: bool) -> list[nn.Module]:
    padding = [nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []
    inner = 0 if padding else kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride, inner, groups=groups, bias=bias)
    return [*padding, conv, nn.BatchNorm2d(outputs, eps=1e-3)]


def imagenet_photos(examples: int | None = None) -> Examples:
    """1,000 photos of 224x224, one of each class in the order of the classes, of which every fifth calibrates.

    They are probably from ImageNet's training part: good for calibration and for agreement, not for absolute accuracy.

    Args:
        examples: the first so many of those that judge, and the 200 that calibrate; all where None.
    """
    pack = read_data("imagenet_sample1000_224", _PHOTOS)
    photos, labels = torch.from_numpy(read_photos(pack, (224, 224))), torch.from_numpy(pack["labels"]).long()
    return Examples(photos, labels, lambda x: x.float() / 127.5 - 1, first=examples)


def mobilenetv1_imagenet(examples: int | None = None) -> Task:
    """The trained network on the 800 photos that do not calibrate.

    What decides is ``agreement``: of how many photos the first choice is the float network's, in percent. The photos are
    probably ones that the network was trained on, and one of each class, so ``top1`` is optimistic and moves by chance where
    answers change from wrong to right; agreement counts every change.

    Args:
        examples: judge by the first so many photos only.
    """
    model = MobileNetV1(0.75, 1000)
    model.load_state_dict(read_weights("mobilenetv1_075_imagenet", _SOURCE))
    model.eval()
    photos = imagenet_photos(examples)

    @cache
    def wanted() -> list[Tensor]:
        with torch.inference_mode():
            return [model(x).argmax(1) for x, _ in photos.judged()]

    def evaluate(predict: Predict) -> dict[str, float]:
        agreed = right = total = 0
        for (inputs, labels), first in zip(photos.judged(), wanted(), strict=True):
            chosen = torch.from_numpy(predict(inputs.numpy()).argmax(1))
            agreed += int((chosen == first).sum())
            right += int((chosen == labels).sum())
            total += len(labels)
        return {"agreement": 100.0 * agreed / total, "top1": 100.0 * right / total}

    return Task(
        model=model,
        example_inputs=photos.prepare(photos.inputs[:2]),
        calibration_batches=photos.calibration,
        evaluate=evaluate,
        metric="agreement",
        name="mobilenetv1-imagenet",
    )
