"""What quantization shifts on average is measured in the file, layer by layer, and put back into the biases."""

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.quantization import quantization
from edgepress.targets.onnx_bias import corrected_biases
from edgepress.targets.onnx_file import onnx_model
from edgepress.targets.onnx_tensors import onnx_tensors
from edgepress.targets.quantize_onnx import quantize_onnx
from edgepress.targets.segments import segments


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return onnx_model(trace(nn.Linear(64, 8).eval(), torch.zeros(1, 64)))


def inputs(count, seed):
    """Each feature is nearly the same in all examples, so that rounding shifts it the same way."""
    base = np.random.default_rng(0).random((1, 64), np.float32)
    return base + np.random.default_rng(seed).normal(0, 2e-4, (count, 64)).astype(np.float32)


def error(model, plain, x):
    names = [plain.graph.output[0].name]
    found, wanted = (onnx_tensors(m, names)({m.graph.input[0].name: x})[names[0]] for m in (model, plain))
    return float(((found - wanted) ** 2).mean() / wanted.var()), np.abs((found - wanted).mean(0)).max()


def test_measured_shifts_must_be_put_back(model):
    pieces = lambda: iter([(inputs(32, 1),)])  # noqa: E731
    how = quantization("int8")
    before = error(quantize_onnx(model, pieces, how, correct=False), model, inputs(64, 2))
    after = error(quantize_onnx(model, pieces, how), model, inputs(64, 2))
    assert after[0] < 0.5 * before[0]
    assert after[1] < 0.2 * before[1]


def test_only_biases_must_change(model):
    pieces = lambda: iter([(inputs(16, 1),)])  # noqa: E731
    one, other = (quantize_onnx(model, pieces, quantization("int8"), correct=c) for c in (False, True))
    assert [node.name for node in one.graph.node] == [node.name for node in other.graph.node]
    tensors = {tensor.name: tensor for tensor in one.graph.initializer}
    changed = {t.name for t in other.graph.initializer if t.SerializeToString() != tensors[t.name].SerializeToString()}
    assert changed
    assert all(name.endswith("_bias_int32") for name in changed)


def test_a_file_that_would_get_worse_must_stay_as_it_was(model):
    pieces = lambda: iter([(inputs(16, 1),)])  # noqa: E731
    small = quantize_onnx(model, pieces, quantization("int8"), correct=False)
    tails = {node.name: node.output[0] for node in model.graph.node}
    odd = [(x[None] * (100 if i % 4 else 1),) for i, x in enumerate(inputs(16, 1))]
    assert corrected_biases(model, small, tails, odd) is small


def test_every_operator_must_lie_in_one_piece_of_a_branching_graph():
    graph = [(["x"], ["a"]), (["a"], ["b"]), (["a"], ["c"]), (["b", "c"], ["d"]), (["d"], ["e"])]
    found = segments(graph, ["x"], ["a", "b", "d", "e"])
    assert Counter(number for piece in found for number in piece.operators) == dict.fromkeys(range(5), 1)
    assert [piece.inputs for piece in found] == [("x",), ("a",), ("a", "b"), ("d",)]
    assert [piece.done for piece in found] == [("x",), (), ("a", "b"), ("d", "e")]


def test_embeddings_must_be_stored_in_int8_and_looked_up_as_floats():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(500, 16), nn.Linear(16, 3))
    tokens = torch.arange(12).view(2, 6)
    plain = onnx_model(trace(net, tokens))
    small = quantize_onnx(plain, lambda: iter([(tokens.numpy(),)]), quantization("int8"))
    assert any(t.data_type == onnx.TensorProto.INT8 and tuple(t.dims) == (500, 16) for t in small.graph.initializer)
    assert len(small.SerializeToString()) < 0.4 * len(plain.SerializeToString())
    table = net[0].weight.detach().numpy()
    shown = onnx.ModelProto()
    shown.CopyFrom(small)
    name = next(node.output[0] for node in small.graph.node if node.op_type == "Mul")
    rows = onnx_tensors(shown, [name])({small.graph.input[0].name: tokens.numpy()})[name].reshape(-1, 16)
    assert (np.abs(rows - table[:12]) <= np.abs(table[:12]).max(1, keepdims=True) / 254 + 1e-6).all()
