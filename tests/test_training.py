import math
from dataclasses import replace

import pytest
import torch

from edgepress.compress.distill import Distill, logit_distillation, output_distillation
from edgepress.compress.errors import RecipeError, TaskError
from edgepress.compress.network import trace
from edgepress.compress.task import epoch_length, score
from edgepress.compress.train import Precision, Schedule, fastest_precision

PLAIN = Precision()


def damaged(task):
    """The trained network with noise on its weights."""
    network = trace(task.model, task.inputs)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.7 * p.abs().mean() * torch.randn_like(p))
    return network


def weights(network):
    return {k: v.clone() for k, v in network.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("labels", [0.0, 0.5])
def test_distill_brings_the_accuracy_back(task, labels):
    network = damaged(task)
    before, original = score(task, network.predict), score(task, trace(task.model, task.inputs).predict)
    assert before < original - 10
    untouched = weights(network)
    recovered = Distill(epochs=10, lr=0.05, labels=labels, precision=PLAIN)(network, task)
    assert score(task, recovered.predict) > original - 4
    assert same(untouched, weights(network))
    entry = recovered.history[-1]
    assert entry["pass"] == "Distill"
    assert entry["found"]["epochs"] == 10
    assert entry["found"]["losses"][-1] < entry["found"]["losses"][0]


def test_distill_needs_no_labels(task):
    unlabelled = replace(task, train_batches=lambda epoch: [(x, None) for x, _ in task.train_batches(epoch)])
    network = damaged(task)
    recovered = Distill(epochs=10, lr=0.05, precision=PLAIN)(network, unlabelled)
    assert score(task, recovered.predict) > score(task, network.predict) + 10


def test_distill_follows_another_teacher(task):
    teacher = trace(task.model, task.inputs)
    with torch.no_grad():
        teacher.module.get_parameter("head.bias").add_(torch.tensor([50.0, 0.0, 0.0]))  # says 0 whatever comes
    student = Distill(epochs=6, labels=0.0, lr=0.1, teacher=teacher, precision=PLAIN)(damaged(task), task)
    images = next(iter(task.train_batches(0)))[0].numpy()
    assert (student.predict(images).argmax(1) == 0).mean() > 0.95


def test_interrupted_distillation_ends_at_the_same_weights(task, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"
    distill = Distill(epochs=3, lr=0.02, precision=PLAIN, checkpoint=checkpoint)
    network = damaged(task)
    whole = distill(network, task)
    checkpoint.unlink()

    class Interrupted(list):
        def __iter__(self):
            yield from self[:3]
            raise KeyboardInterrupt

    def stop_in_second_epoch(epoch):
        batches = task.train_batches(epoch)
        return Interrupted(batches) if epoch == 1 else batches

    with pytest.raises(KeyboardInterrupt):
        distill(network, replace(task, train_batches=stop_in_second_epoch))
    assert checkpoint.exists()
    seen = []

    def noting(epoch):
        seen.append(epoch)
        return task.train_batches(epoch)

    resumed = distill(network, replace(task, train_batches=noting))
    assert same(weights(whole), weights(resumed))
    assert [e for e in seen if e] == [1, 2]
    assert same(weights(whole), weights(distill(network, task)))  # a finished one is taken as it is
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.name]


def test_checkpoint_of_another_run_is_not_taken(task, tmp_path):
    checkpoint = tmp_path / "run.checkpoint"

    def stop(epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return task.train_batches(epoch)

    network = damaged(task)
    with pytest.raises(KeyboardInterrupt):
        Distill(epochs=2, lr=0.5, precision=PLAIN, checkpoint=checkpoint)(network, replace(task, train_batches=stop))
    other = Distill(epochs=2, lr=0.02, precision=PLAIN, checkpoint=checkpoint)(network, task)
    assert other.history[-1]["found"]["epochs"] == 2
    assert same(weights(other), weights(Distill(epochs=2, lr=0.02, precision=PLAIN)(network, task)))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 4), (2, 16)])
def test_fraction_of_an_epoch_is_trained_where_the_length_is_known(task, epochs, steps):
    entry = Distill(epochs=epochs, precision=PLAIN)(damaged(task), task).history[-1]["found"]
    assert entry["steps"] == steps


def test_learning_starts_in_the_first_epoch_of_data_without_a_length(task):
    endless = replace(task, train_batches=lambda epoch: iter(task.train_batches(epoch)))
    network = damaged(task)
    found = Distill(epochs=10, lr=0.05, precision=PLAIN)(network, endless).history[-1]["found"]
    assert found["epochs"] == 10
    assert found["losses"][-1] < 0.7 * found["losses"][0]


def test_loss_that_is_not_finite_stops_with_a_sentence(task):
    with pytest.raises(TaskError, match=r"The (loss|gradient) is (nan|inf).*epoch \d.*lower the learning rate"):
        Distill(epochs=3, lr=1e9, warmup=0.0, clip=1e30, precision=PLAIN)(damaged(task), task)


def test_minutes_end_training_and_bring_the_rate_down(task):
    entry = Distill(epochs=10_000, minutes=0.03, precision=PLAIN)(damaged(task), task).history[-1]["found"]
    assert entry["epochs"] < 1000
    assert entry["steps"] > 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_schedule_warms_up_and_falls_to_zero(optimizer):
    schedule = Schedule(lr=0.2, warmup=0.1, optimizer=optimizer)
    assert schedule.rate(0.05) == pytest.approx(0.1)
    assert schedule.rate(0.1) == pytest.approx(0.2)
    assert schedule.rate(0.55) == pytest.approx(0.1)
    assert schedule.rate(1.0) == pytest.approx(0.0)


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": -1}, {"warmup": 1.0}, {"minutes": 0}, {"optimizer": "rmsprop"}])
def test_schedule_refuses_what_makes_no_sense(wrong):
    with pytest.raises(RecipeError):
        Schedule(**wrong)
    with pytest.raises(RecipeError):
        Distill(**wrong)


def test_logit_distillation_equals_its_closed_form():
    student, teacher, t = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, -2.0]]), 2.0
    p = 1 / (1 + math.exp(-4 / t))
    q = 1 / (1 + math.exp(2 / t))
    expected = t * t * (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))
    assert float(logit_distillation(student, teacher, t)) == pytest.approx(expected, rel=1e-5)


def test_output_distillation_counts_in_units_of_the_teachers_variance():
    teacher = torch.tensor([0.0, 2.0])  # variance 1
    assert float(output_distillation(teacher + 3, teacher)) == pytest.approx(9.0)
    assert float(output_distillation((teacher + 3, 100 * teacher), (teacher, 100 * teacher))) == pytest.approx(4.5)


def test_fastest_precision_leaves_out_what_does_not_run(task, monkeypatch):
    network = trace(task.model, task.inputs)
    found = fastest_precision(network, (torch.zeros(8, 1, 8, 8),))
    assert isinstance(found, Precision)
    assert not network.training
    forward = torch.autocast.__enter__

    def refuse(self):
        if self._enabled:
            raise RuntimeError("no bfloat16 kernel")
        return forward(self)

    monkeypatch.setattr(torch.autocast, "__enter__", refuse)
    assert not fastest_precision(network, (torch.zeros(8, 1, 8, 8),)).bf16


def test_the_length_of_an_epoch_must_be_known_where_it_can_be(task):
    batches = list(task.train_batches(0))
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(10, 1), torch.zeros(10)), batch_size=4)

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    def broken(epoch):
        yield batches[0]
        raise OSError("the disk is gone")

    for source, count in (
        (batches, len(batches)),
        (lambda epoch: iter(batches), None),
        (lambda epoch: (b for b in batches), len(batches)),
        (data, 3),
        (torch.utils.data.DataLoader(Stream()), None),
        (broken, None),
    ):
        for epochs in (1, 10):
            assert epoch_length(replace(task, train_batches=source), epochs) == count


@pytest.mark.parametrize(("epochs", "count"), [(0.3, 150), (2, 150), (3, None), (10, None)])
def test_how_far_an_epoch_is_counted_must_not_hang_on_the_machine(task, epochs, count):
    [batch, *_] = task.train_batches(0)
    drawn, told = [], []

    def many(epoch):
        for i in range(150):
            drawn.append(i)
            yield batch

    assert epoch_length(replace(task, train_batches=many), epochs, told.append) == count
    assert len(drawn) == (count or 101)
    assert told == [*range(1, (count or 100) + 1)]


def test_a_fraction_of_an_epoch_must_end_there_with_a_slow_generator(task, monkeypatch):
    steps = []
    rate = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda self, progress: steps.append(progress) or rate(self, progress))
    [batch, *_] = task.train_batches(0)
    Distill(epochs=0.25, precision=PLAIN)(damaged(task), replace(task, train_batches=lambda epoch: (batch for _ in range(40))))
    assert len(steps) == 10


def test_the_rate_must_fall_within_a_single_epoch_of_a_generator(task, monkeypatch):
    rates = []
    rate = Schedule.rate
    monkeypatch.setattr(Schedule, "rate", lambda self, progress: rates.append(rate(self, progress)) or rates[-1])
    generated = replace(task, train_batches=lambda epoch: (b for b in task.train_batches(epoch)))
    Distill(epochs=1, lr=0.05, precision=PLAIN)(damaged(task), generated)
    assert rates[-1] < 0.2 * max(rates)
