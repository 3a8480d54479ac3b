import contextlib

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgepress.compress.errors import FileError
from edgepress.compress.network import trace
from edgepress.targets.artifact import Port, read_artifact
from edgepress.targets.export import export


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 3))
    network = trace(model, torch.randn(1, 2, 6, 6)).then(**{"pass": "Prune", "macs": 0.5})
    return {suffix: export(network, folder / f"net.{suffix}") for suffix in ("onnx", "tflite")}


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_read_artifact_must_describe_the_file_again(files, suffix):
    again = read_artifact(files[suffix].path)
    assert again == files[suffix]
    assert again.history == ({"pass": "Prune", "macs": 0.5},)
    assert again.bytes == again.path.stat().st_size
    assert len(again.sha256) == 64


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize("part", [0.0, 0.002, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_read_artifact_must_refuse_a_truncated_file(files, suffix, part, tmp_path):
    whole = files[suffix].path.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(FileError, match=r"cut\..* is truncated or .*\.$"):
        read_artifact(cut)


def test_read_artifact_must_refuse_a_tflite_without_its_identifier(files, tmp_path):
    content = bytearray(files["tflite"].path.read_bytes())
    content[4:8] = b"XXXX"
    (tmp_path / "net.tflite").write_bytes(content)
    with pytest.raises(FileError, match="identifier is missing"):
        read_artifact(tmp_path / "net.tflite")


def test_read_artifact_must_not_crash_on_any_damage(files, tmp_path):
    whole = files["tflite"].path.read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "net.tflite"
    for _ in range(50):
        content = np.frombuffer(whole, np.uint8).copy()
        content[random.integers(8, len(content), 30)] = random.integers(0, 256, 30)
        path.write_bytes(content.tobytes())
        with contextlib.suppress(FileError):  # any other exception fails the test
            assert read_artifact(path).format == "tflite"


@pytest.mark.parametrize("name", ["net.bin", "net", "net.pth"])
def test_read_artifact_must_refuse_other_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileError, match=r"none of \.onnx, \.tflite and \.pt2"):
        read_artifact(tmp_path / name)


def test_read_artifact_must_refuse_text_under_either_suffix(tmp_path):
    for name in ("net.onnx", "net.tflite"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(FileError, match=r"not an? "):
            read_artifact(tmp_path / name)


def test_read_artifact_must_leave_out_weights_listed_as_inputs(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "old",
        [tensor("x", 1, ["batch", 3]), tensor("w", 1, [3, 2])],
        [tensor("y", 1, [None, 2])],
        [weight],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "old.onnx")
    artifact = read_artifact(tmp_path / "old.onnx")
    assert artifact.inputs == (Port("x", (None, 3), "float32"),)
    assert artifact.outputs == (Port("y", (None, 2), "float32"),)
    assert (artifact.precision, artifact.history) == ("fp32", ())


def test_read_artifact_must_refuse_outputs_that_are_no_tensors(tmp_path):
    tensor = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("SequenceConstruct", ["x"], ["y"])],
        "sequence",
        [tensor("x", 1, [1])],
        [onnx.helper.make_tensor_sequence_value_info("y", 1, [1])],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "s.onnx")
    with pytest.raises(FileError, match="'y' is not a tensor"):
        read_artifact(tmp_path / "s.onnx")


def test_read_artifact_must_describe_strangers_files(reference_data):
    int8 = read_artifact(reference_data / "deploy" / "mlperf_resnet8_int8.tflite")
    assert int8.precision == "int8"
    assert int8.inputs == (Port("input_1_int8", (None, 32, 32, 3), "int8", scale=1.0, zero_point=-128),)
    face = read_artifact(reference_data / "deploy" / "face_rfb320.onnx")
    assert [port.name for port in face.inputs + face.outputs] == ["input", "scores", "boxes"]
    voice = read_artifact(reference_data / "deploy" / "silero_vad.onnx")
    assert [port.shape for port in voice.inputs] == [(None, None), (2, None, 128), ()]
