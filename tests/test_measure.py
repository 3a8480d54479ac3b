import json
from pathlib import Path

import numpy as np
import pytest

from edgepress.compress.errors import DeviceError, UserError
from edgepress.targets.artifact import Artifact, Port, read_artifact
from edgepress.targets.devices.null import Null
from edgepress.targets.measure import Measurement, Plan, measure, noise_warning, ratio

QUICK = Plan(rounds=3, min_round_s=0.001, warmup_s=0.0)


def artifact_of(name="a.onnx"):
    return Artifact(Path(name), "onnx", "fp32", (Port("x", (1, 3), "float32"),), (), "", 10)


def measurement_of(rounds, name="a.onnx", **environment_):
    return Measurement(artifact_of(name), "local", "onnxruntime", "1", 1, rounds, environment={"cores": 4, **environment_})


@pytest.fixture
def tiny_onnx(tmp_path):
    """``y = relu(x)`` with an open batch."""
    import onnx
    from onnx import TensorProto, helper

    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 8]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "tiny", [x], [y])
    path = tmp_path / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return read_artifact(path)


# ---- measure and its refusals


def test_measure_must_return_one_measurement_for_each_file_with_equal_rounds():
    place = Null({"a.onnx": 2000, "b.onnx": 1000})
    measured = measure([artifact_of("a.onnx"), artifact_of("b.onnx")], device=place, threads=2, plan=QUICK)
    assert [m.artifact.path.name for m in measured] == ["a.onnx", "b.onnx"]
    assert {(len(m.samples_ns), m.threads, m.runtime, m.device) for m in measured} == {(3, 2, "null", "null")}
    assert ratio(*measured).value == 2.0
    json.dumps(measured[0].environment)


def test_measure_must_refuse_what_makes_no_sense():
    place = Null({"a.onnx": 1000})
    with pytest.raises(DeviceError, match=r"no device 'ssh:board'.* local"):
        measure([artifact_of()], device="ssh:board")
    with pytest.raises(UserError, match="nothing to measure"):
        measure([], device=place)
    with pytest.raises(UserError, match="0 threads"):
        measure([artifact_of()], device=place, threads=0)
    with pytest.raises(UserError, match="feeds for 1 of 2"):
        measure([artifact_of(), artifact_of()], device=place, feeds=[[]])
    with pytest.raises(UserError, match="runtimes for 1 of 2"):
        measure([artifact_of(), artifact_of()], device=place, runtimes=["litert"])
    with pytest.raises(UserError, match="at least 2 rounds"):
        Plan(rounds=1)
    with pytest.raises(UserError, match="positive"):
        Plan(budget_s=0)


def test_measure_must_run_a_real_file_with_the_given_feeds(tiny_onnx):
    feeds = [[np.zeros((4, 8), np.float32)], [np.zeros((1, 8), np.float32)]]
    plan = Plan(rounds=4, min_round_s=0.002, warmup_s=0.01)
    first, second = measure([tiny_onnx, tiny_onnx], plan=plan, feeds=feeds)
    assert (first.runtime, len(first.samples_ns), len(second.samples_ns)) == ("onnxruntime", 4, 4)
    assert 0 < first.p50_ns <= first.p90_ns <= first.p99_ns
    assert first.environment is second.environment
    assert first.idle_bytes is not None
    assert 0 < first.idle_bytes < first.peak_bytes
    assert ratio(first, second).low > 0


def test_measure_must_run_a_strangers_tflite_file(reference_data):
    files = [read_artifact(reference_data / "deploy" / f"mlperf_ad_{kind}.tflite") for kind in ("float", "int8")]
    measured = measure(files, plan=Plan(rounds=3, min_round_s=0.002, warmup_s=0.01))
    assert [m.runtime for m in measured] == ["litert", "litert"]
    assert all(m.peak_bytes > m.idle_bytes for m in measured)


# ---- what is computed from samples


def test_measurement_must_compute_its_figures_from_the_samples():
    measured = measurement_of(((10, 20, 30), (40, 50)))
    assert (measured.p50_ns, measured.mean_ns) == (30.0, 30.0)
    assert measured.per_second == pytest.approx(1e9 / 30)
    assert measured.p90_ns == pytest.approx(46.0)
    assert measured.p99_ns == pytest.approx(49.6)


def test_ratio_must_refuse_measurements_of_different_runs():
    rounds = ((100,), (101,), (99,))
    first = measurement_of(rounds, date="2024-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"not measured in one run"):
        ratio(first, measurement_of(rounds, date="2024-01-01T00:01:00+00:00"))
    same_run = measurement_of(((50,), (51,), (49,)), date="2024-01-01T00:00:00+00:00")
    assert ratio(first, same_run).value == pytest.approx(2, rel=0.01)


def test_noise_must_be_none_on_a_quiet_machine_and_a_sentence_on_a_busy_one():
    quiet = ((100, 101),) * 10
    assert measurement_of(quiet, other_cores=0.5, load_average=[9.0, 9, 9]).noise is None
    busy = measurement_of(quiet, other_cores=3.2).noise
    assert busy == "The machine was too noisy to trust the times of a.onnx: other work kept 3.2 of 4 cores busy."
    assert "3.5 of 4" in measurement_of(quiet, other_cores=None, load_average=[3.5, 1, 1]).noise
    assert "second half" in measurement_of(((100,),) * 5 + ((120,),) * 5).noise


def test_noise_warning_must_say_each_reason_once():
    both = [measurement_of(((100, 101),) * 10, name, other_cores=3.2) for name in ("a.onnx", "b.onnx")]
    assert noise_warning(both).count("3.2 of 4 cores") == 1
    assert "a.onnx, b.onnx" in noise_warning(both)
    assert noise_warning([measurement_of(((100, 101),) * 10)]) is None


def test_noise_must_name_what_else_happened():
    quiet = ((100, 101),) * 10
    assert "hypervisor took 0.30 of 4" in measurement_of(quiet, stolen_cores=0.3).noise
    assert "jumped by 3600 s" in measurement_of(quiet, clock_jump_s=3600.0).noise
    hot = [[float(i), 2400.0 - 150 * i, 60.0 + i] for i in range(8)]
    assert "clock fell from 2400 to 1500 MHz at 67 degrees" in measurement_of(quiet, trace=hot).noise
    assert measurement_of(quiet, stolen_cores=0.0, clock_jump_s=0.0, trace=[[0.0, 2400.0, 50.0]] * 8).noise is None
