"""The pass as a whole, on the tiny trained network that the tests share, and on the reference network where it is there."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgepress.compress.distill import Distill
from edgepress.compress.errors import EdgepressError, RecipeError
from edgepress.compress.network import trace
from edgepress.compress.pruning import Fisher, Magnitude, Prune, Random, Taylor, inspect
from edgepress.compress.pruning import prune as prune_module
from edgepress.compress.task import Task


@pytest.fixture
def network(task):
    return trace(task.model, task.inputs).eval()


def test_prune_must_reach_its_budget_and_write_it_down(network, task):
    smaller = Prune(macs=0.5, rounds=2, multiple=4, batches=4)(network, task)
    assert 0.25 * network.macs() < smaller.macs() <= 0.5 * network.macs()
    (entry,) = smaller.history
    assert entry["pass"] == "Prune"
    assert entry["criterion"] == {"fisher": {}}
    assert (entry["macs_before"], entry["macs_after"]) == (network.macs(), smaller.macs())
    assert entry["oracle_error"] < 1e-5
    stem = next(c for c in entry["channels"] if c["weight"] == "stem.0.weight")
    assert stem["before"] == 16 > stem["after"] or any(c["after"] < c["before"] for c in entry["channels"])
    assert all(c["after"] % 4 == 0 for c in entry["channels"] if c["before"] % 4 == 0)
    assert list(smaller.state_dict()) == list(network.state_dict())


def test_prune_must_leave_its_input_alone(network, task):
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    graph = str(network.module.graph)
    smaller = Prune(macs=0.7, rounds=1, multiple=2, batches=2)(network, task)
    assert str(network.module.graph) == graph
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert network.history == ()
    assert not smaller.training


def test_prune_must_be_reproducible(network, task):
    one, two = (Prune(macs=0.6, rounds=2, multiple=2, batches=3)(network, task) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("criterion", [Taylor(squared=False), Magnitude(p=1), Magnitude(), Random(3)])
def test_every_criterion_must_prune(network, task, criterion):
    smaller = Prune(criterion, macs=0.6, rounds=1, multiple=2, batches=2)(network, task)
    assert smaller.macs() <= 0.6 * network.macs()


def test_taylor_must_keep_more_accuracy_than_chance(network, task):
    kept = {}
    for criterion in (Taylor(), *map(Random, range(4))):
        smaller = Prune(criterion, macs=0.2, rounds=2, multiple=1, batches=8)(network, task)
        kept[criterion] = task.evaluate(smaller.predict)["accuracy"]
    assert kept.pop(Taylor()) > sum(kept.values()) / 4 + 10


def test_prune_must_work_without_labels(network, task):
    unlabelled = dataclasses.replace(task, train_batches=None)
    smaller = Prune(macs=0.35, rounds=2, multiple=1, batches=4)(network, unlabelled)
    assert smaller.macs() <= 0.35 * network.macs()
    assert task.evaluate(smaller.predict)["accuracy"] > 70


def test_max_per_layer_must_count_from_the_start(network, task):
    smaller = Prune(Magnitude(), macs=0.5, rounds=4, multiple=1, max_per_layer=0.5)(network, task)
    assert all(c["after"] >= c["before"] / 2 for c in smaller.history[0]["channels"] if c["weight"] != "head.weight")


def test_nothing_must_go_where_nothing_has_to(network, task):
    same = Prune(macs=1.0, rounds=1)(network, task)
    assert same.macs() == network.macs()


def test_an_impossible_budget_must_be_refused_with_what_stands_in_the_way(network, task):
    with pytest.raises(RecipeError, match="cannot be reached: at least 0"):
        Prune(macs=0.001)(network, task)

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(1, 2)

        def forward(self, x):
            x = self.a(x)
            return self.b(torch.linalg.matrix_exp(x[:, :, None] @ x[:, None]).sum((1, 2))[:, None])

    x = torch.randn(2, 4)
    with pytest.raises(RecipeError, match=r"linalg_matrix_exp at .*test_pruning_prune.py, line \d+ .* has no rule and locks"):
        Prune(macs=0.5)(trace(Odd(), x), Task(Odd(), x, lambda p: {"a": 0.0}, "a"))


@pytest.mark.parametrize(
    "settings", [{"macs": 0}, {"macs": 1.5}, {"rounds": 0}, {"multiple": 2.5}, {"batches": -1}, {"max_per_layer": 1}]
)
def test_settings_that_make_no_sense_must_be_refused(settings):
    with pytest.raises(RecipeError, match=f"{next(iter(settings))}=.* makes no sense"):
        Prune(**settings)


def test_a_wrong_rewrite_must_not_pass_the_gate(network, task, monkeypatch):
    honest = prune_module.remove

    def wrong(*args):
        smaller = honest(*args)
        with torch.no_grad():
            next(smaller.module.parameters()).mul_(1.5)
        return smaller

    monkeypatch.setattr(prune_module, "remove", wrong)
    with pytest.raises(EdgepressError, match="differs from its oracle"):
        Prune(macs=0.7, rounds=1, multiple=1, batches=1)(network, task)


def test_parameters_and_bytes_must_be_budgets_too(network, task):
    smaller = Prune(Magnitude(), parameters=0.5, bytes="2 kB", rounds=2, multiple=1)(network, task)
    assert smaller.parameter_count <= 0.5 * network.parameter_count
    budgets = smaller.history[0]["budgets"]
    assert budgets["bytes"]["after"] <= budgets["bytes"]["limit"] == 2000


def test_a_peak_that_several_layers_share_must_fall(network, task):
    smaller = Prune(Magnitude(), activations=0.7, precision="fp32", rounds=2, multiple=2)(network, task)
    found = smaller.history[0]["budgets"]["activations"]
    assert found["after"] <= found["limit"] == 0.7 * found["before"]


def test_latency_must_be_paid_by_the_clock(network, task):
    class Clock:
        """Convolutions cost by their output channels, nothing else costs."""

        def seconds(self, layers):
            return np.array([float(x.output[0]) if x.operator.startswith("conv") else 0.0 for x in layers])

    smaller = Prune(Magnitude(), latency=0.5, clock=Clock(), multiple=1, rounds=2)(network, task)
    found = smaller.history[0]["budgets"]["latency"]
    convs = [p for p in network.parameters() if p.dim() == 4]
    assert found["before"] == sum(len(p) for p in convs)
    assert sum(len(p) for p in smaller.parameters() if p.dim() == 4) == found["after"] <= found["before"] / 2
    with pytest.raises(RecipeError, match="needs a clock"):
        Prune(latency=0.5)(network, task)


def test_each_round_may_end_with_a_recovery(network, task):
    recover = Distill(epochs=0.2, lr=0.01)
    smaller = Prune(Magnitude(), macs=0.6, rounds=2, multiple=2, recover=recover)(network, task)
    assert [entry["pass"] for entry in smaller.history] == ["Distill", "Distill", "Prune"]
    plain = Prune(Magnitude(), macs=0.6, rounds=2, multiple=2)(network, task)
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), smaller.parameters(), strict=True) if a.shape == b.shape)


def test_an_interrupted_prune_must_go_on_after_its_last_round(network, task, tmp_path, monkeypatch):
    prune = Prune(Taylor(), macs=0.5, rounds=3, multiple=2, batches=2, checkpoint=tmp_path / "prune")
    whole = prune(network, task)
    assert not (tmp_path / "prune").exists(), "a finished pass leaves nothing behind"
    honest, cuts = prune_module.remove, []

    def interrupted(*args):
        cuts.append(1)
        if len(cuts) == 3:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(prune_module, "remove", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(network, task)
    again = prune(network, task)
    assert len(cuts) == 4, "two rounds before, one after"
    assert [tuple(p.shape) for p in again.parameters()] == [tuple(p.shape) for p in whole.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), whole.parameters(), strict=True))
    assert again.history[0]["channels"] == whole.history[0]["channels"]


def test_branches_must_go_where_depth_is_cheaper():
    torch.manual_seed(0)

    class Lazy(nn.Module):
        """The second block adds next to nothing."""

        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            nn.init.normal_(self.b.weight, std=1e-4)

        def forward(self, x):
            x = self.stem(x).relu()
            x = x + self.a(x).relu()
            x = x + self.b(x)
            return self.head(x)

    model, x = Lazy(), torch.randn(16, 8)
    task = Task(model, x, lambda p: {"a": 0.0}, "a", train_batches=[(x, torch.randint(0, 4, (16,)))])
    smaller = Prune(Fisher(), macs=0.75, depth=True, rounds=1, multiple=1)(trace(model, x), task)
    assert smaller.history[0]["branches"] == ["b"]
    assert "b.weight" not in smaller.state_dict()
    assert smaller.history[0]["channels"]
    assert all(c["before"] == c["after"] for c in smaller.history[0]["channels"])


# ---- the reference network's shape, without its weights


class Basic(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, o, 3, o // i, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.pad = (o - i) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad)) if self.pad else x))


class ResNet56(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = [16] * 10 + [32] * 9 + [64] * 9
        self.blocks = nn.Sequential(*[Basic(i, o) for i, o in itertools.pairwise(widths)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        return self.linear(self.blocks(F.relu(self.bn1(self.conv1(x)))).mean((2, 3)))


def test_resnet56_must_lose_channels_of_its_residual_stream():
    network = trace(ResNet56(), torch.zeros(1, 3, 32, 32)).eval()
    report = inspect(network)
    assert [g.channels for g in report.groups if len(g.weights) > 20] == [16, 16, 32]
    assert len(report.groups) == 30
    smaller = Prune(Random(0), macs=0.4, rounds=1)(
        network, Task(ResNet56(), torch.zeros(1, 3, 32, 32), lambda p: {"a": 0.0}, "a")
    )
    assert smaller.history[0]["oracle_error"] < 1e-5
    stream = {len(p) for n, p in smaller.module.named_parameters() if n.startswith("blocks.20.conv2")}
    assert stream.pop() < 64
