"""MLPerf Tiny's four reference networks and their tasks: images, people in sight, keywords, strange machine sounds.

C. Banbury et al., "MLPerf Tiny Benchmark", NeurIPS 2021; the trained networks are those of https://github.com/mlcommons/tiny.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgepress.compress.task import Predict, Task

from .cifar10 import RawCifar10
from .examples import Examples
from .mobilenet import MobileNetV1
from .packs import data_folder
from .published import read_data, read_weights

__all__ = [
    "AutoEncoder",
    "DepthwiseSeparable",
    "ResNet8",
    "Sounds",
    "mlperf_ad",
    "mlperf_kws",
    "mlperf_resnet8",
    "mlperf_vww",
]

_SOURCE = "https://github.com/mlcommons/tiny"
_DATA = "https://github.com/eembc/energyrunner (MLPerf Tiny's accuracy sets)"
_WINDOW, _STEP = 640, 128  # five spectra of 128 bands, and one spectrum further


class ResNet8(nn.Module):
    """Three residual blocks on ``[N, 3, 32, 32]``, pixels from 0 to 255; logits ``[N, 10]``.

    Example:
        >>> ResNet8()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 16, 3, 1), (16, 16, 3, 1), (16, 16, 3, 1), (16, 32, 3, 2), (32, 32, 3, 1), (16, 32, 1, 2)]
        for i, shape in enumerate([*shapes, (32, 64, 3, 2), (64, 64, 3, 1), (32, 64, 1, 2)]):
            setattr(self, f"c{i}", nn.Conv2d(*shape, padding=shape[2] // 2 if shape[3] == 1 else 0))
        for i, width in enumerate((16, 16, 16, 32, 32, 64, 64)):
            setattr(self, f"b{i}", nn.BatchNorm2d(width, eps=1e-3))
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))  # where a 3x3 convolution with stride 2 pads in TensorFlow
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, 3, 32, 32]`` to logits ``[N, 10]``."""
        conv = [self.get_submodule(f"c{i}") for i in range(9)]
        norm = [self.get_submodule(f"b{i}") for i in range(7)]
        x = F.relu(norm[0](conv[0](x)))
        x = F.relu(x + norm[2](conv[2](F.relu(norm[1](conv[1](x))))))
        x = F.relu(conv[5](x) + norm[4](conv[4](F.relu(norm[3](conv[3](self.pad(x)))))))
        x = F.relu(conv[8](x) + norm[6](conv[7](F.relu(norm[5](conv[6](self.pad(x)))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


class DepthwiseSeparable(nn.Module):
    """DS-CNN, four depthwise separable convolutions, on ``[N, 1, 49, 10]``; logits ``[N, 12]``.

    Y. Zhang, N. Suda, L. Lai, V. Chandra, "Hello Edge: Keyword Spotting on Microcontrollers", 2017.

    Example:
        >>> DepthwiseSeparable()(torch.zeros(1, 1, 49, 10)).shape
        torch.Size([1, 12])
    """

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((1, 1, 4, 5))
        self.stem, self.stem_bn = nn.Conv2d(1, 64, (10, 4), 2), _norm(64)
        self.dw = nn.ModuleList(nn.Conv2d(64, 64, 3, 1, 1, groups=64) for _ in range(4))
        self.dw_bn = nn.ModuleList(_norm(64) for _ in range(4))
        self.pw = nn.ModuleList(nn.Conv2d(64, 64, 1) for _ in range(4))
        self.pw_bn = nn.ModuleList(_norm(64) for _ in range(4))
        self.fc = nn.Linear(64, 12)

    def forward(self, x: Tensor) -> Tensor:
        """49 frames of 10 cepstral coefficients ``[N, 1, 49, 10]`` to logits ``[N, 12]``."""
        x = F.relu(self.stem_bn(self.stem(self.pad(x))))
        for depthwise, norm, pointwise, last in zip(self.dw, self.dw_bn, self.pw, self.pw_bn, strict=True):
            x = F.relu(last(pointwise(F.relu(norm(depthwise(x))))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


class AutoEncoder(nn.Module):
    """Linear layers with a bottleneck of 8: ``[N, 640]`` to a reconstruction of it.

    Example:
        >>> AutoEncoder().eval()(torch.zeros(1, 640)).shape
        torch.Size([1, 640])
    """

    def __init__(self) -> None:
        super().__init__()
        widths, layers = [_WINDOW, 128, 128, 128, 128, 8, 128, 128, 128, 128], []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs, eps=1e-3), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Linear(widths[-1], _WINDOW))

    def forward(self, x: Tensor) -> Tensor:
        """Log-mel energies of five frames ``[N, 640]`` to their reconstruction."""
        return self.net(x)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Sounds:
    """Clips of machine sounds ``[N, 25600]`` as log-mel energies, and whether each is of a broken machine ``[N]``.

    Every ``aside``-th clip of a sound machine calibrates and trains, none where it is 0; the first so many of the others judge.
    """

    clips: Tensor
    broken: Tensor
    aside: int = 5
    first: int | None = None

    @property
    def is_aside(self) -> Tensor:
        """bool ``[N]``: which clips are put aside."""
        number = (~self.broken).cumsum(0) - 1
        return ~self.broken & (number % self.aside == 0) if self.aside else torch.zeros_like(self.broken)

    def windows(self, clip: Tensor) -> Tensor:
        """All windows of a clip ``[W, 640]``, each one spectrum further."""
        return clip.unfold(0, _WINDOW, _STEP).float().contiguous()

    def calibration(self) -> Iterator[Tensor]:
        """The windows of the clips that are put aside, a batch for each clip."""
        for clip in self.clips[self.is_aside]:
            yield self.windows(clip)

    def training(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same windows, mixed, each its own target."""
        windows = torch.cat(list(self.calibration()))
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            yield windows[rows], windows[rows]

    def evaluate(self, predict: Predict) -> dict[str, float]:
        """Area under the ROC curve in percent: how often a broken machine is reconstructed worse than a sound one."""
        judged = (~self.is_aside).nonzero()[:, 0][: self.first]
        errors = []
        for clip in self.clips[judged]:
            windows = self.windows(clip).numpy()
            errors.append(float(((predict(windows) - windows) ** 2).mean()))
        broken, scores = self.broken[judged].numpy(), np.array(errors)
        higher = scores[broken][:, None] - scores[~broken][None, :]
        return {"auc": 100.0 * float((higher > 0).mean() + 0.5 * (higher == 0).mean())}


def mlperf_resnet8(examples: int | None = None) -> Task:
    """Image classification on CIFAR-10; judged by the first ``examples`` test images, by all where None."""
    model = ResNet8()
    model.load_state_dict(read_weights("mlperf_resnet8_cifar10", _SOURCE))
    return RawCifar10.read(data_folder()).first(examples).task("mlperf-resnet8", model)


def mlperf_vww(examples: int | None = None) -> Task:
    """Visual wake words, a person in sight or not: 500 images of 96x96, of which every fifth calibrates and trains."""
    model = MobileNetV1(0.25, 2, bias=True, activation=nn.ReLU)
    model.load_state_dict(read_weights("mlperf_vww_mobilenetv1_025", _SOURCE))
    pack = read_data("mlperf_tiny_data", _DATA)
    images = torch.from_numpy(pack["vww01_x"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(pack["vww01_y"]).long()
    return _classification("mlperf-vww", model, Examples(images, labels, lambda x: x.float() / 255, first=examples))


def mlperf_kws(examples: int | None = None) -> Task:
    """Keyword spotting, ten words, silence and others: 1,000 utterances, of which every other calibrates and trains."""
    model = DepthwiseSeparable()
    model.load_state_dict(read_weights("mlperf_kws_dscnn", _SOURCE))
    pack = read_data("mlperf_tiny_data", _DATA)
    scale, zero = pack["kws01_scale_zp"].tolist()
    spectra, labels = torch.from_numpy(pack["kws01_x"])[:, None], torch.from_numpy(pack["kws01_y"]).long()
    return _classification("mlperf-kws", model, Examples(spectra, labels, lambda x: (x.float() - zero) * scale, 2, examples))


def _classification(name: str, model: nn.Module, data: Examples) -> Task:
    return Task(
        model=model.eval(),
        example_inputs=data.prepare(data.inputs[:2]),
        train_batches=data.training,
        calibration_batches=data.calibration,
        evaluate=data.evaluate,
        metric="accuracy",
        name=name,
    )


def mlperf_ad(examples: int | None = None) -> Task:
    """Anomaly detection on the sounds of toy cars: 60 clips, of which every fifth sound one calibrates and trains.

    Args:
        examples: judge by so many clips only, of both kinds in turns.
    """
    model = AutoEncoder()
    model.load_state_dict(read_weights("mlperf_ad_autoencoder", _SOURCE))
    pack = read_data("mlperf_tiny_data", _DATA)
    clips, broken = torch.from_numpy(pack["ad01_x"]), torch.from_numpy(pack["ad01_y"]) == 1
    turns = torch.where(broken, broken.cumsum(0), (~broken).cumsum(0)).argsort(stable=True)
    data = Sounds(clips[turns], broken[turns], first=examples)
    return Task(
        model=model.eval(),
        example_inputs=data.windows(data.clips[0])[:2],
        train_batches=data.training,
        calibration_batches=data.calibration,
        evaluate=data.evaluate,
        metric="auc",
        loss=F.mse_loss,
        name="mlperf-ad",
    )
