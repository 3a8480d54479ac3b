"""Function-preserving changes: folding, equalization, and rounding with compensation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgepress.compress.equalize import Equalize, pairs
from edgepress.compress.errors import RecipeError
from edgepress.compress.fold import folded
from edgepress.compress.network import Network, trace
from edgepress.compress.rounding import Round, gptq, grid_scale
from edgepress.compress.task import Task


def settled(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Normalisations with statistics and weights that a fold can get wrong."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return model.eval()


def task_of(model: nn.Module, x: torch.Tensor) -> Task:
    return Task(model, x, lambda predict: {"score": 0.0}, "score", train_batches=[(x, torch.zeros(len(x)).long())])


def conv(i: int, o: int, groups: int = 1, bias: bool = False) -> list[nn.Module]:
    return [nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=bias), nn.BatchNorm2d(o), nn.ReLU()]


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Sequential(*conv(3, 8)), nn.Sequential(*conv(8, 12)), nn.Sequential(*conv(12, 8)[:2])
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.head(torch.relu(x + self.b(self.a(x))).mean((2, 3)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.q, self.k, self.out = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.out(torch.relu(self.q(y) * self.k(y)))


NETS = {
    "plain": (lambda: nn.Sequential(*conv(3, 8), *conv(8, 8, 8), nn.MaxPool2d(2), *conv(8, 6, bias=True)), (5, 3, 8, 8)),
    "residual": (Residual, (5, 3, 8, 8)),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 3)), (5, 6)),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), nn.ConvTranspose2d(6, 2, 2)),
        (5, 4, 6, 6),
    ),
    "attention": (Block, (5, 7, 8)),
}


@pytest.fixture(params=NETS)
def case(request: pytest.FixtureRequest) -> tuple[Network, torch.Tensor, Task]:
    build, shape = NETS[request.param]
    torch.manual_seed(1)
    x = torch.randn(*shape)
    model = settled(build(), x)
    return trace(model, x), x, task_of(model, x)


def test_folding_changes_nothing_and_leaves_no_normalisation(case):
    network, x, _ = case
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = folded(network)
    assert torch.allclose(result(x), network(x), atol=1e-5)
    assert not [node for node in result.module.graph.nodes if "batch_norm" in str(node.target)]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_folded_network_is_saved_copied_and_trained(case, tmp_path):
    network, x, _ = case
    result = folded(network)
    again = Network.load(result.save(tmp_path / "net"))
    assert torch.equal(again(x), result.copy()(x))
    result.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in result.parameters())


def test_a_normalisation_whose_layer_feeds_others_stays():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return y + self.norm(y)

    x = torch.randn(2, 3, 4, 4)
    network = trace(settled(Twice(), x), x)
    assert "norm.weight" in folded(network).state_dict()
    assert torch.allclose(folded(network)(x), network(x), atol=1e-6)


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_equalizing_computes_the_same_with_other_weights(case, method):
    network, x, task = case
    equal = Equalize(method)(network, task)
    assert torch.allclose(equal(x), network(x), rtol=1e-3, atol=1e-4)
    moved = equal.history[-1]["found"]["pairs"]
    other = [n for n, v in folded(network).state_dict().items() if not torch.equal(v, equal.state_dict()[n])]
    assert bool(other) == bool([m for m in moved if method == "activations" or "norm" not in m])


def test_which_channels_can_be_scaled():
    found = {}
    for name, (build, shape) in NETS.items():
        x = torch.randn(*shape)
        found[name] = [(p.outputs[0], [w for w, _ in p.inputs]) for p in pairs(folded(trace(settled(build(), x), x)))]
    assert found["plain"] == [("0.weight", ["3.weight"]), ("3.weight", ["7.weight"])]
    assert found["residual"] == [("a.0.weight", ["b.0.weight"])]  # the residual stream has an addition between
    assert found["linear"] == [("0.weight", ["3.weight"])]
    assert found["attention"] == [("norm.weight", ["k.weight", "q.weight"])]  # a product of two is no way for a scale


def test_equalizing_activations_helps_a_linear_layer_with_outlier_channels():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    with torch.no_grad():
        model[0].weight[3] = 60.0  # an outlier channel, as language models have them
    x = torch.randn(64, 16)
    network = trace(model, x)

    def error(net: Network) -> float:
        seen = net.module.get_parameter("0.weight"), net.module.get_parameter("0.bias")
        activations = torch.nn.functional.layer_norm(x, (16,), *seen)
        step = activations.abs().max() / 127
        weight = net.module.get_parameter("1.weight")
        steps = weight.abs().amax(1, keepdim=True) / 127
        rounded = (activations / step).round() * step @ ((weight / steps).round() * steps).T
        return float((rounded + net.module.get_parameter("1.bias") - network(x)).detach().square().mean())

    assert error(Equalize("activations")(network, task_of(model, x))) < 0.5 * error(network)


def test_rounding_lies_on_the_grid_that_the_rule_of_the_writers_finds(case):
    network, _, task = case
    rounded = Round("w4a8", batches=1)(network, task)
    for name in rounded.history[-1]["found"]["weights"]:
        rows = rounded.module.get_parameter(name).detach().flatten(1)
        scale = rows.abs().amax(1, keepdim=True) / 7
        steps = rows / scale
        assert torch.allclose(steps, steps.round(), atol=1e-4), name


def test_compensated_rounding_moves_the_outputs_less_than_rounding_to_nearest():
    torch.manual_seed(0)
    inputs = torch.randn(400, 6) @ torch.randn(6, 24) + 0.1 * torch.randn(400, 24)  # correlated, as activations are
    weight = torch.randn(10, 24)
    scale = grid_scale(weight, 7)
    nearest = (weight / scale).round().clamp(-7, 7) * scale
    better = gptq(weight, inputs.T @ inputs, scale, 7)

    def moved(new: torch.Tensor) -> float:
        return float((inputs @ (new - weight).T).square().sum())

    assert moved(better) < 0.5 * moved(nearest)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Round("fp16"),
        lambda: Round("int4"),
        lambda: Round("int8", batches=0),
        lambda: Equalize("both"),  # type: ignore[arg-type]
        lambda: Equalize(strength=2.0),
        lambda: Equalize(batches=0),
    ],
)
def test_settings_that_make_no_sense_are_refused(make):
    with pytest.raises(RecipeError):
        make()
