import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.compress.network import trace
from edgepress.targets.artifact import read_artifact
from edgepress.targets.export import export
from edgepress.targets.runtimes import open_runtime, random_feeds


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.words = nn.Embedding(10, 4)

    def forward(self, image, tokens):
        features = self.conv(image).relu()
        return features, features.mean((2, 3)) + self.words(tokens).mean(1)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("two")
    inputs = (torch.randn(1, 3, 5, 7), torch.randint(0, 10, (1, 6)))
    network = trace(TwoInputs(), inputs)
    paths = {
        "onnx": export(network, folder / "two.onnx"),
        "tflite": export(network, folder / "two.tflite"),
        "int8": export(network, folder / "two_int8.tflite", "int8", [inputs] * 4),
    }
    return network, paths


def save(path, nodes, inputs, outputs, weights=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(nodes, "test", [value(*i) for i in inputs], [value(*o) for o in outputs], list(weights))
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return read_artifact(path)


def batch(count=5):
    random = np.random.default_rng(1)
    image = random.standard_normal((count, 3, 5, 7)).astype(np.float32)
    return image, random.integers(0, 10, (count, 6))


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_predict_must_give_what_the_network_gives_for_any_batch(two, kind):
    network, files = two
    runtime = open_runtime(files[kind])
    for count in (1, 5):
        for wanted, got in zip(network.predict(*batch(count)), runtime.predict(*batch(count)), strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_predict_must_take_and_give_real_numbers_for_an_int8_file(two):
    network, files = two
    assert files["int8"].inputs[0].dtype == "int8"
    image, tokens = (x.numpy() for x in network.example_inputs)
    got = open_runtime(files["int8"]).predict(image, tokens)
    for w, g in zip(network.predict(image, tokens), got, strict=True):
        assert g.dtype == np.float32
        assert g.shape == w.shape
        assert np.abs(g - w).max() < 0.15 * np.abs(w).max()


@pytest.mark.parametrize("kind", ["onnx", "tflite", "int8"])
def test_run_must_take_the_files_own_layout(two, kind):
    _, files = two
    feeds = random_feeds(files[kind])
    assert [(feed.shape, feed.dtype.name) for feed in feeds] == [
        (tuple(1 if size is None else size for size in port.shape), port.dtype) for port in files[kind].inputs
    ]
    outputs = open_runtime(files[kind], threads=2).run(feeds)
    assert [output.dtype.name for output in outputs] == [port.dtype for port in files[kind].outputs]


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_predict_must_name_what_does_not_fit(two, kind):
    runtime = open_runtime(two[1][kind])
    image, tokens = batch()
    with pytest.raises(UserError, match=r"takes 2 inputs \('image' \[N, 3, 5, 7\], 'tokens' \[N, 6\]\); it was given 1 of"):
        runtime.predict(image)
    with pytest.raises(UserError, match=r"given 2 of shape \[5, 5, 7, 3\], \[5, 6\]"):
        runtime.predict(np.moveaxis(image, 1, -1), tokens)
    with pytest.raises(UserError, match="without examples"):
        runtime.predict(image[:0], tokens[:0])
    with pytest.raises(UserError):
        runtime.predict(image, tokens[:3])


def test_predict_must_run_a_fixed_batch_in_pieces(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    artifact = save(tmp_path / "four.onnx", [node], [("x", 1, [4, 2])], [("y", 1, [4, 2])])
    runtime = open_runtime(artifact)
    for count in (1, 4, 6, 9):
        x = np.random.default_rng(0).standard_normal((count, 2)).astype(np.float32)
        np.testing.assert_array_equal(runtime.predict(x), np.maximum(x, 0))


def test_predict_must_convert_other_number_types(tmp_path):
    node = helper.make_node("Relu", ["x"], ["y"])
    artifact = save(tmp_path / "net.onnx", [node], [("x", 1, ["n", 2])], [("y", 1, ["n", 2])])
    assert open_runtime(artifact).predict(np.array([[-1, 2]])).tolist() == [[0.0, 2.0]]


def test_run_must_resize_a_tflite_file_with_an_open_batch(reference_data):
    artifact = read_artifact(reference_data / "deploy" / "mlperf_ad_float.tflite")
    runtime, x = open_runtime(artifact), np.random.default_rng(0).standard_normal((3, 640)).astype(np.float32)
    np.testing.assert_allclose(runtime.run([x])[0], runtime.predict(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileError, match="'input_1' takes"):
        runtime.run([x[:, :5]])


def test_open_runtime_must_refuse_a_damaged_file_in_one_sentence(two, tmp_path):
    for kind, name in (("onnx", "ONNX Runtime"), ("tflite", "LiteRT")):
        artifact = two[1][kind]
        other = tmp_path / artifact.path.name
        other.write_bytes(artifact.path.read_bytes())
        described = read_artifact(other)
        other.write_bytes(artifact.path.read_bytes()[: artifact.bytes // 2])
        with pytest.raises(FileError, match=f"{name} cannot load .*{other.name}: .*[.]$"):
            open_runtime(described)


def test_open_runtime_must_refuse_an_operator_that_the_runtime_lacks(tmp_path):
    node = helper.make_node("Nonsense", ["x"], ["y"])
    artifact = save(tmp_path / "net.onnx", [node], [("x", 1, [1])], [("y", 1, [1])])
    with pytest.raises(FileError, match="Nonsense"):
        open_runtime(artifact)


def test_open_runtime_must_name_the_pip_line_of_a_missing_runtime(two, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(DeviceError, match="pip install onnxruntime"):
        open_runtime(two[1]["onnx"])


def test_open_runtime_must_refuse_no_threads(two):
    with pytest.raises(UserError, match="0 threads"):
        open_runtime(two[1]["onnx"], threads=0)


@pytest.mark.parametrize("kind", ["onnx", "tflite"])
def test_runtimes_must_not_write_to_the_terminal(two, kind, capfd):
    runtime = open_runtime(two[1][kind])
    runtime.run(random_feeds(two[1][kind]))
    runtime.close()
    assert capfd.readouterr() == ("", "")


def test_random_feeds_must_be_the_same_for_the_same_seed(two):
    first, again, other = (random_feeds(two[1]["onnx"], seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], other[0])


def test_random_feeds_must_find_a_length_that_a_signal_network_runs_with(tmp_path):
    weight = onnx.numpy_helper.from_array(np.ones((1, 1, 50), np.float32), "w")
    shape = onnx.numpy_helper.from_array(np.array([1], np.int64), "axis")
    nodes = [helper.make_node("Unsqueeze", ["x", "axis"], ["u"]), helper.make_node("Conv", ["u", "w"], ["y"])]
    inputs = [("x", TensorProto.FLOAT, ["n", "samples"])]
    artifact = save(tmp_path / "wave.onnx", nodes, inputs, [("y", 1, ["n", 1, "m"])], [weight, shape])
    assert random_feeds(artifact)[0].shape == (1, 64)


def test_random_feeds_must_say_so_when_no_size_runs(tmp_path):
    shape = onnx.numpy_helper.from_array(np.array([-1, 7919], np.int64), "shape")
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["y"])]
    artifact = save(tmp_path / "odd.onnx", nodes, [("x", 1, ["n", "m"])], [("y", 1, ["n", 7919])], [shape])
    with pytest.raises(FileError, match=r"No size tried for the open dimensions of .*odd\.onnx runs"):
        random_feeds(artifact)


def test_strangers_files_must_run(reference_data):
    for path in sorted((reference_data / "deploy").iterdir()):
        if path.suffix not in (".onnx", ".tflite"):
            continue
        artifact = read_artifact(path)
        runtime = open_runtime(artifact)
        outputs = runtime.run(random_feeds(artifact))
        assert len(outputs) == len(artifact.outputs), path
        assert all(np.isfinite(output).all() for output in outputs), path
