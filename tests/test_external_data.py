"""Weights in files beside an ONNX file: found, kept within its folder, sent along to devices."""

import os

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from test_hostile import FLOAT, OPSET, QUICK, external, in_initializer, model, one_sentence, outcome
from torch import nn

from edgepress.compress.errors import FileError
from edgepress.targets.agent import frames
from edgepress.targets.artifact import deflated_bytes, read_artifact
from edgepress.targets.devices import Failed, Job, Taken
from edgepress.targets.devices.link import Piped
from edgepress.targets.devices.local import Local
from edgepress.targets.measure import measure
from edgepress.targets.runtimes import open_runtime, random_feeds
from edgepress.targets.silence import silence


@pytest.fixture(scope="module")
def local():
    device = Local()
    yield device
    device.close()


def beside(path, data="weights.data", seed=0):
    """A file whose weights lie in another."""
    weights = np.random.default_rng(seed).standard_normal((4, 4)).astype(np.float32)
    made = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        [("x", FLOAT, ["batch", 4])],
        weights=[onnx.numpy_helper.from_array(weights, "w")],
    )
    onnx.save(made, path, save_as_external_data=True, location=data, size_threshold=0)
    return weights


def test_a_file_with_data_beside_it_must_be_read_checked_measured_and_judged(tmp_path, local):
    weights = beside(tmp_path / "net.onnx")
    artifact = read_artifact(tmp_path / "net.onnx")
    sizes = [(tmp_path / name).stat().st_size for name in ("net.onnx", "weights.data")]
    assert artifact.data == (tmp_path / "weights.data",)
    assert artifact.bytes == sum(sizes)
    assert deflated_bytes(artifact) > sizes[1] / 2  # random weights hardly become smaller
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    here, far = open_runtime(artifact), Piped.open(local, artifact)
    for runtime in (here, far):
        np.testing.assert_allclose(runtime.predict(x), x @ weights, rtol=1e-5)
        runtime.close()
    assert isinstance(local.check(Job(artifact, random_feeds(artifact))), Taken)
    [measured] = measure([artifact], local, plan=QUICK)
    assert measured.p50_ns > 0


def test_what_torch_writes_beside_a_file_must_be_found(tmp_path, local):
    with silence():
        program = torch.onnx.export(nn.Linear(64, 64).eval(), (torch.zeros(1, 64),), dynamo=True)
    program.save(tmp_path / "net.onnx", external_data=True)
    artifact = read_artifact(tmp_path / "net.onnx")
    assert [path.name for path in artifact.data] == ["net.onnx.data"]
    assert outcome(artifact.path, local) == "ran"


def test_the_hash_must_cover_the_data(tmp_path):
    beside(tmp_path / "net.onnx")
    before = read_artifact(tmp_path / "net.onnx")
    content = bytearray(before.data[0].read_bytes())
    content[5] ^= 1
    before.data[0].write_bytes(content)
    after = read_artifact(tmp_path / "net.onnx")
    assert after.sha256 != before.sha256
    assert after.bytes == before.bytes


def test_data_of_two_files_of_one_device_must_not_mix(tmp_path, local):
    x, answers = np.eye(4, dtype=np.float32), []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        weights = beside(tmp_path / str(i) / "net.onnx", seed=i)
        far = Piped.open(local, read_artifact(tmp_path / str(i) / "net.onnx"))
        np.testing.assert_allclose(far.predict(x), weights, rtol=1e-6)
        answers.append(far.predict(x))
        far.close()
    assert not np.array_equal(*answers)


def in_branch(tensor):
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)], [tensor]
    )
    condition = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    return model([helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)], weights=[condition])


def in_constant(tensor):
    return model([helper.make_node("Constant", [], ["y"], value=tensor)])


def in_function(tensor):
    made = in_initializer(TensorProto(name="w", data_type=FLOAT, dims=[1], float_data=[1.0]))
    made.functions.append(
        helper.make_function("f", "F", [], ["y"], [helper.make_node("Constant", [], ["y"], value=tensor)], OPSET)
    )
    return made


@pytest.mark.parametrize("place", [in_initializer, in_branch, in_constant, in_function])
def test_data_must_be_found_wherever_the_file_uses_it(place, tmp_path):
    (tmp_path / "net.onnx").write_bytes(place(external("w.bin")).SerializeToString())
    with pytest.raises(FileError, match=r"keeps weights in 'w\.bin', which is missing"):
        read_artifact(tmp_path / "net.onnx")
    (tmp_path / "w.bin").write_bytes(bytes(64))
    assert read_artifact(tmp_path / "net.onnx").data == (tmp_path / "w.bin",)


@pytest.mark.parametrize(
    "location",
    ["../secret", "../home/inside", "folder/../inside", "/etc/passwd", "a/../../secret", "..", ".", "", "C:\\secret",
     "..\\secret", "*/_ORT_MEM_ADDR_/*", "x\n\x1b[2J", "n" * 2000, "link", "circle", "folder", "pipe", "net.onnx",
     "folder/link", "\x00"],
)  # fmt: skip
def test_data_must_lie_in_the_files_own_folder(location, tmp_path):
    home = tmp_path / "home"
    (home / "folder").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(1000))
    (home / "inside").write_bytes(bytes(1000))
    (home / "link").symlink_to(tmp_path / "secret")
    (home / "folder" / "link").symlink_to("../../secret")
    (home / "circle").symlink_to("circle")
    os.mkfifo(home / "pipe")
    (home / "net.onnx").write_bytes(in_initializer(external(location)).SerializeToString())
    with pytest.raises(FileError, match=r"it was not read|is no file beside it|is missing") as found:
        read_artifact(home / "net.onnx")
    one_sentence(found.value)


def test_links_inside_the_folder_and_stores_of_downloads_must_work(tmp_path, local):
    for folder in ("blobs", "snapshots"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / "1").write_bytes(in_initializer(external("w.bin")).SerializeToString())
    (tmp_path / "blobs" / "2").write_bytes(bytes(64))
    (tmp_path / "snapshots" / "net.onnx").symlink_to("../blobs/1")
    (tmp_path / "snapshots" / "w.bin").symlink_to("../blobs/2")
    artifact = read_artifact(tmp_path / "snapshots" / "net.onnx")
    assert artifact.data == (tmp_path / "snapshots" / "w.bin",)
    assert outcome(artifact.path, local) == "ran"


@pytest.mark.parametrize(
    "more",
    [
        {"offset": 4096},
        {"offset": 1, "length": 64},
        {"length": 1 << 40},
        {"offset": -8},
        {"length": "many"},
        {"length": "9" * 5000},
    ],
)
def test_data_that_is_shorter_than_the_file_says_must_be_refused(more, tmp_path):
    (tmp_path / "w.bin").write_bytes(bytes(64))
    (tmp_path / "net.onnx").write_bytes(in_initializer(external("w.bin", **more)).SerializeToString())
    with pytest.raises(FileError, match=r"wants more of 'w\.bin' than its 64 bytes"):
        read_artifact(tmp_path / "net.onnx")


@pytest.mark.parametrize("name", ["$(touch owned)", ".hidden", "-rf", "gewichte\u00e4", "a/b/c/d/e", "model.onnx"])
def test_a_name_that_is_not_plain_must_not_reach_a_device(name, tmp_path, local):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    beside(tmp_path / "net.onnx", name)
    artifact = read_artifact(tmp_path / "net.onnx")
    found = local.check(Job(artifact, random_feeds(artifact)))
    assert isinstance(found, Failed)
    assert "join the two with onnx.save(onnx.load('net.onnx'), 'joined.onnx')" in str(found.error)


@pytest.mark.parametrize("name", ["../x", "0/../x", "0/.x", "/x", "0/", "0", "x/y", "0//x", "0/a/../../x", "0/x\n", "0/x\0"])
def test_an_agent_must_refuse_names_by_itself(name, local):
    with pytest.raises(frames.Failure, match="name"):
        local._link.ask("put", [np.zeros(1, np.uint8)], file=name)
