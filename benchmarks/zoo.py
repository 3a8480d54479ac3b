"""Tiny networks of many kinds to judge pruning and exporting by; more are in `zoo_more`, those of the `transformers` library in
`zoo_transformers`.

Each entry of `ZOO` makes (network in evaluation mode, example inputs ``[2, ...]``), the same ones every time. Weights and
statistics are random, normalisations included: what is neutral hides mistakes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import zoo_more
import zoo_transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations

Inputs = tuple[Tensor, ...]
Built = tuple[nn.Module, Inputs]


# ---- pieces


def cbr(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    conv = nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), act())


class Head(nn.Module):
    """Global average and a classifier."""

    def __init__(self, channels: int, classes: int = 10):
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


class Residual(nn.Module):
    """``body(x) + short(x)``, with an activation behind the sum."""

    def __init__(self, body: nn.Module, short: nn.Module | None = None, act: nn.Module | None = None):
        super().__init__()
        self.body, self.short, self.act = body, short or nn.Identity(), act or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.short(x))


class Cat(nn.Module):
    """Branches side by side, joined along the channels."""

    def __init__(self, *branches: nn.Module):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def image(channels: int = 3, size: int = 32) -> Inputs:
    return (torch.randn(2, channels, size, size),)


# ---- plain, residual, concatenated


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 48), nn.Tanh(), nn.Linear(48, 10),
    )  # fmt: skip


def vgg() -> nn.Module:
    return nn.Sequential(
        cbr(3, 16), cbr(16, 16), nn.MaxPool2d(2), cbr(16, 32), cbr(32, 32), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10),
    )  # fmt: skip


class PaddedShortcut(nn.Module):
    """He et al.'s option A: every second pixel, and zero channels at both sides."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


def basic(i: int, o: int, stride: int = 1) -> nn.Module:
    body = nn.Sequential(cbr(i, o, 3, stride), nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
    return Residual(body, PaddedShortcut(o - i) if i != o else None, nn.ReLU())


def resnet_basic() -> nn.Module:
    return nn.Sequential(cbr(3, 16), basic(16, 16), basic(16, 32, 2), basic(32, 32), Head(32))


def bottleneck(i: int, m: int, stride: int = 1, groups: int = 1) -> nn.Module:
    o = 4 * m
    body = nn.Sequential(cbr(i, m, 1), cbr(m, m, 3, stride, groups), nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o))
    short = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 or i != o else None
    return Residual(body, short, nn.ReLU())


def resnet_bottleneck() -> nn.Module:
    return nn.Sequential(cbr(3, 16), nn.MaxPool2d(3, 2, 1), bottleneck(16, 8), bottleneck(32, 8), bottleneck(32, 16, 2), Head(64))


def resnet_preact() -> nn.Module:
    def block(c: int) -> nn.Module:
        return Residual(nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), cbr(c, c), nn.Conv2d(c, c, 3, padding=1, bias=False)))

    return nn.Sequential(cbr(3, 16, 3, 2), block(16), block(16), nn.Conv2d(16, 32, 1, 2), block(32), nn.ReLU(), Head(32))


def resnext() -> nn.Module:
    return nn.Sequential(cbr(3, 16), bottleneck(16, 16, 1, 4), bottleneck(64, 16, 1, 4), bottleneck(64, 32, 2, 4), Head(128))


def resnet_groupnorm() -> nn.Module:
    def block(c: int) -> nn.Module:
        conv = functools.partial(nn.Conv2d, c, c, 3, padding=1, bias=False)
        return Residual(nn.Sequential(conv(), nn.GroupNorm(4, c), nn.SiLU(), conv(), nn.GroupNorm(8, c)), act=nn.SiLU())

    return nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), block(32), nn.GroupNorm(4, 32), block(32), Head(32))


class DenseLayer(nn.Module):
    def __init__(self, i: int, growth: int):
        super().__init__()
        conv = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.body = nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), cbr(i, 4 * growth, 1), conv)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), DenseLayer(16, 8), DenseLayer(24, 8), DenseLayer(32, 8), cbr(40, 20, 1), nn.AvgPool2d(2),
        DenseLayer(20, 8), DenseLayer(28, 8), nn.BatchNorm2d(36), nn.ReLU(), Head(36),
    )  # fmt: skip


def inception_block(i: int) -> nn.Module:
    pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(i, 8, 1))
    return Cat(cbr(i, 8, 1), nn.Sequential(cbr(i, 8, 1), cbr(8, 16)), nn.Sequential(cbr(i, 4, 1), cbr(4, 8, 5)), pooled)


def inception() -> nn.Module:
    return nn.Sequential(cbr(3, 16, 3, 2), inception_block(16), inception_block(40), Head(40))


def squeezenet() -> nn.Module:
    def fire(i: int, squeezed: int, o: int) -> nn.Module:
        return nn.Sequential(cbr(i, squeezed, 1), Cat(cbr(squeezed, o, 1), cbr(squeezed, o, 3)))

    last = nn.Conv2d(64, 10, 1)
    return nn.Sequential(cbr(3, 16, 3, 2), fire(16, 8, 16), fire(32, 12, 32), last, nn.AdaptiveAvgPool2d(1), nn.Flatten())


# ---- small devices' networks


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def inverted(i: int, o: int, stride: int, k: int = 3, squeeze: bool = False, act: type[nn.Module] = nn.ReLU6) -> nn.Module:
    h = 4 * i
    body = nn.Sequential(
        cbr(i, h, 1, act=act), cbr(h, h, k, stride, h, act=act), SqueezeExcite(h) if squeeze else nn.Identity(),
        nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o),
    )  # fmt: skip
    return Residual(body) if stride == 1 and i == o else body


def mobilenet_v2() -> nn.Module:
    return nn.Sequential(cbr(3, 8), inverted(8, 16, 2), inverted(16, 16, 1), inverted(16, 24, 2), cbr(24, 64, 1), Head(64))


def mobilenet_v3() -> nn.Module:
    act = nn.Hardswish
    blocks = inverted(8, 16, 2, 5, True, act), inverted(16, 16, 1, 5, True, act), inverted(16, 24, 2, 3, False, act)
    return nn.Sequential(cbr(3, 8, 3, 2, act=act), *blocks, cbr(24, 64, 1, act=act), Head(64))


class GhostModule(nn.Module):
    """Han et al. 2020: half of the channels are cheap depthwise copies of the other half."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.o, half = o, -(-o // 2)
        self.primary, self.cheap = cbr(i, half, 1), cbr(half, half, 3, groups=half)

    def forward(self, x: Tensor) -> Tensor:
        x = self.primary(x)
        return torch.cat([x, self.cheap(x)], 1)[:, : self.o]


def ghostnet() -> nn.Module:
    def block(c: int) -> nn.Module:
        return Residual(nn.Sequential(GhostModule(c, 3 * c), SqueezeExcite(3 * c), GhostModule(3 * c, c)))

    return nn.Sequential(cbr(3, 16, 3, 2), block(16), GhostModule(16, 23), GhostModule(23, 24), block(24), Head(24))


class ShuffleUnitV1(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.groups, m = groups, c // 4
        self.reduce, self.deep = cbr(c, m, 1, groups=groups), cbr(m, m, 3, groups=m, act=nn.Identity)
        self.widen = nn.Sequential(nn.Conv2d(m, c, 1, groups=groups), nn.BatchNorm2d(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.widen(self.deep(F.channel_shuffle(self.reduce(x), self.groups))))


class ShuffleUnitV2(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        h = c // 2
        self.body = nn.Sequential(cbr(h, h, 1), cbr(h, h, 3, groups=h, act=nn.Identity), cbr(h, h, 1))

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.chunk(2, 1)
        y = torch.cat([left, self.body(right)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet_v1() -> nn.Module:
    return nn.Sequential(cbr(3, 64, 3, 2), ShuffleUnitV1(64, 4), ShuffleUnitV1(64, 4), Head(64))


def shufflenet_v2() -> nn.Module:
    return nn.Sequential(cbr(3, 32, 3, 2), ShuffleUnitV2(32), ShuffleUnitV2(32), cbr(32, 64, 3, 2), ShuffleUnitV2(64), Head(64))


class Res2Net(nn.Module):
    """Gao et al. 2019: parts of the channels, each convolved after the one before was added."""

    def __init__(self, c: int = 32, parts: int = 4):
        super().__init__()
        self.parts, m = parts, c // parts
        self.inp, self.out, self.head = cbr(3, c, 3, 2), nn.Conv2d(c, c, 1), Head(c)
        self.convs = nn.ModuleList(cbr(m, m) for _ in range(parts - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        first, *rest = x.chunk(self.parts, 1)
        done = [first]
        for part, conv in zip(rest, self.convs, strict=True):
            done.append(conv(part if len(done) == 1 else part + done[-1]))
        return self.head(F.relu(x + self.out(torch.cat(done, 1))))


class RepVgg(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.three, self.one, self.same = cbr(c, c, 3, act=nn.Identity), cbr(c, c, 1, act=nn.Identity), nn.BatchNorm2d(c)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.three(x) + self.one(x) + self.same(x))


def repvgg() -> nn.Module:
    return nn.Sequential(cbr(3, 16, 3, 2), RepVgg(16), cbr(16, 24, 3, 2), RepVgg(24), RepVgg(24), Head(24))


def convmixer() -> nn.Module:
    def block(c: int) -> nn.Module:
        deep = nn.Sequential(nn.Conv2d(c, c, 5, groups=c, padding="same"), nn.GELU(), nn.BatchNorm2d(c))
        return nn.Sequential(Residual(deep), nn.Conv2d(c, c, 1), nn.GELU(), nn.BatchNorm2d(c))

    return nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.GELU(), nn.BatchNorm2d(24), block(24), block(24), Head(24))


class Cbam(nn.Module):
    """Woo et al. 2018: channels weighed by two poolings through one MLP, pixels by a convolution over channel statistics."""

    def __init__(self, c: int = 32):
        super().__init__()
        self.stem, self.head = nn.Sequential(cbr(3, c, 3, 2), cbr(c, c)), Head(c)
        self.mlp = nn.Sequential(nn.Linear(c, c // 4), nn.ReLU(), nn.Linear(c // 4, c))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        weight = torch.sigmoid(self.mlp(x.mean((2, 3))) + self.mlp(x.amax((2, 3))))
        x = x * weight[:, :, None, None]
        statistics = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return self.head(x * torch.sigmoid(self.spatial(statistics)))


class NonLocal(nn.Module):
    """Wang et al. 2018: attention between all pixels of a feature map."""

    def __init__(self, c: int = 24, inner: int = 12):
        super().__init__()
        self.stem, self.out, self.head = cbr(3, c, 3, 4), nn.Conv2d(inner, c, 1), Head(c)
        self.query, self.key, self.value = (nn.Conv2d(c, inner, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        n, _, h, w = x.shape
        q, k, v = (f(x).flatten(2) for f in (self.query, self.key, self.value))
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)
        y = torch.bmm(weights, v.transpose(1, 2)).transpose(1, 2).reshape(n, -1, h, w)
        return self.head(x + self.out(y))


# ---- dense outputs


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.d1, self.d2, self.mid = cbr(3, 8), cbr(8, 16), cbr(16, 32)
        self.up = nn.ConvTranspose2d(32, 16, 2, 2)
        self.u2, self.u1, self.out = cbr(32, 16), cbr(24, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.u2(torch.cat([b, self.up(self.mid(F.max_pool2d(b, 2)))], 1))
        return self.out(self.u1(torch.cat([a, F.interpolate(y, scale_factor=2, mode="bilinear")], 1)))


class Aspp(nn.Module):
    """DeepLab's parallel dilations and its image-level branch, resized back to the input."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.stem = nn.Sequential(cbr(3, c, 3, 2), cbr(c, c, 3, 2))
        self.branches = nn.ModuleList(nn.Conv2d(c, 8, 3, padding=d, dilation=d) for d in (1, 2, 4))
        self.pooled, self.project, self.out = nn.Conv2d(c, 8, 1), cbr(32, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        whole = F.interpolate(self.pooled(F.adaptive_avg_pool2d(y, 1)), size=y.shape[2:], mode="nearest")
        y = self.out(self.project(torch.cat([F.relu(b(y)) for b in self.branches] + [whole], 1)))
        return F.interpolate(y, size=x.shape[2:], mode="bilinear", align_corners=False)


class HighResolution(nn.Module):
    """HRNet's two resolutions that exchange what they know."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = cbr(3, 16, 3, 2), cbr(16, 24, 3, 2)
        self.high_block, self.low_block = basic(16, 16), basic(24, 24)
        self.down, self.up, self.out = cbr(16, 24, 3, 2, act=nn.Identity), cbr(24, 16, 1, act=nn.Identity), nn.Conv2d(40, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        high, low = self.high_block(x), self.low_block(self.low(x))
        high, low = F.relu(high + F.interpolate(self.up(low), scale_factor=2.0)), F.relu(low + self.down(high))
        return self.out(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))


def autoencoder() -> nn.Module:
    down = nn.Conv2d(1, 8, 3, 2, 1), nn.ELU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ELU(), nn.Flatten(), nn.Linear(16 * 49, 12)
    up = nn.Linear(12, 16 * 49), nn.Unflatten(1, (16, 7, 7)), nn.ELU(), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ELU()
    return nn.Sequential(*down, *up, nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid())


class TiedAutoencoder(nn.Module):
    """The decoder's weights are the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(36, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        code = self.second(torch.tanh(self.first(x)))
        return F.linear(torch.tanh(F.linear(code, self.second.weight.t())), self.first.weight.t())


class SuperResolution(nn.Module):
    """EDSR: residual blocks without normalisation, then channels into pixels, beside a resized input."""

    def __init__(self, c: int = 16):
        super().__init__()
        body = [Residual(nn.Sequential(nn.Conv2d(c, c, 3, 1, 1), nn.ReLU(), nn.Conv2d(c, c, 3, 1, 1))) for _ in range(2)]
        self.net = nn.Sequential(nn.Conv2d(3, c, 3, 1, 1), *body, nn.Conv2d(c, 4 * c, 3, 1, 1), nn.PixelShuffle(2))
        self.out = nn.Conv2d(c, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.net(x)) + F.interpolate(x, scale_factor=2, mode="nearest")


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 64 * 16), nn.BatchNorm2d(64)
        self.body = nn.Sequential(
            nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.InstanceNorm2d(16, affine=True), nn.LeakyReLU(0.2),
            nn.Conv2d(16, 64, 3, 1, 1), nn.PixelShuffle(2), nn.GroupNorm(4, 16), nn.PReLU(16), nn.Conv2d(16, 3, 3, 1, 1),
            nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(F.relu(self.norm(self.linear(z).view(-1, 64, 4, 4))))


def discriminator() -> nn.Module:
    """SNGAN: spectral normalisation on every layer."""
    sn = parametrizations.spectral_norm
    body = sn(nn.Conv2d(3, 16, 4, 2, 1)), nn.LeakyReLU(0.2), sn(nn.Conv2d(16, 32, 4, 2, 1)), nn.LeakyReLU(0.2)
    return nn.Sequential(*body, nn.Flatten(), sn(nn.Linear(32 * 64, 1)))


# ---- detectors


class C3(nn.Module):
    """A cross-stage block: the channels in halves, each step's result kept for the join."""

    def __init__(self, c: int):
        super().__init__()
        self.inp, self.out = cbr(c, c, 1, act=nn.SiLU), cbr(2 * c, c, 1, act=nn.SiLU)
        self.steps = nn.ModuleList(cbr(c // 2, c // 2, act=nn.SiLU) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.inp(x).chunk(2, 1))
        for step in self.steps:
            parts.append(step(parts[-1]))
        return self.out(torch.cat(parts, 1))


class Yolo(nn.Module):
    def __init__(self, classes: int = 4, anchors: int = 3):
        super().__init__()
        self.anchors, self.values = anchors, classes + 5
        self.high = nn.Sequential(cbr(3, 16, 3, 2, act=nn.SiLU), cbr(16, 32, 3, 2, act=nn.SiLU), C3(32))
        self.low = nn.Sequential(cbr(32, 64, 3, 2, act=nn.SiLU), C3(64))
        self.lateral, self.neck = cbr(64, 32, 1, act=nn.SiLU), C3(64)
        self.heads = nn.ModuleList(nn.Conv2d(64, anchors * self.values, 1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        high = self.high(x)
        low = self.low(high)
        joined = self.neck(torch.cat([high, F.interpolate(self.lateral(low), scale_factor=2.0, mode="nearest")], 1))
        found = []
        for head, features in zip(self.heads, (joined, low), strict=True):
            y = head(features)
            n, _, h, w = y.shape
            y = y.view(n, self.anchors, self.values, h, w).permute(0, 1, 3, 4, 2).sigmoid()
            found.append(y.reshape(n, -1, self.values))
        return torch.cat(found, 1)


class Ssd(nn.Module):
    """Boxes and scores from maps of three sizes, channels moved last and joined; a learned L2 norm on the first map."""

    def __init__(self, classes: int = 4, anchors: int = 2):
        super().__init__()
        self.classes, widths = classes, (16, 24, 32)
        self.scale = nn.Parameter(torch.full((1, 16, 1, 1), 5.0))
        self.stages = nn.ModuleList([nn.Sequential(cbr(3, 16, 3, 2), cbr(16, 16, 3, 2)), cbr(16, 24, 3, 2), cbr(24, 32, 3, 2)])
        self.boxes = nn.ModuleList(nn.Conv2d(c, anchors * 4, 3, 1, 1) for c in widths)
        self.scores = nn.ModuleList(nn.Conv2d(c, anchors * classes, 3, 1, 1) for c in widths)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        boxes, scores = [], []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            y = F.normalize(x, dim=1) * self.scale if i == 0 else x
            boxes.append(self.boxes[i](y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
            scores.append(self.scores[i](y).permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.classes))
        return {"boxes": torch.cat(boxes, 1), "scores": torch.cat(scores, 1).softmax(-1)}


class Pyramid(nn.Module):
    """RetinaNet: a feature pyramid whose levels share their heads."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(cbr(3, 16, 3, 2), basic(16, 16)), basic(16, 32, 2), basic(32, 48, 2)])
        self.laterals = nn.ModuleList(nn.Conv2d(i, c, 1) for i in (16, 32, 48))
        self.smooth = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(3))
        self.score = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, 6, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        found: list[Tensor] = []
        top: Tensor | None = None
        for features, lateral, smooth in reversed(list(zip(maps, self.laterals, self.smooth, strict=True))):
            y = lateral(features)
            top = y if top is None else y + F.interpolate(top, size=y.shape[2:], mode="nearest")
            found.append(self.score(smooth(top)).flatten(2).transpose(1, 2))
        return tuple(found)


class CapsNet(nn.Module):
    """Sabour et al. 2017: capsules routed by agreement, and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.primary = nn.Conv2d(3, 16, 5, 2), nn.Conv2d(16, 32, 5, 2)
        self.weight = nn.Parameter(0.1 * torch.randn(10, 4 * 25, 16, 8))
        self.decoder = nn.Sequential(nn.Linear(160, 32), nn.ReLU(), nn.Linear(32, 12))

    @staticmethod
    def squash(x: Tensor) -> Tensor:
        square = (x * x).sum(-1, keepdim=True)
        return square / (1 + square) * x / (square + 1e-8).sqrt()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = self.primary(F.relu(self.conv(x)))
        u = self.squash(u.view(u.shape[0], 4, 8, -1).permute(0, 1, 3, 2).reshape(u.shape[0], -1, 8))
        votes = torch.einsum("knij,bnj->bkni", self.weight, u)
        logits = torch.zeros(votes.shape[0], 10, votes.shape[2])
        for _ in range(2):
            out = self.squash((logits.softmax(1)[..., None] * votes).sum(2))
            logits = logits + (votes * out[:, :, None]).sum(-1)
        return out.norm(dim=-1), self.decoder(out.flatten(1))


# ---- vectors, sets, sequences


class ActorCritic(nn.Module):
    """A reinforcement-learning policy: one body, an action distribution and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(17, 64), nn.Tanh(), nn.Linear(64, 48), nn.Tanh())
        self.mean, self.value, self.deviation = nn.Linear(48, 6), nn.Linear(48, 1), nn.Parameter(torch.zeros(6))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.body(observation)
        mean = self.mean(x)
        return mean, self.deviation.exp().expand_as(mean), self.value(x).squeeze(-1)


class DuelingDqn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 16, 5, 2), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.ReLU(), nn.Flatten())
        self.value = nn.Sequential(nn.Linear(32 * 36, 32), nn.ReLU(), nn.Linear(32, 1))
        self.advantage = nn.Sequential(nn.Linear(32 * 36, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(1, keepdim=True)


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            cbr(1, 12, 3, 2), cbr(12, 24, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 16)
        )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(self.encoder(a), dim=1), F.normalize(self.encoder(b), dim=1)
        return (a * b).sum(1)


class Recommender(nn.Module):
    """DLRM: tables of categories and a dense vector, met by inner products."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, width) for n in (20, 30, 40))
        self.bottom = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear(width + 16, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, dense: Tensor, categories: Tensor) -> Tensor:
        x = self.bottom(dense)
        rows = torch.stack([x, *(table(categories[:, i]) for i, table in enumerate(self.tables))], 1)
        met = torch.bmm(rows, rows.transpose(1, 2)).flatten(1)
        return torch.sigmoid(self.top(torch.cat([x, met], 1)))


class TextCnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(50, 16), nn.Linear(36, 4)
        self.convs = nn.ModuleList(nn.Conv1d(16, 12, k) for k in (2, 3, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens).transpose(1, 2)
        return self.head(torch.cat([F.relu(conv(x)).amax(2) for conv in self.convs], 1))


class PointNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.local = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), nn.ReLU(), nn.Conv1d(16, 32, 1), nn.ReLU())
        self.point = nn.Sequential(nn.Conv1d(64, 24, 1), nn.BatchNorm1d(24), nn.ReLU(), nn.Conv1d(24, 4, 1))

    def forward(self, points: Tensor) -> Tensor:
        x = self.local(points)
        whole = x.max(2, keepdim=True)[0].expand(-1, -1, points.shape[2])
        return self.point(torch.cat([x, whole], 1)).transpose(1, 2)


class GraphConv(nn.Module):
    """Kipf & Welling 2017 on a dense adjacency matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, nodes: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        x = F.relu(self.first(adjacency @ nodes / degree))
        return self.head(F.relu(self.second(adjacency @ x / degree)).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], width: int, **options: object):
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(6, 16, 3, padding=1), kind(16, 24, batch_first=True, **options)
        self.head = nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 5))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(F.relu(self.conv(x)).transpose(1, 2))
        return self.head(y[:, -1])


class LanguageModel(nn.Module):
    """An LSTM whose output layer is its embedding."""

    def __init__(self, words: int = 40, width: int = 24):
        super().__init__()
        self.words, self.rnn = nn.Embedding(words, width), nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.out = nn.Linear(width, words)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.rnn(self.words(tokens))[0])


class Crnn(nn.Module):
    """Shi et al. 2015: columns of a feature map read as a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(cbr(1, 12), nn.MaxPool2d(2), cbr(12, 16), nn.MaxPool2d((2, 1)))
        self.rnn, self.head = nn.GRU(64, 20, bidirectional=True, batch_first=True), nn.Linear(40, 11)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y, _ = self.rnn(y.permute(0, 3, 1, 2).flatten(2))
        return self.head(y).log_softmax(-1)


class CausalBlock(nn.Module):
    def __init__(self, i: int, o: int, dilation: int):
        super().__init__()
        self.pad = 2 * dilation
        self.a = parametrizations.weight_norm(nn.Conv1d(i, o, 3, dilation=dilation))
        self.b = parametrizations.weight_norm(nn.Conv1d(o, o, 3, dilation=dilation))
        self.short = nn.Conv1d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(F.pad(x, (self.pad, 0))))
        return F.relu(F.relu(self.b(F.pad(y, (self.pad, 0)))) + self.short(x))


class Tcn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = (
            nn.Sequential(CausalBlock(6, 16, 1), CausalBlock(16, 16, 2), CausalBlock(16, 24, 4)),
            nn.Linear(24, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, :, -1])


class WaveNet(nn.Module):
    """Gated dilated convolutions; residual and skip outputs come from one layer."""

    def __init__(self, c: int = 16):
        super().__init__()
        self.inp = nn.Conv1d(1, c, 1)
        self.gates = nn.ModuleList(nn.Conv1d(c, 2 * c, 2, dilation=d) for d in (1, 2, 4))
        self.outs = nn.ModuleList(nn.Conv1d(c, 2 * c, 1) for _ in range(3))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(c, 24, 1), nn.ReLU(), nn.Conv1d(24, 8, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        skips = torch.zeros_like(x)
        for gate, out in zip(self.gates, self.outs, strict=True):
            a, b = gate(F.pad(x, (gate.dilation[0], 0))).chunk(2, 1)
            residual, skip = out(torch.tanh(a) * torch.sigmoid(b)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.last(skips)


class KeywordSpotter(nn.Module):
    """DS-CNN: depthwise-separable convolutions on a spectrogram."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(1, 24, (10, 4), (2, 2), (5, 1), bias=False)
        blocks = [m for _ in range(2) for m in (cbr(24, 24, 3, groups=24), cbr(24, 24, 1))]
        self.net = nn.Sequential(stem, nn.BatchNorm2d(24), nn.ReLU(), *blocks, Head(24, 12))

    def forward(self, spectrogram: Tensor) -> Tensor:
        return self.net(spectrogram[:, None])


def video() -> nn.Module:
    body = nn.Conv3d(3, 8, 3, 1, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(8, 16, 3, 1, 1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16, 5))


class RadianceField(nn.Module):
    """NeRF: a position as sines, and again in the middle of a deep MLP."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(27, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(width + 27, width), nn.ReLU())
        self.density, self.colour = nn.Linear(width, 1), nn.Linear(width, 3)

    def forward(self, position: Tensor) -> Tensor:
        waves = [f(position * 2.0**i) for i in range(4) for f in (torch.sin, torch.cos)]
        x = torch.cat([position, *waves], -1)
        y = self.second(torch.cat([self.first(x), x], -1))
        return torch.cat([self.colour(y).sigmoid(), F.softplus(self.density(y))], -1)


# ---- attention


class Encoder(nn.Module):
    def __init__(self, **options: object):
        super().__init__()
        self.inp, self.position, self.out = nn.Linear(12, 32), nn.Parameter(torch.randn(1, 10, 32)), nn.Linear(32, 5)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(self.inp(x) + self.position).mean(1))


class EncoderDecoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.words, self.out = nn.Linear(12, 32), nn.Embedding(30, 32), nn.Linear(32, 30)
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, batch_first=True)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(7))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.out(self.transformer(self.inp(source), self.words(target), tgt_mask=self.mask, tgt_is_causal=True))


class Mixer(nn.Module):
    """MLP-Mixer: one MLP over patches, one over channels."""

    def __init__(self, patches: int = 16, c: int = 24):
        super().__init__()
        self.patch, self.head, self.norm = nn.Conv2d(3, c, 8, 8), nn.Linear(c, 10), nn.LayerNorm(c)
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(4))
        self.tokens = nn.ModuleList(self.mlp(patches, 32) for _ in range(2))
        self.channels = nn.ModuleList(self.mlp(c, 48) for _ in range(2))

    @staticmethod
    def mlp(width: int, hidden: int) -> nn.Module:
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return self.head(self.norm(x).mean(1))


class PackedAttention(nn.Module):
    """One projection for queries, keys and values, as in timm's ViT and nanoGPT."""

    def __init__(self, width: int = 32, heads: int = 4):
        super().__init__()
        self.heads, self.inp, self.head = heads, nn.Linear(12, width), nn.Linear(width, 5)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(b, n, c)
        return self.head(x + self.out(y))


class Conformer(nn.Module):
    """Gulati et al. 2020: half feed-forwards around attention and a gated depthwise convolution."""

    def __init__(self, c: int = 24):
        super().__init__()
        self.inp, self.head = nn.Linear(10, c), nn.Linear(c, 8)
        self.before, self.after = (
            nn.Sequential(nn.LayerNorm(c), nn.Linear(c, 48), nn.SiLU(), nn.Linear(48, c)) for _ in range(2)
        )
        self.norm, self.attention = nn.LayerNorm(c), nn.MultiheadAttention(c, 4, batch_first=True)
        self.conv_norm, self.last = nn.LayerNorm(c), nn.LayerNorm(c)
        deep = nn.Conv1d(c, c, 5, padding=2, groups=c), nn.BatchNorm1d(c), nn.SiLU(), nn.Conv1d(c, c, 1)
        self.conv = nn.Sequential(nn.Conv1d(c, 2 * c, 1), nn.GLU(1), *deep)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        x = x + 0.5 * self.before(x)
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.conv(self.conv_norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.last(x + 0.5 * self.after(x)))


# ---- the table


def signal(channels: int = 6, length: int = 20) -> Inputs:
    return (torch.randn(2, channels, length),)


def words(count: int, length: int = 12) -> Tensor:
    return torch.randint(0, count, (2, length))


_HAND: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "lenet": (lenet, lambda: image(1, 28)),
    "vgg": (vgg, image),
    "resnet-basic": (resnet_basic, image),
    "resnet-bottleneck": (resnet_bottleneck, image),
    "resnet-preact": (resnet_preact, image),
    "resnet-groupnorm": (resnet_groupnorm, image),
    "resnext": (resnext, image),
    "densenet": (densenet, image),
    "inception": (inception, image),
    "squeezenet": (squeezenet, image),
    "mobilenet-v2": (mobilenet_v2, image),
    "mobilenet-v3": (mobilenet_v3, image),
    "ghostnet": (ghostnet, image),
    "shufflenet-v1": (shufflenet_v1, image),
    "shufflenet-v2": (shufflenet_v2, image),
    "res2net": (Res2Net, image),
    "repvgg": (repvgg, image),
    "convmixer": (convmixer, image),
    "cbam": (Cbam, image),
    "nonlocal": (NonLocal, image),
    "u-net": (UNet, image),
    "deeplab": (Aspp, image),
    "hrnet": (HighResolution, image),
    "autoencoder": (autoencoder, lambda: image(1, 28)),
    "autoencoder-tied": (TiedAutoencoder, lambda: (torch.randn(2, 36),)),
    "super-resolution": (SuperResolution, lambda: image(3, 16)),
    "gan-generator": (Generator, lambda: (torch.randn(2, 16),)),
    "gan-discriminator": (discriminator, image),
    "yolo": (Yolo, image),
    "ssd": (Ssd, image),
    "retinanet": (Pyramid, image),
    "capsnet": (CapsNet, image),
    "rl-policy": (ActorCritic, lambda: (torch.randn(2, 17),)),
    "dueling-dqn": (DuelingDqn, lambda: image(4)),
    "siamese": (Siamese, lambda: (*image(1, 16), *image(1, 16))),
    "recommender": (Recommender, lambda: (torch.randn(2, 8), words(20, 3))),
    "text-cnn": (TextCnn, lambda: (words(50),)),
    "pointnet": (PointNet, lambda: (torch.randn(2, 3, 40),)),
    "graph-conv": (GraphConv, lambda: (torch.randn(2, 9, 8), torch.rand(2, 9, 9))),
    "keyword-spotter": (KeywordSpotter, lambda: (torch.randn(2, 25, 10),)),
    "video-cnn": (video, lambda: (torch.randn(2, 3, 4, 16, 16),)),
    "radiance-field": (RadianceField, lambda: (torch.randn(2, 3),)),
    "lstm": (lambda: Recurrent(nn.LSTM, 24, num_layers=2, dropout=0.1), signal),
    "lstm-bidirectional": (lambda: Recurrent(nn.LSTM, 48, num_layers=2, bidirectional=True), signal),
    "lstm-projected": (lambda: Recurrent(nn.LSTM, 12, proj_size=12), signal),
    "lstm-language-model": (LanguageModel, lambda: (words(40),)),
    "gru": (lambda: Recurrent(nn.GRU, 24, num_layers=2), signal),
    "gru-bidirectional": (lambda: Recurrent(nn.GRU, 48, num_layers=2, bidirectional=True), signal),
    "crnn": (Crnn, lambda: (torch.randn(2, 1, 16, 32),)),
    "tcn": (Tcn, signal),
    "wavenet": (WaveNet, lambda: signal(1, 32)),
    "transformer-encoder": (lambda: Encoder(activation="gelu"), lambda: (torch.randn(2, 10, 12),)),
    "transformer-encoder-prenorm": (lambda: Encoder(norm_first=True), lambda: (torch.randn(2, 10, 12),)),
    "transformer-decoder": (EncoderDecoder, lambda: (torch.randn(2, 10, 12), words(30, 7))),
    "attention-packed": (PackedAttention, lambda: (torch.randn(2, 10, 12),)),
    "conformer": (Conformer, lambda: (torch.randn(2, 20, 10),)),
    "mlp-mixer": (Mixer, image),
}


def built(make: Callable[[], nn.Module], inputs: Callable[[], Inputs]) -> Built:
    torch.manual_seed(0)
    model, example = make(), inputs()
    return as_trained(model, example), example


def as_trained(model: nn.Module, example: Inputs) -> nn.Module:
    """Evaluation mode, an output that follows the input, normalisations off their neutral values.

    Fresh weights often let the signal die out on the way; such a network's output would be right whatever was done to it.
    """
    for module in model.eval().modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.dim() > 1 and not isinstance(module, nn.Embedding):
            _amplify(weight)
        if "Norm" in type(module).__name__:
            for name, parameter in module.named_parameters(recurse=False):
                nn.init.uniform_(parameter, 0.5, 1.5) if name == "weight" else nn.init.normal_(parameter, std=0.3)
    _measure(model, resized(example, 32))
    return model


@torch.no_grad()
def _amplify(weight: Tensor) -> None:
    """Scale up to the size that keeps the variance of what passes, in place."""
    weight *= max(1.0, weight[0].numel() ** -0.5 / max(float(weight.square().mean()) ** 0.5, 1e-12))


@torch.no_grad()
def _measure(model: nn.Module, inputs: Inputs) -> None:
    """Give batch normalisations nearly the statistics of these inputs, in place."""
    norms = [m for m in model.modules() if isinstance(getattr(m, "running_mean", None), Tensor) and hasattr(m, "momentum")]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    model(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        norm.running_mean += 0.3 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2.0)
        norm.running_var += 0.01


def resized(inputs: Inputs, n: int) -> Inputs:
    """Other inputs of the same kind, ``[n, ...]``: noise, or the example's integers shuffled."""
    draw = torch.Generator().manual_seed(n)
    return tuple(
        torch.randn((n, *x.shape[1:]), generator=draw).to(x.dtype)
        if x.is_floating_point()
        else x.flatten()[torch.randint(x.numel(), (n, *x.shape[1:]), generator=draw)]
        for x in inputs
    )


ZOO: dict[str, Callable[[], Built]] = {
    name: functools.partial(built, make, inputs)
    for name, (make, inputs) in {**_HAND, **zoo_more.TABLE, **zoo_transformers.TABLE}.items()
}
