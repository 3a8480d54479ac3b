"""Costs, criteria, scores and the choice of what goes."""

import math

import nets
import numpy as np
import pytest
import torch
from torch import nn

from edgepress.compress.errors import RecipeError, TaskError
from edgepress.compress.network import trace
from edgepress.compress.pruning import (
    Bounds,
    Depth,
    Goal,
    Magnitude,
    Random,
    Taylor,
    analyse,
    channel_scores,
    channels_of,
    inspect,
    remove,
    select,
)
from edgepress.compress.pruning.budget import limit
from edgepress.compress.pruning.cost import FileBytes, Latency, Macs, Parameters, PeakActivation
from edgepress.compress.pruning.scores import label_free_loss
from edgepress.compress.shorten import branches, taken_along, without


def found(model, x):
    network = trace(model, x).eval()
    return network, channels_of(analyse(network))


def cnn():
    torch.manual_seed(0)
    return found(nets.trained(nets.resnet("A")), torch.randn(2, 3, 16, 16))


def now(channels):
    return np.array([len(g.channels) for g in channels.groups], float)


def squared(outputs, targets):
    return (outputs - targets).square().mean()


# ---- cost


@pytest.mark.parametrize("name", ["vgg", "resnext", "mobilenet", "unet", "shufflenet", "generator", "channel-attention"])
def test_macs_must_agree_with_torchs_counter_before_and_after(name):
    model, inputs = nets.build(name)
    network, channels = found(model, inputs(2))
    macs = Macs(channels)
    assert macs.total(now(channels)) == network.macs()
    gone = np.concatenate([g.channels[: len(g.channels) // 2] for g in channels.groups])
    left = np.array([len(g.channels) - len(g.channels) // 2 for g in channels.groups], float)
    assert macs.total(left) == pytest.approx(remove(network, channels.analysis, gone).macs(), rel=1e-12)


def test_cost_of_each_step_must_be_that_of_the_step_alone():
    _, channels = cnn()
    macs, counts = Macs(channels), now(channels)
    after = macs.after(counts, np.full(len(counts), 2.0))
    for i in range(len(counts)):
        alone = counts.copy()
        alone[i] -= 2
        assert after[i] == macs.total(alone) < macs.total(counts)


# ---- scores


def by_hand(network, channels, batches, loss):
    """Squared first-order change of the loss when one channel's readers are zeroed, with plain loops."""
    labels, analysis = channels.analysis.labels, channels.analysis
    reads = {(str(operand.target), dim) for _, operand, dim in analysis.contractions}
    total = np.zeros(len(channels.classes))
    for (x,), y in batches:
        network.module.zero_grad()
        loss(network(x), y).backward()
        for i, c in enumerate(channels.classes):
            change = 0.0
            for name, parameter in analysis.parameters.items():
                for dim, ids in enumerate(parameter.labels):
                    rows = torch.from_numpy(np.flatnonzero(labels.find(ids) == c))
                    if (name, dim) in reads and len(rows):
                        w = parameter.tensor.detach()
                        change += float((w * parameter.tensor.grad).index_select(dim, rows).sum())
            total[i] += change**2
    return total / len(batches)


def test_taylor_scores_must_equal_plain_loops():
    network, channels = cnn()
    batches = [((torch.randn(4, 3, 16, 16),), torch.randn(4, 5)) for _ in range(2)]
    scores = channel_scores(network, channels, Taylor(), batches, squared)
    np.testing.assert_allclose(scores, by_hand(network, channels, batches, squared), rtol=1e-3, atol=1e-9)


def test_taylor_must_predict_what_the_loss_does():
    """To first order: scaling a channel's readers by 1 - h changes the loss by h times the sum of weight times gradient."""
    network, channels = found(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.zeros(1, 4))
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    scores = channel_scores(network, channels, Taylor(), [((x,), y)], squared)
    base = float(squared(network(x), y).detach())
    for i in range(6):
        nudged = network.copy()
        with torch.no_grad():
            nudged.module.get_parameter("2.weight")[:, i] *= 1 - 1e-2
        assert abs(float(squared(nudged(x), y).detach()) - base) / 1e-2 == pytest.approx(math.sqrt(scores[i]), rel=0.1, abs=1e-3)


def test_scoring_must_leave_the_network_alone():
    network, channels = cnn()
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    channel_scores(network, channels, Taylor(), [((torch.randn(4, 3, 16, 16),), torch.randn(4, 5))], squared)
    assert network.training
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_frozen_weights_must_be_scored_too():
    network, channels = cnn()
    for p in network.parameters():
        p.requires_grad_(False)
    scores = channel_scores(network, channels, Taylor(), [((torch.randn(4, 3, 16, 16),), torch.randn(4, 5))], squared)
    assert (scores > 0).any()


def test_scores_must_refuse_what_gives_none():
    network, channels = cnn()
    with pytest.raises(TaskError, match="no batch"):
        channel_scores(network, channels, Taylor(), [], squared)
    with pytest.raises(TaskError, match="NaN"):
        channel_scores(network, channels, Taylor(), [((torch.full((2, 3, 16, 16), math.nan),), torch.zeros(2, 5))], squared)


def test_magnitude_must_be_the_mean_over_the_class():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 2.0], [0.0, 0.0]]))
        model[0].bias.copy_(torch.tensor([1.0, 2.0, 0.0]))
        model[1].weight.copy_(torch.tensor([[1.0, -2.0, 4.0]]))
    network, channels = found(model, torch.zeros(1, 2))
    assert channel_scores(network, channels, Magnitude(p=1), [], squared).tolist() == [1.0, 2.0, 1.0]
    assert channel_scores(network, channels, Magnitude(p=2), [], squared).tolist() == [1.0, 4.0, 4.0]


def test_random_must_follow_its_seed():
    network, channels = cnn()
    one, same, other = (channel_scores(network, channels, Random(seed), [], squared) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_label_free_scores_must_follow_the_change_of_the_outputs():
    """On a linear layer the expected score is the squared change of the outputs, up to one factor."""
    torch.manual_seed(0)
    network, channels = found(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.zeros(1, 4))
    x = torch.randn(256, 4)
    scores = channel_scores(network, channels, Taylor(), [((x,), None)] * 200, squared)
    hidden, weight = network.module.get_parameter("0.weight"), network.module.get_parameter("2.weight")
    active = torch.relu(x @ hidden.T + network.module.get_parameter("0.bias"))
    change = (active.square().sum(0) * weight.square().sum(0)).detach()
    assert torch.corrcoef(torch.stack([scores, change]))[0, 1] > 0.97


def test_label_free_loss_must_have_a_gradient_at_every_output():
    a, b = torch.randn(3, 2, requires_grad=True), torch.randn(4, requires_grad=True)
    label_free_loss({"a": a, "b": [b, torch.arange(3)]}, 0).backward()
    assert (a.grad != 0).all()
    assert (b.grad != 0).all()


# ---- selection


def macs_goal(channels, limit):
    return [Goal(Macs(channels), limit)]


class Stairs:
    """A clock on which a layer takes as long as its output channels rounded up to a multiple of eight."""

    def seconds(self, layers):
        return np.array([float(-(-x.output[0] // 8)) if x.operator.startswith("conv") else 0.0 for x in layers])


def test_selection_must_meet_the_budget_it_reports():
    network, channels = cnn()
    scores = np.random.default_rng(0).random(len(channels.classes))
    chosen = select(channels, scores, macs_goal(channels, 0.6 * network.macs()), Bounds(multiple=4))
    smaller = remove(network, channels.analysis, chosen.removed)
    assert chosen.reached
    assert chosen.totals == (smaller.macs(),)
    assert smaller.macs() <= 0.6 * network.macs()
    assert smaller.macs() > 0.4 * network.macs(), "far more than asked went"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("degree", [0, 1, 2])
def test_nothing_that_fits_may_be_gone(seed, degree):
    network, channels = cnn()
    scores = np.random.default_rng(seed).lognormal(0, 2, len(channels.classes))
    branch = next(b for b in branches(network) if b.parameters)
    depth = Depth(frozenset(branch.nodes), 5.0, branch.addition)
    goal = macs_goal(channels, 0.3 * network.macs())[0]
    chosen = select(channels, scores, [goal], Bounds(multiple=4), degree=degree, branches=[depth])
    counts, without = np.array(chosen.kept, float), depth.nodes if chosen.branches else frozenset()
    back = np.array([g.step(4) if n < len(g.channels) else 0 for g, n in zip(channels.groups, chosen.kept, strict=True)], float)
    assert back.any()
    assert (goal.cost.after(counts, -back, without)[back > 0] > goal.limit).all()
    if chosen.branches:
        assert goal.cost.total(counts) > goal.limit


def test_a_large_step_that_reaches_the_budget_must_give_back_what_it_made_needless():
    net = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64), nn.Linear(64, 2))
    _, channels = found(net, torch.zeros(1, 4))
    macs = Macs(channels)
    assert macs.total(now(channels)) == 4 * 8 + 8 * 64 + 64 * 2
    scores = np.concatenate([np.full(8, 0.1), np.full(64, 1.0)])  # the narrow one costs less for what it saves
    chosen = select(channels, scores, [Goal(macs, 600.0)], Bounds(multiple=8, max_part=0.9))
    assert chosen.reached
    assert chosen.kept == (8, 56)  # one step of the narrow one is not there to be had: 8 is the whole of it
    scores = np.concatenate([np.full(16, 0.1), np.full(64, 1.0)])
    _, channels = found(nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 64), nn.Linear(64, 2)), torch.zeros(1, 4))
    chosen = select(channels, scores, [Goal(Macs(channels), 1100.0)], Bounds(multiple=8))
    assert chosen.kept == (8, 64)


def test_kept_counts_must_be_multiples_where_the_original_was():
    torch.manual_seed(0)
    model = nn.Sequential(nets.cbr(3, 32), nets.cbr(32, 12), nets.cbr(12, 64), nets.Head(64))
    network, channels = found(nets.trained(model), torch.zeros(1, 3, 8, 8))
    scores = np.random.default_rng(0).random(len(channels.classes))
    chosen = select(channels, scores, macs_goal(channels, 0.3 * network.macs()), Bounds())
    kept = {g.name: n for g, n in zip(channels.groups, chosen.kept, strict=True)}
    assert kept["0.0.weight"] % 8 == kept["2.0.weight"] % 8 == 0
    assert kept["1.0.weight"] % 4 == 0  # 12 is a multiple of 4 only
    assert sum(kept.values()) < 108


def test_groups_of_a_grouped_convolution_must_count_once_for_each_position():
    model, inputs = nets.build("resnext")
    _, channels = found(model, inputs(2))
    grouped = next(g for g in channels.groups if g.name == "1.body.0.0.weight")
    assert len(grouped.channels) == 4
    assert grouped.step(8) == 2  # two channels in each of four groups are eight positions


def test_no_group_may_fall_below_its_floor():
    network, channels = cnn()
    scores = np.ones(len(channels.classes))
    for bounds in (Bounds(multiple=1), Bounds(multiple=1, max_part=0.5), Bounds(multiple=1, min_channels=3), Bounds()):
        chosen = select(channels, scores, macs_goal(channels, 0.0), bounds)
        assert not chosen.reached
        assert all(n >= bounds.floor(g) >= 1 for g, n in zip(channels.groups, chosen.kept, strict=True))
        assert all(n.shape[0] > 0 for n in remove(network, channels.analysis, chosen.removed).parameters())


def test_channels_that_save_nothing_must_stay():
    class Loose(nn.Module):
        """The scale's own channels are added and summed up: taking them saves no multiplication."""

        def __init__(self):
            super().__init__()
            self.a, self.b, self.free = nn.Linear(4, 8), nn.Linear(8, 2), nn.Parameter(torch.randn(16))

        def forward(self, x):
            return self.b(self.a(x).relu()) + (self.free * x[:, :1]).sum(1, keepdim=True)

    _, channels = found(Loose(), torch.randn(2, 4))
    loose = next(i for i, g in enumerate(channels.groups) if g.name == "free")
    scores = np.concatenate([np.full(len(g.channels), 0.0 if i == loose else 1.0) for i, g in enumerate(channels.groups)])
    chosen = select(channels, scores, macs_goal(channels, 10.0), Bounds(multiple=1))
    assert chosen.kept[loose] == 16
    assert chosen.kept[1 - loose] < 8


def test_the_lowest_scores_of_a_group_must_go_first():
    network, channels = cnn()
    scores = np.random.default_rng(1).random(len(channels.classes))
    chosen = select(channels, scores, macs_goal(channels, 0.5 * network.macs()), Bounds(multiple=1))
    stays, at = channels.without(chosen.removed), 0
    for g in channels.groups:
        mine, here, at = scores[at : at + len(g.channels)], stays[at : at + len(g.channels)], at + len(g.channels)
        assert here.all() or mine[~here].max() < mine[here].min()


def test_a_stair_must_be_climbed_although_its_first_step_saves_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nets.cbr(3, 16), nets.cbr(16, 16), nets.Head(16))
    _, channels = found(nets.trained(model), torch.zeros(1, 3, 8, 8))
    cost, scores = Latency(channels, Stairs()), np.arange(1.0, 33.0)
    assert cost.after(now(channels), np.array([4.0, 4.0])).tolist() == [4.0, 4.0]
    chosen = select(channels, scores, [Goal(cost, 3.0)], Bounds(multiple=4))
    assert chosen.reached
    assert chosen.kept == (8, 16)  # the cheaper of the two stairs, whole


def test_several_budgets_must_hold_together():
    network, channels = cnn()
    costs = [Macs(channels), Parameters(channels), FileBytes(channels, 1), PeakActivation(channels, 4)]
    goals = [
        Goal(c, float(c.total(now(channels))) * part, getattr(c, "guide", None))
        for c, part in zip(costs, (0.8, 0.5, 0.6, 0.7), strict=True)
    ]
    chosen = select(channels, np.random.default_rng(0).random(len(channels.classes)), goals, Bounds(multiple=1))
    assert chosen.reached
    smaller = remove(network, channels.analysis, chosen.removed)
    assert smaller.macs() == chosen.totals[0] <= goals[0].limit
    assert smaller.parameter_count == chosen.totals[1] <= goals[1].limit


def test_limits_must_hold_by_name():
    _, channels = cnn()
    bounds = Bounds(multiple=1, max_part=0.99, limits={channels.groups[0].name: 1, channels.groups[1].name: 5})
    chosen = select(channels, np.ones(len(channels.classes)), macs_goal(channels, 0.0), bounds)
    assert chosen.kept[0] == len(channels.groups[0].channels)
    assert chosen.kept[1] >= 5 > min(chosen.kept)


@pytest.mark.parametrize(("worth", "goes"), [(1e-9, (0,)), (1e9, ())])
def test_width_and_depth_must_compete(worth, goes):
    network, channels = cnn()
    branch = next(b for b in branches(network) if b.parameters)
    depth = Depth(frozenset(branch.nodes), worth, branch.addition)
    scores = np.ones(len(channels.classes))
    chosen = select(channels, scores, macs_goal(channels, 0.9 * network.macs()), Bounds(multiple=1), branches=[depth])
    assert chosen.branches == goes
    assert chosen.reached


def test_of_an_addition_only_one_operand_may_go():
    network, channels = cnn()
    branch = branches(network)[0]
    twice = [Depth(frozenset(branch.nodes), 0.0, branch.addition), Depth(frozenset({"x"}), 0.0, branch.addition)]
    chosen = select(channels, np.ones(len(channels.classes)), macs_goal(channels, 0.2 * network.macs()), Bounds(), branches=twice)
    assert chosen.branches == (0,)


class TwoReaders(nn.Module):
    """An encoder of most of the work, read by two branches."""

    def __init__(self):
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
        self.f, self.g, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        memory = self.encode(x)
        x = x + self.f(memory)
        return self.head(x + self.g(memory))


@pytest.mark.parametrize("part", [0.95, 0.2])
def test_what_branches_take_along_together_must_count(part):
    network = trace(TwoReaders(), torch.randn(2, 8))
    channels, may_go = channels_of(analyse(network)), branches(network)
    depths = [Depth(frozenset(b.nodes), 1e-3, b.addition) for b in may_go]
    scores = np.ones(len(channels.classes))
    goal = macs_goal(channels, part * network.macs())
    chosen = select(channels, scores, goal, Bounds(multiple=64), branches=depths, along=taken_along(network, may_go))
    shorter = without(network, *(may_go[i] for i in chosen.branches))
    assert chosen.totals == (shorter.macs(),)
    assert chosen.reached
    assert len(chosen.branches) == (1 if part == 0.95 else 2)


@pytest.mark.parametrize(
    ("currency", "budget", "said"),
    [
        ("macs", 0, "above 0 and at most 1"),
        ("macs", 1.5, "such as '40 M'"),
        ("bytes", "3 ms", "units: B, kB"),
        ("latency", "fast", "'0.25 ms'"),
    ],
)
def test_budgets_that_make_no_sense_must_be_refused(currency, budget, said):
    with pytest.raises(RecipeError, match=said):
        limit(currency, budget, 1.0)


def test_criteria_must_refuse_what_makes_no_sense():
    with pytest.raises(RecipeError, match="p is 1 or 2"):
        Magnitude(p=3)


def test_inspection_must_add_up():
    network, channels = cnn()
    report = inspect(network)
    assert report.macs == network.macs()
    assert [g.channels for g in report.groups] == [len(g.channels) for g in channels.groups]
    assert all(g.macs_per_channel > 0 for g in report.groups)
    assert all(f.known for f in report.frozen)
    assert {("4.linear.weight", 0), ("4.linear.bias", 0)} <= {w for f in report.frozen for w in f.weights}
