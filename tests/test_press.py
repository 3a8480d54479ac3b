"""The loop's judgement: what is accepted, what is rejected, what is not delivered."""

import importlib
import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from conftest import accuracy

import edgepress as ep
from edgepress.compress.errors import EdgepressError, RecipeError
from edgepress.compress.network import Network
from edgepress.compress.passes import describe
from edgepress.running import run_passes
from edgepress.targets.stats import Ratio

pipeline = importlib.import_module("edgepress.pipeline")
ONNX = {"formats": ("onnx",), "precisions": ("fp32",)}


@dataclass(frozen=True)
class Spoil:
    """A pass that ruins the network."""

    noise: float = 10.0

    def __call__(self, network, task):
        spoiled = network.copy()
        with torch.no_grad():
            for p in spoiled.parameters():
                p.add_(self.noise * torch.randn_like(p))
        return spoiled.then(**{"pass": "Spoil"}, **describe(self))


@dataclass(frozen=True)
class Meddle:
    """A pass that breaks the rule that its input stays as it was."""

    def __call__(self, network, task):
        network.module.head.weight = torch.nn.Parameter(network.module.head.weight[:2].detach())
        return network


def names(report):
    return [f.artifact.path.name for f in report.files]


def test_press_delivers_measured_files_in_every_format(task, tmp_path):
    recipe = ep.Recipe((ep.Shorten(macs=0.5), ep.Prune(macs=0.7, rounds=1, multiple=4), ep.Distill(epochs=4, lr=0.02)))
    report = ep.press(task, max_drop=8.0, out=tmp_path, recipe=recipe)
    kinds = [f"{stem}-{p}.{s}" for stem in ("original", "pressed") for p in ("fp32", "int8") for s in ("onnx", "tflite")]
    assert [n for n in names(report) if "-mixed" not in n] == kinds  # which of them the CPU makes slower is its own affair
    assert report.accepted == any(f.accepted for f in report.files)  # whether a tiny int8 file is faster is up to the CPU
    assert all(f.drop <= 8.0 and f.speedup.high >= 1 for f in report.files if f.accepted)
    assert all(f.drop > 8.0 or f.speedup.high < 1 for f in report.files if not f.accepted and not f.original)
    for file in report.files:
        runtime = ep.open_runtime(ep.read_artifact(file.artifact.path))
        assert accuracy(runtime.predict) == file.metrics  # the figure is the file's own
        runtime.close()
    for file in report.files:
        if file.artifact.precision == "fp32":
            assert file.parity.max_rel < 1e-3
    layers = {layer.name: layer for layer in report.layers}
    assert layers["block.0"].after == 0
    assert 0 < layers["stem.0"].after < layers["stem.0"].before
    assert [p["pass"] for p in report.passes] == ["Shorten", "Prune", "Distill"]
    assert sorted(p.name for p in (tmp_path / "passes").iterdir())[0].startswith("00-shorten-")
    assert report.profile["file"] == report.closest.artifact.path.name
    assert any(module["name"].startswith("stem.0") for module in report.profile["modules"])
    assert 0 < sum(module["share"] for module in report.profile["modules"]) <= 1.001
    assert "Where the time goes" in (tmp_path / "report.html").read_text()


def test_press_says_by_how_much_the_budget_was_missed(task, tmp_path, capsys):
    report = ep.press(task, max_drop=1.0, out=tmp_path, recipe=ep.Recipe((Spoil(),), **ONNX))
    assert not report.accepted
    spoiled = report.files[-1]
    assert spoiled.drop > 1
    assert f"{spoiled.drop - 1:.2f} over the budget" in spoiled.verdict
    assert spoiled.artifact.path.exists()
    assert json.loads((tmp_path / "report.json").read_text())["accepted"] is False


def test_press_decides_on_validation_data_where_there_is_some(task, tmp_path):
    strict = replace(task, validate=lambda predict: {"accuracy": 100.0 if isinstance(predict.__self__, Network) else 0.0})
    report = ep.press(strict, out=tmp_path, recipe=ep.Recipe((), formats=("onnx",), precisions=("int8",)))
    assert report.decided_on == "validate"
    assert not report.accepted
    assert "on the validation data" in report.files[-1].verdict
    assert report.files[-1].drop < 50  # what is shown comes from evaluate


def test_press_does_not_deliver_a_file_that_disagrees(task, tmp_path, monkeypatch):
    export = pipeline.export

    def sabotage(network, path, precision="fp32", calibration=None):
        if path.name == "pressed-fp32.onnx":
            network = Spoil(1.0)(network, task)
        return export(network, path, precision, calibration)

    monkeypatch.setattr(pipeline, "export", sabotage)
    report = ep.press(task, out=tmp_path, recipe=ep.Recipe((ep.Shorten(macs=0.5),), **ONNX))
    assert names(report) == ["original-fp32.onnx"]
    assert any("pressed-fp32.onnx was not delivered" in w for w in report.warnings)
    assert not (tmp_path / "pressed-fp32.onnx").exists()
    assert not report.accepted


def test_press_does_not_deliver_a_file_that_does_not_load(task, tmp_path, monkeypatch):
    export = pipeline.export

    def truncate(network, path, precision="fp32", calibration=None):
        artifact = export(network, path, precision, calibration)
        if path.name == "pressed-fp32.onnx":
            path.write_bytes(path.read_bytes()[:1000])
        return artifact

    monkeypatch.setattr(pipeline, "export", truncate)
    report = ep.press(task, out=tmp_path, recipe=ep.Recipe((ep.Shorten(macs=0.5),), **ONNX))
    assert any("pressed-fp32.onnx was not delivered" in w for w in report.warnings)
    assert not (tmp_path / "pressed-fp32.onnx").exists()


def test_a_slower_file_is_rejected(task, monkeypatch):
    judge = pipeline._Judge(task, {"accuracy": 90.0}, 90.0, 1.0)
    found = pipeline._Judged(None, False, "", None, {"accuracy": 90.0}, 0.0, 0.0)

    def verdict(found, low, high, twin=None):
        return judge.verdict(found, Ratio((low + high) / 2, low, high), twin, 1)

    assert verdict(found, 0.7, 0.9) == (False, "rejected: slower than the original (0.90x at best)")
    assert verdict(found, 0.9, 1.1) == (True, "accepted, though not measurably faster than the original")
    assert verdict(found, 1.2, 1.4) == (True, "accepted")
    assert verdict(replace(found, repairs="ranges by mse"), 1.2, 1.4) == (True, "accepted (ranges by mse)")
    worse = replace(found, deciding_drop=1.5)
    assert verdict(worse, 1.2, 1.4)[1] == "rejected: accuracy dropped 1.50 points, 0.50 over the budget"
    assert verdict(replace(found, baseline=True), 1.0, 1.0)[0] is False
    monkeypatch.setattr(pipeline, "why_slow", lambda artifact, threads: "40% in Cast")
    slower = verdict(found, 1.2, 1.4, Ratio(0.8, 0.7, 0.9))
    assert slower == (False, "rejected: slower than its float twin (0.90x at best; 40% in Cast)")


@dataclass(frozen=True)
class Nudge:
    """A pass that changes a weight of its input in place, its shape no more."""

    def __call__(self, network, task):
        with torch.no_grad():
            network.module.head.weight[0, 0] += 1
        return network.then(**{"pass": "Nudge"})


@pytest.mark.parametrize("meddler", [Meddle(), Nudge()])
def test_press_catches_a_pass_that_changes_its_input(task, tmp_path, meddler):
    with pytest.raises(RecipeError, match=f"{type(meddler).__name__} changed the network it was given"):
        ep.press(task, out=tmp_path, recipe=ep.Recipe((meddler,), **ONNX))


@pytest.mark.parametrize("inside", [False, True], ids=["Distill", "Prune"])
def test_a_finished_pass_is_taken_only_for_the_same_network_and_teacher(task, tmp_path, inside):
    network = ep.trace(task.model, task.example_inputs)
    other = network.copy()
    with torch.no_grad():
        other.module.head.bias += 1

    def folders(start, teacher):
        recover = ep.Distill(epochs=0.2, teacher=teacher)
        run_passes(start, task, (ep.Prune(macs=0.8, rounds=1, recover=recover) if inside else recover,), tmp_path)
        return len(list(tmp_path.iterdir()))

    assert folders(network, None) == folders(network, None) == 1
    assert folders(other, None) == 2
    assert folders(network, other) == 3


def test_an_error_in_a_pass_names_it_and_what_went_before(task, tmp_path):
    recipe = ep.Recipe((ep.Shorten(macs=0.5), ep.Prune(macs=0.001)), **ONNX)
    with pytest.raises(EdgepressError, match=r"Prune \(pass 2 of 2, after Shorten\): .*cannot be reached"):
        ep.press(task, out=tmp_path, recipe=recipe)


def test_press_without_calibration_data_says_that_int8_is_missing(task, tmp_path):
    bare = replace(task, calibration_batches=None)
    report = ep.press(bare, out=tmp_path, recipe=ep.Recipe((), formats=("onnx",), precisions=("int8",)))
    assert names(report) == ["original-fp32.onnx"]
    assert any("int8" in w and "calibration" in w for w in report.warnings)


def test_resnet20_of_the_reference_data_keeps_its_accuracy_in_every_runtime(reference_data, tmp_path):
    task = ep.load_task("resnet20-cifar10")
    network = ep.trace(task.model, task.example_inputs)
    data = task.train_batches.__self__
    images, labels = data.test_images[:1000], data.test_labels[:1000].numpy()
    inputs = data.inputs(images).numpy()
    right = {"torch": float((network.predict(inputs).argmax(1) == labels).mean())}
    for name in ("fp32.onnx", "int8.onnx", "fp32.tflite", "int8.tflite"):
        artifact = ep.export(network, tmp_path / name, name.split(".")[0], task.calibration_batches)
        right[name] = float((ep.open_runtime(artifact, threads=2).predict(inputs).argmax(1) == labels).mean())
    assert right["torch"] > 0.9
    assert right["fp32.onnx"] == right["torch"] == right["fp32.tflite"]
    assert np.abs(np.array([right["int8.onnx"], right["int8.tflite"]]) - right["torch"]).max() <= 0.01


class Sampled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Linear(3, 2)

    def forward(self, x):
        return self.mean(x) + torch.randn(x.shape[0], 2)


def test_a_network_that_draws_random_numbers_is_refused_before_any_pass(tmp_path):
    def never(network, task):
        raise AssertionError("a pass was run")

    task = ep.Task(Sampled().eval(), torch.zeros(2, 3), accuracy, "accuracy", calibration_batches=[torch.zeros(2, 3)])
    with pytest.raises(EdgepressError, match=r"draws random numbers at .*torch.randn.*take them as an input"):
        ep.press(task, out=tmp_path, recipe=ep.Recipe((never,), **ONNX))
