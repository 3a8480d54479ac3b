"""Layers that lose accuracy are found in the file, and left in floats only where that is what it takes."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgepress as ep
from edgepress import pipeline, repair
from edgepress.cli import main
from edgepress.compress.errors import UserError
from edgepress.compress.progress import silenced
from edgepress.compress.quantization import quantization
from edgepress.compress.task import Task
from edgepress.targets.sensitivity import layers_of, sensitivity
from edgepress.targets.stats import Ratio


class Fragile(nn.Module):
    """Its third layer has a large weight for a channel that is always 0: it takes the whole 8-bit grid for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 16)
        self.fragile, self.head = nn.Linear(16, 16), nn.Linear(16, 2)
        with torch.no_grad():
            self.second.weight[0], self.second.bias[0] = 0.0, -1.0
            self.fragile.weight[:, 0] = 3000.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(torch.relu(self.fragile(x)))


@pytest.fixture(scope="module")
def task() -> Task:
    torch.manual_seed(0)
    model, inputs = Fragile().eval(), torch.randn(400, 8)
    with torch.no_grad():
        outputs = model(inputs)
        model.head.bias -= torch.tensor([0.0, float((outputs[:, 1] - outputs[:, 0]).median())])  # both classes occur
        labels = model(inputs).argmax(1).numpy()

    def evaluate(predict):
        return {"accuracy": 100.0 * float(np.mean(predict(inputs.numpy()).argmax(1) == labels))}

    return Task(model, inputs[:4], evaluate, "accuracy", calibration_batches=[inputs[:200]], name="fragile")


@pytest.mark.parametrize("suffix", [".onnx", ".tflite"])
def test_the_layer_that_loses_the_accuracy_is_found(task, suffix):
    network = ep.trace(task.model, task.inputs)
    shown = [task.calibration_batches[0][:64].numpy()]
    with silenced():
        error, found = sensitivity(network, suffix, "int8", task.calibration_batches, shown)
    assert found[0].module == "fragile"
    assert found[0].gain > 0.9 * error
    assert {entry.module for entry in found} == set(layers_of(network))
    # and where the file goes wrong: behind the fragile layer, not before it
    gone = {entry.module: entry.snr_db for entry in found}
    assert gone["fragile"] < gone["second"] - 10


def test_a_layer_that_is_not_there_is_refused_with_those_that_are(task):
    with pytest.raises(UserError, match="it has first"):
        sensitivity(ep.trace(task.model, task.inputs), ".onnx", "int8", task.calibration_batches, modules=["fragil"])


def test_a_quantized_file_that_lost_too_much_is_followed_by_one_that_did_not(task, tmp_path):
    recipe = ep.Recipe(formats=("onnx",), precisions=("int8",))
    with silenced():
        report = ep.press(task, recipe=recipe, out=tmp_path, max_drop=2.0)
    files = {f.name: f for f in report.files}
    assert set(files) == {"original-fp32.onnx", "original-int8.onnx", "original-int8-repaired.onnx"}
    assert files["original-int8.onnx"].drop > 2.0
    assert not files["original-int8.onnx"].accepted
    repaired = files["original-int8-repaired.onnx"]
    assert repaired.drop <= 2.0
    if repaired.accepted:  # it is rejected where it is slower than the file in floats
        assert repaired.verdict.startswith("accepted (")
    notes = json.loads((tmp_path / "report.json").read_text())["files"]
    assert {entry["path"] for entry in notes} == set(files)


@pytest.mark.parametrize(
    ("slower", "layers"),
    [
        ({"first": -1e9}, 1),
        ({"first": 1e8, "second": -1e9}, 2),
        ({"first": -1e9, "second": 1e8}, 1),
        ({"first": 1e9}, 0),
        ({"first": -1.0}, 0),  # too little
        ({"third": -1e9}, 0),  # with it too many weights would be in floats
    ],
)
def test_first_layers_that_integers_make_slower_stay_in_floats(tmp_path, monkeypatch, slower, layers):
    torch.manual_seed(0)
    names = ("first", "second", "third", "fourth")
    model = nn.Sequential(
        OrderedDict(zip(names, (nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 60), nn.Linear(60, 4)), strict=True))
    )
    task = Task(model, torch.randn(2, 4), lambda predict: {"score": 0.0}, "score", calibration_batches=[torch.randn(64, 4)])
    network, how = ep.trace(model, task.inputs), quantization("int8")
    plain = ep.export(network, tmp_path / "net-int8.onnx", how, task.calibration_batches)
    floats = ep.export(network, tmp_path / "net-fp32.onnx")
    monkeypatch.setattr(repair, "slower_in_floats", lambda *files: slower)
    made = repair.eased(network, plain, floats, how, task, 1)
    assert (made is None) == (layers == 0)
    if made is not None:
        assert made[1] == f"{', '.join(names[:layers])} in floats"
        assert made[0].path == tmp_path / "net-int8-mixed.onnx"
        stored = onnx.load(made[0].path).graph.initializer
        assert sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in stored) == 4 - layers


@pytest.mark.parametrize("faster", [True, False])
def test_a_mixed_file_is_delivered_where_it_is_measured_to_be_faster(tmp_path, monkeypatch, faster):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 60), nn.Linear(60, 4))
    task = Task(model, torch.randn(2, 4), lambda predict: {"score": 90.0}, "score", calibration_batches=[torch.randn(64, 4)])
    monkeypatch.setattr(repair, "slower_in_floats", lambda *files: {"0": -1e9})
    monkeypatch.setattr(pipeline, "ratio", lambda one, other: Ratio(1.2, 1.1, 1.3) if faster else Ratio(1.0, 0.9, 1.1))
    with silenced():
        report = ep.press(task, recipe=ep.Recipe(formats=("onnx",), precisions=("int8",)), out=tmp_path)
    names = [file.name for file in report.files]
    assert ("original-int8-mixed.onnx" in names) == (tmp_path / "original-int8-mixed.onnx").exists() == faster
    if faster:
        assert report.files[-1].verdict == "accepted (0 in floats)"


def test_leaving_a_layer_in_floats_is_written_into_the_file(task, tmp_path):
    network = ep.trace(task.model, task.inputs)
    kinds = {}
    for name, layers in {"all": {}, "some": {"fragile": "fp32"}}.items():
        how = quantization("int8", layers=layers)
        ep.export(network, tmp_path / f"{name}.onnx", how, task.calibration_batches)
        graph = onnx.load(tmp_path / f"{name}.onnx").graph
        kinds[name] = sum(t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2 for t in graph.initializer)
    assert kinds == {"all": 4, "some": 3}


def test_calibration_data_without_examples_is_a_sentence(task, monkeypatch, capsys):
    empty = replace(task, calibration_batches=[torch.zeros(0, 8)])
    monkeypatch.setattr("edgepress.commands._network", lambda source: (ep.trace(task.model, task.inputs), empty))
    assert main(["sensitivity", "fragile"]) == 2
    assert "holds no examples" in capsys.readouterr().err


def test_the_command_prints_a_table_and_json(task, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("edgepress.commands._network", lambda source: (ep.trace(task.model, task.inputs), task))
    with silenced():
        assert main(["sensitivity", "fragile", "--examples", "32", "--clock"]) == 0
        table = capsys.readouterr().out
        assert main(["sensitivity", "fragile", "--examples", "32", "--json"]) == 0
    assert "left in floats" in table
    assert "dB" in table
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["module"] == "fragile"
    assert found["layers"][0]["ns"] is None
