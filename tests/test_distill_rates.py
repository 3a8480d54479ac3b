"""The learning rate that `Distill` takes where none is given."""

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from edgepress.compress.distill import Distill
from edgepress.compress.network import trace
from edgepress.compress.task import Task
from edgepress.compress.train import Precision


@pytest.mark.parametrize(
    ("middle", "settings", "rate"),
    [
        (nn.BatchNorm2d(4), {}, 0.05),
        (nn.Identity(), {}, 0.01),
        (nn.GroupNorm(2, 4), {}, 0.01),
        (nn.Identity(), {"lr": 0.05}, 0.05),
        (nn.BatchNorm2d(4), {"lr": 0.01}, 0.01),
        (nn.Identity(), {"optimizer": "adamw"}, 0.001),
        (nn.BatchNorm2d(4), {"optimizer": "adamw"}, 0.001),
    ],
)
def test_rate_without_batch_normalisation_must_be_lower_unless_given(middle, settings, rate):
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), middle, nn.ReLU(), nn.Flatten(), nn.Linear(144, 2)).eval()
    task = Task(model, x, lambda predict: {"a": 0.0}, "a", train_batches=[(x, torch.zeros(8).long())] * 4)
    rates = []
    handle = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    trained = Distill(epochs=1, warmup=0.0, cache=False, precision=Precision(), **settings)(trace(model, x), task)
    handle.remove()
    assert max(rates) == pytest.approx(rate)
    assert trained.history[-1]["found"]["lr"] == rate
