import numpy as np
import pytest
import torch
from nets import build
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.pruning.analysis import analyse
from edgepress.compress.pruning.cost import FileBytes, Latency, Macs, Parameters, PeakActivation
from edgepress.compress.pruning.groups import channels_of
from edgepress.compress.pruning.layers import Steps
from edgepress.compress.pruning.rewrite import remove
from edgepress.compress.shorten import branches, without


class Mixed(nn.Module):
    """A residual branch, a depthwise convolution, a concatenation, a grouped convolution and a product."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        self.depth = nn.Sequential(nn.Conv2d(24, 24, 3, 2, 1, groups=24), nn.BatchNorm2d(24), nn.ReLU())
        self.outer = nn.Conv2d(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(40, 16, 1, groups=4)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = torch.relu(x + self.outer(x))
        y = torch.cat([self.depth(self.inner(x)), self.pool(x)], 1)
        return self.head(self.grouped(y).mean((2, 3)))


class Bytes:
    """A clock that takes a second for every value read or written, and remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def seconds(self, layers):
        self.asked.extend(layers)
        return np.array([sum(np.prod(s) for s in (*x.inputs, x.output)) for x in layers], float)


@pytest.fixture(scope="module")
def mixed():
    torch.manual_seed(0)
    network = trace(Mixed().eval(), torch.zeros(1, 3, 8, 8))
    return network, channels_of(analyse(network))


def full(channels):
    return np.array([float(len(g.channels)) for g in channels.groups])


def costs(channels):
    return [
        Macs(channels),
        Parameters(channels),
        FileBytes(channels, 1),
        PeakActivation(channels, 1),
        Latency(channels, Bytes()),
    ]


def test_costs_follow_the_network_as_channels_go(mixed):
    network, channels = mixed
    generator = np.random.default_rng(0)
    for _ in range(3):
        left = [int(generator.integers(1, len(g.channels) + 1)) for g in channels.groups]
        smaller = remove(
            network, channels.analysis, np.concatenate([g.channels[n:] for g, n in zip(channels.groups, left, strict=True)])
        )
        again = channels_of(analyse(smaller))
        counts = np.array(left, float)
        assert Macs(channels).total(counts) == smaller.macs()
        assert Parameters(channels).total(counts) == smaller.parameter_count
        for before, after in zip(costs(channels), costs(again), strict=True):
            assert before.total(counts) == pytest.approx(after.total(full(again)))
        assert Steps.of(channels).at(counts) == Steps.of(again).at(full(again))


def test_after_is_the_total_with_one_group_smaller(mixed):
    _, channels = mixed
    counts, steps = full(channels), np.array([float(g.step(8)) for g in channels.groups])
    steps[0] = 0
    for cost in costs(channels):
        expected = [float(cost.total(counts - steps[g] * np.eye(len(steps))[g])) for g in range(len(steps))]
        assert cost.after(counts, steps) == pytest.approx(expected)
        assert cost.total(counts[:, None] - np.diag(steps)) == pytest.approx(expected)
        assert cost.after(counts, steps)[1:].min() < cost.total(counts)


def test_costs_of_a_branch_left_out_are_those_of_the_shorter_network(mixed):
    network, channels = mixed
    (branch,) = [b for b in branches(network) if "outer.weight" in b.parameters]
    shorter = channels_of(analyse(without(network, branch)))
    for here, there in zip(costs(channels), costs(shorter), strict=True):
        total = here.total(full(channels), branch.nodes)
        assert total == pytest.approx(there.total(full(shorter)))
        assert total < here.total(full(channels))
        if not isinstance(here, PeakActivation):
            assert total == pytest.approx(sum(here.parts(full(channels), branch.nodes).values()))


def test_steps_fuse_what_runtimes_fuse(mixed):
    _, channels = mixed
    found = [(x.operator, x.output, x.activation) for x in Steps.of(channels).at(full(channels))]
    assert found == [
        ("input", (3, 8, 8), ""),
        ("conv", (16, 8, 8), "relu"),
        ("conv", (16, 8, 8), ""),
        ("add", (16, 8, 8), "relu"),
        ("conv", (24, 8, 8), "relu6"),
        ("depthwise", (24, 4, 4), "relu"),
        ("max_pool", (16, 4, 4), ""),
        ("cat", (40, 4, 4), ""),
        ("conv", (16, 4, 4), ""),
        ("mean", (16,), ""),
        ("linear", (5,), ""),
    ]


def test_an_activation_that_something_else_reads_the_input_of_is_not_fused():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            x = self.conv(x)
            return x.relu() * x

    channels = channels_of(analyse(trace(Both(), torch.zeros(1, 3, 4, 4))))
    assert [x.operator for x in Steps.of(channels).at(full(channels))] == ["input", "conv", "relu", "mul"]


def test_file_bytes_count_what_a_folded_file_holds(mixed):
    _, channels = mixed
    weights = 16 * 3 * 9 + 24 * 16 + 24 * 9 + 16 * 16 * 9 + 16 * 10 + 5 * 16
    vectors = 16 + 24 + 24 + 16 + 16 + 5  # biases; of a normalisation only where the layer before it had none
    assert FileBytes(channels, 1).total(full(channels)) == weights + 4 * vectors
    assert FileBytes(channels, 4).total(full(channels)) == 4 * weights + 4 * vectors


def test_peak_activation_is_the_widest_moment(mixed):
    _, channels = mixed
    # the addition: both operands and the result; without it the depthwise step, while the pooling still wants the stem's
    assert PeakActivation(channels, 1).total(full(channels)) == 64 * 3 * 16
    assert PeakActivation(channels, 4).total(full(channels)) == 4 * 64 * 3 * 16
    added = next(s.node for s in Steps.of(channels).steps if s.layer.operator == "add")
    branch = next(n for s in Steps.of(channels).steps if added in s.nodes for n in s.operands[1:])
    assert PeakActivation(channels, 1).total(full(channels), [branch]) == 64 * (16 + 24) + 16 * 24


def test_a_clock_is_asked_once_for_each_shape_of_a_step(mixed):
    _, channels = mixed
    clock = Bytes()
    latency = Latency(channels, clock)
    counts, steps = full(channels), np.array([float(g.step(8)) for g in channels.groups])
    latency.total(counts)
    latency.after(counts, steps)
    asked = len(clock.asked)
    latency.after(counts, steps)
    latency.parts(counts, ["outer"])
    assert len(clock.asked) == asked
    assert asked > len(Steps.of(channels).steps)


def test_heads_and_sequences_have_shapes_without_the_batch():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)

        def forward(self, x):
            q, k, v = self.qkv(x).view(x.shape[0], 5, 3, 4, 3).permute(2, 0, 3, 1, 4).reshape(3, -1, 5, 3).unbind(0)
            y = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)
            return self.out(y.view(-1, 4, 5, 3).transpose(1, 2).reshape(-1, 5, 12))

    channels = channels_of(analyse(trace(Attention(), torch.zeros(1, 5, 12))))
    found = {x.operator: x for x in Steps.of(channels).at(full(channels))}
    assert found["linear"].inputs == ((5, 12),)
    assert found["linear"].output == (5, 12)
    assert found["softmax"].output == (4, 5, 5)


@pytest.mark.parametrize("name", ["own-kernels", "lstm", "transformer", "shufflenet", "experts"])
def test_every_cost_is_known_for_networks_of_all_kinds(name):
    model, inputs = build(name)
    network = trace(model, inputs(2))
    channels = channels_of(analyse(network))
    counts = full(channels)
    for cost in costs(channels):
        total = cost.total(counts)
        assert 0 < total < np.inf
        assert (cost.after(counts, np.minimum(counts - 1, 1)) <= total * (1 + 1e-9)).all()
    assert Parameters(channels).total(counts) == network.parameter_count
    for layer in Steps.of(channels).at(counts):
        assert all(n > 0 for shape in (*layer.inputs, layer.output) for n in shape), layer
