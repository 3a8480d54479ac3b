"""Files from strangers: whatever is in them, the answer is one sentence, in time, and this process lives on."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import resnet
from onnx import TensorProto, helper

from edgepress.compress.errors import FileError, UserError
from edgepress.compress.network import trace
from edgepress.targets.agent.machine import memory_bytes
from edgepress.targets.artifact import METADATA_KEY, read_artifact
from edgepress.targets.devices import Failed, Job, Taken
from edgepress.targets.devices.link import Piped
from edgepress.targets.devices.local import Local
from edgepress.targets.export import export
from edgepress.targets.measure import Plan
from edgepress.targets.runtimes import random_feeds

QUICK = Plan(rounds=3, min_round_s=0.002, warmup_s=0.0, timeout_s=20)
LIMIT_S = 20.0
OPSET = [helper.make_opsetid("", 18)]
FLOAT = TensorProto.FLOAT
FLIPS = 300


@pytest.fixture(scope="module")
def local():
    device = Local()
    yield device
    device.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    network = trace(resnet("A").eval(), torch.randn(1, 3, 16, 16))
    return {suffix: export(network, folder / f"net.{suffix}").path for suffix in ("onnx", "tflite")}


def outcome(path, device):
    """What becomes of a file: 'refused' when it is read, 'failed' when it is run, or 'ran'. Anything else fails the test."""
    start = time.monotonic()
    try:
        artifact = read_artifact(path)
        found = device.check(Job(artifact, random_feeds(artifact, device=device)), timeout_s=LIMIT_S)
    except UserError as error:
        one_sentence(error)
        return "refused"
    assert time.monotonic() - start < 6 * LIMIT_S
    if isinstance(found, Failed):
        one_sentence(found.error)
        return "failed"
    return "ran"


def one_sentence(error):
    text = str(error)
    assert text.endswith(".")
    assert text.isprintable()
    assert "Traceback" not in text


def model(nodes, inputs=(("x", FLOAT, [1, 4]),), outputs=(("y", FLOAT, None),), weights=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "g", [value(*i) for i in inputs], [value(*o) for o in outputs], list(weights))
    return helper.make_model(graph, opset_imports=OPSET, ir_version=9)


def external(location, **more):
    tensor = TensorProto(name="w", data_type=FLOAT, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def in_initializer(tensor):
    return model([helper.make_node("MatMul", ["x", "w"], ["y"])], weights=[tensor])


# ---- damage


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_a_file_cut_anywhere_must_be_one_sentence(files, suffix, tmp_path, local):
    whole, path = files[suffix].read_bytes(), tmp_path / f"cut.{suffix}"
    for size in [*range(0, 64, 7), *np.linspace(64, len(whole) - 1, 120).astype(int), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert outcome(path, local) in ("refused", "failed"), f"cut at {size}"


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_flipped_bits_must_be_one_sentence_or_harmless(files, suffix, tmp_path, local):
    flipped(files[suffix], tmp_path, local, FLIPS, runs=25)


def test_flipped_bits_of_strangers_files_must_be_one_sentence_or_harmless(reference_data, tmp_path, local):
    for path in sorted((reference_data / "deploy").glob("*.tflite")):
        flipped(path, tmp_path, local, 40, runs=3)


def flipped(path, folder, device, count, runs):
    """Turn bits in the structure of a file, not only in its weights, read all and run some."""
    whole, random, damaged = path.read_bytes(), np.random.default_rng(0), folder / path.name
    ran = 0
    for i in range(count):
        content = np.frombuffer(whole, np.uint8).copy()
        # half of them where a format keeps its tables: flatbuffers in front, protobufs of ours at either end
        part = 4096 if i % 2 else len(content)
        at = random.integers(0, min(part, len(content)), random.integers(1, 9))
        content[at if i % 4 < 2 else len(content) - 1 - at] ^= np.uint8(1) << random.integers(0, 8, len(at)).astype(np.uint8)
        damaged.write_bytes(content.tobytes())
        try:
            read_artifact(damaged)
        except FileError as error:
            one_sentence(error)
            continue
        if ran < runs:
            ran += outcome(damaged, device) in ("ran", "failed")
    assert ran > 0  # some must get as far as the runtime


# ---- what is no file


def test_what_is_no_file_must_be_refused_at_once(tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "circle.tflite").symlink_to("circle.tflite")
    (tmp_path / "zeros.tflite").symlink_to("/dev/zero")
    (tmp_path / "log.onnx").symlink_to("/proc/kmsg")
    (tmp_path / "nothing.onnx").write_bytes(b"")
    for name in (
        "folder.onnx",
        "pipe.onnx",
        "circle.tflite",
        "zeros.tflite",
        "log.onnx",
        "nothing.onnx",
        "n" * 5000 + ".onnx",
        "\0.onnx",
    ):
        with pytest.raises(FileError, match=r"There is no file|truncated|Cannot read"):
            read_artifact(tmp_path / name)


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_a_file_larger_than_the_memory_must_be_refused_unread(suffix, tmp_path):
    with (tmp_path / f"net.{suffix}").open("wb") as file:
        os.truncate(file.fileno(), memory_bytes())  # takes no room on the disk
    with pytest.raises(FileError, match="does not fit into this computer's memory"):
        read_artifact(tmp_path / f"net.{suffix}")


def test_data_larger_than_the_memory_must_be_refused_unread(tmp_path):
    (tmp_path / "net.onnx").write_bytes(in_initializer(external("w.bin")).SerializeToString())
    with (tmp_path / "w.bin").open("wb") as file:
        os.truncate(file.fileno(), 2 * memory_bytes())
    with pytest.raises(FileError, match="more than this computer's memory"):
        read_artifact(tmp_path / "net.onnx")


# ---- sizes


def test_inputs_that_would_fill_the_memory_must_not_be_made(tmp_path, local):
    onnx.save(model([helper.make_node("Relu", ["x"], ["y"])], [("x", FLOAT, [1 << 40, 1 << 20])]), tmp_path / "net.onnx")
    with pytest.raises(FileError, match=r"would take 9,223,372,037 GB, more than a quarter of this computer's memory\.$"):
        random_feeds(read_artifact(tmp_path / "net.onnx"))


def test_inputs_of_a_tflite_that_would_fill_the_memory_must_not_be_made(files, tmp_path):
    packed(files["tflite"], tmp_path / "net.tflite", lambda tensor: setattr(tensor, "shape", [1, 1 << 30, 1 << 30, 3]))
    with pytest.raises(FileError, match="more than a quarter of this computer's memory"):
        random_feeds(read_artifact(tmp_path / "net.tflite"))


def packed(source, path, change):
    """A copy of a TFLite file whose first input was changed."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    found = schema.ModelT.InitFromPackedBuf(source.read_bytes(), 0)
    tensor = found.subgraphs[0].tensors[found.subgraphs[0].inputs[0]]
    tensor.shapeSignature = None
    change(tensor)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(found.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 20], [1 << 62, 4], [-1, 4], [0, 4], [1] * 500])
@pytest.mark.parametrize("where", ["output", "initializer"])
def test_sizes_that_make_no_sense_must_be_one_sentence_or_harmless(where, dims, tmp_path, local):
    weight = TensorProto(name="w", data_type=FLOAT, dims=dims if where == "initializer" else [4, 4], raw_data=bytes(64))
    made = in_initializer(weight)
    if where == "output":
        made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, [max(d, 0) for d in dims]))
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    assert outcome(tmp_path / "net.onnx", local) in ({"failed", "ran"} if where == "output" else {"failed"})


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.COMPLEX64, TensorProto.INT4, 99])
def test_inputs_that_are_no_numbers_must_be_refused(kind, tmp_path, local):
    made = model([helper.make_node("Identity", ["x"], ["y"])], [("x\x1b[2J", FLOAT, [1, 4])])
    made.graph.input[0].type.tensor_type.elem_type = kind
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    assert outcome(tmp_path / "net.onnx", local) == "refused"


# ---- depth and bombs


def nested(depth):
    """Branches within branches, as bytes: each layer is a graph, a node and an attribute."""

    def field(number, content):
        size, head = len(content), b""
        while size >= 128:
            head, size = head + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + head + bytes([size]) + content

    output = field(12, helper.make_tensor_value_info("y", FLOAT, None).SerializeToString())
    inner = field(1, helper.make_node("Constant", [], ["y"], value_float=1.0).SerializeToString()) + field(2, b"g") + output
    for _ in range(depth):
        branches = b"".join(
            field(5, field(1, name) + b"\xa0\x01\x05" + field(6, inner if name == b"then_branch" else leaf()))
            for name in (b"then_branch", b"else_branch")
        )
        inner = field(1, field(1, b"c") + field(2, b"y") + field(4, b"If") + branches) + field(2, b"g") + output
    condition = field(5, helper.make_tensor("c", TensorProto.BOOL, [], [True]).SerializeToString())
    return b"\x08\x09" + field(7, inner + condition) + field(8, b"\x10\x12")


def leaf():
    value = helper.make_tensor_value_info("y", FLOAT, None)
    return helper.make_graph([helper.make_node("Constant", [], ["y"], value_float=1.0)], "l", [], [value]).SerializeToString()


@pytest.mark.parametrize(("depth", "becomes"), [(2, {"ran"}), (25, {"ran", "failed"}), (100, {"refused"}), (3000, {"refused"})])
def test_branches_within_branches_must_be_one_sentence(depth, becomes, tmp_path, local):
    (tmp_path / "net.onnx").write_bytes(nested(depth))
    assert outcome(tmp_path / "net.onnx", local) in becomes


READ = """
import resource, sys
from edgepress.targets.artifact import read_artifact
from edgepress.compress.errors import FileError
import onnx, ai_edge_litert.schema_py_generated
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_artifact(sys.argv[1])
except FileError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def unpacked(path):
    """What is said of a file in a fresh process, and by how many MiB that grew."""
    done = subprocess.run([sys.executable, "-c", READ, path], capture_output=True, text=True, timeout=60, check=True)
    said, grown = done.stdout.splitlines()
    return said, int(grown)


@pytest.mark.parametrize("start", [b"\x0a\x00", b"\x2a\x02\x08\x01"])  # empty operators, weights with one size each
def test_a_protobuf_bomb_must_not_go_off(start, tmp_path):
    graph = start * 6_000_000
    size = len(graph)
    head = bytes([0x3A]) + bytes([(size >> 7 * i) & 127 | (128 if i < 3 else 0) for i in range(4)])
    (tmp_path / "net.onnx").write_bytes(head + graph)
    said, grown = unpacked(tmp_path / "net.onnx")
    assert said.endswith("net.onnx is refused: it would unpack to many times its own size.")
    assert grown < 100  # it would be 500 and more


@pytest.mark.parametrize("name_bytes", [1, 1 << 20])
def test_a_flatbuffer_bomb_must_not_go_off(name_bytes, tmp_path):
    (tmp_path / "net.tflite").write_bytes(bomb(1000, 3000, name_bytes))
    said, grown = unpacked(tmp_path / "net.tflite")
    assert said.endswith("net.tflite is refused: it would unpack to many times its own size.")
    assert grown < 200


def bomb(graphs, tensors, name_bytes):
    """A small file whose many graphs are one, with many tensors that are one."""
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    builder = flatbuffers.Builder(1 << 20)

    def vector(start, offset, count):
        start(builder, count)
        for _ in range(count):
            builder.PrependUOffsetTRelative(offset)
        return builder.EndVector()

    name = builder.CreateString("n" * name_bytes)
    schema.TensorStart(builder)
    schema.TensorAddName(builder, name)
    many = vector(schema.SubGraphStartTensorsVector, schema.TensorEnd(builder), tensors)
    schema.SubGraphStart(builder)
    schema.SubGraphAddTensors(builder, many)
    many = vector(schema.ModelStartSubgraphsVector, schema.SubGraphEnd(builder), graphs)
    schema.ModelStart(builder)
    schema.ModelAddSubgraphs(builder, many)
    builder.Finish(schema.ModelEnd(builder), b"TFL3")
    return bytes(builder.Output())


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{}", "[]", "{", json.dumps({"history": 5, "precision": ["\x1b"], "inputs": {}}),
     json.dumps({"history": [1, None]}), json.dumps({"history": {"pass": 1}, "precision": "\x1b[2J"})],
)  # fmt: skip
def test_metadata_of_strangers_must_be_taken_with_care(text, tmp_path):
    made = in_initializer(onnx.numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"))
    made.metadata_props.add(key=METADATA_KEY, value=text)
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    artifact = read_artifact(tmp_path / "net.onnx")
    assert (artifact.history, artifact.precision) == ((), "fp32")


# ---- memory and time of what runs


def greedy(path, count):
    """A file of a few bytes that makes an array of ``count`` floats from its input, so that no optimizer can make it before."""
    sum_of = [helper.make_node("ReduceSum", ["y"], ["z"], keepdims=0)]
    size = [helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64), helper.make_node("Add", ["i", "n"], ["s"])]
    made = model(
        [*size, helper.make_node("ConstantOfShape", ["s"], ["y"]), *sum_of], [("x", FLOAT, [1])], [("z", FLOAT, None)],
        [helper.make_tensor("n", TensorProto.INT64, [1], [count])],
    )  # fmt: skip
    onnx.save(made, path)


def test_a_file_that_wants_more_memory_than_there_is_must_be_one_sentence(tmp_path, local):
    greedy(tmp_path / "modest.onnx", 1000)
    greedy(tmp_path / "greedy.onnx", memory_bytes())  # four times as many bytes
    modest, wanting = (read_artifact(tmp_path / f"{name}.onnx") for name in ("modest", "greedy"))
    feeds = [np.zeros(1, np.float32)]
    assert isinstance(local.check(Job(modest, feeds)), Taken)
    found = local.check(Job(wanting, feeds))
    assert isinstance(found, Failed)
    one_sentence(found.error)
    assert "memory" in str(found.error) or "alloc" in str(found.error)
    assert isinstance(local.check(Job(modest, feeds)), Taken)  # and the agent lives on


def test_a_constant_that_wants_more_memory_than_there_is_must_be_one_sentence(tmp_path, local):
    shape = helper.make_tensor("s", TensorProto.INT64, [2], [1 << 31, 1 << 20])
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["c"]), helper.make_node("Add", ["x", "c"], ["y"])]
    onnx.save(model(nodes, [("x", FLOAT, [1])], weights=[shape]), tmp_path / "net.onnx")
    assert outcome(tmp_path / "net.onnx", local) == "failed"


def test_a_worker_must_have_limits(local, tmp_path):
    greedy(tmp_path / "net.onnx", 10)
    far = Piped.open(local, read_artifact(tmp_path / "net.onnx"))
    agent = local._link._process.pid
    [worker] = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    limits = Path(f"/proc/{worker}/limits").read_text()
    for name, least, most in (
        ("Max address space", memory_bytes(), 2 * memory_bytes() + (1 << 32)),
        ("Max core file size", 0, 0),
    ):
        line = next(line for line in limits.splitlines() if line.startswith(name))
        assert least <= int(line.removeprefix(name).split()[0]) <= most
    assert Path(f"/proc/{worker}/oom_score_adj").read_text().strip() == "1000"
    far.close()


def test_a_file_that_runs_for_ever_must_be_given_up(tmp_path, local):
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Cos", ["a"], ["b"])],
        "body",
        [
            helper.make_tensor_value_info(*i)
            for i in (("i", TensorProto.INT64, []), ("go", TensorProto.BOOL, []), ("a", FLOAT, [1]))
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, []), helper.make_tensor_value_info("b", FLOAT, [1])],
    )
    counts = [helper.make_tensor("n", TensorProto.INT64, [], [1 << 62]), helper.make_tensor("t", TensorProto.BOOL, [], [True])]
    onnx.save(
        model([helper.make_node("Loop", ["n", "t", "x"], ["y"], body=body)], [("x", FLOAT, [1])], weights=counts),
        tmp_path / "net.onnx",
    )
    artifact, start = read_artifact(tmp_path / "net.onnx"), time.monotonic()
    found = local.check(Job(artifact, [np.zeros(1, np.float32)]), timeout_s=2.0)
    assert isinstance(found, Failed)
    assert "did not finish in time" in str(found.error)
    assert time.monotonic() - start < 10


# ---- whose process


MEASURE = """
import sys
from edgepress.targets.artifact import read_artifact
from edgepress.targets.measure import Plan, measure
from edgepress.targets.runtimes import random_feeds
artifact = read_artifact(sys.argv[1])
print(random_feeds(artifact)[0].shape)
[found] = measure([artifact], plan=Plan(rounds=3, min_round_s=0.002, warmup_s=0.0))
print(len(found.samples_ns), "onnxruntime" in sys.modules)
"""


def test_measuring_must_never_open_a_file_in_this_process(tmp_path):
    made = model([helper.make_node("AveragePool", ["x"], ["y"], kernel_shape=[20])], [("x", FLOAT, ["batch", 1, "length"])])
    onnx.save(made, tmp_path / "net.onnx")
    done = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "net.onnx"], capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == ["(1, 1, 64)", "3 False"], done.stderr
