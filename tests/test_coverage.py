"""A few architectures of the benchmark's zoo all the way: pruned by half, exact, trained, written to both formats and run."""

import pruning_coverage
import pytest
import quantization_coverage
import torch
from zoo import ZOO

from edgepress.compress.network import trace
from edgepress.compress.pruning import analyse, channels_of, masked, relative_error, remove

NAMES = ["shufflenet-v2", "tcn", "ssd"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pruned_architecture_must_be_exact_and_run_from_both_formats(name, tmp_path):
    torch.manual_seed(0)
    model, inputs = ZOO[name]()
    row = {"name": name}
    for step in pruning_coverage.ours(model, inputs, tmp_path, ("onnx", "tflite")):
        row |= step
    assert pruning_coverage.verdict(row, ("onnx", "tflite")) == ""
    before, after = row["parameters"]
    assert after < 0.6 * before


def test_a_folded_network_must_equal_its_oracle_and_nothing_else():
    model, inputs = ZOO["tcn"]()
    network = trace(model, inputs)
    analysis = analyse(network)
    gone = pruning_coverage.half(channels_of(analysis))
    smaller = remove(network, analysis, gone)
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
        assert relative_error(smaller(*inputs), masked(analysis, gone)(*inputs)) < 1e-5
        assert relative_error(smaller(*inputs), masked(analysis, [])(*inputs)) > 1e-3


def test_a_quantized_architecture_must_run_near_its_network_and_a_precision_without_kernels_be_said():
    row = dict(quantization_coverage.tried("u-net", "int8", ["onnx", "tflite"]))
    assert min(row["onnx"], row["tflite"]) > 20
    (sentence,) = (value for name, value in quantization_coverage.tried("u-net", "int8-dynamic", ["onnx"]) if name == "onnx")
    assert sentence.startswith(quantization_coverage.NOTHING)
