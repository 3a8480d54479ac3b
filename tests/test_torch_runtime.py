import ast
import contextlib
import io
import json
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from edgepress.compress.errors import FileError, UserError
from edgepress.compress.network import trace
from edgepress.targets.agent import pt2, torch_session
from edgepress.targets.agent.sessions import Session
from edgepress.targets.agent.turns import Turn, interleave
from edgepress.targets.artifact import Artifact, read_artifact
from edgepress.targets.export import export
from edgepress.targets.measure import Plan, measure
from edgepress.targets.runtimes import open_runtime, random_feeds

QUICK = Plan(rounds=5, min_round_s=0.002, warmup_s=0.0)
compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler: g++ is not installed")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.norm = nn.Linear(6, 3), nn.BatchNorm1d(6)

    def forward(self, x):
        return torch.relu(self.head(self.norm(x)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return trace(Net().eval(), torch.zeros(1, 6))


@pytest.fixture(scope="module")
def artifact(network, tmp_path_factory):
    return export(network, tmp_path_factory.mktemp("net") / "net.pt2")


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)


def saved(tmp_path, module, inputs, name="net.pt2", **more):
    """A stranger's file, as torch.export.save writes it, with its sample inputs."""
    path = tmp_path / name
    torch.export.save(torch.export.export(module.eval(), inputs, **more), path)
    return path


def rewritten(path, change):
    """The file with entries changed: ``change`` takes and gives the name and bytes of each, or None to leave it out."""
    target, before = path.with_name(f"changed_{path.name}"), zipfile.ZipFile(path)
    with zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            for name, content in change(entry.filename, before.read(entry)):
                after.writestr(name, content)
    return target


def with_model(path, edit):
    """The file with its graph's JSON edited in place."""

    def change(name, content):
        if name.endswith("/models/model.json"):
            program = json.loads(content)
            edit(program)
            content = json.dumps(program).encode()
        yield name, content

    return rewritten(path, change)


# ---- reading


def test_an_exported_file_must_be_described_and_hold_no_pickle(artifact, network):
    assert (artifact.format, artifact.precision) == ("pt2", "fp32")
    assert [(p.name, p.shape, p.dtype) for p in artifact.inputs] == [("x", (None, 6), "float32")]
    assert [(p.name, p.shape) for p in artifact.outputs] == [("output", (None, 3))]
    entries = {entry.filename.split("/", 1)[1]: entry.file_size for entry in zipfile.ZipFile(artifact.path).infolist()}
    assert entries["data/sample_inputs/model.pt"] == 0
    pruned = network.then(**{"pass": "Prune", "part": 0.5})
    assert export(pruned, artifact.path.with_name("b.pt2")).history == ({"pass": "Prune", "part": 0.5},)


def test_a_strangers_file_must_be_described_and_run(tmp_path):
    class Two(nn.Module):
        def forward(self, image, flags, *, bias):
            return {"sum": image + bias, "count": flags.sum()}

    inputs = torch.zeros(2, 3).half(), torch.ones(4, dtype=torch.bool)
    program = torch.export.export(Two(), inputs, {"bias": torch.ones(3).half()})
    torch.export.save(program, tmp_path / "two.pt2")
    found = read_artifact(tmp_path / "two.pt2")
    assert [(p.name, p.shape, p.dtype) for p in found.inputs] == [
        ("image", (2, 3), "float16"), ("flags", (4,), "bool"), ("bias", (3,), "float16"),
    ]  # fmt: skip
    assert [(p.name, p.dtype) for p in found.outputs] == [("output_0", "float16"), ("output_1", "int64")]
    total, count = open_runtime(found).run(
        [np.full((2, 3), 2, np.float16), np.array([True, False, True, True]), np.ones(3, "f2")]
    )
    assert total.tolist() == [[3.0] * 3] * 2
    assert count == 3


@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32")])
def test_precision_must_be_that_of_the_weights(tmp_path, dtype, precision):
    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2, dtype=dtype)

        def forward(self, x):
            return self.linear(x.to(dtype)).float()

    assert read_artifact(saved(tmp_path, Casting(), (torch.zeros(1, 4),))).precision == precision


def marker(tmp_path):
    return tmp_path / "was_run"


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _pickled_weight(path, evil):
    def change(name, content):
        if name.endswith("model_weights_config.json"):
            config = json.loads(content)
            next(iter(config["config"].values()))["use_pickle"] = True
            content = json.dumps(config).encode()
        yield name, pickle.dumps(evil) if name.endswith("weight_0") else content

    return rewritten(path, change)


def _pickled_inputs(path, evil):
    def change(name, content):
        if name.endswith("sample_inputs/model.pt"):
            buffer = io.BytesIO()
            torch.save((evil,), buffer)
            content = buffer.getvalue()
        yield name, content

    return rewritten(path, change)


def _called(path, evil):
    def edit(program):
        node = program["graph_module"]["graph"]["nodes"][0]
        node["target"] = "torch.os.mkdir"
        node["inputs"] = [{"name": "path", "arg": {"as_string": evil.path}, "kind": 1}]

    return with_model(path, edit)


def _evaluated(path, evil):
    def edit(program):
        sizes = program["graph_module"]["graph"]["tensor_values"]["x"]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": f"__import__('os').mkdir('{evil.path}') or Integer(5)", "hint": None}}

    return with_model(path, edit)


def _imported(path, evil):
    def edit(program):
        call = next(entry for entry in program["graph_module"]["module_call_graph"] if entry["fqn"] == "")
        context = json.dumps({"__enum__": True, "fqn": "antigravity:x", "name": "x"})
        call["signature"]["out_spec"] = json.dumps([1, {"type": "builtins.list", "context": context, "children_spec": []}])

    return with_model(path, edit)


def _opaque(path, evil):
    def change(name, content):
        yield name, content
        if name.endswith("weight_0"):
            yield name.replace("weights/weight_0", "constants/opaque_obj_0"), pickle.dumps(evil)

    return rewritten(path, change)


@pytest.mark.parametrize(
    ("change", "words"),
    [(_pickled_weight, "is a pickle"), (_called, "calls 'torch.os.mkdir'"), (_evaluated, "no plain expression"),
     (_imported, "nested in a way"), (_opaque, "entry 'data/constants/opaque_obj_0'")],
)  # fmt: skip
def test_what_would_run_a_strangers_code_must_be_refused(tmp_path, artifact, change, words):
    path = change(Path(shutil.copy(artifact.path, tmp_path)), Evil(marker(tmp_path)))
    with pytest.raises(FileError, match=words):
        read_artifact(path)
    forged = Artifact(path, "pt2", "fp32", artifact.inputs, artifact.outputs, "", 0)
    with pytest.raises(FileError, match=words):  # also where the description was not asked for
        open_runtime(forged)
    assert not marker(tmp_path).exists()


def test_sample_inputs_that_torch_would_unpickle_unsafely_must_be_refused_before_it_does(tmp_path):
    path = _pickled_inputs(saved(tmp_path, Net(), (torch.zeros(2, 6),)), Evil(marker(tmp_path)))
    described = read_artifact(path)  # does not look at them
    with pytest.raises(FileError, match="sample inputs are a pickle"):
        open_runtime(described)
    assert not marker(tmp_path).exists()
    with contextlib.suppress(TypeError):  # of a log line of torch's own
        torch.export.load(path)
    assert marker(tmp_path).exists(), "the file is harmless, so this test shows nothing"


@pytest.mark.parametrize(
    "target",
    ["torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "torch.ops.load_library", "torch.ops.aten.__class__",
     "_operator.attrgetter", "torch.load", "torch.sym_int.__globals__"],
)  # fmt: skip
def test_operators_that_reach_out_must_be_refused(tmp_path, artifact, target):
    def edit(program):
        program["graph_module"]["graph"]["nodes"][0]["target"] = target

    with pytest.raises(FileError, match="does not know as an operator"):
        read_artifact(with_model(Path(shutil.copy(artifact.path, tmp_path)), edit))


def test_a_damaged_file_must_be_refused_in_a_sentence(tmp_path, artifact):
    data = artifact.path.read_bytes()
    for content, words in ((b"", "truncated"), (data[: len(data) // 2], "truncated"), (b"PK\x03\x04" + bytes(50), "truncated")):
        path = tmp_path / "bad.pt2"
        path.write_bytes(content)
        with pytest.raises(FileError, match=words):
            read_artifact(path)


def test_a_networks_own_folder_without_weights_must_be_refused(tmp_path, network):
    network.save(tmp_path / "saved")
    with pytest.raises(FileError, match="holds no numbers for the weight"):
        read_artifact(tmp_path / "saved" / "program.pt2")


def test_an_open_size_must_be_readable_in_every_form(tmp_path):
    class Odd(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y])[::2].reshape(-1, 2), x.shape[0] * torch.ones(x.shape[0] // 2 + 1)

    batch = torch.export.Dim("batch", min=2, max=64)
    path = saved(tmp_path, Odd(), (torch.zeros(4, 4), torch.zeros(4, 4)), dynamic_shapes=({0: batch}, {0: batch}))
    found = read_artifact(path)
    assert found.inputs[0].shape == (None, 4)
    feeds = random_feeds(found)
    feeds = [np.repeat(feed, 6, 0) for feed in feeds]
    first, second = open_runtime(found).run(feeds)
    assert first.shape == (12, 2)
    assert second.tolist() == [6.0] * 4


# ---- running


@pytest.mark.parametrize("runtime", ["torch", "torch:fp16", "torch:bf16"])
def test_eager_must_answer_as_the_network_does(artifact, network, x, runtime):
    opened, expected = open_runtime(artifact, runtime=runtime), network.predict(x)
    answer = opened.predict(x)
    assert answer.dtype == np.float32
    assert opened.name == runtime
    difference = np.abs(answer - expected).max()
    assert difference <= {"torch": 1e-6, "torch:fp16": 5e-3, "torch:bf16": 5e-2}[runtime]
    assert (difference > 0) == (runtime != "torch"), "a conversion that changes nothing did not take place"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_program_must_move_whole_to_another_device_and_type(tmp_path, dtype):
    """The device that every PyTorch has beside the CPU stands for a GPU."""

    class Made(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.fixed = nn.Parameter(torch.ones(6)), torch.full((6,), 2.0)
            self.register_buffer("counts", torch.arange(6))

        def forward(self, x):
            made = torch.arange(6, device=x.device) + self.counts + torch.tensor([1, 2, 3, 4, 5, 6])
            return x * self.weight + self.fixed + made + torch.zeros(x.shape[0], 6, dtype=torch.float32, device=x.device)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(saved(tmp_path, Made(), (torch.zeros(2, 6),)))
    module = torch_session._module(torch, program, torch.device("meta"), dtype)
    answer = module(torch.zeros(2, 6, device="meta", dtype=dtype))
    assert answer.device.type == "meta"
    assert answer.dtype == (dtype or torch.float32)


def test_threads_of_this_process_must_be_as_before(artifact, x):
    before = torch.get_num_threads()
    open_runtime(artifact, threads=before + 1).predict(x)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("runtime", "words"),
    [("torch:fast", "is run by torch, torch:inductor"), ("torch:bf16:inductor", "is run by torch"), ("litert", "is run by torch"),
     ("torch:cudagraphs", "need an NVIDIA GPU")],
)  # fmt: skip
def test_a_runtime_that_does_not_fit_must_be_refused(artifact, runtime, words):
    with pytest.raises(FileError, match=words):
        open_runtime(artifact, runtime=runtime)
    with pytest.raises(UserError, match="is run by 'onnxruntime'"):
        open_runtime(Artifact(artifact.path.with_suffix(".onnx"), "onnx", "fp32", (), (), "", 0), runtime="torch")


def test_a_missing_compiler_must_be_said(artifact, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for runtime in ("torch:inductor", "torch:aoti"):
        with pytest.raises(FileError, match=r"needs a C\+\+ compiler"):
            open_runtime(artifact, runtime=runtime)


@compiler
def test_a_compiled_program_must_be_measured_by_an_agent_that_leaves_nothing(artifact, tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    eager, compiled = measure([artifact] * 2, plan=QUICK, runtimes=["torch", "torch:aoti"])
    assert (eager.runtime, compiled.runtime) == ("torch", "torch:aoti")
    assert compiled.first_ns > 100 * compiled.p50_ns > 0, "compiling is in the first run, not in the latency"
    assert compiled.first_ns >= compiled.compile_ns > 100 * compiled.p50_ns
    assert eager.compile_ns is None
    assert list((tmp_path / "tmp").iterdir()) == []


@compiler
def test_a_compiled_program_must_answer_as_the_network_does_and_tell_its_compile_time(
    artifact, network, x, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp_cache_precompile_headers", False)  # they go elsewhere
    session = torch_session.load_program(str(artifact.path), "torch:inductor:bf16", 1)
    np.testing.assert_allclose(session.run([x])[0], network.predict(x), atol=5e-2)
    once = session.compile_ns()
    session.run([x])
    assert session.compile_ns() == once > 0


# ---- timing


def test_a_session_with_a_stopwatch_must_be_timed_by_it():
    asked = []

    def stopwatch(feeds):
        assert feeds == ["x"]
        return lambda loops: asked.append(loops) or loops * 1_000_000

    session = Session("torch", "1", lambda feeds: pytest.fail("the clock was put around run"))
    session.stopwatch, session.step_ns = stopwatch, 500_000
    turn = Turn(session, ["x"])
    interleave([turn], {**vars(QUICK), "rounds": 5})
    assert turn.loops == 50, "a hundred steps of its clock"
    assert {sample for samples in turn.rounds for sample in samples} == {1_000_000}
    assert 50 in asked


def test_the_agents_part_must_be_python_3_9():
    for module in (pt2, torch_session):
        assert ast.parse(Path(module.__file__).read_text(), feature_version=(3, 9)).body
