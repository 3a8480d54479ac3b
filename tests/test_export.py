import errno
import json
import os
import weakref
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgepress.compress.errors import FileError, TaskError, UserError
from edgepress.compress.network import trace
from edgepress.compress.quantization import quantization
from edgepress.targets import export as export_module
from edgepress.targets.artifact import METADATA_KEY, Port, read_artifact
from edgepress.targets.calibration import pieces
from edgepress.targets.export import export
from edgepress.targets.onnx_file import OPSET, onnx_model
from edgepress.targets.quantize_onnx import quantize_onnx
from edgepress.targets.quantize_tflite import quantize_tflite
from edgepress.targets.runtimes import open_runtime
from edgepress.targets.tflite_file import annotate_tflite, fed_ports, tflite_model
from edgepress.targets.verify import verify


class Residual(nn.Module):
    """Stem, depthwise and pointwise convolution, option-A shortcut, pooling: what a small CNN is made of."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 4)

    def forward(self, image):
        x = self.stem(image)
        short = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return self.head(torch.relu(self.wide(self.deep(x)) + short).mean((2, 3)))


def residual():
    torch.manual_seed(0)
    model = Residual()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return trace(model, torch.randn(1, 3, 12, 12)).then(**{"pass": "Prune", "macs": 0.5})


def images(count=32, seed=1):
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def network():
    return residual()


@pytest.fixture(scope="module")
def files(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    return {
        (suffix, precision): export(network, folder / f"{precision}.{suffix}", precision, [images()])
        for suffix in ("onnx", "tflite")
        for precision in ("fp32", "int8")
    }


def tflite_operators(path):
    from ai_edge_litert import schema_py_generated as schema

    names = {number: name for name, number in vars(schema.BuiltinOperator).items() if not name.startswith("_")}
    model = schema.ModelT.InitFromPackedBuf(path.read_bytes(), 0)
    return Counter(names[model.operatorCodes[o.opcodeIndex].builtinCode] for o in model.subgraphs[0].operators)


# ---- what a file holds


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_write_an_fp32_file_that_computes_what_the_network_computes(files, network, suffix):
    artifact = files[suffix, "fp32"]
    assert (artifact.format, artifact.precision, artifact.history) == (suffix, "fp32", network.history)
    parity = verify(artifact, network, images())
    assert parity.ok, parity.reason
    assert parity.max_rel < 1e-5


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_write_an_int8_file_that_stays_close(files, network, suffix):
    artifact = files[suffix, "int8"]
    assert (artifact.precision, artifact.history) == ("int8", network.history)
    parity = verify(artifact, network, images(seed=2))
    assert parity.ok, parity.reason
    assert 0 < parity.max_rel < 0.1


def test_export_must_leave_the_batch_of_an_onnx_file_open(files):
    for precision in ("fp32", "int8"):
        artifact = files["onnx", precision]
        assert artifact.inputs == (Port("image", (None, 3, 12, 12), "float32"),)
        assert artifact.outputs == (Port("output", (None, 4), "float32"),)
        assert onnx.load(artifact.path).graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_export_must_put_the_channels_last_in_a_tflite_file(files):
    artifact = files["tflite", "fp32"]
    assert artifact.inputs == (Port("image", (1, 12, 12, 3), "float32", channels_last=True),)
    assert artifact.outputs == (Port("output", (1, 4), "float32"),)
    assert files["tflite", "int8"].inputs[0].shape == (1, 12, 12, 3)
    assert files["tflite", "int8"].inputs[0].dtype == "int8"


def test_export_must_fold_batch_normalisation_and_constants_into_the_onnx_file(files):
    operators = Counter(node.op_type for node in onnx.load(files["onnx", "fp32"].path).graph.node)
    assert operators["Conv"] == 3
    assert not operators.keys() & {"BatchNormalization", "Mul", "Sub", "Div", "Sqrt", "Identity", "Constant", "Transpose"}


def test_export_must_fold_batch_normalisation_and_transposes_out_of_the_tflite_file(files):
    operators = tflite_operators(files["tflite", "fp32"].path)
    assert operators["CONV_2D"] == 2
    assert operators["DEPTHWISE_CONV_2D"] == 1
    assert not operators.keys() & {"MUL", "SUB", "DIV", "RSQRT"}
    # the option-A shortcut pads channels, for which the converter may turn the tensor once; no convolution is between two
    assert operators["TRANSPOSE"] <= 1


def test_every_activation_of_an_int8_onnx_file_must_be_unsigned(files, network):
    """ONNX Runtime on Arm computes operators between int8 and uint8 activations in floats."""
    model = onnx.load(files["onnx", "int8"].path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    points = [constants[n.input[2]] for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert len(points) > 2
    assert {point.data_type for point in points} == {onnx.TensorProto.UINT8}
    assert any(onnx.numpy_helper.to_array(point) > 0 for point in points)
    used = {name for node in model.graph.node for name in node.input}
    assert all(tensor.name in used for tensor in model.graph.initializer)


def test_export_must_keep_every_convolution_in_int8(files):
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromPackedBuf(files["tflite", "int8"].path.read_bytes(), 0)
    graph = model.subgraphs[0]
    kinds = {graph.tensors[index].type for operator in graph.operators for index in operator.outputs}
    assert kinds == {schema.TensorType.INT8}
    nodes = onnx.load(files["onnx", "int8"].path).graph.node
    made_by = {output: node.op_type for node in nodes for output in node.output}
    for node in nodes:
        if node.op_type == "Conv":
            assert [made_by.get(name) for name in node.input[:2]] == ["DequantizeLinear", "DequantizeLinear"]


def test_export_must_quantize_onnx_activations_per_tensor(files):
    loaded = onnx.load(files["onnx", "int8"].path)
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in loaded.graph.initializer}
    scales = [sizes[node.input[1]] for node in loaded.graph.node if node.op_type == "QuantizeLinear"]
    assert scales
    assert set(scales) == {1}


def test_export_must_write_its_metadata_and_nobodys_paths(files):
    artifact = files["onnx", "fp32"]
    loaded = onnx.load(artifact.path)
    notes = json.loads(next(p.value for p in loaded.metadata_props if p.key == METADATA_KEY))
    assert notes["precision"] == "fp32"
    assert notes["history"] == [{"pass": "Prune", "macs": 0.5}]
    assert notes["version"]
    assert loaded.opset_import[0].version == OPSET
    onnx.checker.check_model(loaded, full_check=True)
    for written in files.values():
        content = written.path.read_bytes()
        assert b"Residual" not in content
        assert b"test_export" not in content
        assert os.fsencode(os.getcwd()) not in content


def test_export_must_align_the_buffers_of_a_tflite_file(files):
    from ai_edge_litert import schema_py_generated as schema

    for precision in ("fp32", "int8"):
        content = files["tflite", precision].path.read_bytes()
        model = schema.Model.GetRootAs(content, 0)
        starts = [
            model.Buffers(i)._tab.Vector(model.Buffers(i)._tab.Offset(4))
            for i in range(model.BuffersLength())
            if model.Buffers(i).DataLength()
        ]
        assert starts
        assert {start % 16 for start in starts} == {0}


def test_annotate_must_keep_weights_that_a_large_file_holds_behind_its_tables():
    import flatbuffers
    from ai_edge_litert import schema_py_generated as schema

    content, layout = tflite_model(perceptron())
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    largest = max(model.buffers, key=lambda buffer: 0 if buffer.data is None else len(buffer.data))
    weights, largest.data, largest.size = bytes(largest.data), None, len(largest.data)
    packed = b""
    for _ in range(2):  # the offset is known when the tables' size is
        largest.offset = len(packed) or 1
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        packed = bytes(builder.Output())
    assert weights not in packed
    assert weights in annotate_tflite(packed + weights, layout)
    with pytest.raises(ValueError, match="buffer"):
        annotate_tflite(packed + weights[:-1], layout)


# ---- networks of other kinds


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.words = nn.Embedding(10, 4)

    def forward(self, image, tokens):
        features = self.conv(image).relu()
        logits = features.mean((2, 3)) + self.words(tokens).mean(1)
        return {"map": features, "logits": logits, "best": logits.argmax(1)}


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return y, x, y


class Signal(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm1d(2), nn.Conv1d(2, 4, 5)

    def forward(self, output):
        return self.conv(self.norm(output).relu())


class Windows(nn.Module):
    """Expansions beside moved channels, and attention over windows of a batch that is open, its result reshaped."""

    def __init__(self):
        super().__init__()
        self.conv, self.key = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)

    def forward(self, image):
        x = nn.functional.normalize(self.conv(image), dim=1)
        x = x.flatten(2).transpose(1, 2).reshape(-1, 8, 8)
        windows, n, _ = x.shape
        query = x.view(windows, n, 2, 4).transpose(1, 2)
        key = self.key(x).view(windows, n, 1, 4).transpose(1, 2).expand(windows, 2, n, 4)
        y = nn.functional.scaled_dot_product_attention(query, key, key).transpose(1, 2).reshape(x.shape)
        return y.reshape(-1, 16, 8).mean(1)


class Grouped(nn.Module):
    """Attention whose keys serve two heads each: repeated in five dimensions."""

    def __init__(self):
        super().__init__()
        self.query, self.key = nn.Linear(8, 16), nn.Linear(8, 8)

    def forward(self, x):
        n = x.shape[1]
        query = self.query(x).view(-1, n, 4, 4).transpose(1, 2)
        key = self.key(x).view(-1, n, 2, 4).transpose(1, 2)[:, :, None]
        key, value = (k.reshape(-1, 4, n, 4) for k in (key.expand(-1, 2, 2, n, 4), key.tile(1, 1, 2, 1, 1)))
        return nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


class Tiles(nn.Module):
    """An image taken apart into tiles and put together again."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(12, 20, 1)

    def forward(self, image):
        tiles = self.conv(nn.functional.unfold(image, (2, 2), stride=2))
        return nn.functional.fold(tiles, (4, 6), (2, 2), stride=2)


class Projected(nn.Module):
    """LSTMs that hand on fewer numbers than they keep: every layer and direction, the last states too."""

    def __init__(self):
        super().__init__()
        self.first = nn.LSTM(6, 12, 2, proj_size=5, bidirectional=True, batch_first=True)
        self.second = nn.LSTM(10, 8, proj_size=3, bias=False)

    def forward(self, x):
        y, (h, c) = self.first(x)
        return self.second(y.transpose(0, 1))[0].transpose(0, 1), h.transpose(0, 1), c.transpose(0, 1)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Two(), (torch.randn(2, 3, 4, 6), torch.arange(10).view(2, 5))),
        (Same(), (torch.randn(2, 4),)),
        (Signal(), (torch.randn(3, 2, 20),)),
        (Windows(), (torch.randn(2, 3, 4, 4),)),
        (Grouped(), (torch.randn(2, 12, 8),)),
        (Tiles(), (torch.randn(2, 3, 4, 6),)),
        (Projected(), (torch.randn(2, 7, 6),)),
    ],
    ids=["several", "same", "signal", "windows", "grouped", "tiles", "projected"],
)
def test_export_must_keep_the_inputs_and_outputs_of_any_network(model, inputs, suffix, tmp_path):
    network = trace(model, inputs)
    for precision in ("fp32", "int8"):
        artifact = export(network, tmp_path / f"net.{suffix}", precision, [inputs] * 3)
        parity = verify(artifact, network, inputs)
        assert parity.ok, parity.reason
        outputs = open_runtime(artifact).predict(*(x.numpy() for x in inputs))
        wanted = network.predict(*(x.numpy() for x in inputs))
        if isinstance(wanted, np.ndarray):
            wanted, outputs = (wanted,), (outputs,)
        assert [o.shape for o in outputs] == [w.shape for w in wanted]
        names = [port.name for port in artifact.inputs + artifact.outputs]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_export_must_write_distances_into_an_onnx_file(p, tmp_path):
    class Distances(nn.Module):
        def forward(self, x):
            return torch.cdist(x, x[:, :3] + 1, p=p)

    network = trace(Distances(), torch.randn(2, 5, 4))
    parity = verify(export(network, tmp_path / "net.onnx"), network)
    assert parity.ok, parity.reason
    assert any("cdist" in str(n.target) for n in network.module.graph.nodes), "exporting must leave the network as it was"


def test_export_must_write_64_bit_integers_as_32_bit_in_tflite(tmp_path):
    inputs = (torch.randn(2, 3, 4, 6), torch.arange(10).view(2, 5))
    artifact = export(trace(Two(), inputs), tmp_path / "two.tflite")
    assert [port.dtype for port in artifact.inputs] == ["float32", "int32"]
    assert [port.channels_last for port in artifact.inputs] == [True, False]
    assert [port.channels_last for port in artifact.outputs] == [True, False, False]


def test_export_must_write_evaluation_mode_and_leave_the_network_in_training(tmp_path):
    network = trace(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)), torch.randn(1, 4)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    artifact = export(network, tmp_path / "net.onnx")
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert verify(artifact, network).ok


# ---- calibration


class Watched:
    """A source of arrays that knows how many of those it gave are still held, and how often it was read."""

    def __init__(self, count, shape):
        self.count, self.shape, self.most, self.readings = count, shape, 0, 0

    def __call__(self):
        self.readings += 1
        given = []
        random = np.random.default_rng(0)
        for _ in range(self.count):
            self.most = max(self.most, sum(ref() is not None for ref in given))
            array = random.standard_normal(self.shape).astype(np.float32)
            given.append(weakref.ref(array))
            yield array
            del array


def perceptron():
    return trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(1, 4))


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_release_calibration_batches(suffix, tmp_path):
    source = Watched(30, (8, 4))
    export(perceptron(), tmp_path / f"net.{suffix}", "int8", source)
    assert source.readings >= 1
    assert source.most <= 2


def test_quantizers_must_release_calibration_pieces():
    network = perceptron()
    source = Watched(40, (1, 4))
    quantize_onnx(onnx_model(network), lambda: ((array,) for array in source()), quantization("int8"))
    assert source.most <= 3
    content, layout = tflite_model(network)
    content = annotate_tflite(content, layout)
    source = Watched(40, (1, 4))
    quantize_tflite(content, fed_ports(content, layout), ((array,) for array in source()))
    assert source.readings == 1
    assert source.most <= 3


def test_tflite_quantization_must_not_depend_on_the_order_of_the_examples(tmp_path):
    network, data = perceptron(), torch.randn(40, 4) * torch.linspace(0.1, 3, 40)[:, None]
    first = export(network, tmp_path / "a.tflite", "int8", [data])
    last = export(network, tmp_path / "b.tflite", "int8", [data.flip(0)])
    assert first.inputs[0].scale == pytest.approx(last.inputs[0].scale, rel=1e-4)


def test_pieces_must_refuse_data_that_does_not_fit(network):
    with pytest.raises(UserError, match=r"of shape \[N, 1, 12, 12\] does not fit the network, which takes \[N, 3, 12, 12\]"):
        list(pieces(network, [torch.zeros(2, 1, 12, 12)], 4))
    with pytest.raises(UserError, match="NaN"):
        list(pieces(network, [torch.full((2, 3, 12, 12), torch.nan)], 4))
    with pytest.raises(UserError, match="yielded no batch"):
        list(pieces(network, [], 4))


# ---- mistakes


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_refuse_calibration_data_that_does_not_fit(network, suffix, tmp_path):
    with pytest.raises(UserError, match="does not fit the network"):
        export(network, tmp_path / f"net.{suffix}", "int8", [torch.zeros(2, 1, 12, 12)])
    with pytest.raises(TaskError, match="read only once"):
        export(network, tmp_path / f"net.{suffix}", "int8", (image for image in [images()]))
    assert list(tmp_path.iterdir()) == []


def test_export_must_name_the_choices(network, tmp_path):
    with pytest.raises(UserError, match=r"end it in \.onnx or \.tflite"):
        export(network, tmp_path / "net.pt")
    with pytest.raises(UserError, match="choose fp32 or fp16 or"):
        export(network, tmp_path / "net.onnx", "int7")
    with pytest.raises(UserError, match="int8 needs calibration data"):
        export(network, tmp_path / "net.onnx", "int8")


def test_export_must_refuse_a_folder_that_cannot_be_written(network, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot make the folder"):
        export(network, tmp_path / "file" / "net.onnx")
    (tmp_path / "net.onnx").mkdir()
    with pytest.raises(FileError, match="a folder of that name"):
        export(network, tmp_path / "net.onnx")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(FileError, match="Cannot write to the folder"):
        export(network, tmp_path / "other.onnx")


def test_export_must_leave_the_old_file_when_the_disk_is_full(network, tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export_module.os, "replace", full)
    with pytest.raises(FileError, match="No space left on device"):
        export(network, path)
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_name_the_operator_that_a_format_lacks(suffix, tmp_path):
    class Singular(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    with pytest.raises(FileError, match=rf"cannot be written as fp32 \.{suffix}: the operator aten.+svd"):
        export(trace(Singular(), torch.randn(1, 3, 3)), tmp_path / f"net.{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_export_must_refuse_a_projection_that_starts_from_a_state_for_onnx(tmp_path):
    class Started(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 6, proj_size=3, batch_first=True)

        def forward(self, x, state):
            return self.rnn(x, (state[None], x.new_zeros(1, x.shape[0], 6)))[0]

    network = trace(Started(), (torch.randn(2, 5, 4), torch.randn(2, 3)))
    with pytest.raises(FileError, match=r"An LSTM with projections .* starts from zeros"):
        export(network, tmp_path / "net.onnx")


def test_export_must_name_the_operator_that_the_converter_lacks_for_a_type(tmp_path):
    class Integer(nn.Module):
        def forward(self, tokens):
            return tokens.argmax(1)

    with pytest.raises(FileError, match=r"the operator tfl\.arg_max has no counterpart there; .* try \.onnx"):
        export(trace(Integer(), torch.arange(4)[None]), tmp_path / "net.tflite")


@pytest.mark.parametrize("suffix", ["onnx", "tflite"])
def test_export_must_not_write_to_the_terminal(suffix, tmp_path, capfd):
    export(perceptron(), tmp_path / f"net.{suffix}", "int8", [torch.randn(4, 4)])
    assert capfd.readouterr() == ("", "")


def test_export_must_replace_a_file_by_the_same_bytes_for_the_same_network(network, files, tmp_path):
    for suffix in ("onnx", "tflite"):
        again = export(network, tmp_path / f"net.{suffix}")
        assert again.sha256 == files[suffix, "fp32"].sha256
        assert read_artifact(again.path) == again
