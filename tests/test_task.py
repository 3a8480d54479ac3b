import re

import numpy as np
import pytest
import torch
from torch import nn

from edgepress.compress.errors import TaskError
from edgepress.compress.task import Task, input_batches, labelled_loss, metrics, score, training_batches


def make(**changes):
    fields = {
        "model": nn.Linear(2, 2),
        "example_inputs": torch.zeros(1, 2),
        "evaluate": lambda predict: {"a": 1.0},
        "metric": "a",
    }
    return Task(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "net.pt"}, "Task.model is a str"),
        ({"example_inputs": ()}, "Task.example_inputs must be"),
        ({"example_inputs": torch.tensor(1.0)}, "Task.example_inputs must be"),
        ({"evaluate": None}, "Task.evaluate is a NoneType"),
        ({"loss": 3}, "Task.loss is a int"),
    ],
)
def test_task_refuses_wrong_fields(changes, said):
    with pytest.raises(TaskError, match=re.escape(said)):
        make(**changes)


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        (lambda predict: {"b": 1.0}, r"must return a dict with the metric 'a'; it returned keys \['b'\]"),
        (lambda predict: 0.9, "it returned a float"),
        (lambda predict: {"a": float("nan")}, "returned nan for 'a'"),
        (lambda predict: 1 / 0, r"evaluate raised ZeroDivisionError: division by zero .*test_task\.py, line \d+"),
    ],
)
def test_score_says_what_is_wrong_with_evaluate(evaluate, said):
    with pytest.raises(TaskError, match=said):
        score(make(evaluate=evaluate), lambda x: x)


def test_metrics_come_from_validate_only_where_asked():
    task = make(validate=lambda predict: {"a": 2.0})
    assert metrics(task, lambda x: x) == {"a": 1.0}
    assert metrics(task, lambda x: x, validation=True) == {"a": 2.0}


@pytest.mark.parametrize(("higher", "drop"), [(True, 2.0), (False, -2.0)])
def test_drop_follows_the_direction_of_the_metric(higher, drop):
    assert make(higher_is_better=higher).drop(10.0, 8.0) == drop


def test_batches_are_read_from_lists_loaders_and_functions():
    pair = (torch.ones(2, 2), torch.zeros(2, dtype=torch.int64))
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pair), batch_size=1)
    for source in ([pair], loader, lambda: [pair], lambda epoch: [pair] * (epoch + 1)):
        batches = list(training_batches(make(train_batches=source), 1))
        assert all(isinstance(inputs, tuple) and inputs[0].shape[1] == 2 for inputs, _ in batches)
        assert len(batches) in (1, 2)
    assert len(list(training_batches(make(train_batches=lambda epoch: [pair] * (epoch + 1)), 1))) == 2


def test_training_falls_back_to_unlabelled_inputs():
    ((inputs, targets),) = training_batches(make(calibration_batches=[np.zeros((4, 2), np.float32)]), 0)
    assert inputs[0].shape == (4, 2)
    assert targets is None


def test_batches_refuse_what_cannot_work():
    with pytest.raises(TaskError, match="neither train_batches nor calibration_batches"):
        next(training_batches(make(), 0))
    with pytest.raises(TaskError, match="generator, which can be read only once"):
        next(input_batches(x for x in [torch.zeros(1)]))
    with pytest.raises(TaskError, match=r"must yield pairs"):
        next(training_batches(make(train_batches=[torch.zeros(1, 2)]), 0))
    with pytest.raises(TaskError, match=r"yielded \(str\)"):
        next(input_batches(["image.png"]))
    with pytest.raises(TaskError, match="has no calibration_batches"):
        next(input_batches(None))


def test_loss_of_several_outputs_must_be_named():
    with pytest.raises(TaskError, match=r"give the task a loss\(outputs, targets\)"):
        labelled_loss(make(), (torch.zeros(1), torch.zeros(1)), torch.zeros(1))
    assert labelled_loss(make(loss=lambda o, t: o.sum()), torch.ones(2), None) == 2
