import contextlib

import pytest
import torch
from torch import nn

from edgepress.compress.errors import RecipeError
from edgepress.compress.network import trace
from edgepress.compress.shorten import Shorten, branches, left_out, without
from edgepress.compress.task import Task


class Residual(nn.Module):
    """Four branches; the second does nothing, the fourth changes the shape with a convolution in the shortcut."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(3)])
        self.down = nn.Conv2d(4, 8, 3, 2, 1)
        self.short = nn.Conv2d(4, 8, 1, 2)
        self.head = nn.Linear(8, 5)
        with torch.no_grad():
            self.f[1][1].weight.zero_()

    def forward(self, x):
        for f in self.f:
            x = torch.relu(x + f(x))
        return self.head((self.down(x) + self.short(x)).mean((2, 3)))


@pytest.fixture
def residual():
    torch.manual_seed(0)
    return Residual().eval()


@pytest.fixture
def residual_task(residual):
    x = torch.randn(64, 4, 8, 8)
    return Task(residual, x[:1], lambda predict: {"a": 1.0}, "a", calibration_batches=[x[:40], x[40:]])


def test_branches_are_found_with_their_weights(residual):
    found = {b.module: b for b in branches(trace(residual, torch.zeros(1, 4, 8, 8)))}
    assert set(found) == {"f.0", "f.1", "f.2", "down", "short"}
    assert set(found["f.0"].parameters) >= {"f.0.0.weight", "f.0.0.bias", "f.0.1.weight", "f.0.1.running_mean"}


def test_leaving_a_branch_out_equals_the_module_without_it(residual):
    network = trace(residual, torch.zeros(1, 4, 8, 8))
    first = next(b for b in branches(network) if b.module == "f.0")
    shorter = without(network, first)
    x = torch.randn(3, 4, 8, 8)
    expected = x
    for k in (0, 1, 2):
        expected = torch.relu(expected + (residual.f[k](expected) if k else 0))
    expected = residual.head((residual.down(expected) + residual.short(expected)).mean((2, 3)))
    torch.testing.assert_close(shorter(x), expected, rtol=1e-5, atol=1e-6)
    assert (shorter(x) - network(x)).abs().max() > 1e-3
    assert "f.0.0.weight" not in shorter.state_dict()
    assert "f.0.0.weight" in network.state_dict()


def test_leaving_a_branch_out_leaves_no_activation_twice(residual):
    network = trace(residual, torch.zeros(1, 4, 8, 8))
    second = next(b for b in branches(network) if b.module == "f.1")
    targets = [str(n.target) for n in without(network, second).module.graph.nodes]
    assert targets.count("aten.relu.default") == 2


def test_shorten_removes_first_what_does_nothing(residual, residual_task):
    network = trace(residual, torch.zeros(1, 4, 8, 8))
    before = network.macs()
    shorter = Shorten(macs=0.9, examples=50)(network, residual_task)
    entry = shorter.history[-1]
    assert [r["branch"] for r in entry["found"]["removed"]] == ["f.1"]
    assert entry["found"]["removed"][0]["change"] < 1e-6
    assert network.macs() == before
    assert shorter.macs() == entry["found"]["after"]["macs"] < 0.9 * before
    x = torch.randn(2, 4, 8, 8)
    assert shorter.train()(x).sum().backward() is None


def test_shorten_reaches_its_budget_or_stops_when_nothing_is_left(residual, residual_task):
    network = trace(residual, torch.zeros(1, 4, 8, 8))
    shorter = Shorten(macs=0.01)(network, residual_task)
    assert not branches(shorter)
    assert len(shorter.history[-1]["found"]["removed"]) == 4


def test_shorten_meets_a_budget_of_parameters_too(residual, residual_task):
    network = trace(residual, torch.zeros(1, 4, 8, 8))
    by_macs = Shorten(macs=0.9)(network, residual_task)
    both = Shorten(macs=0.9, parameters=0.6)(network, residual_task)
    assert both.parameter_count <= 0.6 * network.parameter_count < by_macs.parameter_count
    assert both.macs() <= 0.9 * network.macs()


def test_shorten_leaves_a_network_without_branches_alone(task):
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    network = trace(plain, torch.zeros(1, 1, 8, 8))
    same = Shorten(macs=0.5)(
        network, Task(plain, torch.zeros(1, 1, 8, 8), lambda p: {"a": 1.0}, "a", calibration_batches=[torch.zeros(2, 1, 8, 8)])
    )
    assert same.history[-1]["found"]["removed"] == []
    assert same.macs() == network.macs()


@pytest.mark.parametrize("macs", [0, 1, -1])
def test_shorten_refuses_budgets_outside_0_and_1(macs):
    with pytest.raises(RecipeError, match="between 0 and 1"):
        Shorten(macs=macs)


class Assigns(nn.Module):
    """A branch whose insides are put together by writing into slices, and one behind it that adds in place."""

    def __init__(self):
        super().__init__()
        self.start, self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x):
        x = self.start(x).relu()
        parts = torch.zeros_like(x)
        parts[:, :3] = self.a(x)
        parts[:, 3:] = self.b(x)
        x = x + parts
        mask = torch.zeros_like(x)
        mask[:, ::2] = 1.0
        x += self.c(x)
        return x * mask


@pytest.mark.parametrize("gone", [("a.weight",), ("c.weight",), ("a.weight", "c.weight")])
def test_what_is_written_in_place_stays_where_it_is_read_and_goes_where_it_is_not(gone):
    torch.manual_seed(0)
    model = Assigns().eval()
    network, x = trace(model, torch.zeros(2, 4)), torch.randn(3, 4)
    chosen = [b for b in branches(network) if any(name in gone for name in b.parameters)]
    assert len(chosen) == len(gone)
    shorter = without(network, *chosen)
    with torch.no_grad():
        y = model.start(x).relu()
        y = y if "a.weight" in gone else y + torch.cat([model.a(y), model.b(y)], 1)
        y = y if "c.weight" in gone else y + model.c(y)
        assert torch.allclose(shorter(x), y * torch.tensor([1.0, 0] * 3), atol=1e-6)
        with contextlib.ExitStack() as stack:
            for branch in chosen:
                stack.enter_context(left_out(network, branch))
            assert torch.allclose(network(x), shorter(x), atol=1e-6)
        assert torch.allclose(network(x), model(x), atol=1e-6)
    left = {name.partition(".")[0] for name, _ in shorter.module.named_parameters()}
    assert left == {"start", *({"a", "b"} if "a.weight" not in gone else ()), *({"c"} if "c.weight" not in gone else ())}


def test_weights_that_two_branches_share_go_with_both():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.one, self.two = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            scale = self.both.exp()
            x = x + self.one(x) * scale
            return x + self.two(x) * scale

    network = trace(Shared(), torch.randn(2, 4))
    every = branches(network)
    assert "both" in without(network, every[0]).state_dict()
    assert list(without(network, *every).state_dict()) == []
