"""NVIDIA GPUs without one: what is done to CUDA, told by stand-ins; the few tests that need a GPU are skipped elsewhere."""

import contextlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import gpu as gpu_benchmark
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from edgepress import commands
from edgepress.compare import Benched
from edgepress.compress.errors import DeviceError, UserError
from edgepress.compress.network import trace
from edgepress.tables import bench_table
from edgepress.targets.agent import frames, sessions, torch_session, worker
from edgepress.targets.artifact import Artifact
from edgepress.targets.devices import Job, Taken, find_device
from edgepress.targets.export import export
from edgepress.targets.measure import Measurement, Plan, measure, ratio, try_measure
from edgepress.targets.runtimes import explain, random_feeds

cuda_device = sys.modules["edgepress.targets.devices.cuda"]  # `cuda` there is the function
QUICK = Plan(rounds=5, min_round_s=0.002, warmup_s=0.0)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a PyTorch with CUDA")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trace(nn.Sequential(nn.Linear(6, 3), nn.ReLU()).eval(), torch.zeros(1, 6))


@pytest.fixture(scope="module")
def artifact(network, tmp_path_factory):
    return export(network, tmp_path_factory.mktemp("net") / "net.pt2")


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


# ---- events and graphs


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at, self.done = None, False

    def record(self):
        self.at, self.done = FakeEvent.now, False

    def synchronize(self):
        self.done = True

    def elapsed_time(self, end):
        assert end.done, "not waited for"
        return end.at - self.at


@contextlib.contextmanager
def entered(stack, item):
    stack.append(item)
    yield item
    assert stack.pop() is item


def test_runs_on_a_gpu_must_be_timed_by_events_and_waited_for(artifact, x, monkeypatch):
    session = torch_session.Program.__new__(torch_session.Program)
    session.torch, session.device, session.threads = torch, torch.device("cuda:1"), torch.get_num_threads()
    current = [torch.device("cuda:0")]
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered(current, device))

    def call(*inputs):
        assert current[-1] == torch.device("cuda:1"), "events are recorded on the current device"
        FakeEvent.now += 0.25

    timed = session._by_events(call, [])
    FakeEvent.now += 100.0  # between samples: not theirs
    assert timed(4) == 1_000_000
    assert current == [torch.device("cuda:0")]


class FakeCuda:
    """What PyTorch has for CUDA graphs; a graph holds what was called while it was captured."""

    def __init__(self):
        self.streams, self.said, self.captured = ["main"], [], None
        self.CUDAGraph = lambda: types.SimpleNamespace(calls=[], replay=self.replay)

    def Stream(self):
        return self.named("side")

    def current_stream(self):
        return self.named(self.streams[-1])

    def named(self, name):
        return types.SimpleNamespace(name=name, wait_stream=lambda other: self.said.append(f"{name} waits for {other.name}"))

    def stream(self, stream):
        return entered(self.streams, stream.name)

    @contextlib.contextmanager
    def graph(self, graph):
        self.captured = graph.calls
        with entered(self.streams, "capture"):
            yield

    def replay(self):
        self.said.append("replay")
        for call in self.captured:
            call()


def test_a_graph_must_be_captured_after_a_warm_up_on_another_stream_and_read_its_own_inputs():
    cuda = FakeCuda()
    inputs, output = [torch.tensor([1.0])], torch.zeros(1)

    def call(value):
        cuda.said.append(cuda.streams[-1])
        if cuda.streams[-1] == "capture":
            cuda.captured.append(lambda: output.copy_(2 * value))
        return output

    replay = torch_session._captured(types.SimpleNamespace(cuda=cuda), call, inputs)
    assert cuda.said[0] == "side waits for main"
    assert cuda.said[1:-2] == ["side"] * (len(cuda.said) - 3)
    assert len(cuda.said) >= 6, "three runs before, as PyTorch's manual asks"
    assert cuda.said[-2:] == ["main waits for side", "capture"]
    assert replay(*inputs).tolist() == [2.0]
    assert replay(torch.tensor([5.0])).tolist() == [10.0], "other inputs are copied to where the graph reads"
    version = inputs[0]._version
    assert replay(*inputs).tolist() == [10.0]
    assert inputs[0]._version == version, "its own inputs were copied onto themselves: that would be timed"
    assert cuda.streams == ["main"]


def test_memory_on_a_gpu_must_be_what_pytorch_says_and_take_the_place_of_the_hosts(artifact, x, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: said.append(device) or 4096)
    program = torch_session.open_program(str(artifact.path), "torch", 1)
    assert torch_session.session_of(program, "torch").memory_bytes() is None
    program.device = torch.device("cuda:0")
    session = torch_session.session_of(program, "torch")
    assert session.memory_bytes() == 4096
    assert said == [torch.device("cuda:0")]
    monkeypatch.setattr(worker, "load", lambda *_: session)
    session.run = lambda feeds: [x]
    header = {"file": "net.pt2", "runtime": "torch", "threads": 1, "runs": 2}
    answer, _ = worker._check(str(tmp_path), header, [x])
    assert (answer["peak_bytes"], answer["idle_bytes"]) == (4096, 0)
    assert answer["compile_ns"] is None


def test_compile_time_must_be_shown_where_something_was_compiled(artifact, capsys):
    def row(**more):
        taken = Measurement(artifact, "null", "torch", "2.13", 1, ((1000,), (1001,), (1000,), (1002,), (1000,)), **more)
        return Benched(artifact, taken, ratio(taken, taken))

    eager, compiled = row(), row(compile_ns=12_345_678_901)
    assert commands._benched(compiled)["cold_start"]["compile_ns"] == 12_345_678_901
    assert commands._benched(eager)["cold_start"]["compile_ns"] is None
    commands._print(bench_table([eager, compiled]))
    shown = capsys.readouterr().out
    assert "compile" in shown
    assert "12.3 s" in shown
    commands._print(bench_table([eager, eager]))
    assert "compile" not in capsys.readouterr().out


# ---- what is missing


@pytest.mark.parametrize(
    ("runtime", "lacking", "words"),
    [
        ("torch:inductor", "triton", "triton is not installed here: python3 -m pip install triton"),
        ("torch:max-autotune:fp16", "triton", "triton is not installed here"),
        ("torch:aoti", "toolkit", "aoti needs the headers of the CUDA toolkit .* set CUDA_HOME"),
        ("torch:aoti", "compiler", r"aoti needs a C\+\+ compiler"),
    ],
)
def test_what_compiling_for_a_gpu_lacks_must_be_said_before_it_starts(artifact, runtime, lacking, words, monkeypatch):
    mode = runtime.split(":")[1]
    monkeypatch.setattr(torch_session.shutil, "which", lambda name: None if lacking == "compiler" else f"/usr/bin/{name}")
    found = {"triton": None if lacking == "triton" else "a spec"}
    monkeypatch.setattr(torch_session.importlib.util, "find_spec", found.__getitem__)
    monkeypatch.setattr(torch_session, "_cuda_home", lambda: None if lacking == "toolkit" else "/usr/local/cuda")
    with pytest.raises(frames.Failure) as raised:
        torch_session._check_mode(mode, "cuda")
    with pytest.raises(UserError, match=words):
        raise explain(raised.value.fields, artifact)
    torch_session._check_mode("", "cuda")
    torch_session._check_mode("cudagraphs", "cuda")


# ---- ONNX Runtime


class FakeOrt(types.SimpleNamespace):
    """An ONNX Runtime whose providers are the CPU's underneath; it remembers which were asked for."""

    def __init__(self, starts):
        real = onnxruntime
        super().__init__(
            **{name: getattr(real, name) for name in ("SessionOptions", "ExecutionMode", "disable_telemetry_events")}
        )
        self.__version__, self.asked, self.starts = real.__version__, [], starts

    def get_available_providers(self):
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]

    def preload_dlls(self):
        print("Failed to load a library")

    def InferenceSession(self, path, options, providers):
        self.asked = providers
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        started = providers if self.starts else ["CPUExecutionProvider"]
        return types.SimpleNamespace(get_providers=lambda: started, get_inputs=session.get_inputs, run=session.run)


@pytest.fixture
def onnx_file(network, tmp_path):
    return export(network, tmp_path / "net.onnx")


def test_tensorrt_must_have_cuda_behind_it_and_tell_how_long_it_built(onnx_file, x, monkeypatch, capsys):
    ort = FakeOrt(starts=True)
    monkeypatch.setitem(sys.modules, "onnxruntime", ort)
    session = sessions.load(str(onnx_file.path), "onnxruntime:tensorrt")
    assert ort.asked == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    loading = session.compile_ns()
    session.run([x])
    built = session.compile_ns()
    session.run([x])
    assert session.compile_ns() == built > loading > 0, "the engine of open sizes is built in the first run, and only there"
    assert sessions.load(str(onnx_file.path), "onnxruntime:cuda").compile_ns() is None
    assert ort.asked == ["CUDAExecutionProvider"]
    assert capsys.readouterr().out == ""


def test_a_provider_that_does_not_start_must_be_named(onnx_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", FakeOrt(starts=False))
    with pytest.raises(frames.Failure, match="its CUDAExecutionProvider does not start: a library"):
        sessions.load(str(onnx_file.path), "onnxruntime:cuda")


def test_a_workers_limit_of_addresses_must_make_room_for_cuda():
    code = """
import resource
from edgepress.targets.agent import worker
worker._limit_memory()
first = resource.getrlimit(resource.RLIMIT_AS)
worker._make_room("onnxruntime")
assert resource.getrlimit(resource.RLIMIT_AS) == first != (first[1], first[1])
worker._make_room("onnxruntime:cuda")
assert resource.getrlimit(resource.RLIMIT_AS) == (first[1], first[1])
"""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- the device


@pytest.mark.parametrize("name", ["cuda:", "cuda:x", "cuda://0", "cuda:-1", "cuda:0000"])
def test_a_gpus_name_that_makes_no_sense_must_be_refused(name):
    with pytest.raises(DeviceError, match="There is no device"):
        find_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_computer_without_a_gpu_must_say_so_in_one_sentence(artifact):
    with pytest.raises(DeviceError, match=r"^cuda cannot be used: [^\n]+\.$"):
        measure([artifact], device="cuda", plan=QUICK)


@pytest.mark.parametrize(
    ("found", "words"),
    [(("2.13.0+cpu", None, 0), "built without CUDA"), (("2.9.1", "12.8", 1), "older"),
     (("2.11.0", "12.8", 0), "finds no such NVIDIA GPU"), (("2.11.0", "12.8", 1), None)],
)  # fmt: skip
def test_what_stands_in_the_way_of_a_gpu_must_be_told_apart(found, words):
    problem = cuda_device._problem(dict(zip(("torch", "cuda", "gpus"), found, strict=True)))
    assert (problem is None) if words is None else words in problem


def test_the_second_gpu_must_be_the_second_that_the_user_lets_us_see(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cuda_device._visible(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [cuda_device._visible(i) for i in range(3)] == ["4", "7", "-1"]


def test_a_file_that_the_gpu_would_not_run_must_be_refused(artifact):
    on_gpu = cuda_device._on_gpu
    onnx = Artifact(Path("a.onnx"), "onnx", "fp32", (), (), "", 0)
    tflite = Artifact(Path("a.tflite"), "tflite", "fp32", (), (), "", 0)
    assert on_gpu(artifact, None) == "torch"
    assert on_gpu(onnx, None) == "onnxruntime:cuda"
    with pytest.raises(UserError, match="ask for onnxruntime:cuda"):
        on_gpu(onnx, "onnxruntime")
    with pytest.raises(UserError, match=r"No runtime puts a\.tflite on an NVIDIA GPU"):
        on_gpu(tflite, None)


def test_sensors_that_a_gpu_lacks_must_be_left_out():
    line = "570.86.15, 1980, 2619, 1980, 34, [N/A]\n"
    assert cuda_device._readings(line) == {
        "gpu_driver": "570.86.15", "gpu_mhz": 1980.0, "gpu_memory_mhz": 2619.0, "gpu_most_mhz": 1980.0, "gpu_celsius": 34.0,
    }  # fmt: skip
    assert cuda_device._readings("No devices were found\n") == {}


def test_the_cuda_device_must_drive_an_agent_told_where_to_run(artifact, monkeypatch):
    """All of the device but the GPU: the agent's programs run on the CPU instead."""
    monkeypatch.setattr(cuda_device, "_probe", lambda name, visible: {"gpu": "none", "uuid": ""})
    monkeypatch.setattr(cuda_device, "_variables", lambda visible: {"EDGEPRESS_TORCH_DEVICE": "cpu"})
    filled = sys.modules["edgepress.targets.devices.answers"].filled
    with_energy = lambda taken, entry, samples: filled(taken, {**entry, "joules": 1.0}, samples)  # noqa: E731
    monkeypatch.setattr("edgepress.targets.devices.answers.filled", with_energy)
    device = cuda_device.cuda("cuda")
    try:
        assert device.environment()["gpu"] == "none"
        outcomes, seen = device.measure([Job(artifact, random_feeds(artifact))], 1, vars(QUICK))
        assert isinstance(outcomes[0], Taken)
        assert outcomes[0].runtime == "torch"
        assert outcomes[0].joules is None, "the sensor is the CPU's"
        assert "gpu_after" in seen
        opened = device.open(artifact)
        assert opened.predict(np.zeros((2, 6), np.float32)).shape == (2, 3)
    finally:
        device.close()


@gpu
@pytest.mark.parametrize("runtime", ["torch", "torch:cudagraphs", "torch:inductor", "torch:aoti", "torch:cudagraphs:fp16"])
def test_a_gpu_must_answer_as_the_network_does_and_be_measured(artifact, network, x, runtime):
    device = find_device("cuda")
    try:
        np.testing.assert_allclose(device.open(artifact, runtime=runtime).predict(x), network.predict(x), atol=2e-2)
        (taken,) = try_measure([artifact], device, plan=QUICK, runtimes=[runtime])
        assert taken.p50_ns > 0
        assert taken.environment["gpu"]
    finally:
        device.close()


def test_two_of_four_must_keep_the_two_largest_of_every_four():
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, 0.0, 0.0, -1.0, 0.5]])
    assert gpu_benchmark.two_of_four(weight).tolist() == [[0.0, -4.0, 3.0, 0.0, 0.0, 0.0, -1.0, 0.5]]


def test_semi_structured_must_take_linear_layers_alone(monkeypatch):
    """Where there is no such GPU: which weights are handed over, not what becomes of them."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight * 2)
    module = nn.Sequential(nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Linear(4, 4))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    after = gpu_benchmark.semi_structured(module, ["0.weight", "1.weight"]).state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"0.weight"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_must_end_well_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu_benchmark.main() == 0
    assert "Nothing was measured" in capsys.readouterr().out


ONLY = """
import sys
from importlib.machinery import PathFinder

class Only(PathFinder):
    # of what is installed, only PyTorch with what it needs itself, numpy and edgepress are there
    allowed = {"torch", "torchgen", "functorch", "numpy", "triton", "nvidia", "typing_extensions", "sympy", "mpmath", "filelock",
               "networkx", "jinja2", "markupsafe", "fsspec", "setuptools", "packaging", "pkg_resources", "_distutils_hack"}

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        spec = super().find_spec(name, path, target)
        places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec and path is None else []
        installed = {place.rpartition("site-packages/")[2].replace(".", "/").split("/")[0] for place in places}
        return None if name in installed and name not in cls.allowed and not name.startswith("__editable__") else spec

sys.meta_path[:] = [Only if finder is PathFinder else finder for finder in sys.meta_path]
"""
BARE = """
import importlib.util, sys
from edgepress.targets.artifact import read_artifact
from edgepress.targets.measure import Plan, measure
(m,) = measure([read_artifact(sys.argv[1])], plan=Plan(rounds=2, min_round_s=0.001, warmup_s=0.0))
print(m.runtime)
for name in ("onnx", "onnxruntime", "ai_edge_litert", "litert_torch", "nncf", "rich", "yaml", "safetensors"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    print(name, "was there")
"""


@pytest.fixture
def bare(tmp_path):
    """An environment for Python processes, the agent's among them, that can import PyTorch and numpy and no other package."""
    folder = tmp_path / "only"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(ONLY)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_measuring_on_a_gpu_must_need_pytorch_and_numpy_alone(artifact, bare):
    done = subprocess.run([sys.executable, "-c", BARE, artifact.path], env=bare, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["torch"], done.stderr


def test_the_benchmark_and_the_command_line_must_need_pytorch_and_numpy_alone(artifact, bare):
    commands = (
        [gpu_benchmark.__file__, "--cpu", "--networks", "resnet8", "--batches", "1", "--modes", "eager", "--precisions", "fp32",
         "--rounds", "5"],
        ["-m", "edgepress", "bench", str(artifact.path), "--json"],
    )  # fmt: skip
    for command in commands:
        done = subprocess.run([sys.executable, *command], env=bare, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout[done.stdout.index("{") :])
        (row,) = found.get("rows") or found["files"]
        assert row["runtime"].startswith("torch")
