import gc
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.targets import local
from edgepress.targets.artifact import Artifact, Port, read_artifact
from edgepress.targets.local import Local, environment, peak_memory
from edgepress.targets.measure import Measurement, Plan, _interleave, _Turn, find_device, measure, noise_warning, ratio

QUICK = Plan(rounds=3, min_round_s=0.001, warmup_s=0.0, memory=False)


class Clock:
    """A clock that only moves when something runs, in steps of ``step`` nanoseconds."""

    def __init__(self, step=1):
        self.now, self.step = 0, step

    def __call__(self):
        self.now += 1  # reading it takes time, or two readings would never differ
        return self.now // self.step * self.step


class Paced:
    """A runtime that takes a given time of a fake clock, and writes down when it was run."""

    name, version = "paced", "1"

    def __init__(self, artifact, clock, duration_ns, log):
        self.artifact, self.clock, self.log, self.closed = artifact, clock, log, False
        self.durations = itertools.repeat(duration_ns) if isinstance(duration_ns, int) else iter(duration_ns)

    def run(self, feeds):
        self.clock.now += next(self.durations)
        self.log.append((self.artifact.path.name, gc.isenabled()))
        return []

    def close(self):
        self.closed = True


class Place:
    """A device for tests: no memory, no load, runtimes that take a fixed time."""

    name = "place"

    def __init__(self, fails=False):
        self.opened, self.fails = [], fails

    def environment(self):
        return {"cpu": "none", "cores": 4, "load_average": [0.0, 0.0, 0.0]}

    def open(self, artifact, threads):
        if self.fails and self.opened:
            raise FileError("the second file is broken")
        self.opened.append(Paced(artifact, Clock(), 1000, []))
        return self.opened[-1]

    def peak_memory(self, artifact, threads, feeds, timeout_s):
        raise AssertionError("memory was not asked for")

    def busy_s(self):
        return None


def artifact_of(name="a.onnx"):
    return Artifact(Path(name), "onnx", "fp32", (Port("x", (1, 3), "float32"),), (), "", 10)


def measurement_of(rounds, name="a.onnx", **environment_):
    return Measurement(artifact_of(name), "local", "onnxruntime", "1", 1, rounds, environment={"cores": 4, **environment_})


def turns_of(clock, durations, log):
    return [_Turn(Paced(artifact_of(name), clock, ns, log), []) for name, ns in durations.items()]


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


# ---- taking turns


def test_interleave_must_give_each_file_one_turn_a_round_in_changing_order():
    clock, log = Clock(), []
    turns = turns_of(clock, {"a": 100_000, "b": 200_000, "c": 300_000}, log)
    _interleave(turns, Plan(rounds=12, min_round_s=0.002, warmup_s=0.001), Place(), clock)
    timed = [name for name, collecting in log if not collecting]
    blocks = [name for i, name in enumerate(timed) if not i or timed[i - 1] != name]
    runs = {turn.runtime.artifact.path.name: turn.repeats + turn.settle for turn in turns}
    assert {name: timed.count(name) for name in "abc"} == {name: 12 * count for name, count in runs.items()}
    assert len(blocks) >= 12 * 3 - 11  # a file may end one round and open the next
    at, orders = 0, set()
    for _ in range(12):
        size = sum(runs.values())
        orders.add("".join(dict.fromkeys(timed[at : at + size])))
        assert {name: timed[at : at + size].count(name) for name in "abc"} == runs
        at += size
    assert len(orders) > 2


def test_interleave_must_keep_every_sample_with_its_round():
    clock = Clock()
    turns = turns_of(clock, {"a": 100_000, "b": 400_000}, [])
    _interleave(turns, Plan(rounds=7, min_round_s=0.002, warmup_s=0.001), Place(), clock)
    for turn, ns in zip(turns, (100_000, 400_000), strict=True):
        assert len(turn.rounds) == 7
        assert {sample for samples in turn.rounds for sample in samples} <= {ns, ns + 1}
    assert len(turns[0].rounds[0]) == pytest.approx(4 * len(turns[1].rounds[0]), abs=1)


def test_interleave_must_switch_garbage_collection_off_and_on_again_even_after_a_failure():
    clock, log = Clock(), []
    _interleave(turns_of(clock, {"a": 1000}, log), Plan(rounds=2, min_round_s=1e-5, warmup_s=0.0), Place(), clock)
    assert (("a", False) in log, gc.isenabled()) == (True, True)
    turns = turns_of(clock, {"a": [1000] * 5 + ["not a time"]}, log)
    with pytest.raises(TypeError):
        _interleave(turns, Plan(rounds=20, min_round_s=1e-5, warmup_s=0.0), Place(), clock)
    assert gc.isenabled()


def test_samples_must_last_long_enough_for_the_clock():
    clock = Clock(step=1000)
    turns = turns_of(clock, {"short": 2_000, "long": 1_000_000}, [])
    _interleave(turns, Plan(rounds=2, min_round_s=0.001, warmup_s=0.001), Place(), clock)
    assert turns[0].loops >= 50
    assert turns[1].loops == 1
    assert np.median(turns[0].rounds[0]) == pytest.approx(2_000, rel=0.02)


def test_budget_must_leave_out_rounds_but_never_below_five():
    for budget_s, rounds in ((1e9, 20), (0.105, 10), (1e-6, 5)):
        clock = Clock()
        turns = turns_of(clock, {"a": 1_000_000}, [])
        _interleave(turns, Plan(min_round_s=0.009, warmup_s=0.0, budget_s=budget_s), Place(), clock)
        assert len(turns[0].rounds) == rounds


def test_warm_up_must_go_on_until_times_settle():
    clock, log = Clock(), []
    falling = [int(10_000_000 * 0.8**i) for i in range(12)] + [500_000] * 10_000
    turns = turns_of(clock, {"a": falling}, log)
    _interleave(turns, Plan(rounds=3, min_round_s=0.001, warmup_s=0.01), Place(), clock)
    assert {sample for samples in turns[0].rounds for sample in samples} <= {500_000, 500_001}


def test_other_work_must_be_counted_in_cores(monkeypatch):
    place, clock = Place(), Clock()
    seconds = iter([10.0, 1e9])
    place.busy_s = lambda: next(seconds)
    others = _interleave(turns_of(clock, {"a": 1000}, []), Plan(rounds=2, min_round_s=1e-5, warmup_s=0.0), place, clock)
    assert others is not None
    assert others > 1e3


# ---- measure and its refusals


def test_measure_must_return_one_measurement_for_each_file_with_equal_rounds():
    place = Place()
    measured = measure([artifact_of("a.onnx"), artifact_of("b.onnx")], device=place, threads=2, plan=QUICK)
    assert [m.artifact.path.name for m in measured] == ["a.onnx", "b.onnx"]
    assert {(len(m.samples_ns), m.threads, m.runtime, m.device) for m in measured} == {(3, 2, "paced", "place")}
    assert [m.peak_bytes for m in measured] == [None, None]
    assert all(runtime.closed for runtime in place.opened)
    json.dumps(measured[0].environment)


def test_measure_must_refuse_what_makes_no_sense():
    with pytest.raises(DeviceError, match=r"no device 'ssh:board'.*'local'"):
        measure([artifact_of()], device="ssh:board")
    with pytest.raises(UserError, match="nothing to measure"):
        measure([], device=Place())
    with pytest.raises(UserError, match="0 threads"):
        measure([artifact_of()], device=Place(), threads=0)
    with pytest.raises(UserError, match="feeds for 1 of 2"):
        measure([artifact_of(), artifact_of()], device=Place(), feeds=[[]])
    with pytest.raises(UserError, match="at least 2 rounds"):
        Plan(rounds=1)
    with pytest.raises(UserError, match="positive"):
        Plan(budget_s=0)


def test_measure_must_close_what_it_opened_when_a_file_fails():
    place = Place(fails=True)
    with pytest.raises(FileError, match="second file"):
        measure([artifact_of(), artifact_of()], device=place, plan=QUICK)
    assert [runtime.closed for runtime in place.opened] == [True]


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


def test_find_device_must_return_the_local_one():
    assert isinstance(find_device("local"), Local)


# ---- what is computed from samples


def test_measurement_must_compute_its_figures_from_the_samples():
    measured = measurement_of(((10, 20, 30), (40, 50)))
    assert (measured.p50_ns, measured.mean_ns) == (30.0, 30.0)
    assert measured.p90_ns == pytest.approx(46.0)
    assert measured.p99_ns == pytest.approx(49.6)


def test_ratio_must_refuse_measurements_of_different_runs():
    rounds = ((100,), (101,), (99,))
    first = measurement_of(rounds, date="2024-01-01T00:00:00+00:00")
    with pytest.raises(UserError, match=r"not measured in one run"):
        ratio(first, measurement_of(rounds, date="2024-01-01T00:01:00+00:00"))
    assert ratio(first, measurement_of(((50,), (50,), (50,)), date="2024-01-01T00:00:00+00:00")).value == 2.0


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


# ---- the local computer


def test_environment_must_describe_the_machine_in_plain_values():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__
    assert found["timer_resolution_ns"] >= 1


def test_busy_must_not_count_this_process_itself():
    if not Path("/proc/stat").exists():
        assert Local().busy_s() is None
        return
    seconds = Local().busy_s()
    assert seconds is None or math.isfinite(seconds)


def test_a_file_that_crashes_its_runtime_must_be_one_sentence(monkeypatch):
    monkeypatch.setattr(local, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(FileError, match=r"a\.onnx cannot be measured: the runtime crashed \(SIGSEGV\)"):
        peak_memory(artifact_of())
    monkeypatch.setattr(local, "_CHILD", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(FileError, match=r"killed the process \(SIGKILL\)"):
        measure([artifact_of()], plan=Plan(rounds=2))


def test_a_child_that_hangs_or_fails_must_be_one_sentence(monkeypatch):
    monkeypatch.setattr(local, "_CHILD", "import time; time.sleep(60)")
    with pytest.raises(DeviceError, match="did not finish 3 runs in 1 s"):
        peak_memory(artifact_of(), timeout_s=1)
    monkeypatch.setattr(local, "_CHILD", "raise SystemExit('no such thing')")
    with pytest.raises(DeviceError, match=r"failed \(exit code 1\): no such thing"):
        peak_memory(artifact_of())


def test_an_error_in_the_child_must_come_back_as_what_it_was(tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(FileError, match="cannot load"):
        peak_memory(Artifact(broken, "onnx", "fp32", (Port("x", (1,), "float32"),), (), "", 11))


def test_the_child_must_not_import_from_the_working_folder(tiny_onnx, tmp_path, monkeypatch):
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong numpy')")
    monkeypatch.chdir(tmp_path)
    assert peak_memory(tiny_onnx).peak_bytes > 1_000_000
