import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import fake_runtime
import numpy as np
import pytest

from edgepress import cli
from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.targets.agent import frames, supervisor
from edgepress.targets.agent.machine import environment
from edgepress.targets.artifact import Artifact, Port
from edgepress.targets.devices import Failed, Job, Taken, answers, find_device
from edgepress.targets.devices.link import Link, Piped
from edgepress.targets.devices.local import Local
from edgepress.targets.measure import Measurement, Plan, measure, ratio, try_measure
from edgepress.targets.runtimes import explain

QUICK = Plan(rounds=3, min_round_s=0.002, warmup_s=0.0, timeout_s=20, wait_s=120.0)
FEED = np.ones((1, 4), np.float32)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """Temporary folders of agents go here, and a runtime of ours is found."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(fake_runtime.install(tmp_path / "path")))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return folder


@pytest.fixture
def local(temporary):
    device = Local()
    yield device
    device.close()
    assert list(temporary.iterdir()) == []


@pytest.fixture
def order(tmp_path):
    """Make a file that tells the fake runtime what to do."""

    def made(do, **more):
        data = b"\0\0\0\0TFL3" + json.dumps({"do": do, **more}).encode()
        path = tmp_path / f"{do}.tflite"
        path.write_bytes(data)
        ports = (Port("x", (1, 4), "float32"),)
        return Artifact(path, "tflite", "fp32", ports, ports, hashlib.sha256(data).hexdigest(), len(data))

    return made


def job(artifact):
    return Job(artifact, [FEED], "tflite-runtime")


def tried(artifacts, device, plan=QUICK):
    runtimes, feeds = ["tflite-runtime"] * len(artifacts), [[FEED]] * len(artifacts)
    return try_measure(artifacts, device, plan=plan, runtimes=runtimes, feeds=feeds)


# ---- names


@pytest.mark.parametrize(
    "name",
    ["", "board", "ssh:board", "ssh://", "ssh://-oProxyCommand=x", "ssh://a b", "ssh://a;rm -rf", "ssh://u@h:port", "ssh://h?shell=x",
     "adb://", "adb://-s x", "adb://$(x)", "emulated://pentium", "telnet://x"],
)  # fmt: skip
def test_a_name_that_makes_no_sense_must_be_refused(name):
    with pytest.raises(DeviceError, match=r"no device|no address|no serial number|no emulated"):
        find_device(name)


def test_a_name_of_a_file_must_never_reach_a_device(local, tmp_path, order):
    artifact = order("double")
    strange = tmp_path / "a; touch owned; $(x) '\"\n.tflite"
    strange.write_bytes(artifact.path.read_bytes())
    artifact = Artifact(strange, *(getattr(artifact, k) for k in ("format", "precision", "inputs", "outputs", "sha256", "bytes")))
    assert isinstance(tried([artifact], local)[0], Measurement)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(frames.Failure, match="name"):
        local._link.ask("put", [np.zeros(1, np.uint8)], file="../evil.onnx")


def test_a_device_that_is_none_must_not_hide_the_others(local, capsys):
    assert cli.main(["devices", "emulated://pentium", "local", "--json"]) == 2
    said = capsys.readouterr()
    assert json.loads(said.out)["local"]["cores"] >= 1
    assert "There is no emulated 'pentium'" in said.err


# ---- this computer


def test_environment_must_describe_the_machine_in_plain_values(local):
    found = local.environment()
    assert json.loads(json.dumps(found)) == found
    assert found["cpu"]
    assert found["cores"] >= 1
    assert found["packages"]["numpy"] == np.__version__
    assert found["timer_resolution_ns"] >= 1
    assert found.keys() == {"device", *environment()}
    assert found["emulated"] is None


def test_check_must_tell_memory_and_cold_start(local, order):
    found = local.check(job(order("double")))
    assert isinstance(found, Taken)
    assert (found.runtime, found.version) == ("tflite-runtime", "unknown")
    assert 0 < found.idle_bytes <= found.peak_bytes
    assert found.load_ns > 0
    assert found.first_ns > 0


def test_a_far_file_must_predict_like_a_near_one(local, order):
    far = Piped.open(local, order("double"), 1, "tflite-runtime")
    x = np.random.default_rng(0).standard_normal((1000, 4)).astype(np.float32)
    np.testing.assert_array_equal(far.predict(x), 2 * x)
    with pytest.raises(UserError, match="takes 1 input"):
        far.predict(x, x)
    far.close()


def test_files_that_fail_must_not_take_the_others_along(local, order):
    files = [order(*do) for do in (("double",), ("refuse",), ("crash",), ("starve",), ("lie",))]
    good, *bad = tried(files, local)
    assert isinstance(good, Measurement)
    assert len(good.samples_ns) == 3
    assert [type(error) for error in bad] == [FileError] * 4
    refused, crashed, starved, lied = map(str, bad)
    assert refused.endswith("refuse.tflite: this file is not for us.")
    assert crashed.endswith("crash.tflite cannot be run: the runtime crashed (SIGSEGV).")
    assert "want of memory" in starved or "MemoryError" in starved
    assert "\x1b" not in lied
    assert "bad[2J news" in lied


def test_a_file_that_crashes_in_the_middle_must_not_take_the_others_along(local, order):
    late = order("crash", after=10)
    first, crashed, last = tried([order("double"), late, order("double")], local)
    assert isinstance(first, Measurement)
    assert isinstance(last, Measurement)
    assert "the runtime crashed (SIGSEGV)" in str(crashed)
    assert ratio(first, last).value > 0


def test_a_file_that_hangs_must_be_given_up(local, order):
    [error] = tried([order("hang")], local, Plan(rounds=2, timeout_s=1))
    assert isinstance(error, DeviceError)
    assert "did not finish in time" in str(error)


def test_measure_must_raise_what_try_measure_returns(local, order):
    with pytest.raises(FileError, match="not for us"):
        measure([order("double"), order("refuse")], local, plan=QUICK, feeds=[[FEED]] * 2, runtimes=["tflite-runtime"] * 2)


def test_a_runtime_that_is_missing_or_does_not_fit_must_be_named(local, order):
    artifact = order("double")
    for runtime, match in (
        ("onnxruntime", "does not run double.tflite"),
        ("tensorflow", "tensorflow is not installed here"),
        ("tflite-runtime:gpu", "'tflite-runtime:gpu' does not run"),
    ):
        found = local.check(Job(artifact, [FEED], runtime))
        assert isinstance(found, Failed)
        assert match in str(found.error)


def test_a_device_without_numpy_must_be_told_what_to_install(temporary, order, tmp_path):
    (tmp_path / "path" / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\", name='numpy')")
    device = Local()
    found = device.check(job(order("double")))
    device.close()
    assert str(found.error) == "numpy is not installed here: python3 -m pip install numpy"
    assert "on ssh://pi: python3 -m pip install numpy" in str(
        explain({"error": "missing", "detail": "numpy"}, order("x"), "ssh://pi")
    )


def test_a_clock_that_goes_backwards_must_be_one_sentence_and_not_take_the_others_along(local, order):
    first, jumped, last = tried([order("double"), order("clock-back", after=5), order("wait", seconds=0.0)], local)
    assert isinstance(first, Measurement)
    assert isinstance(last, Measurement)
    assert str(jumped) == "The clock of local went backwards while clock-back.tflite was timed: measure again."


def test_only_one_benchmark_may_hold_the_device(local, order):
    with local._locked(120.0):
        other = Local()
        with pytest.raises(DeviceError, match="local is busy: another benchmark"):
            tried([order("double")], other, replace(QUICK, wait_s=0.0))
        other.close()
    assert isinstance(tried([order("double")], local)[0], Measurement)


def test_a_lock_that_cannot_be_taken_must_be_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "edgepress-device.lock").symlink_to(tmp_path / "somebody's file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(supervisor.os.path, "isdir", lambda path: False)
    with pytest.raises(frames.Failure, match=r"edgepress-device\.lock") as raised:
        supervisor._lock()
    assert not (tmp_path / "somebody's file").exists()
    monkeypatch.undo()
    device = scripted(f"say({ {**raised.value.fields, 'bytes': 0}!r})")
    with pytest.raises(DeviceError, match=r"^board cannot be held for a benchmark: .*edgepress-device.lock: .*\.$"):
        device.measure([], 1, vars(QUICK))
    device.close()


def test_an_emulated_device_must_be_refused_before_a_file_is_tried(order):
    device = scripted("say({'bytes': 0, 'error': 'emulated', 'detail': 'qemu runs this process'})")
    with pytest.raises(DeviceError, match=r"board is an emulated machine \(qemu runs this process\), and its time means nothing"):
        device.measure([job(order("double"))], 1, vars(QUICK))
    assert device._sent == {}
    device.close()


def test_an_agent_that_is_killed_must_be_one_sentence_and_leave_nothing(temporary, order):
    device = Local()
    with pytest.raises(DeviceError, match=r"process that runs the files was ended"):
        tried([order("double"), order("kill-agent", after=4)], device)
    device.close()
    again = Local()
    assert isinstance(tried([order("double")], again)[0], Measurement)  # and sweeps up
    again.close()
    assert list(temporary.iterdir()) == []


def test_a_host_that_goes_away_must_leave_nothing(temporary, order):
    device = Local()
    device._put(order("double"))
    assert len(list(temporary.iterdir())) == 1
    device._link._process.stdin.close()
    device._link._process.wait(10)
    assert list(temporary.iterdir()) == []
    device.close()


def test_ctrl_c_must_leave_nothing(temporary, tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from edgepress.targets.artifact import Artifact, Port
from edgepress.targets.measure import measure, Plan
from pathlib import Path
p = (Port("x", (1, 4), "float32"),)
a = Artifact(Path({str(tmp_path / "w.tflite")!r}), "tflite", "fp32", p, p, "1", 10)
print("go", flush=True)
measure([a], plan=Plan(rounds=1000, budget_s=100), feeds=[[np.ones((1, 4), np.float32)]], runtimes=["tflite-runtime"])
"""
    (tmp_path / "w.tflite").write_bytes(b"\0\0\0\0TFL3" + json.dumps({"do": "wait", "seconds": 0.02}).encode())
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout.readline() == b"go\n"
    until(lambda: any(temporary.iterdir()))
    time.sleep(0.5)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=20)
    until(lambda: not any(temporary.iterdir()))


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def test_a_full_disk_must_be_one_sentence_and_not_take_the_others_along(temporary, order, monkeypatch):
    full = temporary.parent / "full"
    full.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", full], capture_output=True).returncode:
        pytest.skip("a small file system needs root and mount")
    try:
        monkeypatch.setenv("TMPDIR", str(full))
        small, big = order("wait", seconds=0.0), order("double", padding="x" * 200_000)
        with contextlib.closing(Local()) as device:
            kept, refused = tried([small, big], device)
        assert isinstance(kept, Measurement)
        assert re.search(r"double.tflite \(200,\d+ bytes\) does not fit on local: .* bytes are free", str(refused))
        assert list(full.iterdir()) == []
    finally:
        subprocess.run(["umount", full], check=True)


def test_a_module_in_the_working_folder_must_not_be_taken(temporary, order, tmp_path, monkeypatch):
    for name in ("json", "numpy", "types"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    device = Local()
    assert isinstance(device.check(job(order("double"))), Taken)
    device.close()


# ---- what a device says


def scripted(lines):
    """A device that runs Python code of ours in place of the agent."""
    head = f"""
import json, os, struct, sys

def say(header):
    text = json.dumps(header).encode()
    os.write(1, struct.pack(">I", len(text)) + text)

sys.stdin.buffer.read(int(sys.stdin.buffer.read(8)))
os.write(1, b"Welcome!" + {frames.GREETING!r})
os.read(0, 1)  # of the request
"""
    program = f"{head}{lines}\nwhile os.read(0, 4096): pass"
    return Piped("board", [sys.executable, "-c", program], lambda code, text: f"lost: {code}")


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        ("os.write(1, b'rubbish that is no frame at all')", "makes no sense"),
        ("os.write(1, struct.pack('>I', 1 << 31))", "makes no sense"),
        ("say({'bytes': -5})", "makes no sense"),
        ("say({'bytes': 0})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'a b': 1}})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'load_average': 'high'}})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'cores': '4', 'mhz': 1.0}})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'celsius': float('nan')}})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'trace': [[1.0, 2.0]]}})", "says of itself makes no sense"),
        ("say({'bytes': 0, 'environment': {'packages': ['numpy']}})", "says of itself makes no sense"),
        ("os.write(1, struct.pack('>I', 60_000) + b'[' * 60_000)", "makes no sense"),
        ("say({'bytes': 0, 'environment': {}, 'arrays': [['|O8', [1]]]})", "makes no sense"),
        ("sys.exit(3)", "lost: 3"),
    ],
)
def test_what_a_device_says_must_be_checked(lines, match):
    device = scripted(lines)
    with pytest.raises(DeviceError, match=match):
        device.environment()
    device.close()


TRIED = {"name": "litert", "version": "1", "peak_bytes": 2, "idle_bytes": 1, "load_ns": 3, "first_ns": 4, "compile_ns": None}


@pytest.mark.parametrize(
    "change",
    [{"name": "a\x1b[2J"}, {"version": 5}, {"peak_bytes": -1}, {"load_ns": 1.5}, {"first_ns": True}, {"compile_ns": "1"}],
)
def test_what_a_device_says_of_a_file_must_be_checked(change):
    assert answers.checked(TRIED).first_ns == 4
    with pytest.raises(ValueError, match=r"no (name|count)"):
        answers.checked({**TRIED, **change})


@pytest.mark.parametrize(
    ("samples", "more"),
    [
        (np.zeros((1, 2), np.int64), {}), (np.zeros((3, 0), np.int64), {}), (np.full((3, 2), -1), {}), (np.zeros((3, 2)), {}),
        (np.ones((3, 2), np.int64), {"joules": float("inf")}), (np.ones((3, 2), np.int64), {"joules": -1.0}),
        (np.ones((3, 2), np.int64), {"loops": -1}), (np.ones((3, 2), np.int64), {"runs": None}),
    ],
)  # fmt: skip
def test_samples_of_a_device_must_be_checked(samples, more):
    entry, tried_before = {"joules": 1.0, "loops": 1, "runs": 6}, answers.checked(TRIED)
    assert answers.filled(tried_before, entry, np.ones((3, 2), np.int64)).samples_ns == ((1, 1),) * 3
    with pytest.raises(ValueError, match="no "):
        answers.filled(tried_before, {**entry, **more}, samples)


def test_control_characters_of_a_device_must_not_reach_the_terminal():
    device = scripted("say({'bytes': 0, 'environment': {'cpu': 'x\\x1b[2J' * 9, 'cores': 2, 'deep': [{'y\\x07': 1}]}})")
    found = device.environment()
    assert found["cpu"].startswith("x[2J")
    assert found["deep"] == [{"y": 1}]
    device.close()


def test_a_device_that_says_nothing_must_be_given_up(monkeypatch):
    monkeypatch.setattr("edgepress.targets.devices.link._SILENCE_S", 0.5)
    device = scripted("import time; time.sleep(60)")
    with pytest.raises(DeviceError, match="nothing came from it"):
        device.environment()
    device._link._process.kill()
    device.close()


def test_a_program_that_is_missing_must_be_named():
    with pytest.raises(DeviceError, match="board cannot be reached: there is no program no-such-program here"):
        Link("board", ["no-such-program"], lambda code, text: "")
    with pytest.raises(DeviceError, match="board cannot be reached: /proc/self/status does not start"):
        Link("board", ["/proc/self/status"], lambda code, text: "")


# ---- a phone


@pytest.fixture
def phone(tmp_path, temporary, monkeypatch):
    """An `adb` that runs what it is given in a shell here, as the real one does on the phone."""
    program = tmp_path / "adb"
    monkeypatch.setenv("EDGEPRESS_ADB", str(program))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def answers(script):
        program.write_text(f'#!/bin/sh\n[ "$1 $3 $4" = "-s shell -T" ] || exit 9\n{script}\n')
        program.chmod(0o755)

    answers('[ "$2" = R58M ] && exec sh -c "$5"')
    return answers


def test_a_phone_must_be_measured_through_adb(phone, order, temporary):
    place = find_device("adb://R58M")
    [measured] = tried([order("double")], place)
    assert isinstance(measured, Measurement)
    assert measured.device == "adb://R58M"
    place.close()
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("says", "match"),
    [
        ("error: device unauthorized.", "has not allowed this computer"),
        ("adb: device 'R58M' not found", "adb does not see it"),
        ("error: device offline", "is offline"),
        ("run-as: unknown package: com.termux", "There is no python3"),
        ("cut", "was lost"),
    ],
)
def test_what_is_wrong_with_a_phone_must_be_said_in_one_sentence(phone, says, match):
    phone(f'echo "{says}" >&2; exit 1')
    place = find_device("adb://R58M")
    with pytest.raises(DeviceError, match=match):
        place.environment()
    place.close()
