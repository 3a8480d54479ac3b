import html
import io
import json
from dataclasses import replace

import nets
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import edgepress as ep
from edgepress.compress.distill import Distill
from edgepress.compress.errors import RecipeError
from edgepress.compress.layerwise import patches
from edgepress.compress.network import Network, trace
from edgepress.compress.pruning import Prune
from edgepress.compress.sparsify import Sparsify, dense_twin, keep_largest, keep_n_of_m, sparsegpt
from edgepress.compress.surgery import read_plan
from edgepress.compress.task import Task, score
from edgepress.compress.train import Precision
from edgepress.report import table
from edgepress.targets.stats import Ratio

PLAIN = Precision()


def zeros(network):
    return {layer["weight"]: network.module.get_parameter(layer["weight"]) == 0 for layer in _found(network)["layers"]}


def _found(network):
    return next(e["found"] for e in network.history if e["pass"] == "Sparsify")


def test_masks_keep_what_scores_highest():
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0], [0.5, 0.6, 0.7, 3.0]])
    assert keep_largest(scores, 0.5).tolist() == [[True, False, True, True], [False, False, False, True]]
    assert keep_n_of_m(scores, 2, 4).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert keep_n_of_m(scores, 1, 2, dim=0).tolist() == [[True, True, True, False], [False, False, False, True]]
    assert int(keep_largest(torch.zeros(10), 0.3).sum()) == 7  # equal scores: still the number that was asked for


def test_sparsegpt_makes_up_for_a_weight_as_least_squares_would():
    """Without weight 1, those right of it that change the output least are w_R + w_1 H_RR^-1 H_R1."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(4, 4, generator=random, dtype=torch.double) @ torch.randn(4, 500, generator=random, dtype=torch.double)
    damped = x @ x.T + 0.01 * (x @ x.T).diagonal().mean() * torch.eye(4)
    weight = torch.tensor([[5.0, 0.1, 6.0, 7.0]], dtype=torch.double)
    expected = weight[0, 2:] + weight[0, 1] * torch.linalg.solve(damped[2:, 2:], damped[2:, 1])
    got = sparsegpt(weight, x @ x.T, 0.25)
    assert got[0, :2].tolist() == [5.0, 0.0]
    torch.testing.assert_close(got[0, 2:], expected)


def test_sparsegpt_is_magnitude_where_inputs_are_alike_and_uncorrelated():
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparsegpt(weight, 3 * torch.eye(8), 0.5), weight * keep_largest(weight.abs(), 0.5))
    torch.testing.assert_close(sparsegpt(weight, 3 * torch.eye(8), (2, 4)), weight * keep_n_of_m(weight.abs(), 2, 4))


@pytest.mark.parametrize("amount", [0.3, 0.5, (2, 4)])
def test_sparsegpt_moves_outputs_less_than_magnitude_does(amount):
    random = torch.Generator().manual_seed(1)
    x = torch.randn(32, 8, generator=random) @ torch.randn(8, 500, generator=random)  # inputs that follow one another
    x += 0.3 * torch.randn(32, 500, generator=random)
    weight = torch.randn(16, 32, generator=random)
    mask = keep_n_of_m(weight.abs(), *amount) if isinstance(amount, tuple) else keep_largest(weight.abs(), amount)
    ours = sparsegpt(weight, x @ x.T, amount)
    assert abs(int((ours == 0).sum()) - int((~mask).sum())) <= 1
    assert ((ours - weight) @ x).norm() < 0.7 * ((weight * mask - weight) @ x).norm()


def test_inputs_that_are_always_zero_lose_their_weights():
    h = torch.diag(torch.tensor([1.0, 0.0]))
    assert sparsegpt(torch.tensor([[1.0, 9.0]]), h, 0.5).tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("shape", "kernel", "settings"),
    [
        ((2, 3, 9), (4,), {"stride": 2, "padding": 1, "dilation": 2}),
        ((2, 3, 7, 6), (3, 2), {"stride": (2, 1), "padding": (1, 2)}),
        ((2, 3, 7, 6), (3, 4), {"padding": "same", "dilation": 2}),
        ((1, 2, 4, 5, 6), (2, 3, 1), {"padding": (0, 1, 0)}),
    ],
)
def test_patches_are_what_a_convolution_multiplies(shape, kernel, settings):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(5, shape[1], *kernel)
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    expected = conv(x, weight, **settings)
    got = weight.movedim(1, -1).flatten(1) @ patches(x, kernel, **settings)
    torch.testing.assert_close(got.view(5, shape[0], *expected.shape[2:]).transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "taylor", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparsify_zeroes_the_part_that_was_asked_for(task, method, pattern):
    network = trace(task.model, task.inputs)
    untouched = {k: v.clone() for k, v in network.state_dict().items()}
    sparse = Sparsify(method=method, pattern=pattern)(network, task)
    found = _found(sparse)
    assert found["dense"] == ["stem.0.weight"]
    assert [layer["weight"] for layer in found["layers"]] == ["block.0.weight", "block.3.weight", "head.weight"]
    assert all(layer["zeros"] == pytest.approx(0.5 * layer["of"], abs=1) for layer in found["layers"])
    assert all(torch.equal(v, untouched[k]) for k, v in network.state_dict().items())
    if pattern == "2:4":
        for mask in zeros(sparse).values():
            assert (mask.movedim(1, -1).reshape(-1, 4).sum(1) >= 2).all()
    assert score(task, sparse.predict) > score(task, network.predict) - 15


def test_sparsegpt_loses_less_than_magnitude(task):
    network, images = trace(task.model, task.inputs), next(iter(task.train_batches(9)))[0].numpy()
    change = {
        method: float((Sparsify(sparsity=0.8, method=method)(network, task).predict(images) - network.predict(images)).std())
        for method in ("magnitude", "sparsegpt")
    }
    assert change["sparsegpt"] < 0.7 * change["magnitude"]


def test_taylor_and_sparsegpt_need_no_labels(task):
    unlabelled = replace(task, train_batches=None)
    for method in ("taylor", "sparsegpt"):
        assert _found(Sparsify(method=method)(trace(task.model, task.inputs), unlabelled))["zeros"] > 1000


def test_global_threshold_takes_more_where_weights_are_small(task):
    network = trace(task.model, task.inputs)
    with torch.no_grad():
        network.module.get_parameter("block.0.weight").mul_(1e-3)
    found = _found(Sparsify(sparsity=0.4, scope="global", keep_first=False, keep_last=True)(network, task))
    parts = {layer["weight"]: layer["zeros"] / layer["of"] for layer in found["layers"]}
    assert parts["block.0.weight"] > 0.75
    assert parts["block.3.weight"] < 0.2
    assert found["dense"] == ["head.weight"]
    everything = Sparsify(sparsity=0.5, scope="global")(network, task)
    assert not any(mask.all() for mask in zeros(everything).values())  # no layer dies


@pytest.mark.parametrize("name", ["resnext", "transformer"])
def test_sparsegpt_goes_through_groups_and_attention(name):
    module, inputs = nets.build(name)
    torch.manual_seed(0)
    batches = [inputs(8) for _ in range(4)]
    task = Task(module, inputs(2), lambda predict: {"a": 0.0}, "a", calibration_batches=batches)
    network = trace(module, inputs(2))
    sparse, other = (Sparsify(sparsity=0.6, method=method)(network, task) for method in ("sparsegpt", "magnitude"))
    x = batches[0]
    wanted = network(*x)
    assert (sparse(*x) - wanted).norm() < (other(*x) - wanted).norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_recovery_holds_the_zeros(task, tmp_path, optimizer):
    sparse = Sparsify(sparsity=0.7)(trace(task.model, task.inputs), task)
    loaded = Network.load(sparse.copy().save(tmp_path / "net"))
    train = Distill(epochs=1, lr=0.01, optimizer=optimizer, precision=PLAIN)
    recovered = train(train(loaded, task), task)
    before, after = zeros(sparse), zeros(recovered)
    assert all((after[name] | ~before[name]).all() for name in before)
    assert score(task, recovered.predict) >= score(task, sparse.predict) - 1
    for name in before:
        moved = recovered.module.get_parameter(name) != sparse.module.get_parameter(name)
        assert (moved | before[name]).float().mean() > 0.99  # the others do train
    dense = train(trace(task.model, task.inputs), task)
    assert (dense.module.get_parameter("block.0.weight") == 0).float().mean() < 0.01


def test_interrupted_recovery_holds_the_zeros(task, tmp_path):
    sparse = Sparsify(sparsity=0.7)(trace(task.model, task.inputs), task)
    train = Distill(epochs=2, lr=0.02, precision=PLAIN, checkpoint=tmp_path / "run.checkpoint")

    def stop(epoch):
        if epoch == 1:
            raise KeyboardInterrupt
        return task.train_batches(epoch)

    with pytest.raises(KeyboardInterrupt):
        train(sparse, replace(task, train_batches=stop))
    resumed = train(sparse, task)
    whole = replace(train, checkpoint=None)(sparse, task)
    assert all(torch.equal(a, b) for a, b in zip(resumed.tensors(), whole.tensors(), strict=True))
    assert all((zeros(resumed)[name] == mask).all() for name, mask in zeros(sparse).items())


def test_channels_can_go_after_weights_did(task):
    sparse = Sparsify(sparsity=0.5)(trace(task.model, task.inputs), task)
    smaller = Prune(macs=0.6, rounds=1, multiple=1)(sparse, task)
    recovered = Distill(epochs=0.5, lr=0.01, precision=PLAIN)(smaller, task)
    before, after = zeros(smaller), zeros(recovered)
    assert all((after[name] | ~before[name]).all() and before[name].any() for name in before)


def test_dense_twin_has_the_same_shapes_and_no_zeros(task):
    sparse = Sparsify(sparsity=0.9)(trace(task.model, task.inputs), task)
    twin = dense_twin(sparse)
    assert {k: v.shape for k, v in twin.state_dict().items()} == {k: v.shape for k, v in sparse.state_dict().items()}
    assert not any(mask.any() for mask in zeros(twin).values())
    assert all(mask.any() for mask in zeros(sparse).values())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sparsity": 1.0}, "between 0 and 1"),
        ({"pattern": "4:2"}, "N:M"),
        ({"pattern": "blocks"}, "N:M"),
        ({"pattern": "2:4", "sparsity": 0.6}, "every layer's sparsity"),
        ({"method": "sparsegpt", "scope": "global"}, "layer by layer"),
        ({"method": "luck"}, "method is"),
        ({"batches": 0}, "at least 1"),
    ],
)
def test_sparsify_refuses_what_makes_no_sense(wrong, message):
    with pytest.raises(RecipeError, match=message):
        Sparsify(**wrong)


def test_sparsify_says_when_no_layer_is_left():
    model, x = nn.Linear(4, 2), torch.zeros(1, 4)
    task = Task(model, x, lambda predict: {"a": 0.0}, "a")
    with pytest.raises(RecipeError, match=r"no layer.*stay dense: \['weight'\]"):
        Sparsify()(trace(model, x), task)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="2:4 on sparse tensor cores needs an NVIDIA GPU")
def test_two_of_four_runs_on_sparse_tensor_cores():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)), torch.randn(64, 128)
    task = Task(model, x, lambda predict: {"a": 0.0}, "a")
    network = Sparsify(pattern="2:4", keep_first=False)(trace(model, x), task)
    module = network.module.half().cuda()
    expected = module(x.half().cuda())
    for layer in (module.get_submodule("0"), module.get_submodule("2")):
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()))
    torch.testing.assert_close(module(x.half().cuda()), expected, rtol=1e-2, atol=1e-2)


def test_press_measures_what_the_zeros_buy(task, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "passes:\n- sparsify: {sparsity: 0.9, method: sparsegpt, keep_first: false}\n- distill: {epochs: 1, lr: 0.02}\n"
        "export: {formats: [onnx], precisions: [fp32]}\n"
    )
    report = ep.press(task, max_drop=20.0, out=tmp_path / "out", recipe=ep.read_recipe(recipe))
    before, made = report.files
    assert before.sparse_speedup is None
    assert made.deflated_bytes < 0.6 * before.deflated_bytes
    assert abs(made.artifact.bytes - before.artifact.bytes) < 0.2 * before.artifact.bytes
    assert made.sparse_speedup.low <= made.sparse_speedup.value <= made.sparse_speedup.high
    written = json.loads((tmp_path / "out" / "report.json").read_text())["files"]
    assert [f["deflated_bytes"] for f in written] == [f.deflated_bytes for f in report.files]
    console = Console(width=200, file=io.StringIO())
    console.print(table(report))
    assert f"{made.name}: {made.sparse_note} against its dense twin." in console.file.getvalue()
    assert made.sparse_note in html.unescape((tmp_path / "out" / "report.html").read_text())
    assert replace(made, sparse_speedup=Ratio(1.0, 0.9, 1.1)).sparse_note.startswith("no speed-up from sparsity on this runtime")
    assert replace(made, sparse_speedup=Ratio(1.3, 1.2, 1.4)).sparse_note.startswith("a speed-up from sparsity")
    assert sorted(p.name for p in (tmp_path / "out").glob("*.onnx")) == ["original-fp32.onnx", "pressed-fp32.onnx"]
    assert read_plan(tmp_path / "out" / "surgery.json").shapes["head.weight"] == (3, 16)
