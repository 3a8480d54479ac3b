"""What is removed is removed exactly: pruned networks against the masked originals, on a zoo and on random networks."""

import random
from functools import cache

import nets
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_leaves

from edgepress.compress.network import trace
from edgepress.compress.pruning import analyse, channels_of, masked, relative_error, remove
from edgepress.compress.pruning.analysis import NO_RULE, RULE_FAILED
from edgepress.compress.pruning.inspection import frozen_by

TOLERANCE = 1e-5
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")  # torch says that it takes its slower way


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def analysed(name):
    model, inputs = nets.build(name)
    network = trace(model, inputs(2)).eval()
    analysis = analyse(network)
    return network, analysis, channels_of(analysis), inputs


def some(channels, seed, part=None):
    """A random part of each group's channels, never all of one."""
    draw = random.Random(seed)
    gone = []
    for group in channels.groups:
        n = len(group.channels)
        count = round((draw.random() if part is None else part) * n)
        gone += draw.sample(group.channels.tolist(), min(count, n - 1))
    return gone


@cache
def pruned(name, seed):
    network, analysis, channels, _ = analysed(name)
    gone = some(channels, seed, 0.5 if seed == 0 else None)
    return remove(network, analysis, gone), gone


def error(network, oracle, inputs):
    with torch.no_grad():
        return relative_error(network(*inputs), oracle(*inputs))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", nets.ZOO)
def test_pruned_network_must_compute_what_the_masked_original_computes(name, seed):
    network, analysis, _, inputs = analysed(name)
    smaller, gone = pruned(name, seed)
    assert smaller.parameter_count < network.parameter_count
    assert list(smaller.state_dict()) == list(network.state_dict())
    for batch in (1, 2, 5):
        assert error(smaller, masked(analysis, gone), inputs(batch)) < TOLERANCE


@pytest.mark.parametrize("name", nets.ZOO)
def test_oracle_must_reject_another_removal_set(name):
    _, analysis, channels, inputs = analysed(name)
    smaller, gone = pruned(name, 0)
    other = some(channels, 2, 0.5)
    assert set(gone) != set(other)
    assert error(smaller, masked(analysis, other), inputs(2)) > 1e-3
    assert error(smaller, masked(analysis, []), inputs(2)) > 1e-3


@pytest.mark.parametrize("name", nets.ZOO)
def test_pruned_network_must_train(name):
    inputs = analysed(name)[3]
    smaller = pruned(name, 0)[0].copy().train()
    before = {k: p.detach().clone() for k, p in smaller.module.named_parameters()}
    optimizer = torch.optim.SGD(smaller.parameters(), lr=0.01)
    sum(y.square().mean() for y in tree_leaves(smaller(*inputs(4)))).backward()
    optimizer.step()
    moved = [k for k, p in smaller.module.named_parameters() if not torch.equal(p, before[k])]
    assert len(moved) > 0.6 * len(before)
    assert all(torch.isfinite(p).all() for p in smaller.parameters())


@pytest.mark.parametrize("name", nets.CNNS)
def test_every_hidden_channel_of_a_cnn_must_be_free(name):
    network, _, channels, _ = analysed(name)
    free = {axis[:2] for group in channels.groups for axis in group.axes}
    stuck = [n for n, p in network.module.named_parameters() if n.endswith("weight") and p.dim() == 4 and (n, 0) not in free]
    assert stuck == (["out.weight"] if name == "unet" else []), "filters that cannot go"


HEADS = {"transformer": (4, 4), "packed": (4, 4), "rotary": (2, 2)}  # heads, and independent positions of each


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("attention", ["heads", "head_dim"])
def test_attention_must_lose_heads_or_positions_of_every_head(name, attention):
    network, _, _, inputs = analysed(name)
    analysis = analyse(network, attention=attention)
    channels = channels_of(analysis)
    query = {"transformer": "encoder.layers.0.self_attn.in_proj_weight", "packed": "qkv.weight", "rotary": "q.weight"}[name]
    (group,) = {g.axes: g for g in channels.groups if any(axis[:2] == (query, 0) for axis in g.axes)}.values()
    assert len(group.channels) == HEADS[name][attention == "head_dim"]
    gone = some(channels, 0, 0.5)
    assert error(remove(network, analysis, gone), masked(analysis, gone), inputs(3)) < TOLERANCE


@pytest.mark.parametrize("name", nets.ZOO)
def test_no_rule_may_be_missing_or_fail(name):
    reasons = {f.reason for f in frozen_by(analysed(name)[1])}
    assert not [r for r in reasons if r == NO_RULE or r.startswith(RULE_FAILED)]


def test_removal_must_leave_the_original_alone():
    network, analysis, channels, inputs = analysed("resnet-A")
    x = inputs(2)
    graph, output = str(network.module.graph), network(*x)
    remove(network, analysis, some(channels, 0))
    assert str(network.module.graph) == graph
    assert torch.equal(network(*x), output)


def test_rounds_must_compose():
    network, analysis, channels, inputs = analysed("shufflenet")
    for seed in range(3):
        gone = some(channels, seed, 0.25)
        smaller = remove(network, analysis, gone)
        assert error(smaller, masked(analysis, gone), inputs(3)) < TOLERANCE
        network = smaller
        analysis = analyse(network)
        channels = channels_of(analysis)


def test_tied_weights_must_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inp, self.a, self.b, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.out(self.b(self.a(self.inp(x)).relu()).relu())

    network = trace(nets.trained(Tied()), torch.zeros(2, 3))
    analysis = analyse(network)
    gone = some(channels_of(analysis), 0, 0.5)
    smaller = remove(network, analysis, gone)
    assert smaller.module.get_parameter("a.weight") is smaller.module.get_parameter("b.weight")
    assert smaller.module.get_parameter("a.weight").shape == (4, 4)
    assert error(smaller, masked(analysis, gone), (torch.randn(4, 3),)) < TOLERANCE


def test_relative_error_must_tell_what_differs():
    x = torch.tensor([1.0, -4.0])
    assert relative_error({"a": x}, {"a": x + torch.tensor([0.0, 1.0])}) == pytest.approx(1 / 3)
    assert relative_error(x, x[:1]) == float("inf")
    assert relative_error((x, x), (x,)) == float("inf")
    nan = torch.tensor([1.0, float("nan")])
    assert relative_error(nan, nan) == 0
    assert relative_error(x, nan) == relative_error(nan, x) == float("inf")


# ---- random networks


class Drawn(nn.Module):
    """A stack of blocks that a recipe of (kind, width) names."""

    def __init__(self, recipe):
        super().__init__()
        self.kinds, self.layers, c = [], nn.ModuleList(), 4
        self.stem = nets.cbr(3, c)
        for kind, width in recipe:
            out = 2 * width
            layer = {
                "conv": lambda c=c, o=out: nets.cbr(c, o),
                "residual": lambda c=c: nets.cbr(c, c),
                "dense": lambda c=c, o=out: nn.Conv2d(c, o, 3, padding=1),
                "depthwise": lambda c=c: nn.Conv2d(c, 2 * c, 3, padding=1, groups=c),
                "grouped": lambda c=c, o=out: nn.Conv2d(c, o, 3, padding=1, groups=2),
                "pad": lambda c=c: nets.cbr(c, c + 4),
                "swap": lambda: nn.Identity(),
                "shuffle": lambda: nn.Identity(),
                "gate": lambda c=c: nn.Linear(c, c),
                "up": lambda c=c, o=out: nn.ConvTranspose2d(c, o, 2, 2, groups=2),
                "norm": lambda c=c: nn.GroupNorm(2, c),
            }[kind]()
            c = {"conv": out, "dense": c + out, "depthwise": 2 * c, "grouped": out, "pad": c + 4, "up": out}.get(kind, c)
            self.kinds.append(kind)
            self.layers.append(layer)
        self.head = nn.Linear(4 * c, 3)

    def forward(self, x):
        x = self.stem(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = self.block(kind, layer, x)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))

    def block(self, kind, layer, x):
        n, c, h, w = x.shape
        if kind == "residual":
            return x + layer(x)
        if kind == "dense":
            return torch.cat([layer(x), x], 1)
        if kind == "pad":
            return layer(x) + F.pad(x, (0, 0, 0, 0, 1, 3))
        if kind == "swap":
            a, b = x[:, : c // 2], x[:, c // 2 :]
            return torch.cat([b, a.relu()], 1)
        if kind == "shuffle":
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "gate":
            return x * layer(x.mean((2, 3))).sigmoid()[:, :, None, None]
        if kind == "up":
            return F.avg_pool2d(layer(x), 2)
        return layer(x).relu()


KINDS = ["conv", "residual", "dense", "depthwise", "grouped", "pad", "swap", "shuffle", "gate", "up", "norm"]


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 4)), min_size=1, max_size=4), st.integers(0, 2**16))
def test_random_networks_must_match_their_oracles(recipe, seed):
    torch.manual_seed(seed)
    network = trace(nets.trained(Drawn(recipe)), torch.zeros(2, 3, 8, 8)).eval()
    analysis = analyse(network)
    channels = channels_of(analysis)
    gone = some(channels, seed)
    smaller = remove(network, analysis, gone)
    for batch in (1, 3):
        assert error(smaller, masked(analysis, gone), (torch.randn(batch, 3, 8, 8),)) < TOLERANCE
