import csv
import errno
import importlib.util
import math
import os
import re
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgepress.compress import precision as precision_module
from edgepress.compress.average import Average
from edgepress.compress.errors import FileError, RecipeError, TaskError
from edgepress.compress.features import places, watched
from edgepress.compress.mixing import mixed
from edgepress.compress.network import trace
from edgepress.compress.nonfinite import trouble
from edgepress.compress.precision import compiled_where_faster, twin
from edgepress.compress.task import Task, labelled_loss, score
from edgepress.compress.train import Precision, Schedule, fit
from edgepress.compress.training_log import COLUMNS, open_log

PLAIN = Precision()


@pytest.fixture
def network(task):
    return trace(task.model, task.inputs)


def train(network, task, loss=None, precision=PLAIN, **schedule):
    def labelled(outputs, inputs, targets):
        return labelled_loss(task, outputs, targets)

    chosen = Schedule(**{"epochs": 1, "lr": 0.02} | schedule)
    return fit(network, task, loss or labelled, chosen, precision=precision)


def weights(network):
    return [t.clone() for t in network.tensors()]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- accumulation


def linear_task(batches):
    torch.manual_seed(1)
    return Task(nn.Linear(6, 3), torch.zeros(1, 6), lambda predict: {"a": 0.0}, metric="a", train_batches=batches)


def test_accumulated_batches_are_one_step_on_all_their_examples():
    x, y = torch.randn(40, 6), torch.randint(0, 3, (40,))
    pieces = [(x[:16], y[:16]), (x[16:24], y[16:24]), (x[24:30], y[24:30]), (x[30:], y[30:])]  # of unlike sizes
    whole = [(x[:24], y[:24]), (x[24:], y[24:])]
    trained = []
    for batches, accumulate in ((pieces, 2), (whole, 1)):
        task = linear_task(batches)
        network = trace(task.model, task.inputs)
        found = train(network, task, epochs=1, lr=0.1, warmup=0.0, accumulate=accumulate, clip=1e9)
        assert found["steps"] == 2
        trained.append(weights(network))
    for ours, theirs in zip(*trained, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# ---- averages


def test_average_is_what_is_delivered_and_judged(task, network):
    judged, steps = [], []

    def validate(predict):
        judged.append(weights(predict.__self__))
        return {"accuracy": 1.0}

    def loss(outputs, inputs, targets):
        steps.append([p.detach().clone() for p in network.parameters()])  # as the step before left them
        return nn.functional.cross_entropy(outputs, targets)

    train(network, replace(task, validate=validate), loss=loss, epochs=2, ema=0.5)
    expected = steps[0]
    for t, now in enumerate(steps[1:9], 1):  # the first epoch's
        past = min(0.5, (1 + t) / (10 + t))
        expected = [past * e + (1 - past) * n for e, n in zip(expected, now, strict=True)]
    for ours, theirs in zip(judged[0], expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not same(steps[-1], list(network.parameters()))


def test_average_is_the_closed_form_and_swaps_back():
    network = trace(nn.Linear(1, 1, bias=False), torch.zeros(1, 1))
    weight = network.module.get_parameter("weight")
    values, expected = [0.0, 1.0, 4.0, 2.0], 0.0
    weight.data.fill_(values[0])
    average = Average(network, 0.25)
    for t, value in enumerate(values[1:], 1):
        weight.data.fill_(value)
        average.update()
        past = min(0.25, (1 + t) / (10 + t))
        expected = past * expected + (1 - past) * value
    with average.swapped():
        assert weight.item() == pytest.approx(expected)
    assert weight.item() == 2.0


# ---- patience


def test_patience_ends_training_and_delivers_the_best_epoch(task, network):
    values, seen = iter([10.0, 30.0, 20.0, 29.0, 99.0]), []

    def validate(predict):
        seen.append([t.clone() for t in predict.__self__.tensors()])
        return {"accuracy": next(values)}

    found = train(network, replace(task, validate=validate), epochs=5, patience=2)
    assert found["epochs"] == 4
    assert found["best"] == 30.0
    assert same(weights(network), seen[1])
    assert not same(weights(network), seen[3])


def test_patience_follows_a_metric_that_is_better_when_lower(task, network):
    values = iter([10.0, 30.0, 20.0])
    judged = replace(task, validate=lambda predict: {"accuracy": next(values)}, higher_is_better=False)
    assert train(network, judged, epochs=9, patience=2)["best"] == 10.0


# ---- parameters beside the network


def test_extra_parameters_are_trained_and_kept_in_checkpoints(task, network, tmp_path):
    projection = nn.Parameter(torch.ones(3, 3))

    def loss(outputs, inputs, targets):
        return nn.functional.cross_entropy(outputs @ projection, targets)

    runs = []
    for _ in range(2):
        copy = network.copy()
        with torch.no_grad():
            projection.fill_(1.0)
        fit(copy, task, loss, Schedule(epochs=1), precision=PLAIN, extra=[projection], checkpoint=tmp_path / "c")
        runs.append([*weights(copy), projection.detach().clone()])
    assert same(*runs)
    assert not torch.equal(runs[0][-1], torch.ones(3, 3))


# ---- data


def test_mixed_targets_are_soft_and_the_same_for_the_same_epoch(task, network):
    soft = mixed(task.train_batches, 3, mixup=0.4, cutmix=1.0, smoothing=0.1, seed=5)
    first, again, other = (list(soft(epoch)) for epoch in (0, 0, 1))
    for (x, y), (x2, y2) in zip(first, again, strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
        torch.testing.assert_close(y.sum(1), torch.ones(len(y)))
        assert y.min() >= 0.1 / 3 - 1e-6
    assert not torch.equal(first[0][1], other[0][1])
    value = labelled_loss(task, torch.zeros(64, 3), first[0][1])
    assert float(value) == pytest.approx(math.log(3), rel=1e-5)
    before = score(task, network.predict)
    found = train(network, replace(task, train_batches=soft), epochs=2)
    assert found["epochs"] == 2
    assert score(task, network.predict) > before - 10


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_targets_are_mixed_in_the_share_of_the_inputs(kind):
    labels = torch.arange(8) % 2
    images = labels.float()[:, None, None, None].expand(8, 1, 10, 10)  # each shows its own class
    for x, y in mixed([(images, labels)] * 6, 2, **{kind: 1.0})(0):
        torch.testing.assert_close(x.mean((1, 2, 3)), y[:, 1], rtol=1e-4, atol=1e-4)


def test_mixing_refuses_what_it_cannot_mix():
    words = [(torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, dtype=torch.long))]
    for options, message in (({"mixup": 0.2}, "mixup mixes numbers"), ({"cutmix": 1.0}, "rectangles of images")):
        with pytest.raises(TaskError, match=message):
            next(mixed(words, 2, **options)(0))
    assert next(mixed(words, 2, smoothing=0.1)(0))[0].dtype == torch.long
    with pytest.raises(TaskError, match="targets from 0 to 1"):
        next(mixed([(torch.zeros(4, 3), torch.full((4,), 2))], 2)(0))
    with pytest.raises(TaskError, match="labelled"):
        next(mixed([(torch.zeros(4, 3), None)], 2)(0))
    with pytest.raises(RecipeError):
        mixed(words, 2, smoothing=1.0)


# ---- logs


def test_log_is_a_table(task, network, tmp_path):
    path = tmp_path / "runs" / "log.csv"
    found = train(network, task, epochs=3, log=str(path), patience=5)
    rows = table(path)
    assert tuple(rows[0]) == COLUMNS
    assert [int(r["step"]) for r in rows] == [8, 16, 20, 24]
    assert [bool(r["metric"]) for r in rows] == [True, True, False, True]
    assert max(float(r["metric"]) for r in rows if r["metric"]) == pytest.approx(found["best"])
    assert float(rows[-1]["lr"]) < float(rows[0]["lr"])


def test_log_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot write the log"), open_log(tmp_path / "file" / "log.csv"):
        pass


class Writer:
    """In place of TensorBoard's."""

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.noted, self.closed = folder, purge_step, [], False

    def add_scalar(self, name, value, step):
        self.noted.append((name, value, step))

    def close(self):
        self.closed = True


@pytest.fixture
def writers(monkeypatch):
    made = []

    def writer(*arguments, **options):
        made.append(Writer(*arguments, **options))
        return made[-1]

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=writer))
    return made


def test_tensorboard_gets_what_the_table_gets(task, network, tmp_path, writers):
    folder = tmp_path / "board"
    found = train(network.copy(), task, epochs=3, patience=5, log=str(folder))
    train(network.copy(), task, epochs=3, patience=5, log=str(tmp_path / "log.csv"))
    (writer,) = writers
    assert (writer.folder, writer.purge_step, writer.closed) == (str(folder), None, True)
    for name in ("lr", "loss", "metric"):
        rows = [(float(r[name]), int(r["step"])) for r in table(tmp_path / "log.csv") if r[name]]
        assert [(value, step) for n, value, step in writer.noted if n == name] == [(pytest.approx(v), s) for v, s in rows]
    assert max(value for name, value, _ in writer.noted if name == "metric") == found["best"]


def test_tensorboard_drops_what_an_interrupted_run_noted_after_its_checkpoint(tmp_path, writers):
    with pytest.raises(KeyboardInterrupt), open_log(tmp_path, rows=4, steps=30):
        raise KeyboardInterrupt
    assert (writers[0].purge_step, writers[0].closed) == (31, True)


def test_tensorboard_on_a_full_disk_is_a_sentence(tmp_path, writers, monkeypatch):
    def full(*noted):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Writer, "add_scalar", full)
    with (
        pytest.raises(FileError, match=r"Cannot write the log .*: No space left on device; make room"),
        open_log(tmp_path) as note,
    ):
        note({"step": 1, "loss": 0.5})


def test_tensorboard_without_tensorboard_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # importing it is an ImportError
    with pytest.raises(RecipeError, match=r"pip install tensorboard, or log to a \.csv file"), open_log(tmp_path / "board"):
        pass
    assert not (tmp_path / "board").exists()


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="TensorBoard is not installed")
def test_tensorboard_itself_is_written(tmp_path):
    with open_log(tmp_path / "board") as note:
        note({"step": 1, "loss": 0.5, "lr": 0.1, "metric": None})
    assert list((tmp_path / "board").glob("events*"))


# ---- what is not finite


@pytest.mark.parametrize(
    ("weight", "value", "expected"),
    [
        ("block.0.weight", 1e38, r"what the module 'block\.\d' gives"),
        ("head.weight", math.nan, "the weight 'head.weight'"),
    ],
)
def test_first_trouble_is_named(network, weight, value, expected):
    with torch.no_grad():
        network.module.get_parameter(weight).fill_(value)
    found = trouble(network.train(), (torch.randn(4, 1, 8, 8),))
    assert re.fullmatch(expected, found)


def test_trouble_names_the_input_and_the_gradient(network):
    assert trouble(network, (torch.full((2, 1, 8, 8), math.nan),)) == "input 1 of the batch"
    assert trouble(network, (torch.zeros(2, 1, 8, 8),)) == ""
    for name in ("stem.0.weight", "block.3.weight", "block.0.bias"):
        parameter = network.module.get_parameter(name)
        parameter.grad = torch.full_like(parameter, math.nan)
    assert trouble(network, (torch.zeros(2, 1, 8, 8),)) == "the gradient of 'block.3.weight'"


def test_loss_that_is_not_finite_gives_the_last_good_weights_back(task, network):
    def poisoned(epoch):
        for number, (x, y) in enumerate(task.train_batches(epoch)):
            yield (x * math.nan if epoch == 3 and number == 2 else x), y

    copies = {}

    def loss(outputs, inputs, targets):
        copies[len(copies)] = weights(network)
        return nn.functional.cross_entropy(outputs, targets)

    with pytest.raises(TaskError, match=r"loss is nan at step 3 of epoch 4, .*input 1 of the batch.*weights of 20 steps again"):
        train(network, replace(task, train_batches=poisoned), loss=loss, epochs=5)
    assert same(weights(network), copies[20])
    assert all(t.isfinite().all() for t in network.tensors())
    assert not network.training


def test_batch_of_one_example_must_not_spoil_the_statistics():
    x, y = torch.randn(9, 6), torch.randint(0, 3, (9,))
    task = linear_task([(x[:8], y[:8]), (x[8:], y[8:])])
    network = trace(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)), torch.zeros(1, 6))
    before = [p.detach().clone() for p in network.parameters()]
    with pytest.raises(TaskError, match=r"batch of a single example has no variance .*drop_last=True"):
        train(network, task)
    assert same(list(network.parameters()), before)
    assert all(t.isfinite().all() for t in network.tensors())
    assert not network.training
    plain = trace(nn.Linear(6, 3), torch.zeros(1, 6))
    assert train(plain, task)["steps"] == 2


# ---- how steps compute


def test_twin_shares_weights_and_statistics(task, network):
    network.train()
    shared = twin(network)
    assert {id(p) for p in shared.parameters()} == {id(p) for p in network.parameters()}
    before = weights(network)
    shared(torch.randn(4, 1, 8, 8))
    assert not same(before, weights(network))  # the running statistics moved
    network.eval()
    assert not same(before, weights(network))


class Activations(nn.Module):
    """ReLUs whose inputs nobody else reads, and others."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Conv2d(1, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.norm(self.a(x)))  # own
        z = self.b(y)
        z = F.relu(z) + z  # the sum reads it, too
        y = F.relu(torch.sigmoid(y) + z)  # own: a sum
        y = F.relu(torch.tanh(y))  # the backward pass of tanh reads what it gave
        y = F.relu(y.flatten(1))  # a view of what another operator reads
        return self.c(F.relu(x.flatten(1)[:, :4] + y[:, :4]))  # own


def test_twin_overwrites_only_what_nobody_else_reads():
    torch.manual_seed(0)
    network = trace(Activations(), torch.zeros(1, 1, 4, 4)).train()
    shared = twin(network)
    kinds = [node.target for node in shared.graph.nodes if node.name.startswith("relu")]
    own, others = torch.ops.aten.relu_.default, torch.ops.aten.relu.default
    assert kinds == [own, others, own, others, others, own]
    x, results = torch.randn(6, 1, 4, 4), []
    for call in (network, shared):
        for parameter in network.parameters():
            parameter.grad = None
        outputs = call(x)
        outputs.square().sum().backward()
        results.append([outputs, *(parameter.grad for parameter in network.parameters())])
    assert same(*results)
    assert all(gradient.abs().max() > 0 for gradient in results[0])
    assert own not in {node.target for node in network.module.graph.nodes}


def test_twin_leaves_what_is_watched():
    network = trace(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), torch.zeros(1, 1, 4, 4)).train()
    x = torch.randn(3, 1, 4, 4)
    with watched(network, [places(network)["0"]]) as seen:
        twin(network)(x)
        assert torch.equal(seen["0"], F.conv2d(x, *network.parameters()))
        assert seen["0"].min() < 0


def test_compiling_that_fails_leaves_steps_as_they_are(network, monkeypatch):
    def broken(module):
        def call(*inputs):
            raise RuntimeError("no C++ compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    inputs = (torch.randn(4, 1, 8, 8),)
    assert compiled_where_faster(network, inputs, PLAIN) == PLAIN
    monkeypatch.setattr(torch, "compile", lambda module: module)
    for seconds, chosen in ((1.0, Precision(compiled=True)), (3.0, PLAIN)):
        monkeypatch.setattr(precision_module, "_trial_step", lambda call, kind, *rest, s=seconds: s if kind.compiled else 2.0)
        assert compiled_where_faster(network, inputs, PLAIN) == chosen


def test_compiled_steps_train_the_same_weights(task, network, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)  # the graph that would be compiled, as it is
    compiled, plain = network.copy(), network.copy()
    train(plain, task)
    fit(
        compiled, task, lambda y, x, t: labelled_loss(task, y, t), Schedule(epochs=1, lr=0.02), precision=Precision(compiled=True)
    )
    assert same(weights(plain), weights(compiled))


def test_half_precision_needs_a_gpu(task, network):
    with pytest.raises(RecipeError, match="fp16 needs a GPU"):
        fit(network, task, lambda y, x, t: y.sum(), Schedule(), precision=Precision(fp16=True))
    with pytest.raises(RecipeError, match="not both"):
        Precision(bf16=True, fp16=True)


# ---- time


def test_minutes_are_kept_and_the_rate_falls_within_them(task, network, tmp_path):
    started = time.monotonic()
    train(network, task, epochs=1000, minutes=0.03, log=str(tmp_path / "log.csv"))
    took = time.monotonic() - started
    assert 1.8 <= took < 1.8 + 5
    rates = [float(r["lr"]) for r in table(tmp_path / "log.csv")]
    assert rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize(
    "wrong", [{"accumulate": 0}, {"ema": 1.0}, {"patience": 0}, {"clip": 0}, {"deterministic": True, "minutes": 1.0}]
)
def test_schedule_refuses_options_that_make_no_sense(wrong):
    with pytest.raises(RecipeError):
        Schedule(**wrong)


def test_rates_fit_their_optimizer():
    assert Schedule().peak == 0.05
    assert Schedule(optimizer="adamw").peak == 0.001
    assert Schedule(lr=0.3).peak == 0.3
