import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgepress.compress.errors import UserError
from edgepress.compress.network import trace
from edgepress.targets.export import export
from edgepress.targets.verify import verify


def model(seed=0, outputs=3):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, outputs)
    )


@pytest.fixture(scope="module")
def network():
    return trace(model(), torch.zeros(1, 2, 6, 6))


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def artifact(request, network, tmp_path_factory):
    return export(network, tmp_path_factory.mktemp("verify") / f"net.{request.param}")


def test_verify_must_accept_what_export_wrote(artifact, network):
    parity = verify(artifact, network)
    assert parity.ok, parity.reason
    assert 0 <= parity.max_rel < 1e-4
    assert 0 <= parity.max_abs < 1e-4
    assert parity.examples == 9


def test_verify_must_use_the_inputs_it_is_given(artifact, network):
    assert verify(artifact, network, torch.randn(4, 2, 6, 6)).examples == 4
    assert verify(artifact, network, [np.ones((2, 2, 6, 6), np.float32)]).examples == 2
    with pytest.raises(UserError):
        verify(artifact, network, torch.randn(4, 3, 6, 6))


def test_verify_must_refuse_a_file_of_another_network(artifact):
    parity = verify(artifact, trace(model(seed=1), torch.zeros(1, 2, 6, 6)))
    assert not parity.ok
    assert parity.max_rel > 1e-3
    assert "differs from the network by" in parity.reason


def test_verify_must_state_the_difference_that_there_is(tmp_path):
    class Line(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, x):
            return x * self.slope

    artifact = export(trace(Line(2.0), torch.zeros(1, 2)), tmp_path / "line.onnx")
    parity = verify(artifact, trace(Line(2.5), torch.zeros(1, 2)), torch.tensor([[1.0, -4.0]]))
    assert (parity.max_abs, parity.max_rel, parity.ok) == (2.0, pytest.approx(0.2), False)
    assert verify(artifact, trace(Line(2.5), torch.zeros(1, 2)), torch.tensor([[1.0, -4.0]]), tolerance=0.3).ok


def test_verify_must_refuse_outputs_of_another_shape(artifact):
    parity = verify(artifact, trace(model(outputs=5), torch.zeros(1, 2, 6, 6)))
    assert not parity.ok
    assert "shape [9, 3] where the network gives [9, 5]" in parity.reason


def test_verify_must_report_a_file_that_is_damaged_or_gone(artifact, network):
    content = artifact.path.read_bytes()
    try:
        artifact.path.write_bytes(content[: len(content) // 2])
        parity = verify(artifact, network)
        assert not parity.ok
        assert "truncated" in parity.reason
        assert np.isnan(parity.max_abs)
        artifact.path.unlink()
        assert "There is no file" in verify(artifact, network).reason
    finally:
        artifact.path.write_bytes(content)


def test_verify_must_report_a_file_that_gives_nan(network, tmp_path):
    artifact = export(network, tmp_path / "net.onnx")
    loaded = onnx.load(artifact.path)
    weight = loaded.graph.initializer[0]
    broken = np.full(list(weight.dims), np.nan, np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(broken, weight.name))
    onnx.save(loaded, artifact.path)
    parity = verify(artifact, network)
    assert not parity.ok
    assert "NaN" in parity.reason


def test_verify_must_leave_the_judgement_of_int8_to_the_task(network, tmp_path):
    artifact = export(network, tmp_path / "net.onnx", "int8", [torch.randn(8, 2, 6, 6)])
    parity = verify(artifact, network, torch.randn(8, 2, 6, 6))
    assert parity.ok
    assert parity.max_rel > 0


class Sampled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.spread = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.mean(x) + torch.randn_like(self.mean(x)) * self.spread(x).exp()


def test_verify_must_say_that_a_network_draws_random_numbers(tmp_path):
    network = trace(Sampled().eval(), torch.randn(2, 3))
    parity = verify(export(network, tmp_path / "net.onnx"), network)
    assert not parity.ok
    assert "draws random numbers at" in parity.reason
    assert "torch.randn_like(self.mean(x))" in parity.reason
    assert "such as a mean" in parity.reason
