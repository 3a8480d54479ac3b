"""Tiny networks, one for each construction that pruning has to see through; weights and statistics are random, not neutral."""

import torch
import torch.nn.functional as F
from torch import nn


def cbr(i, o, k=3, stride=1, groups=1, act=nn.ReLU):
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o), act())


class Head(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.linear = nn.Linear(channels, 5)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def vgg():
    return nn.Sequential(
        cbr(3, 8), nn.MaxPool2d(2), cbr(8, 16), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(256, 24), nn.ReLU(), nn.Dropout(), nn.Linear(24, 5),
    )  # fmt: skip


class Basic(nn.Module):
    """He et al.'s basic block; option A: the shortcut is sliced and padded with zero channels, B: a convolution."""

    def __init__(self, i, o, stride, option):
        super().__init__()
        self.a, self.b = cbr(i, o, 3, stride), nn.Sequential(nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o))
        self.pad = (o - i) // 2
        self.down = nn.Conv2d(i, o, 1, stride) if option == "B" and i != o else None

    def forward(self, x):
        y = self.b(self.a(x))
        if self.down is not None:
            x = self.down(x)
        elif self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(x + y)


def resnet(option):
    return nn.Sequential(cbr(3, 8), Basic(8, 8, 1, option), Basic(8, 16, 2, option), Basic(16, 24, 2, option), Head(24))


class Bottleneck(nn.Module):
    def __init__(self, i, m, stride=1, groups=1):
        super().__init__()
        o = 4 * m
        self.body = nn.Sequential(cbr(i, m, 1), cbr(m, m, 3, stride, groups), nn.Conv2d(m, o, 1, bias=False), nn.BatchNorm2d(o))
        self.down = nn.Conv2d(i, o, 1, stride) if stride > 1 or i != o else nn.Identity()

    def forward(self, x):
        return F.relu(self.body(x) + self.down(x))


def bottleneck():
    return nn.Sequential(cbr(3, 8), Bottleneck(8, 8), Bottleneck(32, 8, 2), Head(32))


def resnext():
    return nn.Sequential(cbr(3, 16), Bottleneck(16, 16, 1, 4), Bottleneck(64, 16, 2, 4), Head(64))


class DenseLayer(nn.Module):
    def __init__(self, i, growth):
        super().__init__()
        self.body = nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), cbr(i, 16, 1), nn.Conv2d(16, growth, 3, padding=1, bias=False))

    def forward(self, x):
        return torch.cat([x, self.body(x)], 1)


def densenet():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), DenseLayer(8, 4), DenseLayer(12, 4), cbr(16, 8, 1), nn.AvgPool2d(2),
        DenseLayer(8, 4), nn.BatchNorm2d(12), nn.ReLU(), Head(12),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.silu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Inverted(nn.Module):
    def __init__(self, i, o, stride, squeeze=False):
        super().__init__()
        h = 4 * i
        self.skip = stride == 1 and i == o
        self.body = nn.Sequential(
            cbr(i, h, 1, act=nn.ReLU6), cbr(h, h, 3, stride, h, act=nn.ReLU6), SqueezeExcite(h) if squeeze else nn.Identity(),
            nn.Conv2d(h, o, 1, bias=False), nn.BatchNorm2d(o),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x) if self.skip else self.body(x)


def mobilenet(squeeze=False):
    return nn.Sequential(cbr(3, 8), Inverted(8, 8, 1, squeeze), Inverted(8, 12, 2, squeeze), cbr(12, 16, 1), Head(16))


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.d1, self.d2, self.mid = cbr(3, 8), cbr(8, 12), cbr(12, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.u2, self.u1, self.out = cbr(24, 12), cbr(20, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        a = self.d1(x)
        b = self.d2(F.max_pool2d(a, 2))
        y = self.u2(torch.cat([b, self.up(self.mid(F.max_pool2d(b, 2)))], 1))
        return self.out(self.u1(torch.cat([a, F.interpolate(y, scale_factor=2, mode="bilinear")], 1)))


class InceptionBlock(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.a, self.b = cbr(i, 8, 1), nn.Sequential(cbr(i, 8, 1), cbr(8, 12))
        self.c, self.d = nn.Sequential(cbr(i, 4, 1), cbr(4, 8, 5)), nn.Sequential(nn.MaxPool2d(3, 1, 1), cbr(i, 8, 1))

    def forward(self, x):
        return torch.cat([self.a(x), self.b(x), self.c(x), self.d(x)], 1)


def inception():
    return nn.Sequential(cbr(3, 8, 3, 2), InceptionBlock(8), InceptionBlock(36), Head(36))


class ShuffleUnit(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = c // 2
        self.body = nn.Sequential(cbr(h, h, 1), nn.Conv2d(h, h, 3, 1, 1, groups=h), nn.BatchNorm2d(h), cbr(h, h, 1))

    def forward(self, x):
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.body(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def shufflenet():
    return nn.Sequential(cbr(3, 16, 3, 2), ShuffleUnit(16), ShuffleUnit(16), cbr(16, 16, 1), Head(16))


class Generator(nn.Module):
    """Reshape from a vector, grouped and depthwise transposed convolutions, pixel shuffle, group and instance norm."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 16 * 4)
        self.body = nn.Sequential(
            nn.ConvTranspose2d(16, 24, 4, 2, 1, groups=2), nn.ReLU(),
            nn.ConvTranspose2d(24, 24, 2, 2, groups=24), nn.InstanceNorm2d(24, affine=True), nn.PReLU(24),
            nn.Conv2d(24, 48, 3, 1, 1, groups=24), nn.GroupNorm(4, 48), nn.SiLU(), nn.Conv2d(48, 32, 1), nn.PixelShuffle(2),
            nn.GroupNorm(8, 8), nn.Conv2d(8, 3, 1), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z):
        return self.body(F.relu(self.linear(z).view(-1, 16, 2, 2)))


class Constants(nn.Module):
    """Sizes that stand in the graph as numbers: expand, repeat, zeros, split, narrow, unflatten, negative slices, squeeze."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = cbr(3, 12), nn.Conv2d(12, 24, 1), nn.Conv2d(24, 16, 1)
        self.scale = nn.Parameter(torch.randn(1, 12, 1, 1))
        self.shift = nn.Parameter(torch.randn(1, 1, 1, 1))
        self.one, self.two = nn.Linear(10, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.a(x) * self.scale + self.shift.expand(1, 12, 1, 1) + self.shift.repeat(1, 12, 1, 1)
        x = F.glu(torch.relu(self.b(x)), 1) + torch.zeros(x.shape[0], 12, x.shape[2], x.shape[3])
        p, q, r = torch.cat([x, torch.ones_like(x)], 1).split([10, 6, 8], 1)
        y = self.c(torch.cat([q, p, r], 1))
        y = torch.cat([y[:, :4], y[:, -2:], y.narrow(1, 6, 4)], 1)
        y = F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1)
        return self.two(self.one(y).unflatten(1, (6, 1)).flatten(1).relu())


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.conv = nn.Conv1d(6, 12, 3, padding=1)
        self.rnn = getattr(nn, kind)(12, 10, 2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(20, 5)

    def forward(self, x):
        y, _ = self.rnn(F.relu(self.conv(x)).transpose(1, 2))
        return self.head(y[:, -1])


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inp = nn.Linear(6, 16)
        self.position = nn.Parameter(torch.randn(1, 10, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.encoder(self.inp(x) + self.position).mean(1))


class ChannelAttention(nn.Module):
    """A statistic over channels, which changes its meaning when channels go; an einsum; a layer norm."""

    def __init__(self):
        super().__init__()
        self.stem, self.mix = cbr(3, 12), nn.Parameter(torch.randn(8, 12))
        self.norm, self.head = nn.LayerNorm(8), Head(8)

    def forward(self, x):
        x = self.stem(x)
        x = x * torch.sigmoid(x.mean(1, keepdim=True) + x.amax(1, keepdim=True)) * torch.softmax(x, 1)
        x = torch.einsum("oc,nchw->nohw", self.mix, x)
        return self.head(self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Packed(nn.Module):
    """Queries, keys and values from one matrix, relative position biases, shifted windows."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv, self.out = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 48), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.randn(4, 31))
        self.register_buffer("places", torch.arange(16)[:, None] - torch.arange(16) + 15)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x):
        x = self.patch(x).permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = self.norm(x).roll((-2, -2), (1, 2)).view(n, 2, 4, 2, 4, c).transpose(2, 3).reshape(-1, 16, c)
        q, k, v = self.qkv(y).reshape(-1, 16, 3, 4, 4).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / 2 + self.bias[:, self.places]).softmax(-1)
        y = self.out((weights @ v).transpose(1, 2).flatten(2)).view(n, 2, 2, 4, 4, c).transpose(2, 3).reshape(n, h, w, c)
        return self.head((x + y.roll((2, 2), (1, 2))).mean((1, 2)))


class Rotary(nn.Module):
    """A decoder's layer: rotated queries and keys, grouped heads, a gated feed-forward, root mean square norms."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm = nn.Linear(6, 16), nn.RMSNorm(16)
        self.q, self.k, self.v, self.o = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 48), nn.Linear(24, 16), nn.Linear(16, 5)

    def rotated(self, x):
        angles = torch.outer(torch.arange(x.shape[2]), 0.1 ** torch.arange(2))
        cos, sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    def forward(self, x):
        x = self.inp(x)
        n, t, c = x.shape
        y = self.norm(x)
        q, k, v = (f(y).view(n, t, -1, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k, v = self.rotated(q), self.rotated(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(n, t, c))
        gate, up = self.up(x).split(24, -1)
        return self.head((x + self.down(F.silu(gate) * up)).mean(1))


class Experts(nn.Module):
    """A soft mixture of experts in einsums with and without '...', pairs of features in a bilinear layer, a dict of results."""

    def __init__(self):
        super().__init__()
        self.inp, self.gate = nn.Linear(6, 16), nn.Linear(16, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 16, 12) / 4), nn.Parameter(torch.randn(4, 12, 16) / 4)
        self.pairs, self.head = nn.Bilinear(16, 10, 8), nn.Linear(8, 5)
        self.side = nn.Linear(6, 10)

    def forward(self, x):
        y, gates = self.inp(x), self.gate(self.inp(x)).softmax(-1)
        hidden = torch.einsum("...c,ech->...eh", y, self.up).relu()
        y = y + torch.einsum("bneh,ehc->bnec", hidden, self.down).mul(gates[..., None]).sum(2)
        return {"pairs": self.head(self.pairs(y, self.side(x)).relu().mean(1)), "gates": gates}


class Cells(nn.Module):
    """Recurrent cells step by step, and a projected LSTM behind them."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 8), nn.GRUCell(8, 10), nn.RNNCell(10, 8)
        self.projected, self.head = nn.LSTM(8, 12, batch_first=True, proj_size=6), nn.Linear(6, 5)

    def forward(self, x):
        h = c = x.new_zeros(x.shape[0], 8)
        g, r, steps = x.new_zeros(x.shape[0], 10), x.new_zeros(x.shape[0], 8), []
        for t in range(3):
            h, c = self.lstm(x[:, t], (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
            steps.append(r)
        return self.head(self.projected(torch.stack(steps, 1))[0][:, -1])


class Places(nn.Module):
    """Positions that are chosen, sampled, scattered, transformed or folded while channels pass."""

    def __init__(self):
        super().__init__()
        self.stem, self.offsets, self.mid = cbr(3, 8), nn.Conv2d(8, 2, 3, padding=1), cbr(8, 12, 3, 2)
        self.patches, self.fold = nn.Linear(48, 40), cbr(10, 8)
        self.spectrum = nn.Parameter(torch.randn(8, 8, 5, 2))
        self.score, self.one, self.two = nn.Linear(8, 1), nn.Linear(8, 12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x)
        n = x.shape[0]
        line = torch.linspace(-1, 1, 16)
        grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1) + 0.1 * self.offsets(x).tanh().permute(0, 2, 3, 1)
        x = self.mid(F.grid_sample(x, grid, align_corners=True))
        columns = F.unfold(x, 2, stride=2).transpose(1, 2)
        x = self.fold(F.fold(self.patches(columns).transpose(1, 2), (8, 8), 2, stride=2))
        x = x + torch.fft.irfft2(torch.fft.rfft2(x) * torch.view_as_complex(self.spectrum), s=(8, 8))
        x = x.flatten(2).transpose(1, 2)
        best = self.score(x).topk(6, 1)[1].expand(-1, -1, 8)
        y = torch.zeros(n, 3, 8).scatter_add(1, best % 3, x.gather(1, best))
        return self.two(self.one(y).relu().sum(1))


class OwnKernels(nn.Module):
    """Convolutions whose weights are computed: standardised, mixed for each example, frozen under ``no_grad``."""

    def __init__(self):
        super().__init__()
        self.stem, self.plain, self.gate = cbr(3, 8), nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 4)
        self.kernels = nn.Parameter(torch.randn(4, 10, 12, 3, 3) / 10)
        self.norm, self.head = nn.GroupNorm(5, 10), Head(10)

    def forward(self, x):
        with torch.no_grad():
            x = self.stem(x)
        w = self.plain.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        x = F.conv2d(x, w, self.plain.bias, padding=1).relu()
        n, c, h, w = x.shape
        mixed = torch.einsum("nk,koihw->noihw", self.gate(x.mean((2, 3))).softmax(-1), self.kernels)
        x = F.conv2d(x.reshape(1, n * c, h, w), mixed.reshape(n * 10, c, 3, 3), padding=1, groups=n).view(n, 10, h, w)
        return self.head(self.norm(x).relu())


def image(n):
    return (torch.randn(n, 3, 16, 16),)


def sequence(n):
    return (torch.randn(n, 6, 10),)


def steps(n):
    return (torch.randn(n, 10, 6),)


CNNS = {
    "vgg": vgg,
    "resnet-A": lambda: resnet("A"),
    "resnet-B": lambda: resnet("B"),
    "bottleneck": bottleneck,
    "resnext": resnext,
    "densenet": densenet,
    "mobilenet": mobilenet,
    "squeeze-excite": lambda: mobilenet(squeeze=True),
    "unet": UNet,
    "inception": inception,
    "shufflenet": shufflenet,
    "constants": Constants,
    "channel-attention": ChannelAttention,
}
OTHERS = {
    "generator": (Generator, lambda n: (torch.randn(n, 6),)),
    "lstm": (lambda: Recurrent("LSTM"), sequence),
    "gru": (lambda: Recurrent("GRU"), sequence),
    "transformer": (Transformer, steps),
    "packed": (Packed, image),
    "rotary": (Rotary, steps),
    "experts": (Experts, steps),
    "cells": (Cells, steps),
    "places": (Places, image),
    "own-kernels": (OwnKernels, image),
}
ZOO = {**{name: (make, image) for name, make in CNNS.items()}, **OTHERS}


def build(name, seed=0):
    """(module in evaluation mode, function of the batch size that gives inputs)."""
    make, inputs = ZOO[name]
    torch.manual_seed(seed)
    return trained(make()), inputs


def trained(model):
    """As if trained: statistics, scales and shifts of normalisations off their neutral values."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm | nn.InstanceNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model.eval()
