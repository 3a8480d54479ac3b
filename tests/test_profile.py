import dataclasses
import subprocess

import numpy as np
import onnx
import pytest
import torch
from nets import Basic, Head, cbr, trained
from onnx import helper, numpy_helper
from torch import nn

from edgepress import export, read_artifact, trace
from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.targets import profile_tflite
from edgepress.targets.partitions import aligned, partitions
from edgepress.targets.probe_tflite import _File
from edgepress.targets.profile import alternate, join_modules, kept, profile, typical_ns
from edgepress.targets.profile_torch import profile_network

RUNS = 7


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(1)
    module = trained(nn.Sequential(cbr(3, 8), Basic(8, 16, 2, "A"), Head(16)))
    return trace(module, torch.randn(2, 3, 16, 16))


@pytest.fixture(scope="module")
def profiles(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    batches = [tuple(torch.randn(4, *x.shape[1:]) for x in network.example_inputs)]
    found = {}
    for suffix in ("onnx", "tflite"):
        for precision in ("fp32", "int8"):
            artifact = export(network, folder / f"{precision}.{suffix}", precision, calibration=batches)
            found[suffix, precision] = profile(artifact, runs=RUNS)
    return found


FILES = [("onnx", "fp32"), ("onnx", "int8"), ("tflite", "fp32"), ("tflite", "int8")]


@pytest.mark.parametrize("which", FILES, ids="-".join)
def test_every_layer_with_weights_must_be_found_in_the_file(which, profiles, network):
    layers = {name.rpartition(".")[0] for name, value in network.state_dict().items() if value.dim() > 1}
    told = {module for row in profiles[which].rows for module in row.module.split(" + ")}
    assert len(layers) == 4
    assert layers <= told


@pytest.mark.parametrize("which", FILES, ids="-".join)
def test_rows_must_be_times_and_shares_of_one_run(which, profiles):
    found = profiles[which]
    assert found.runtime == {"onnx": "onnxruntime", "tflite": "litert"}[which[0]]
    assert found.rows_ns == pytest.approx(sum(row.median_ns for row in found.rows))
    assert sum(row.share for row in found.rows) == pytest.approx(1)
    assert min(row.median_ns for row in found.rows) >= 0
    assert found.covered == pytest.approx(found.rows_ns / found.plain_ns)
    assert sum(ns for _, ns, _ in found.by_module()) == pytest.approx(found.rows_ns)
    assert sum(ns for _, ns, _ in found.by_operator()) == pytest.approx(found.rows_ns)
    assert {name for name, _, _ in found.by_module(1)} <= {"", "0", "1", "2", "0 + 1", "1 + 2"}


def test_kernels_must_say_what_they_compute_in(profiles):
    assert any("QC8" in row.kernel for row in profiles["tflite", "int8"].rows)
    assert any("F32" in row.kernel for row in profiles["tflite", "fp32"].rows)
    assert any(row.operator == "QLinearConv" and "int8" in row.kernel for row in profiles["onnx", "int8"].rows)
    assert not any("int8" in row.kernel for row in profiles["onnx", "fp32"].rows)


def test_fp32_files_must_have_no_int8_fallbacks(profiles):
    for suffix in ("onnx", "tflite"):
        assert not [r for r in profiles[suffix, "fp32"].fallbacks if "int8" in r.reason]


def test_converts_must_say_who_put_them_in(profiles):
    reasons = [(remark.op.operator, remark.reason) for remark in profiles["onnx", "int8"].converts]
    assert ("QuantizeLinear", "float to integer; in the file") in reasons
    assert all(operator in ("QuantizeLinear", "DequantizeLinear", "Transpose") for operator, _ in reasons)
    assert all(row.operator == "TRANSPOSE" for row in (r.op for r in profiles["tflite", "int8"].converts))


def test_the_slow_layer_must_stand_out(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.light, self.heavy, self.tail = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 128, 5, padding=2), nn.Conv2d(128, 2, 1)

        def forward(self, x):
            return self.tail(self.heavy(self.light(x).sigmoid()))

    network = trace(Net(), torch.randn(1, 3, 32, 32))
    found = [profile(export(network, tmp_path / name), runs=RUNS) for name in ("a.onnx", "a.tflite")]
    for result in (*found, profile_network(network, runs=RUNS)):
        module, _, share = result.by_module()[0]
        assert module == "heavy", result.rows
        assert share > 0.5, result.rows


# ---- what fell back


def weights(name, *shape):
    values = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    return [
        numpy_helper.from_array(values, f"{name}.weight"),
        numpy_helper.from_array(np.float32(0.01), f"{name}.scale"),
        numpy_helper.from_array(np.int8(0), f"{name}.zero"),
    ]


def rounded(value, result):
    """Through int8 and back."""
    return [
        helper.make_node("QuantizeLinear", [value, "scale", "zero"], [f"{result}_q"], f"quantize_{result}"),
        helper.make_node("DequantizeLinear", [f"{result}_q", "scale", "zero"], [result], f"dequantize_{result}"),
    ]


def convolution(name, value, result):
    return [
        helper.make_node("DequantizeLinear", [f"{name}.weight", f"{name}.scale", f"{name}.zero"], [f"{name}.w"], f"{name}.dq"),
        helper.make_node("Conv", [value, f"{name}.w"], [result], f"{name}/conv", pads=[1, 1, 1, 1]),
    ]


def int8_onnx(path, operator=None):
    """Two int8 convolutions, and a float operator between them where one is named."""
    middle = [helper.make_node(operator, ["c"], ["d"], "planted"), *rounded("d", "e")] if operator else []
    nodes = [
        *rounded("x", "a"), *convolution("first", "a", "b"), *rounded("b", "c"), *middle,
        *convolution("second", "e" if operator else "c", "f"), *rounded("f", "y"),
    ]  # fmt: skip
    constants = [numpy_helper.from_array(np.float32(0.05), "scale"), numpy_helper.from_array(np.int8(0), "zero")]
    tensors = [*weights("first", 8, 8, 3, 3), *weights("second", 8, 8, 3, 3), *constants]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 8, 16, 16]) for name in "xy"]
    graph = helper.make_graph(nodes, "planted", ports[:1], ports[1:], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return read_artifact(path)


def test_a_float_operator_in_an_int8_onnx_file_must_be_found(tmp_path):
    clean = profile(int8_onnx(tmp_path / "clean.onnx"), runs=RUNS)
    planted = profile(int8_onnx(tmp_path / "planted.onnx", "Softplus"), runs=RUNS)
    assert [row.module for row in clean.rows if row.operator == "QLinearConv"] == ["first", "second"]
    assert clean.fallbacks == ()
    assert [remark.op.name for remark in planted.fallbacks] == ["planted"]
    assert planted.fallbacks[0].reason == "computes in floats in an int8 file"
    assert len(planted.converts) > len(clean.converts)


def int8_tflite(path, operator=None):
    """Two int8 additions, and a float operator between them where one is named."""
    f, shape = _File(int8=True), [1, 16, 16, 8]
    x = f.activation(shape)
    y = f.call("ADD", [x, x], shape, "AddOptions")
    if operator:
        f.int8 = False
        y = f.call("DEQUANTIZE", [y], shape)
        y = f.call(operator, [y], shape, "SoftmaxOptions", beta=1.0)
        f.int8 = True
        y = f.call("QUANTIZE", [y], shape)
    path.write_bytes(f.bytes([x], [f.call("ADD", [y, y], shape, "AddOptions")]))
    return read_artifact(path)


def test_a_float_operator_in_an_int8_tflite_file_must_be_found(tmp_path):
    clean = profile(int8_tflite(tmp_path / "clean.tflite"), runs=RUNS)
    planted = profile(int8_tflite(tmp_path / "planted.tflite", "SOFTMAX"), runs=RUNS)
    assert [row.operator for row in clean.rows] == ["ADD", "ADD"]
    assert clean.fallbacks == clean.converts == ()
    assert [remark.op.operator for remark in planted.fallbacks] == ["SOFTMAX"]
    assert {"QUANTIZE", "DEQUANTIZE"} <= {remark.op.operator for remark in planted.converts}


def test_feeds_must_set_open_sizes(tmp_path):
    f = _File(int8=False)
    x = f.activation([1, 64, 64, 8])
    f.graph.tensors[x].shapeSignature = np.array([-1, 64, 64, 8], np.int32)
    (tmp_path / "open.tflite").write_bytes(f.bytes([x], [f.call("RELU", [x], [1, 64, 64, 8])]))
    artifact = read_artifact(tmp_path / "open.tflite")
    one, many = (profile(artifact, feeds=[np.zeros((n, 64, 64, 8), np.float32)], runs=RUNS) for n in (1, 32))
    assert [row.operator for row in one.rows] == [row.operator for row in many.rows] == ["RELU"]
    assert many.rows_ns > 4 * one.rows_ns


def test_operators_in_a_branch_must_have_rows_and_the_branch_none(tmp_path):
    def branch(operator):
        output = helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1, 64])
        return helper.make_graph([helper.make_node(operator, ["x"], ["z"], operator.lower())], operator, [], [output])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        helper.make_node("Greater", ["sum", "limit"], ["more"], "more"),
        helper.make_node("If", ["more"], ["y"], "if", then_branch=branch("Exp"), else_branch=branch("Tanh")),
    ]
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 64]) for name in "xy"]
    limit = numpy_helper.from_array(np.float32(1e9), "limit")
    graph = helper.make_graph(nodes, "branches", ports[:1], ports[1:], [limit])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), tmp_path / "if.onnx")
    found = profile(read_artifact(tmp_path / "if.onnx"), runs=RUNS)
    assert [row.operator for row in found.rows] == ["ReduceSum", "Greater", "Tanh"]


# ---- torch


def test_a_network_must_be_told_in_its_own_modules(network):
    found = profile_network(network, runs=RUNS)
    called = [node for node in network.module.graph.nodes if node.op == "call_function"]
    assert [row.name for row in found.rows] == [node.name for node in called]
    assert {row.module for row in found.rows if row.operator == "aten.conv2d"} == {*("0.0", "1.a.0", "1.b.0")}
    assert found.runtime == "torch"
    assert min(found.plain_ns, found.profiled_ns, *(row.median_ns for row in found.rows)) > 0


def test_a_program_must_be_told_in_the_modules_it_was_exported_from(network, tmp_path):
    found = profile(export(network, tmp_path / "net.pt2"), runs=RUNS)
    assert (found.subject, found.runtime) == ("net.pt2", "torch")
    assert [(row.operator, row.module) for row in found.rows] == [
        (row.operator, row.module) for row in profile_network(network, runs=RUNS).rows
    ]
    assert min(found.plain_ns, *(row.median_ns for row in found.rows)) > 0


def test_a_program_that_takes_its_inputs_by_name_must_be_told(tmp_path):
    class Named(nn.Module):
        def forward(self, x, *, scale):
            return {"y": (x * scale).relu()}

    torch.export.save(torch.export.export(Named(), (torch.ones(3),), {"scale": torch.ones(3)}), tmp_path / "named.pt2")
    found = profile(read_artifact(tmp_path / "named.pt2"), runs=RUNS)
    assert [row.operator for row in found.rows] == ["aten.mul", "aten.relu"]


def test_a_profile_must_leave_the_number_of_threads_as_it_was(network):
    before = torch.get_num_threads()
    profile_network(network, threads=2 if before == 1 else 1, runs=3)
    assert torch.get_num_threads() == before


# ---- errors


@pytest.mark.parametrize("name", ["a.onnx", "a.tflite", "a.pt2"])
def test_mistakes_must_be_named(name, network, tmp_path):
    artifact = export(network, tmp_path / name)
    with pytest.raises(UserError, match="0 threads cannot run"):
        profile(artifact, threads=0)
    with pytest.raises(UserError, match="2 runs make no median"):
        profile(artifact, runs=2)
    with pytest.raises(FileError):
        profile(artifact, feeds=[np.zeros((1, 2), np.float32)], runs=3)


def test_a_library_that_crashes_must_end_its_own_process_only(tmp_path, monkeypatch):
    artifact = int8_tflite(tmp_path / "a.tflite")
    monkeypatch.setattr(profile_tflite, "_CHILD", "import os; os.abort()")
    with pytest.raises(DeviceError, match=r"profiler failed on a.tflite \(signal 6\)"):
        profile(artifact, runs=3)


def test_a_process_that_hangs_must_be_given_up(tmp_path, monkeypatch):
    def hang(*args, **more):
        raise subprocess.TimeoutExpired("python", more["timeout"])

    monkeypatch.setattr(profile_tflite.subprocess, "run", hang)
    with pytest.raises(DeviceError, match="was not profiled in 600 s"):
        profile(int8_tflite(tmp_path / "a.tflite"), runs=3)


# ---- the parts


def test_the_warm_up_must_be_left_out():
    log = []
    plain, profiled = alternate(lambda: log.append("plain"), lambda: log.append("profiled"), 23)
    readings = [i for i, which in enumerate(log) if which == "profiled"]
    assert len(plain) == len(profiled) == len(kept(readings, 23)) == 23
    blocks = np.split(np.array(kept(readings, 23)), [10, 20])
    assert all((np.diff(block) == 1).all() for block in blocks), "runs of one block follow each other"
    assert kept(readings, 23)[-1] == len(log) - 1
    assert kept(readings, 23)[0] > 10, "the warm-up comes before"


def test_ticks_must_become_times():
    generator = np.random.default_rng(0)
    ticks = np.floor(generator.normal(2300, 600, 2001) / 1000) * 1000
    assert abs(typical_ns(list(ticks), 1000) - 2300) < 100 < abs(np.median(ticks) - 2300)
    assert typical_ns([5, 1, 3]) == 3


def test_modules_that_hold_others_must_be_left_out():
    assert join_modules(["a.b", "a", "a.b.c", "a.bc", "a.b.c"]) == "a.b.c + a.bc"
    assert join_modules(["", ""]) == ""


def test_cautions_must_name_what_is_wrong(profiles):
    good = dataclasses.replace(profiles["tflite", "fp32"], plain_ns=1e6, profiled_ns=1.1e6)
    row = dataclasses.replace(good.rows[0], median_ns=0.9e6, share=1.0)
    good = dataclasses.replace(good, rows=(row,))
    assert good.caution is None
    assert "90% longer" in dataclasses.replace(good, profiled_ns=1.9e6).caution
    assert "30% of a run" in dataclasses.replace(good, plain_ns=3e6, profiled_ns=3e6).caution
    assert "180% of a run" in dataclasses.replace(good, plain_ns=0.5e6, profiled_ns=0.5e6).caution


def test_partitions_must_run_when_their_inputs_are_there():
    chain = [([0], [1]), ([1], [2]), ([1], [3]), ([2, 3], [4]), ([4], [5])]
    assert partitions(chain, left=[]) == [[0, 1, 2, 3, 4]]
    assert partitions(chain, left=[1]) == [[0, 2], [3, 4]]
    assert partitions(chain, left=[0, 4]) == [[1, 2, 3]]
    assert partitions(chain, left=[0, 1, 2, 3, 4]) == []


def test_kernels_must_be_told_in_the_files_operators():
    kernels = ["Convert (NC, F32, QS8)", "Convolution (NHWC, QC8) IGEMM", "Convolution (NHWC, QC8) DWConv", "Add (ND)",
               "Clamp (NC)", "Transpose (ND, X8)", "Fully Connected (NC, QS8, QC8W) GEMM", "Copy (NC)"]  # fmt: skip
    operators = ["QUANTIZE", "PAD", "CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "RESHAPE", "FULLY_CONNECTED"]
    assert aligned(kernels, operators) == [0, 2, 3, 4, None, None, 6, None]
    assert aligned([], ["ADD"]) == []
    assert aligned(["Add (ND)"], []) == [None]
    long = ["Add (ND)", "Multiply (ND)"] * 400
    assert aligned(long, ["ADD", "MUL"] * 400) == list(range(800))
