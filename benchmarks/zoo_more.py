"""More tiny networks, written the way that papers' code writes them: maxima taken as `x.max(1)[0]`, parts chosen by tables,
products of two activations, loops over time."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]


def cbs(i: int, o: int, k: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Classifier(nn.Sequential):
    """Some layers, a global average, a linear layer."""

    def __init__(self, channels: int, *layers: nn.Module):
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


class PixelGate(nn.Module):
    """Misra et al. 2021: pixels weighed by the largest and the mean channel, the maximum with its unused index."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 1, 7, padding=3, bias=False), nn.BatchNorm2d(1))

    def forward(self, x: Tensor) -> Tensor:
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.conv(pooled))


def triplet_attention() -> nn.Module:
    return Classifier(24, cbs(3, 16), PixelGate(), cbs(16, 24, 3, 2), PixelGate())


class Selection(nn.Module):
    """Liu et al. 2017: the channels that slimming left, chosen by a table before the first convolution of a block."""

    def __init__(self, c: int, table: list[int]):
        super().__init__()
        self.register_buffer("table", torch.tensor(table))
        self.norm, self.conv = nn.BatchNorm2d(c), nn.Conv2d(len(table), c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(self.norm(x)[:, self.table].relu())


def channel_selection() -> nn.Module:
    return Classifier(16, cbs(3, 16), Selection(16, [0, 2, 3, 7, 8, 9, 12, 15]), Selection(16, [15, *range(11)]))


class Interleaved(nn.Module):
    """Zhang et al. 2017: even and odd channels through convolutions of their own, rolled by a quarter between."""

    def __init__(self, c: int):
        super().__init__()
        self.even, self.odd, self.out = cbs(c // 2, c // 2), cbs(c // 2, c // 2), nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack((self.even(x[:, ::2]), self.odd(x[:, 1::2])), 2).flatten(1, 2)
        return x + self.out(y.roll(y.shape[1] // 4, 1))


def interleaved() -> nn.Module:
    return Classifier(24, cbs(3, 16), Interleaved(16), cbs(16, 24, 3, 2), Interleaved(24))


class SplitAttention(nn.Module):
    """Zhang et al. 2020 (ResNeSt): parts of a grouped convolution weighed by a softmax between them."""

    def __init__(self, i: int, o: int, radix: int = 2, cardinality: int = 2):
        super().__init__()
        self.radix, self.cardinality = radix, cardinality
        self.conv = nn.Conv2d(i, o * radix, 3, padding=1, groups=radix * cardinality, bias=False)
        self.norm, self.one = nn.BatchNorm2d(o * radix), nn.Conv2d(o, 16, 1, groups=cardinality)
        self.two = nn.Conv2d(16, o * radix, 1, groups=cardinality)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        n, width = x.shape[:2]
        parts = torch.split(x, width // self.radix, dim=1)
        weights = self.two(self.one(sum(parts, torch.zeros(())).mean((2, 3), keepdim=True)).relu())
        weights = weights.view(n, self.cardinality, self.radix, -1).transpose(1, 2).softmax(1).reshape(n, -1, 1, 1)
        weighed = [w * part for w, part in zip(torch.split(weights, width // self.radix, dim=1), parts, strict=True)]
        return torch.stack(weighed).sum(0)


def resnest() -> nn.Module:
    return Classifier(24, cbs(3, 16, 3, 2), SplitAttention(16, 16), cbs(16, 24))


class Involution(nn.Module):
    """Li et al. 2021: kernels computed for each pixel, one for each group of channels."""

    def __init__(self, c: int, groups: int = 4):
        super().__init__()
        self.groups = groups
        self.reduce, self.span = cbs(c, c // 2, 1), nn.Conv2d(c // 2, 9 * groups, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        kernels = self.span(self.reduce(x)).view(n, self.groups, 1, 9, h, w)
        windows = F.unfold(x, 3, padding=1).view(n, self.groups, c // self.groups, 9, h, w)
        return (kernels * windows).sum(3).view(n, c, h, w)


def involution() -> nn.Module:
    return Classifier(32, cbs(3, 16), Involution(16), cbs(16, 32, 3, 2), Involution(32))


class EdgeConv(nn.Module):
    """Wang et al. 2019 (DGCNN): each point beside its nearest neighbours in feature space, the largest of them kept."""

    def __init__(self, i: int, o: int, neighbours: int = 4):
        super().__init__()
        self.neighbours = neighbours
        self.conv = nn.Sequential(nn.Conv2d(2 * i, o, 1, bias=False), nn.BatchNorm2d(o), nn.LeakyReLU(0.2))

    def forward(self, x: Tensor) -> Tensor:
        n, c, points = x.shape
        nearest = torch.cdist(x.mT, x.mT).topk(self.neighbours, largest=False)[1]
        nearest = (nearest + points * torch.arange(n).view(-1, 1, 1)).view(-1)
        found = x.mT.reshape(n * points, c)[nearest].view(n, points, self.neighbours, c)
        centre = x.mT.unsqueeze(2).repeat(1, 1, self.neighbours, 1)
        return self.conv(torch.cat((found - centre, centre), 3).permute(0, 3, 1, 2)).max(dim=-1, keepdim=False)[0]


class PointCloud(nn.Module):
    """Two edge convolutions and the largest feature over all points."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = EdgeConv(3, 16), EdgeConv(16, 24), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        one = self.one(x)
        return self.head(torch.hstack((one, self.two(one))).max(2)[0])


class SelectiveScan(nn.Module):
    """Gu and Dao 2023 (Mamba), step by step: a state space whose matrices depend on the input."""

    def __init__(self, d: int = 12, states: int = 4):
        super().__init__()
        self.states, self.norm, self.into = states, nn.RMSNorm(d), nn.Linear(d, 4 * d, bias=False)
        self.conv = nn.Conv1d(2 * d, 2 * d, 3, padding=2, groups=2 * d)
        self.select, self.step = nn.Linear(2 * d, 4 + 2 * states, bias=False), nn.Linear(4, 2 * d)
        self.decay = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(2 * d, 1))
        self.skip, self.out = nn.Parameter(torch.ones(2 * d)), nn.Linear(2 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y, gate = self.into(self.norm(x)).chunk(2, -1)
        y = F.silu(self.conv(y.mT)[:, :, : x.shape[1]].mT)
        step, b, c = self.select(y).split([4, self.states, self.states], -1)
        step = F.softplus(self.step(step)).unsqueeze(-1)
        keep, add = torch.exp(-step * self.decay.exp()), step * b.unsqueeze(2) * y.unsqueeze(-1)
        state, steps = torch.zeros_like(add[:, 0]), []
        for t in range(x.shape[1]):
            state = keep[:, t] * state + add[:, t]
            steps.append((state @ c[:, t].unsqueeze(-1)).squeeze(-1))
        return x + self.out((torch.stack(steps, 1) + self.skip * y) * F.silu(gate))


def state_space() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 12), SelectiveScan(), SelectiveScan(), nn.Linear(12, 4))


class Spline(nn.Module):
    """Liu et al. 2024 (KAN): a learned spline for each pair of features, of degree two."""

    def __init__(self, i: int, o: int, cells: int = 5):
        super().__init__()
        grid = (torch.arange(-2, cells + 3) * 2 / cells - 1).repeat(i, 1)
        self.register_buffer("grid", grid)
        self.base, self.splines = nn.Parameter(torch.randn(o, i) * 0.3), nn.Parameter(torch.randn(o, i, cells + 2) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        grid, y = self.grid, x.unsqueeze(-1)
        basis = ((y >= grid[:, :-1]) & (y < grid[:, 1:])).to(x.dtype)
        for k in (1, 2):
            left = (y - grid[:, : -k - 1]) / (grid[:, k:-1] - grid[:, : -k - 1]) * basis[:, :, :-1]
            basis = left + (grid[:, k + 1 :] - y) / (grid[:, k + 1 :] - grid[:, 1:-k]) * basis[:, :, 1:]
        return F.linear(F.silu(x), self.base) + F.linear(basis.flatten(1), self.splines.flatten(1))


def kan() -> nn.Module:
    return nn.Sequential(Spline(6, 12), Spline(12, 10), Spline(10, 3))


def _image() -> Inputs:
    return (torch.randn(2, 3, 16, 16),)


TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "triplet-attention": (triplet_attention, _image),
    "channel-selection": (channel_selection, _image),
    "interleaved": (interleaved, _image),
    "resnest": (resnest, _image),
    "involution": (involution, _image),
    "dgcnn": (PointCloud, lambda: (torch.randn(2, 3, 20),)),
    "state-space": (state_space, lambda: (torch.randn(2, 8, 10),)),
    "kan": (kan, lambda: (torch.randn(2, 6),)),
}
