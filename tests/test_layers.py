"""``layers`` of a quantization: the same names in both formats and in training, and no name that is nobody's."""

import onnx
import pytest
import torch
from torch import nn

import edgepress as ep
from edgepress.compress.errors import RecipeError, UserError
from edgepress.compress.fake import check_layers, weights
from edgepress.compress.quantization import quantization
from edgepress.compress.shorten import branches, without
from edgepress.targets.onnx_graph import Graph, module_of, weight_of
from edgepress.targets.tflite_recipe import tflite_operators
from edgepress.targets.tflite_tensors import read_model

KINDS = {"conv": {"stem", "blocks.0.point"}, "depthwise": {"blocks.0.deep"}, "conv_transpose": {"up"}, "linear": {"head"}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.point(self.deep(x).relu()).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(Block())
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.up(self.blocks(self.stem(x).relu())).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ep.trace(Net().eval(), torch.randn(2, 3, 8, 8))


def a_task(**settings):
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    return ep.Task(
        Net().eval(),
        images[:2],
        lambda predict: {"accuracy": 100.0 * float((predict(images.numpy()).argmax(1) == labels.numpy()).mean())},
        "accuracy",
        train_batches=[(images, labels)],
        **settings,
    )


def floats_in_onnx(path):
    graph = Graph(onnx.load(path))
    return {module_of(n) for n in graph.nodes if (w := weight_of(graph, n)) is not None and w.dtype == "float32"}


def floats_in_tflite(path):
    model = read_model(path.read_bytes())
    graph = model.subgraphs[0]
    pairs = [(o.module, raw) for o, raw in zip(tflite_operators(model), graph.operators, strict=True) if o.weights]
    weights = {name: graph.tensors[stored_weight(model, raw)] for name, raw in pairs}
    return {name for name, tensor in weights.items() if tensor.quantization.scale is None}


def stored_weight(model, operator):
    """The largest constant that an operator reads."""
    tensors = model.subgraphs[0].tensors
    constants = [i for i in map(int, operator.inputs) if i >= 0 and model.buffers[tensors[i].buffer].data is not None]
    return max(constants, key=lambda i: len(model.buffers[tensors[i].buffer].data))


@pytest.mark.parametrize(("kind", "modules"), KINDS.items())
def test_a_kind_of_operator_must_be_the_same_everywhere(kind, modules, network, tmp_path):
    how = quantization("int8", layers={f"op:{kind}": "fp32"})
    trained = {name.removesuffix(".weight") for name in weights(network, how)}
    assert trained == set().union(*KINDS.values()) - modules
    calibration = [torch.randn(8, 3, 8, 8)]
    assert floats_in_tflite(ep.export(network, tmp_path / "net.tflite", how, calibration).path) == modules
    onnx_floats = floats_in_onnx(ep.export(network, tmp_path / "net.onnx", how, calibration).path)
    assert onnx_floats - {"up"} == modules - {"up"}  # ONNX Runtime has no integer kernel for it anyway


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("blocks", "its layers are 'blocks.*'"),
        ("haed", "there is 'head'"),
        ("layer1.*", "there is 'stem'"),
        ("op:dephtwise", "op:depthwise"),
    ],
)
def test_a_name_that_is_nobodys_must_be_refused_before_any_work(pattern, said, network, tmp_path):
    layers = {pattern: "fp32"}
    calibration = [torch.randn(8, 3, 8, 8)]
    for work in (
        lambda: ep.export(network, tmp_path / "net.onnx", quantization("int8", layers=layers), calibration),
        lambda: ep.sensitivity(network, ".onnx", quantization("int8", layers=layers), calibration),
        lambda: ep.Quantize(layers=layers)(network, a_task()),
        lambda: ep.press(a_task(), out=tmp_path / "out", recipe=ep.Recipe(layers=layers)),
        lambda: ep.press(a_task(), out=tmp_path / "out", recipe=ep.Recipe((ep.Quantize(layers=layers),))),
    ):
        with pytest.raises(UserError) as caught:
            work()
        assert isinstance(caught.value, RecipeError)
        assert pattern in str(caught.value)
        assert said in str(caught.value)
    assert not list(tmp_path.glob("**/*.onnx"))


def test_a_layer_that_pruning_took_away_must_still_count(network):
    shorter = without(network, *branches(network))
    assert "blocks.0.deep.weight" not in shorter.state_dict()
    check_layers(shorter, quantization("int8", layers={"blocks.0.deep": "fp32"}))
