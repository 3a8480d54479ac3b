import importlib.util
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from conftest import DATA
from torch import nn

from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.compress.network import trace
from edgepress.targets import microcontroller, tflm
from edgepress.targets.artifact import Artifact, Port, read_artifact
from edgepress.targets.export import export
from edgepress.targets.microcontroller import Microcontroller, check_microcontroller, write_c_array

needs_tflm = pytest.mark.skipif(
    importlib.util.find_spec("tflite_micro") is None, reason="needs the package tflite-micro: pip install tflite-micro"
)


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3, stride=2))
    network = trace(net.eval(), torch.randn(1, 3, 16, 16))
    path = tmp_path_factory.mktemp("conv") / "conv.tflite"
    return export(network, path, "int8", [torch.randn(4, 3, 16, 16)])


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    network = trace(net.eval(), torch.randn(1, 64))
    return export(network, tmp_path_factory.mktemp("linear") / "linear.tflite", "int8", [torch.randn(64, 64)])


def saved(model, path):
    path.write_bytes(tflm._packed(model))
    return read_artifact(path)


def changed_kinds(artifact, path, changes):
    """A copy of the file in which some kinds of operators are others; a text is a custom operator."""
    model = tflm._model(artifact.path.read_bytes())
    for code in model.operatorCodes:
        new = changes.get(tflm._kind(code))
        if isinstance(new, str):
            code.customCode, new = new, schema.BuiltinOperator.CUSTOM
        if new is not None:
            code.builtinCode, code.deprecatedBuiltinCode = new, min(new, 127)
    return saved(model, path)


# ---- in TFLM


@needs_tflm
def test_an_int8_file_of_ours_must_run_and_equal_the_reference_bit_for_bit(conv):
    found = check_microcontroller(conv)
    assert (found.reason, found.ok, found.exact, found.max_lsb, found.missing) == ("", True, True, 0, ())
    assert {"CONV_2D", "MAX_POOL_2D"} <= set(found.operators)
    assert found.examples == 8
    assert found.version


@needs_tflm
def test_the_arena_must_be_the_smallest_that_works(conv, linear):
    # in some arenas that are too small TFLM crashes, so each is tried in a process of its own
    code = "import sys, tflite_micro as t; t.runtime.Interpreter.from_file(sys.argv[1], arena_size=int(sys.argv[2]))"
    for artifact in (conv, linear):
        needed = check_microcontroller(artifact).arena_bytes
        command = [sys.executable, "-c", code, artifact.path]
        assert subprocess.run([*command, str(needed)], capture_output=True).returncode == 0
        assert subprocess.run([*command, str(needed - 16)], capture_output=True).returncode != 0


@needs_tflm
def test_an_arena_that_is_too_small_must_be_the_reason(conv):
    needed = check_microcontroller(conv).arena_bytes
    assert check_microcontroller(conv, arena_bytes=needed).ok
    found = check_microcontroller(conv, arena_bytes=needed - 1)
    assert not found.ok
    assert found.exact
    assert found.reason == f"conv.tflite needs an arena of {needed:,} bytes, and there are {needed - 1:,}."


@needs_tflm
def test_rounding_of_fully_connected_must_be_named_and_be_no_fault(linear):
    found = check_microcontroller(linear)
    if found.exact:
        pytest.skip("this version of LiteRT rounds as TFLM does")
    assert found.ok
    assert found.max_lsb >= 1
    assert found.differing
    assert all(re.fullmatch(r"operator \d, FULLY_CONNECTED, by 1 step", place) for place in found.differing)


@needs_tflm
def test_all_missing_operators_must_be_named_not_only_the_first(conv, tmp_path):
    kinds = {"CONV_2D": schema.BuiltinOperator.GELU, "MAX_POOL_2D": "MyOwnPool"}
    found = check_microcontroller(changed_kinds(conv, tmp_path / "other.tflite", kinds))
    assert not found.ok
    assert sorted(found.missing) == ["GELU", "MyOwnPool"]
    assert found.arena_bytes is None
    assert "GELU" in found.reason
    assert "MyOwnPool" in found.reason


@needs_tflm
def test_an_operator_that_tflm_has_but_refuses_must_be_a_reason(conv, tmp_path):
    model = tflm._model(conv.path.read_bytes())
    graph = model.subgraphs[0]
    graph.tensors[graph.inputs[0]].type = schema.TensorType.FLOAT32
    found = check_microcontroller(saved(model, tmp_path / "hybrid.tflite"))
    assert not found.ok
    assert found.missing == ()
    assert re.match(r"TFLM cannot run hybrid\.tflite: .*CONV_2D \(number 0\) failed to prepare", found.reason)


@needs_tflm
def test_a_file_that_writes_beyond_its_tensors_must_crash_only_the_child(conv, tmp_path):
    # LOGISTIC writes as much as it reads, and the tensor in which pooling put a quarter of that is smaller
    other = changed_kinds(conv, tmp_path / "other.tflite", {"MAX_POOL_2D": schema.BuiltinOperator.LOGISTIC})
    with pytest.raises(FileError, match=r"other\.tflite cannot be checked: TFLM crashes on it \(SIG\w+\)\.$"):
        check_microcontroller(other)


@needs_tflm
def test_an_open_batch_must_be_run_as_one(conv, tmp_path):
    model = tflm._model(conv.path.read_bytes())
    for tensor in model.subgraphs[0].tensors:
        if model.buffers[tensor.buffer].data is None:
            tensor.shapeSignature = [-1, *tensor.shape[1:]]
    opened = saved(model, tmp_path / "open.tflite")
    assert opened.inputs[0].shape[0] is None
    assert check_microcontroller(opened).exact


@needs_tflm
def test_examples_must_be_run_one_after_the_other(conv):
    feed = np.random.default_rng(0).integers(-128, 128, (3, 16, 16, 3)).astype(np.int8)
    found = check_microcontroller(conv, [feed])
    assert found.examples == 3
    assert found.exact


@needs_tflm
@pytest.mark.parametrize("name", ["ad", "kws", "resnet8", "vww"])
def test_published_files_must_run_and_differ_by_the_rounding_of_fully_connected_at_most(name):
    path = DATA / "deploy" / f"mlperf_{name}_int8.tflite"
    if not path.is_file():
        pytest.skip("needs the reference data: set EDGEPRESS_DATA (docs/reference-data.md)")
    found = check_microcontroller(read_artifact(path), arena_bytes=256 << 10)
    assert found.ok, found.reason
    assert all("FULLY_CONNECTED, by 1 step" in place for place in found.differing)


@needs_tflm
def test_the_documented_example_must_run(conv, tmp_path, monkeypatch, capsys):
    (tmp_path / "net.tflite").write_bytes(conv.path.read_bytes())
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parents[1] / "docs" / "microcontrollers.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(block, names)
    assert capsys.readouterr().out == f"runs in an arena of {names['checked'].arena_bytes:,} bytes\n"
    assert f"arena: {names['checked'].arena_bytes} bytes" in (tmp_path / "net.h").read_text()


# ---- one operator at a time: LiteRT plays TFLM, so that a fault can be planted


def played(data, fault=None):
    """A module like tflite_micro whose interpreter is LiteRT's; `fault` is a tensor that it gets wrong by two steps."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    class Played:
        def __init__(self):
            self.inner = Interpreter(
                model_content=data,
                experimental_op_resolver_type=OpResolverType.BUILTIN_REF,
                experimental_preserve_all_tensors=True,
            )
            self.inner.allocate_tensors()

        def reset(self):
            self.inner.reset_all_variables()

        def set_input(self, value, i):
            self.inner.set_tensor(self.inner.get_input_details()[i]["index"], value)

        def invoke(self):
            self.inner.invoke()

        def GetTensor(self, index, graph):
            value = self.inner.get_tensor(index).astype(np.int64)
            return (value + np.where(value > 0, -2, 2) if index == fault else value).astype(self.inner.get_tensor(index).dtype)

    runtime = types.SimpleNamespace(
        Interpreter=types.SimpleNamespace(from_bytes=lambda data, **options: Played()),
        InterpreterConfig=types.SimpleNamespace(kPreserveAllTensors=1),
    )
    return types.SimpleNamespace(runtime=runtime)


def test_a_file_taken_apart_must_compute_what_the_whole_one_does(conv, linear):
    for artifact in (conv, linear):
        data = artifact.path.read_bytes()
        feeds = [np.random.default_rng(0).integers(-128, 128, artifact.inputs[0].shape).astype(np.int8)]
        assert tflm._differing(played(data), data, [feeds]) == []


def test_an_operator_that_computes_something_else_must_be_found(conv):
    data = conv.path.read_bytes()
    operators = tflm._model(data).subgraphs[0].operators
    feeds = [np.random.default_rng(0).integers(-128, 128, conv.inputs[0].shape).astype(np.int8)]
    kinds = tflm.operator_kinds(data)
    for at, operator in enumerate(operators):
        found = tflm._differing(played(data, int(operator.outputs[0])), data, [feeds])
        assert found[0] == [at, kinds[at], 2, True]
        assert {place for place, *_ in found} <= {at, at + 1}  # the next one was fed with the fault


def test_only_one_step_of_a_fully_connected_must_be_forgiven(conv):
    found = Microcontroller(conv, "1", (), arena_bytes=100, max_lsb=3, max_rel=0.0)
    judge = microcontroller._judge
    assert judge(found, [[4, "FULLY_CONNECTED", 1, True]], None) == ""
    for place in ([4, "FULLY_CONNECTED", 2, True], [4, "CONV_2D", 1, True], [4, "FULLY_CONNECTED", 0.5, False]):
        assert f"by up to 3 steps. Operator 4, {place[1]}," in judge(found, [[1, "FULLY_CONNECTED", 1, True], place], None)
    assert "other outputs of conv.tflite" in judge(found, [], None)
    assert "arena of 100 bytes, and there are 99" in judge(found, [[4, "FULLY_CONNECTED", 1, True]], 99)


def test_distance_must_count_steps_of_integers_and_shares_of_floats():
    assert tflm.distance(np.array([-128, 5], np.int8), np.array([127, 5], np.int8)) == 255
    assert tflm.distance(np.array([10.0, np.inf, np.nan]), np.array([9.0, np.inf, np.nan])) == pytest.approx(0.1)
    assert tflm.distance(np.array([1.0, np.nan]), np.array([1.0, 2.0])) == float("inf")


# ---- refusals and faults


def test_files_that_are_not_for_tflm_must_be_refused(conv, tmp_path):
    port, large = Port("x", (None, None, 3), "int8"), Port("x", (1 << 20, 1 << 10), "int8")
    for artifact, words in (
        (Artifact(tmp_path / "a.onnx", "onnx", "int8", (), (), "", 0), "a.onnx is none"),
        (Artifact(tmp_path / "a.tflite", "tflite", "fp32", (), (), "", 0), "floating point"),
        (Artifact(tmp_path / "a.tflite", "tflite", "int8", (large,), (), "", 0), "takes 1,073,741,824 bytes of input"),
        (Artifact(tmp_path / "a.tflite", "tflite", "int8", (port,), (), "", 0), r"'x' open, \[\?, \?, 3\]"),
    ):
        with pytest.raises(FileError, match=words):
            check_microcontroller(artifact)
    with pytest.raises(UserError, match="0 bytes holds nothing"):
        check_microcontroller(conv, arena_bytes=0)


@pytest.mark.parametrize(
    "feeds",
    [
        [],
        [np.zeros((1, 3, 16, 16), np.int8)],
        [np.zeros((1, 16, 16, 3), np.float32)],
        [np.zeros((0, 16, 16, 3), np.int8)],
        [np.int8(1)],
    ],
)
def test_feeds_that_do_not_fit_must_be_refused(conv, feeds):
    with pytest.raises(UserError, match=r"conv\.tflite takes"):
        check_microcontroller(conv, feeds)


def test_a_crash_must_be_one_sentence_and_lose_no_finding(conv, monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIG{})"
    monkeypatch.setattr(microcontroller, "_CHILD", crash.format("SEGV"))
    with pytest.raises(FileError, match=r"conv\.tflite cannot be checked: TFLM crashes on it \(SIGSEGV\)\.$"):
        check_microcontroller(conv)
    monkeypatch.setattr(microcontroller, "_CHILD", crash.format("KILL"))
    with pytest.raises(FileError, match="want of memory, killed the process"):
        check_microcontroller(conv)
    said = """print('{"stage": "TFLM", "missing": ["GELU"]}', flush=True); """
    monkeypatch.setattr(microcontroller, "_CHILD", said + crash.format("SEGV"))
    assert check_microcontroller(conv).missing == ("GELU",)


def test_a_child_that_hangs_or_fails_must_be_one_sentence(conv, monkeypatch):
    monkeypatch.setattr(microcontroller, "_CHILD", "import time; time.sleep(60)")
    with pytest.raises(DeviceError, match="not checked within"):
        check_microcontroller(conv, timeout_s=0.2)
    monkeypatch.setattr(microcontroller, "_CHILD", "raise SystemExit('no room')")
    with pytest.raises(DeviceError, match="no room"):
        check_microcontroller(conv)


def test_a_missing_package_must_name_the_line_that_brings_it(conv, monkeypatch, tmp_path):
    child = microcontroller._CHILD
    hidden = "import sys; sys.modules['tflite_micro'] = None; "
    monkeypatch.setattr(microcontroller, "_CHILD", hidden + child)
    with pytest.raises(DeviceError, match="pip install tflite-micro"):
        check_microcontroller(conv)
    broken = "import sys; sys.path.insert(0, {!r}); "
    (tmp_path / "tflite_micro.py").write_text("import tensorflow_that_is_not_there")
    monkeypatch.setattr(microcontroller, "_CHILD", broken.format(str(tmp_path)) + child)
    with pytest.raises(DeviceError, match=r"cannot be imported \(No module named 'tensorflow_that_is_not_there'\)"):
        check_microcontroller(conv)


@needs_tflm
def test_a_file_that_has_changed_must_be_refused(conv, tmp_path):
    path = tmp_path / "net.tflite"
    path.write_bytes(conv.path.read_bytes())
    artifact = read_artifact(path)
    path.write_bytes(conv.path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(FileError, match="not the file that was described"):
        check_microcontroller(artifact)
    with pytest.raises(FileError, match="not the file that was described"):
        write_c_array(artifact, tmp_path / "net.cc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.tflite"]


# ---- C


PROGRAM = """
#include "{header}"
#include "{header}"
#include <stdint.h>
#include <stdio.h>
int main(void) {{
  if ((uintptr_t){name} % 16) return 1;
  return fwrite({name}, 1, {name}_len, stdout) != {name}_len;
}}
"""
COMPILERS = {".c": ["gcc", "-std=c11"], ".cc": ["g++", "-std=c++11"], ".cpp": ["g++", "-std=c++20"]}


@pytest.mark.parametrize("suffix", COMPILERS)
def test_a_c_array_must_hold_the_file_when_compiled(conv, tmp_path, suffix):
    compiler = COMPILERS[suffix]
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs the compiler {compiler[0]}")
    source, header = write_c_array(conv, tmp_path / f"2 my-net{suffix}")
    assert (source.name, header.name) == (f"2 my-net{suffix}", "2 my-net.h")
    main = tmp_path / f"main{suffix}"
    main.write_text(PROGRAM.format(header=header.name, name="model_2_my_net_tflite"))
    strict = ["-Wall", "-Wextra", "-pedantic", "-Werror"]
    subprocess.run([*compiler, *strict, main, source, "-o", tmp_path / "run"], check=True, cwd=tmp_path)
    printed = subprocess.run([tmp_path / "run"], check=True, capture_output=True).stdout
    assert printed == conv.path.read_bytes()


def test_the_header_must_say_what_the_file_takes_and_gives(conv, tmp_path):
    checked = Microcontroller(conv, "1", ("CONV_2D",), arena_bytes=12345)
    _, header = write_c_array(conv, tmp_path / "net.cc", checked)
    text, port = header.read_text(), conv.inputs[0]
    assert f"int8 [1, 16, 16, 3], scale {port.scale!r}, zero point {port.zero_point}" in text
    assert f"// SHA-256: {conv.sha256}" in text
    assert "// arena: 12345 bytes" in text
    assert "CONV_2D" in text
    assert "#ifndef NET_TFLITE_H_" in text
    assert "arena" not in write_c_array(conv, tmp_path / "net.cc")[1].read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.cc", "net.h"]


def test_names_in_a_file_must_not_become_code(conv, tmp_path):
    model = tflm._model(conv.path.read_bytes())
    model.metadata = None
    graph = model.subgraphs[0]
    graph.tensors[graph.inputs[0]].name = "a\n#error out\\"
    graph.tensors[graph.outputs[0]].name = "*/ ??/"
    _, header = write_c_array(saved(model, tmp_path / "odd.tflite"), tmp_path / "odd.cc")
    comments = [line for line in header.read_text().splitlines() if line.startswith("// ")]
    assert any("a?#error out?" in line for line in comments)
    assert not any(line.endswith("\\") or "??" in line for line in comments)
    assert sum(line.startswith("#") for line in header.read_text().splitlines()) == 7


def test_what_cannot_be_written_must_be_refused(conv, tmp_path):
    other = Artifact(tmp_path / "a.onnx", "onnx", "int8", (), (), "", 0)
    with pytest.raises(FileError, match=r"not a \.tflite file"):
        write_c_array(other, tmp_path / "a.cc")
    for name, words in (("a.py", r"end it in \.cc"), ('a".cc', "quotes"), ("a\n.cc", "control characters")):
        with pytest.raises(UserError, match=words):
            write_c_array(conv, tmp_path / name)
    with pytest.raises(UserError, match="check that one"):
        write_c_array(conv, tmp_path / "a.cc", Microcontroller(other, "1", ()))
    with pytest.raises(FileError, match="Cannot write"):
        write_c_array(conv, tmp_path / "nowhere" / "a.cc")
    assert list(tmp_path.iterdir()) == []
