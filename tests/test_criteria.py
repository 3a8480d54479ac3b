"""Criteria on cases with known answers, gates against plain gradients, branches, normalisation."""

import gc

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgepress.compress.errors import RecipeError, TaskError
from edgepress.compress.network import trace
from edgepress.compress.pruning import (
    OBD,
    Activation,
    BatchNormScale,
    Fisher,
    GeometricMedian,
    Lamp,
    Magnitude,
    Random,
    Taylor,
    analyse,
    branch_scores,
    channel_scores,
    channels_of,
    normalised,
)
from edgepress.compress.pruning.gates import branch_gates, channel_gates
from edgepress.compress.pruning.scores import joint_scores
from edgepress.compress.shorten import branches


def found(model, *inputs):
    network = trace(model, inputs)
    return network, channels_of(analyse(network))


def chain(a, b):
    """x to sum over c of b_c a_c x: a channel's gate is b_c a_c x for the example x."""
    model = nn.Sequential(nn.Linear(1, len(a), bias=False), nn.Linear(len(a), 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor(a).view(-1, 1))
        model[1].weight.copy_(torch.tensor(b).view(1, -1))
    return found(model, torch.zeros(1, 1))


def mean(outputs, targets):
    return outputs.mean()


def squared(outputs, targets):
    return (outputs - targets).square().flatten(1).mean(1).mean()


X = torch.tensor([[1.0], [-3.0]])
BA = torch.tensor([2.0, -6.0, 0.0])  # b_c a_c
BY_HAND = {
    Taylor(): (BA * X.mean()).square(),
    Taylor(squared=False): (BA * X.mean()).abs(),
    Taylor(over="class"): (2 * BA * X.mean()).square(),  # the filter's weight times gradient is that of the reader once more
    Activation(): BA.abs() * X.abs().mean(),
    Fisher(): BA.square() * X.square().mean() / 2,
    OBD(): (BA * X.mean()).square() / 2,
    OBD(over="class"): (BA * X.mean()).square(),
    Magnitude(p=1): torch.tensor([1.5, 2.5, 2.5]),
    Magnitude(p=1, over="filters"): torch.tensor([1.0, 2.0, 0.0]),
    Magnitude(p=2): torch.tensor([2.5, 6.5, 12.5]),
    Lamp(): torch.tensor([5 / 43, 13 / 38, 1.0]),
    Lamp(over="filters"): torch.tensor([1 / 5, 1.0, 0.0]),
    GeometricMedian(): torch.tensor([2.0, 3.0, 3.0]),
}


@pytest.mark.parametrize("criterion", BY_HAND, ids=str)
def test_scores_must_be_what_the_formula_gives_by_hand(criterion):
    network, channels = chain([1.0, 2.0, 0.0], [2.0, -3.0, 5.0])
    scores = channel_scores(network, channels, criterion, [((X,), X), ((X,), X)], mean)
    torch.testing.assert_close(scores, BY_HAND[criterion])


def test_whole_class_must_count_filters_and_batch_normalisation():
    model = nets.trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    network, channels = found(model, torch.zeros(1, 3, 2, 2))
    x, y = torch.randn(3, 3, 2, 2), torch.randn(3, 2, 2, 2)
    squared(model(x), y).backward()
    products = {name: (p * p.grad).detach() for name, p in model.named_parameters()}
    reads = products["3.weight"].sum((0, 2, 3))
    made = products["0.weight"].sum((1, 2, 3)) + products["0.bias"] + products["1.weight"] + products["1.bias"]
    for over, expected in (("readers", reads), ("class", reads + made)):
        scores = channel_scores(network, channels, Taylor(over=over), [((x,), y)], squared)
        torch.testing.assert_close(scores, expected.square())


def test_batch_norm_scale_must_be_the_mean_over_all_that_a_channel_passes():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)
    )
    network, channels = found(nets.trained(model), torch.zeros(1, 3, 2, 2))
    passed = (model[1].weight.abs() + model[3].weight.abs()).detach() / 2
    scores = channel_scores(network, channels, BatchNormScale(), [], squared)
    torch.testing.assert_close(scores, torch.cat([passed, passed.max().expand(6)]))


def test_batch_norm_scale_must_refuse_a_network_without():
    network, channels = chain([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(RecipeError, match="without BatchNorm"):
        channel_scores(network, channels, BatchNormScale(), [], mean)


def test_geometric_median_must_lay_the_filters_of_several_layers_end_to_end():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 5), nn.Linear(2, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x).relu())

    model = Sum()
    network, channels = found(model, torch.zeros(1, 2))
    filters = torch.cat([model.a.weight, model.b.weight], 1).detach()
    scores = channel_scores(network, channels, GeometricMedian(), [], squared)
    torch.testing.assert_close(scores, torch.stack([(filters - f).norm(dim=1).sum() for f in filters]))


@pytest.mark.parametrize(
    "criterion",
    [lambda: Taylor(over="filters"), lambda: OBD(over="all"), lambda: Magnitude(over="readers"), lambda: Lamp(over="scales")],
)
def test_criteria_must_refuse_a_scope_that_makes_no_sense(criterion):
    with pytest.raises(RecipeError, match="over is"):
        criterion()


# ---- gates


class SequenceFirst(nn.Module):
    """Attention on ``[T, N, C]``, whose examples lie inside of time where the two are merged."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(x.transpose(0, 1)).mean(0))


class InPlace(nn.Module):
    """A residual addition in place."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.a(x)
        y = self.b(x.relu())
        y += x
        return self.c(y.relu_())


class Hidden(nn.Module):
    """Hidden units are read inside of one operator."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


ALONE = ("constants", "recurrent")
GATED = {
    **{name: nets.ZOO[name] for name in ("resnet-A", "resnext", "generator", "channel-attention", "transformer")},
    "constants": nets.ZOO["constants"],
    "recurrent": (Hidden, lambda n: (torch.randn(n, 3, 4),)),
    "sequence-first": (SequenceFirst, lambda n: (torch.randn(n, 5, 8),)),
    "in-place": (InPlace, lambda n: (torch.randn(n, 6),)),
}


@pytest.mark.parametrize("name", GATED)
def test_gates_of_each_example_must_be_its_readers_weights_times_gradients(name):
    make, inputs = GATED[name]
    torch.manual_seed(0)
    network, channels = found(nets.trained(make()), *inputs(2))
    x = inputs(3)
    y = torch.randn_like(network(*x))
    gates = channel_gates(channels)
    assert gates.whole == (name not in ALONE)
    copy = network.copy()
    copy.module.requires_grad_(False)
    together = gates.contributions(copy, x, y, squared, 3)
    for i in range(3):
        alone = channel_scores(network, channels, Taylor(), [(tuple(v[i : i + 1] for v in x), y[i : i + 1])], squared)
        torch.testing.assert_close((3 * together[i]).square(), alone, rtol=1e-3, atol=1e-5 * float(alone.max()))
    assert not together[0].allclose(together[1], rtol=0.1), "examples that are alike cannot tell"


def test_examples_that_the_network_reorders_must_be_found_out():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.b(self.a(x.flip(0)).relu()).flip(0)

    torch.manual_seed(0)
    x, y = torch.randn(3, 3), torch.randn(3, 2)
    model = Turned()
    network, channels = found(model, x)
    straight = trace(nn.Sequential(model.a, nn.ReLU(), model.b), x)
    expected = channel_scores(straight, channels_of(analyse(straight)), Fisher(), [((x,), y)], squared)
    assert len(channels.classes) == 6
    torch.testing.assert_close(channel_scores(network, channels, Fisher(), [((x,), y)], squared), expected)


def test_gate_scores_must_leave_the_network_alone():
    network, channels = found(nets.trained(nets.resnet("A")), torch.zeros(1, 3, 16, 16))
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    channel_scores(network, channels, Fisher(), [((torch.randn(4, 3, 16, 16),), torch.randn(4, 5))], squared)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_gate_scores_must_refuse_what_gives_none():
    network, channels = chain([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(TaskError, match="no batch"):
        channel_scores(network, channels, Fisher(), [], mean)
    with pytest.raises(TaskError, match="NaN"):
        channel_scores(network, channels, Fisher(), [((X / 0,), X)], mean)


def test_fisher_without_labels_must_be_half_of_what_taylor_expects():
    """Signs are random: the square of the batch's sum is the sum of the examples' squares in expectation."""
    torch.manual_seed(0)
    network, channels = found(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.zeros(1, 4))
    batches = [((torch.randn(32, 4),), None)] * 400
    fisher, taylor = (channel_scores(network, channels, c, batches, squared) for c in (Fisher(), Taylor()))
    np.testing.assert_allclose(2 * fisher, taylor, rtol=0.3)


# ---- branches


@pytest.mark.parametrize("make", [lambda: nets.resnet("A"), InPlace], ids=["resnet", "in place"])
def test_gate_of_a_branch_must_predict_what_the_loss_does(make):
    """To first order: scaling what a branch adds by 1 - h changes an example's loss by -h times its gate."""
    torch.manual_seed(0)
    model = make()
    x = torch.randn(3, 6) if isinstance(model, InPlace) else torch.randn(3, 3, 16, 16)
    network = trace(nets.trained(model), x)
    every = branches(network)
    y = torch.randn_like(network(x))
    copy = network.copy()
    copy.module.requires_grad_(False)
    gates = branch_gates(copy, every).contributions(copy, (x,), y, squared, 3)
    for branch, gate in zip(every, gates.T, strict=True):
        losses = []
        for scale in (1.01, 0.99):
            scaled = network.copy()
            with torch.no_grad():
                for name in [n for n in branch.parameters if "running" not in n][-2:]:  # the last layer's weight and bias
                    scaled.module.get_parameter(name).mul_(scale)
                losses.append((scaled(x) - y).square().mean(1) / 3)
        torch.testing.assert_close((losses[0] - losses[1]) / 0.02, gate, rtol=0.02, atol=2e-3)


def test_branch_scores_must_be_in_the_units_of_channel_scores():
    """Where the shortcut is zero, a branch is read as its channels are, one channel wide."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 1, bias=False), nn.Linear(1, 1)

        def forward(self, x):
            return self.c(x[:, :1] * 0 + self.b(self.a(x)))

    model = One()
    with torch.no_grad():
        model.b.weight[:, 1:] = 0  # the first channel alone makes the branch
    network, channels = found(model, torch.zeros(1, 2))
    batch = ((torch.randn(8, 2),), torch.randn(8, 1))
    (branch,) = [b for b in branches(network) if "b.weight" in b.parameters]
    for criterion in (Taylor(), Taylor(squared=False), Activation(), Fisher()):
        of_channels = channel_scores(network, channels, criterion, [batch], squared)
        of_branch = branch_scores(network, [branch], criterion, [batch], squared)
        torch.testing.assert_close(of_branch[0], of_channels[0])
        assert of_branch[0] > 0
        assert (of_channels[1:] == 0).all()


@pytest.mark.parametrize("criterion", [Magnitude(), Random(), OBD(), Lamp(), GeometricMedian(), BatchNormScale()], ids=str)
def test_branches_must_not_be_scored_by_weights(criterion):
    network = trace(nets.resnet("A"), torch.zeros(1, 3, 16, 16))
    with pytest.raises(RecipeError, match="Taylor, Fisher or Activation"):
        branch_scores(network, branches(network), criterion, [], squared)


# ---- normalisation


@pytest.mark.parametrize(
    ("how", "expected"),
    [("none", [3.0, 4.0, 0.0, 0.0]), ("mean", [6 / 7, 8 / 7, 0, 0]), ("max", [0.75, 1, 0, 0]), ("l2", [0.6, 0.8, 0, 0])],
)
def test_scores_must_be_relative_to_their_own_group(how, expected):
    model = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 3))
    _, channels = found(model, torch.zeros(1, 3))
    torch.testing.assert_close(normalised(torch.tensor([3.0, 4.0, 0.0, 0.0]), channels, how), torch.tensor(expected))


def test_unknown_normalisation_must_be_refused():
    _, channels = chain([1.0, 2.0], [1.0, 2.0])
    with pytest.raises(RecipeError, match="none, mean, max, l2"):
        normalised(torch.ones(2), channels, "median")


@pytest.mark.parametrize("criterion", [Fisher(), Activation(), Taylor()])
def test_channels_and_branches_in_one_pass_must_score_as_in_two(criterion):
    network, channels = found(nets.trained(nets.resnet("A")), torch.randn(2, 3, 16, 16))
    batches = [((torch.randn(4, 3, 16, 16),), torch.randn(4, 5))]
    ends = branches(network)
    scores, worth = joint_scores(network, channels, ends, criterion, batches, squared)
    torch.testing.assert_close(scores, channel_scores(network, channels, criterion, batches, squared))
    torch.testing.assert_close(worth, branch_scores(network, ends, criterion, batches, squared))
    assert (worth > 0).any()


def test_gates_must_let_go_of_a_batch():
    """Hooks that hold their own graph would keep every batch's activations until memory is full."""
    network, channels = found(nets.trained(nets.resnet("A")), torch.randn(2, 3, 16, 16))
    batches = [((torch.randn(11, 3, 16, 16),), torch.randn(11, 5)) for _ in range(3)]

    def alive():
        gc.collect()
        return sum(type(x) is torch.Tensor and x.dim() == 4 and len(x) == 11 for x in gc.get_objects())

    before = alive()
    joint_scores(network, channels, branches(network), Fisher(), batches, squared)
    assert alive() == before
