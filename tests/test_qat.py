"""Quantization-aware training: the fake quantizer, where it stands, and that the files hold what was trained."""

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

import edgepress
from edgepress.compress.errors import RecipeError, UserError
from edgepress.compress.fake import (
    fake_activation,
    fake_bias,
    fake_weight,
    faked,
    nearest_range,
    points,
    quantized_weight,
    weights,
)
from edgepress.compress.fold import folded
from edgepress.compress.network import Network, retrace, trace
from edgepress.compress.progress import silenced
from edgepress.compress.quantization import quantization
from edgepress.compress.quantize import Quantize, calibrated, fake_quantized, trained_ranges
from edgepress.compress.task import Task
from edgepress.targets.matching import deployed_ranges, divergence, matched
from edgepress.targets.onnx_file import onnx_model
from edgepress.targets.onnx_tensors import onnx_tensors
from edgepress.targets.quantize_onnx import quantize_onnx, quantized_tensors
from edgepress.targets.ranges import scale_of

INT8 = quantization("int8")


class Residual(nn.Module):
    """Convolutions with and without ReLU, a residual addition, max pooling, a concatenation, the mean and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8)
        self.side, self.head = nn.Conv2d(8, 4, 1), nn.Linear(12, 5)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = F.max_pool2d(F.relu(x + self.body_norm(self.body(x))), 2)
        return self.head(torch.cat([x, self.side(x)], 1).mean((2, 3)))


def seeded(kind, *arguments):
    torch.manual_seed(0)
    model = kind(*arguments)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


def images(count=32, seed=1):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def a_task(model, labelled=True):
    """Learn the model's own decisions, with labels or without."""
    with torch.no_grad():
        batches = [(images(seed=s), model(images(seed=s)).argmax(1)) for s in range(4)]
        wanted = model(images(200, 9)).argmax(1).numpy()

    def evaluate(predict):
        return {"agreement": 100.0 * float((predict(images(200, 9).numpy()).argmax(1) == wanted).mean())}

    inputs = [x for x, _ in batches]
    return Task(model, images(1), evaluate, "agreement", train_batches=batches if labelled else None, calibration_batches=inputs)


@pytest.fixture(scope="module", params=["int8", "w4a8"])
def trained(request):
    model = seeded(Residual)
    with silenced():
        return Quantize(precision=request.param, epochs=2, lr=0.01)(trace(model, images(1)), a_task(model))


# ---- numbers


def test_an_activation_is_rounded_to_the_grid_of_the_files():
    x = torch.linspace(-3, 3, 1001)
    low, high = -1.0, 1.55
    scale, point = scale_of(low, high)
    wanted = (np.clip(np.rint(x.double().numpy() / scale) + point, -128, 127) - point) * scale
    got = fake_activation(x, torch.tensor(low), torch.tensor(high)).numpy()
    assert np.abs(got - wanted).max() < 1e-6
    assert len(np.unique(got)) == 256
    assert 0.0 in got


@pytest.mark.parametrize(("value", "by_x", "by_low", "by_high"), [(0.403, 1, -0.3, 0.3), (2.0, 0, 0, 1), (-2.0, 0, 1, 0)])
def test_the_gradients_of_an_activation_are_those_of_lsq(value, by_x, by_low, by_high):
    # 0.403 is 40.3 steps of 0.01 above 0 and becomes 40: the step's gradient is -0.3, a 255th of it for either end
    x = torch.tensor([[value]], requires_grad=True)
    low, high = (torch.tensor(end, requires_grad=True) for end in (-1.0, 1.55))
    fake_activation(x, low, high).sum().backward()
    factor = 255**1.5  # of one value
    inside = abs(value) < 1
    wanted = [g / 255 * -1 if inside else g for g in (by_low, by_high)]
    assert x.grad.item() == by_x
    assert [low.grad.item() / factor, high.grad.item() / factor] == pytest.approx(wanted, abs=2e-5)


def test_the_gradient_of_a_range_is_eased_by_how_many_values_share_it():
    gradients = []
    for count in (1, 16):
        high = torch.tensor(1.0, requires_grad=True)
        fake_activation(torch.full((1, count), 2.0), torch.tensor(0.0), high).sum().backward()
        gradients.append(high.grad.item())
    assert gradients[1] == pytest.approx(gradients[0] * 16 / 4, rel=1e-5)


@pytest.mark.parametrize("top", [127, 7])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_is_rounded_to_the_grid_of_the_files_and_passes_gradients_on(top, axis):
    torch.manual_seed(0)
    weight = torch.randn(6, 6, 3, requires_grad=True)
    fake = fake_weight(weight, top, axis)
    integers, scale = quantized_weight(weight, top, axis)
    assert integers.abs().max() == top
    along = scale.view(-1, 1, 1) if axis == 0 else scale.view(1, -1, 1)
    assert torch.allclose(fake, integers * along, atol=1e-7)
    fake.sum().backward()
    assert (weight.grad == 1).all()


def test_the_end_of_a_weights_grid_is_learned_and_stays_within_the_weights():
    weight = torch.tensor([[1.0, 0.26, -0.1], [0.5, 0.2, 0.1]], requires_grad=True)
    limit = torch.tensor([0.7, 9.0], requires_grad=True)
    fake = fake_weight(weight, 7, 0, limit)
    assert torch.allclose(fake[0], torch.tensor([0.7, 0.3, -0.1]))
    assert torch.allclose(fake[1], fake_weight(weight, 7)[1])
    fake[:, 0].sum().backward()
    assert weight.grad[:, 0].tolist() == [0.0, 1.0]  # the first is clipped
    assert limit.grad.tolist() == pytest.approx([7**1.5 / 3**0.5, 0.0])


def test_a_channel_of_zeros_stays_zero():
    assert fake_weight(torch.zeros(2, 3), 127).tolist() == torch.zeros(2, 3).tolist()
    assert quantized_weight(torch.zeros(2, 3), 7)[0].abs().max() == 0


def test_a_bias_is_a_whole_multiple_of_the_products_step():
    bias, weight = torch.tensor([0.31, -0.2]), torch.tensor([[1.27], [2.54]])
    got = fake_bias(bias, weight, 127, 0, None, torch.tensor(0.0), torch.tensor(25.5))
    step = torch.tensor([0.001, 0.002])
    assert torch.allclose(got, (bias / step).round() * step)


@pytest.mark.parametrize(("low", "high"), [(-1.03, 2.2), (0.0, 6.0), (-3.0, 0.0), (0.5, 1.0), (0.0, 0.0)])
def test_a_nearest_range_gives_its_scale_and_zero_point_in_any_precision(low, high):
    scale, point = scale_of(low, high)
    found = nearest_range(low, high)
    assert scale_of(*found) == (pytest.approx(scale), point)
    assert scale_of(*(float(np.float32(end)) for end in found))[1] == point


# ---- graphs


def test_folding_changes_nothing_but_rounding():
    network = trace(seeded(Residual), images(1))
    x = images(8).numpy()
    plain = folded(network)
    assert not [name for name in plain.state_dict() if "norm" in name]
    assert np.abs(plain.predict(x) - network.predict(x)).max() < 1e-5


def test_points_of_a_residual_network():
    plain = retrace(folded(trace(seeded(Residual), images(1))))
    assert points(plain, INT8) == {
        "x": "x",
        "relu": "relu",  # not the convolution in front of it
        "conv2d_1": "conv2d_1",  # it feeds the addition
        "relu_1": "relu_1",  # not the addition
        "max_pool2d": "relu_1",  # moves only
        "conv2d_2": "cat",  # feeds the concatenation alone
        "cat": "cat",
        "mean": "mean",
        "linear": "linear",
    }


class Various(nn.Module):
    def forward(self, x):
        a, b = F.avg_pool2d(x, 2).chunk(2, 1)
        y = torch.softmax(a.flatten(1) * 2, 1)
        return y, torch.sigmoid(b.permute(0, 2, 3, 1)), F.leaky_relu(x + 1)


def test_points_of_other_operators():
    network = trace(Various(), torch.zeros(1, 4, 4, 4))
    found = points(network, INT8)
    assert {found[name] for name in ("avg_pool2d", "getitem", "getitem_1", "flatten", "permute")} == {"x"}
    assert [found[name] for name in ("mul", "softmax", "sigmoid")] == ["mul", "softmax", "sigmoid"]
    assert found["add"] == "add"  # a leaky ReLU is not fused
    assert "chunk" not in found
    ranges = dict.fromkeys(found.values(), (-1.0, 1.0))
    state = faked(network, INT8, ranges).state_dict()
    assert state["fakes.softmax_high"] == state["fakes.sigmoid_high"] == 255 / 256
    assert state["fakes.x_high"] == 1.0


def test_a_layer_that_stays_float_is_not_rounded():
    plain = retrace(folded(trace(seeded(Residual), images(1))))
    how = quantization("int8", layers={"head": "fp32", "body": "w4a8"})
    assert "linear" not in points(plain, how)
    assert weights(plain, how) == {"stem.weight": (127, 0), "body.weight": (7, 0), "side.weight": (127, 0)}


def test_ranges_that_begin_at_zero_stay_there():
    plain = retrace(folded(trace(seeded(Residual), images(1))))
    fake = faked(plain, INT8, calibrated(plain, INT8, iter([(images(),)])))
    learned = {name for name, _ in fake.module.named_parameters() if name.startswith("fakes.")}
    assert "fakes.relu_high" in learned
    assert "fakes.relu_low" not in learned
    assert {"fakes.x_low", "fakes.x_high"} <= learned


# ---- training


def test_trained_weights_lie_on_the_grid(trained):
    how = quantization(trained.history[-1]["precision"])
    state = trained.state_dict()
    stored = weights(trained, how)
    assert set(stored) == {"stem.weight", "body.weight", "side.weight", "head.weight"}
    for name, (top, axis) in stored.items():
        integers, scale = quantized_weight(state[name], top, axis)
        assert torch.allclose(integers * scale.view(-1, *[1] * (integers.dim() - 1)), state[name], rtol=1e-6, atol=0)
        assert (integers.flatten(1).abs().amax(1) == top).all()


def test_training_computes_what_the_network_with_rounding_computes(trained):
    x = images(16, 5).numpy()
    fake = fake_quantized(trained)
    wanted, got = trained.predict(x), fake.predict(x)
    assert 0 < np.abs(got - wanted).max() < 0.1 * np.abs(wanted).max()  # activations differ, weights do not
    low, high = trained_ranges(trained)["linear"]
    steps = (got - low) / (high - low) * 255
    assert np.abs(steps - np.rint(steps)).max() < 1e-3


@pytest.mark.parametrize("labelled", [True, False])
def test_training_recovers_what_four_bits_lost(labelled):
    model = seeded(Residual)
    task, network = a_task(model, labelled), trace(model, images(1))
    x = images(100, 9)
    wanted = torch.from_numpy(network.predict(x.numpy()))
    errors = []
    for epochs in (1e-6, 6):
        with silenced():
            quantized = Quantize(precision="w4a8", epochs=epochs, lr=0.01, labels=0.9 if labelled else 0.0)(network, task)
        got = torch.from_numpy(fake_quantized(quantized).predict(x.numpy()))
        errors.append(F.cross_entropy(got, wanted.argmax(1)) if labelled else F.mse_loss(got, wanted))
    assert errors[1] < 0.8 * errors[0]


def test_the_teacher_may_be_a_file(tmp_path):
    model, other = seeded(Residual), seeded(Residual)
    with torch.no_grad():
        other.head.bias += torch.tensor([5.0, 0, 0, 0, 0])
    path = edgepress.export(trace(other, images(1)), tmp_path / "other.onnx").path
    network, task, x = trace(model, images(1)), a_task(model, labelled=False), images(100, 9)
    with silenced():
        own, told = (Quantize(epochs=6, lr=0.01, teacher=t)(network, task).predict(x.numpy()) for t in (None, path))
    assert (told - own)[:, 0].mean() > 1.0
    told = Quantize(epochs=1e-6, teacher=[str(path)])
    assert edgepress.Recipe((told,)).yaml().count(f"- {path}") == 1


def test_a_teacher_of_another_task_is_refused():
    model, other = seeded(Residual), seeded(Residual)
    other.head = nn.Linear(12, 7)
    with pytest.raises(RecipeError, match=r"The teacher gives \[\d+, 7\] where the student gives \[\d+, 5\]"):
        Quantize(epochs=1, teacher=trace(other, images(1)))(trace(model, images(1)), a_task(model))


def test_the_network_that_came_in_stays_as_it_was():
    model = seeded(Residual)
    network = trace(model, images(1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with silenced():
        Quantize(epochs=1)(network, a_task(model))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.history == ()


def test_ranges_survive_saving_and_loading(trained, tmp_path):
    loaded = Network.load(trained.save(tmp_path / "net"))
    assert trained_ranges(loaded) == trained_ranges(trained)
    x = images(8).numpy()
    assert np.array_equal(fake_quantized(loaded).predict(x), fake_quantized(trained).predict(x))


def test_a_pass_afterwards_makes_the_ranges_void(trained):
    model = seeded(Residual)
    pruned = edgepress.Prune(macs=0.8, multiple=1)(trained, a_task(model))
    assert trained_ranges(pruned) == {}
    with pytest.raises(UserError, match="must be the last pass"):
        fake_quantized(pruned)


@pytest.mark.parametrize("precision", ["fp16", "int4", "int8-dynamic", "int16x8"])
def test_precisions_without_8_bit_ranges_are_refused(precision):
    with pytest.raises(RecipeError, match="take int8 or w4a8"):
        Quantize(precision=precision)


# ---- files


def test_tensors_of_a_file_are_told_by_their_values():
    network = retrace(folded(trace(seeded(Residual), images(1))))
    x = images(1).numpy()
    model = onnx_model(network)
    values = onnx_tensors(model)({model.graph.input[0].name: x})
    found = matched(network, [x], {**values, "noise": np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)})
    assert set(found) == set(values)
    assert found["output"] == "linear"
    turned = {name: np.moveaxis(value, 1, -1) for name, value in values.items()}
    assert matched(network, [x], turned) == found


def test_a_network_without_training_has_no_deployed_ranges():
    network = trace(nn.ReLU(), torch.zeros(1, 4))
    x = np.float32([[1, -1, 2, 3]])
    assert deployed_ranges(network, [x], {"y": x.clip(0)}) == {}


def test_divergence_names_the_module_where_a_file_goes_wrong():
    network = retrace(folded(trace(seeded(Residual), images(1))))
    x = images(1).numpy()
    model = onnx_model(network)
    (name,) = [tensor.name for tensor in model.graph.initializer if tensor.name == "body.weight"]
    broken = onnx.ModelProto()
    broken.CopyFrom(model)
    (weight,) = [tensor for tensor in broken.graph.initializer if tensor.name == name]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.5, name))
    feeds = {model.graph.input[0].name: x}
    found = divergence(network, [x], onnx_tensors(model)(feeds), onnx_tensors(broken)(feeds))
    first = next(d for d in found if d.snr_db < 40)
    assert (first.module, first.node) == ("body", "conv2d_1")


@pytest.fixture(scope="module")
def trained_int8():
    model = seeded(Residual)
    task = a_task(model)
    with silenced():
        return Quantize(epochs=1)(trace(model, images(1)), task), task


def assert_holds(integers, network):
    """That the file's integers are the network's, in the file's order of axes."""
    state = network.state_dict()
    for name, (top, axis) in weights(network, INT8).items():
        wanted = quantized_weight(state[name], top, axis)[0].numpy()
        forms = [wanted, np.moveaxis(wanted, 1, -1)] if wanted.ndim == 4 else [wanted, wanted.T]
        assert any(np.array_equal(found, form) for found in integers for form in forms), name


def assert_agrees(outputs, network, x, most):
    """That a file gives what the network with rounding gives, in steps of the output's grid."""
    low, high = trained_ranges(network)["linear"]
    steps = np.abs(outputs - fake_quantized(network).predict(x)) / ((high - low) / 255)
    assert steps.mean() < most
    assert steps.max() < 4


def test_an_onnx_file_holds_the_trained_integers_and_answers_as_the_fake_network_does(trained_int8):
    import onnxruntime

    network, _ = trained_int8
    plain, x = onnx_model(network), images(64, 7).numpy()
    name = plain.graph.input[0].name
    ranges = deployed_ranges(network, [x[:1]], onnx_tensors(plain)({name: x[:1]}))
    assert set(quantized_tensors(plain, INT8)) <= set(ranges)  # nothing is left to calibration
    model = quantize_onnx(plain, None, INT8, ranges, safe=False)
    int8 = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    assert_holds([numpy_helper.to_array(t) for t in int8], network)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")  # else sums saturate on some CPUs
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert_agrees(session.run(None, {name: x})[0], network, x, 0.5)  # the file's outputs are floats


def test_a_tflite_file_holds_the_trained_integers_and_answers_as_the_fake_network_does(trained_int8, tmp_path):
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    network, task = trained_int8
    artifact = edgepress.export(network, tmp_path / "net.tflite", "int8", task.calibration_batches)
    plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    interpreter = Interpreter(model_path=str(artifact.path), experimental_op_resolver_type=plain)
    interpreter.allocate_tensors()
    tensors = [d for d in interpreter.get_tensor_details() if d["dtype"] == np.int8]
    constant = [d["index"] for d in tensors if len(d["quantization_parameters"]["scales"]) > 1]
    assert_holds([interpreter.get_tensor(index) for index in constant], network)
    x, runtime = images(64, 7).numpy(), edgepress.open_runtime(artifact)
    got = np.concatenate([np.asarray(runtime.predict(x[i : i + 1])) for i in range(len(x))])
    assert_agrees(got, network, x, 0.1)
