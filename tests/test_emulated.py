"""The emulated Arm board, and that nothing on it is ever taken for a time. EDGEPRESS_SLOW=1 adds what takes longer."""

import contextlib
import dataclasses
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgepress.compress.errors import DeviceError
from edgepress.compress.network import trace
from edgepress.targets.agent import machine
from edgepress.targets.artifact import read_artifact
from edgepress.targets.devices import Failed, Job, Taken, find_device
from edgepress.targets.devices.count import CLASSES, InstructionCount, count_instructions
from edgepress.targets.devices.emulated import CORES, board_command
from edgepress.targets.export import export
from edgepress.targets.measure import Measurement, Plan, measure
from edgepress.targets.runtimes import open_runtime, random_feeds

BOARD = Path(__file__).parent / "arm_board"
slow = pytest.mark.skipif(not os.environ.get("EDGEPRESS_SLOW"), reason="slow: set EDGEPRESS_SLOW=1")
core = pytest.mark.parametrize("core", ["cortex-a76", "cortex-a53"])


def cores():
    spec = importlib.util.spec_from_file_location("cores", BOARD / "cores.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def reachable(host):
    with contextlib.suppress(OSError), socket.create_connection((host, 80), 3):
        return True
    return False


def setting(folder):
    """What board.sh is told: the same versions as here, since only those answer with the same bits."""
    wheels = " ".join(f"{name}=={version(name)}" for name in ("numpy", "onnxruntime", "ai-edge-litert"))
    return {**os.environ, "EDGEPRESS_BOARD": str(folder), "PYTHON": sys.executable, "WHEELS": wheels}


@pytest.fixture(scope="session")
def made(request):
    """The board's folder: the one in EDGEPRESS_BOARD, or one in pytest's cache, brought up to date."""
    folder = Path(os.environ.get("EDGEPRESS_BOARD") or request.config.cache.mkdir("arm-board"))
    lacking = [name for name in ("apt-get", "dpkg-deb", "gcc") if shutil.which(name) is None]
    if lacking:
        pytest.skip(f"the emulated board is made with {', '.join(lacking)}, which this computer lacks")
    if os.uname()[::4] != ("Linux", "x86_64"):
        pytest.skip("the emulated board needs Linux on x86-64")
    done = subprocess.run([BOARD / "board.sh", "setup"], env=setting(folder), capture_output=True, text=True)
    if done.returncode and not reachable("deb.debian.org"):
        pytest.skip("the emulated board is made from Debian's packages, and there is no network")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def board(made, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_BOARD", str(made))
    return made


@contextlib.contextmanager
def emulated(core):
    device = find_device(f"emulated://{core}")
    try:
        yield device
    finally:
        device.close()


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return trace(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5)), torch.zeros(1, 3, 12, 12))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).random((8, 3, 12, 12), np.float32)


@pytest.fixture(scope="module")
def exported(network, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    return {
        precision: export(network, folder / f"{precision}.onnx", precision, [torch.from_numpy(images)])
        for precision in ("fp32", "int8")
    }


@pytest.fixture
def published(reference_data):
    return {p: read_artifact(reference_data / "deploy" / f"mlperf_resnet8_{p}.tflite") for p in ("float", "int8")}


def answers(artifact, device, feeds):
    with contextlib.closing(device.open(artifact)) as runtime:
        return runtime.run(feeds), (runtime.name, runtime.version)


def close_to(far, near):
    return all(np.abs(f - n).max() <= 1e-5 * np.abs(n).max() for f, n in zip(far, near, strict=True))


# ---- the board


def test_cores_must_be_those_that_the_board_is_made_with():
    assert tuple(cores().CORES) == CORES


def test_a_missing_board_must_be_said_with_the_way_to_make_one(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRESS_BOARD", str(tmp_path))
    with pytest.raises(DeviceError, match=f"no emulated cortex-a76 in {tmp_path}: make one with tests/arm_board/board.sh setup"):
        find_device("emulated://cortex-a76")


def test_a_core_must_be_seen_as_itself_one_after_the_other(board):
    seen = {}
    for core in ("cortex-a76", "cortex-a53"):
        with emulated(core) as device:
            seen[core] = device.environment()
    for core, environment in seen.items():
        assert (environment["architecture"], environment["cores"]) == ("aarch64", 1)
        assert environment["cpu"] == f"emulated {core}"
        assert environment["emulated"] == "board.json says so"
        assert environment["celsius"] is environment["power_sensor"] is environment["mhz"] is None
    assert "asimddp" in seen["cortex-a76"]["cpu_features"]
    assert "asimddp" not in seen["cortex-a53"]["cpu_features"]


def test_files_must_be_checked_there_and_never_timed(board, published, tmp_path):
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(published["int8"].path.read_bytes()[:-20_000])
    broken = dataclasses.replace(published["int8"], path=broken, sha256="")
    with emulated("cortex-a76") as device:
        job = Job(published["int8"], random_feeds(published["int8"]))
        assert isinstance(device.check(job), Taken)
        failed = device.check(dataclasses.replace(job, artifact=broken))
        assert isinstance(failed, Failed)
        assert "broken.tflite on emulated://cortex-a76" in str(failed.error)
        with pytest.raises(DeviceError, match=r"is an emulated machine .* not timed"):
            measure([published["int8"]], device, plan=Plan(rounds=2))


# ---- what runs on an emulator must know it, whatever /proc says


def test_this_computer_must_not_be_taken_for_an_emulated_one():
    assert machine.emulated() is None


def test_emulation_must_be_seen_behind_a_made_up_proc(board, tmp_path, monkeypatch):
    (tmp_path / "rootfs").symlink_to(board / "rootfs")
    (tmp_path / "made").touch()
    cores().make(tmp_path, "cortex-a76")
    (tmp_path / "roots/cortex-a76/board/board.json").unlink()
    monkeypatch.setenv("EDGEPRESS_BOARD", str(tmp_path))
    folder = Path(machine.__file__).parents[1]
    code = (
        f"import sys, os; sys.path.append({str(folder)!r}); from agent import machine as m; print(m._cpuinfo('CPU implementer'), "
        "m.emulated(), m._lacks_robust_lists(), os.path.basename(os.readlink('/proc/self/exe')), sep='|')"
    )
    said = subprocess.run(board_command("cortex-a76", ["-c", code]), capture_output=True, text=True, check=True).stdout
    assert said.strip() == "0x41|a program for another processor runs this process|True|python3.11"


@pytest.mark.parametrize(("content", "why"), [("{broken", None), ("[]", None), ('{"emulated": true}', "board.json says so")])
def test_what_a_board_says_of_itself_must_be_read_with_care(content, why, monkeypatch):
    real = Path.read_text
    said = lambda path, *a, **k: content if str(path) == "/board/board.json" else real(path, *a, **k)  # noqa: E731
    monkeypatch.setattr(Path, "read_text", said)
    assert machine.emulated() == why


def test_a_program_for_another_processor_must_be_seen(tmp_path, monkeypatch):
    other = bytearray(Path(sys.executable).read_bytes()[:64])
    other[18] ^= 0xFF
    (tmp_path / "python").write_bytes(other)
    monkeypatch.setattr(machine.sys, "executable", str(tmp_path / "python"))
    assert machine.emulated() == "a program for another processor runs this process"


# ---- answers


@core
def test_int8_answers_must_be_the_same_bits_as_here(board, core, exported, images, published):
    with emulated(core) as device:
        far, ran = answers(exported["int8"], device, [images])
        assert ran == ("onnxruntime", ort.__version__)
        options = ort.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", "1")  # else x86 without VNNI saturates sums
        near = ort.InferenceSession(exported["int8"].path, options, providers=["CPUExecutionProvider"])
        assert np.array_equal(far[0], near.run(None, {near.get_inputs()[0].name: images})[0])
        feeds = random_feeds(published["int8"])
        far, ran = answers(published["int8"], device, feeds)
        with contextlib.closing(open_runtime(published["int8"])) as here:
            assert ran == (here.name, here.version)
            assert np.array_equal(far[0], here.run(feeds)[0])


@pytest.mark.parametrize("core", ["cortex-a76", *(pytest.param(core, marks=slow) for core in CORES[1:] if core != "cortex-a76")])
def test_float_answers_must_agree_with_those_here(board, core, exported, images, published):
    with emulated(core) as device:
        for artifact, feeds in ((exported["fp32"], [images]), (published["float"], random_feeds(published["float"]))):
            with contextlib.closing(open_runtime(artifact)) as here:
                assert close_to(answers(artifact, device, feeds)[0], here.run(feeds))


@slow
def test_a_32_bit_board_must_run_files_with_the_runtime_that_it_has(board, published):
    subprocess.run([BOARD / "board.sh", "setup32"], env=setting(board), check=True)
    with emulated("cortex-a7") as device:
        environment = device.environment()
        assert environment["architecture"] == "armv7l"
        assert environment["emulated"] == "board.json says so"
        for precision, artifact in published.items():
            feeds = random_feeds(artifact)
            far, (name, _) = answers(artifact, device, feeds)
            assert name == "tflite-runtime"
            with contextlib.closing(open_runtime(artifact, runtime="litert:no-xnnpack")) as here:
                near = here.run(feeds)
            assert np.array_equal(far[0], near[0]) if precision == "int8" else close_to(far, near)
    with pytest.raises(DeviceError, match="64-bit cores only"):
        count_instructions(published["int8"], "cortex-a7")


# ---- instructions


def test_a_count_must_have_no_place_for_a_time():
    fields = {field.name for field in dataclasses.fields(InstructionCount)}
    assert not [name for name in fields if name.endswith(("_ns", "_s", "_ms", "seconds"))]
    required = {f.name for f in dataclasses.fields(Measurement) if f.default is f.default_factory is dataclasses.MISSING}
    assert not required <= fields


def test_instructions_must_be_those_of_the_core(board, published):
    repeats = {"cortex-a76": 2, "cortex-a53": 1}
    counts = {core: count_instructions(published["int8"], core, repeats=n, runs=2) for core, n in repeats.items()}
    assert counts["cortex-a76"].spread <= 0.005
    for core, count in counts.items():
        assert (count.core, count.runtime, count.repeats) == (core, "litert", repeats[core])
        assert sum(count.by_class.values()) == pytest.approx(count.per_inference, abs=len(CLASSES))
    # MLPerf Tiny's image network takes 12.5 million multiply-adds; SDOT does 16
    assert 12.5e6 / 16 < counts["cortex-a76"].by_class["dot_i8"] < 1.1 * 12.5e6 / 16
    assert "dot_i8" not in counts["cortex-a53"].by_class
    assert counts["cortex-a53"].by_class["mul_long"] > 12.5e6 / 16
    assert counts["cortex-a53"].per_inference > counts["cortex-a76"].per_inference


@slow
def test_the_start_must_cancel_out_of_a_count(board, published, exported, images):
    few, many = (count_instructions(published["int8"], "cortex-a76", repeats=1, runs=runs) for runs in (2, 16))
    assert few.per_inference == pytest.approx(many.per_inference, rel=0.005)
    count = count_instructions(exported["int8"], "cortex-a76", feeds=[images[:1]])
    assert count.runtime == "onnxruntime"
    assert count.spread <= 0.005
    assert count.by_class["dot_i8"] > 8 * 27 * 144 / 16  # its first layer


@slow
def test_a_runtime_that_the_board_lacks_must_be_named(board, published):
    with pytest.raises(DeviceError, match="tflite-runtime is not installed on emulated://cortex-a76"):
        count_instructions(published["int8"], "cortex-a76", "tflite-runtime")


# ---- the same board over SSH, with a kernel's own /proc


@pytest.fixture
def served(board, monkeypatch):
    """The port of the board's SSH server."""
    if os.geteuid():
        pytest.skip("the board's SSH server needs root")
    if shutil.which("ssh") is None:
        pytest.skip("there is no ssh on this computer")
    if subprocess.run(["unshare", "--user", "--mount", "--pid", "--fork", "true"], capture_output=True).returncode:
        pytest.skip("the board's SSH server needs user namespaces, and this system refuses them")
    if tuple(int(n) for n in os.uname().release.split("-")[0].split(".")[:2]) < (6, 7):
        pytest.skip("the board's SSH server needs Linux 6.7: binfmt_misc in a namespace")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    subprocess.run([BOARD / "board.sh", "start", "cortex-a76", str(port)], check=True)
    monkeypatch.setenv("EDGEPRESS_SSH", f"ssh -F {board}/ssh_config")
    try:
        yield port
    finally:
        subprocess.run([BOARD / "board.sh", "stop"], check=True)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), "the board's SSH server did not end"
    assert [path.name for path in (board / "rootfs/tmp").iterdir() if path.name != "edgepress-device.lock"] == []


def test_a_board_over_ssh_must_answer_and_never_be_timed(served, published):
    device, feeds = find_device(f"ssh://root@127.0.0.1:{served}"), random_feeds(published["int8"])
    try:
        environment = device.environment()
        assert environment["architecture"] == "aarch64"
        assert "asimddp" in environment["cpu_features"]
        assert environment["emulated"] == "qemu runs this process"
        far, _ = answers(published["int8"], device, feeds)
        with contextlib.closing(open_runtime(published["int8"])) as here:
            assert np.array_equal(far[0], here.run(feeds)[0])
        with pytest.raises(DeviceError, match=r"is an emulated machine .* not timed"):
            measure([published["int8"]], device, plan=Plan(rounds=2))
    finally:
        device.close()
