import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.quantization import quantization
from edgepress.targets.onnx_file import onnx_model
from edgepress.targets.onnx_graph import Graph, channel_axis
from edgepress.targets.quantize_onnx import quantize_onnx
from edgepress.targets.saturation import may_saturate, safe_scales
from edgepress.targets.weight_grid import on_grid, scales_of


def run(model, array, *, widened=False):
    """``widened``: ONNX Runtime turns the int8 weights into uint8 ones, whose kernel adds in 32 bits on every x86."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if widened:
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: array})[0]


def loud(layer, size):
    """Weights of one sign and large activations: each pair of products is far beyond 16 bits."""
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(0.9, 1.0, layer.weight.numel()).reshape(layer.weight.shape))
        layer.bias.zero_()
    network = trace(layer, torch.zeros(1, *size))
    model, array = onnx_model(network), np.ones((4, *size), np.float32)
    return model, array


LAYERS = {
    "linear": (lambda: nn.Linear(16, 8), (16,)),
    "conv": (lambda: nn.Conv2d(8, 8, 3, padding=1), (8, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(8, 16, 1), (8, 6, 6)),
    "odd channels": (lambda: nn.Conv2d(3, 8, 3), (3, 6, 6)),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, groups=2), (8, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (8, 6, 6)),
    "sequence": (lambda: nn.Linear(16, 8), (5, 16)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_file_must_give_the_same_answer_where_the_cpu_saturates(name):
    layer, size = LAYERS[name]
    model, array = loud(layer(), size)
    exact = run(model, array)
    small = quantize_onnx(model, lambda: iter([(array,)]), quantization("int8"))
    assert may_saturate(small) == {}
    assert np.abs(run(small, array) - exact).max() < 0.02 * np.abs(exact).max()
    np.testing.assert_array_equal(run(small, array), run(small, array, widened=True))


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "depthwise"])
def test_the_plain_grid_must_be_found_out_wherever_this_cpu_saturates(name):
    layer, size = LAYERS[name]
    model, array = loud(layer(), size)
    plain = quantize_onnx(model, lambda: iter([(array,)]), quantization("int8"), safe=False)
    bound = may_saturate(plain)
    assert len(bound) == 1
    assert 32767 < next(iter(bound.values())) <= 255 * 254
    wrong = np.abs(run(plain, array) - run(plain, array, widened=True)).max()
    reach = np.abs(run(model, array)).max()
    # with VNNI both are right; without it nearly half of the sum is lost
    assert wrong == 0 or wrong > 0.2 * reach


def test_a_depthwise_convolution_must_not_be_counted():
    layer, size = LAYERS["depthwise"]
    model, array = loud(layer(), size)
    plain = quantize_onnx(model, lambda: iter([(array,)]), quantization("int8"), safe=False)
    assert may_saturate(plain) == {}
    np.testing.assert_array_equal(run(plain, array), run(plain, array, widened=True))


def test_scales_must_widen_only_channels_that_can_overflow_and_only_as_much_as_needed():
    random = np.random.default_rng(0)
    weight = random.standard_normal((64, 8, 3, 3)).astype(np.float32)
    weight[:32] *= np.float32(0.001)
    weight[:32, 0, 0, 0] = 3  # one large weight with small neighbours: no pair comes near
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    plain, safe = scales_of(weight, 0), safe_scales(node, weight, 0)
    np.testing.assert_array_equal(plain[:32], safe[:32])
    assert (safe[32:] >= plain[32:]).all()
    assert (safe[32:] > plain[32:]).any()
    assert (safe < 2 * plain).all()
    rows = np.moveaxis(on_grid(weight, safe, 0), 1, -1).reshape(64, -1, 2).astype(int)
    pairs = np.maximum(np.maximum(rows, 0).sum(2), np.maximum(-rows, 0).sum(2)).max(1)
    assert pairs.max() <= 128
    assert pairs[safe > plain].min() >= 126


def test_dynamic_files_must_not_saturate_either():
    for layer, size in ((nn.Linear(16, 8), (16,)), (nn.LSTM(8, 8, bidirectional=True, batch_first=True), (5, 8))):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(0.05)

        class First(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                made = self.inner(x)
                return made[0] if isinstance(made, tuple) else made

        model = onnx_model(trace(First(layer), torch.zeros(1, *size)))
        small = quantize_onnx(model, None, quantization("int8-dynamic"))
        assert may_saturate(small) == {}
        array = np.ones((1, *size), np.float32)
        exact = run(model, array)
        assert np.abs(run(small, array) - exact).max() < 0.02 * np.abs(exact).max()


def test_integers_must_be_read_in_every_form():
    weight = np.full((2, 2), 100, np.int8)
    for kind, slot in (("QLinearMatMul", 3), ("QGemm", 3), ("MatMulInteger", 1)):
        inputs = [f"i{n}" for n in range(8)]
        inputs[slot] = "w"
        node = onnx.helper.make_node(kind, inputs, ["y"], name="layer")
        graph = onnx.helper.make_graph([node], "g", [], [], [onnx.numpy_helper.from_array(weight, "w")])
        model = onnx.helper.make_model(graph)
        assert may_saturate(model) == {"layer": 255 * 200}
        assert channel_axis(Graph(model).nodes[0]) == 1
