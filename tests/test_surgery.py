import copy
import json

import nets
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgepress.compress import surgery
from edgepress.compress.errors import FileError, UserError
from edgepress.compress.network import Network, trace
from edgepress.compress.pruning import analyse, channels_of, remove
from edgepress.compress.shorten import branches, without
from edgepress.models.resnet_cifar import CifarResNet

REPLAYABLE = ["resnet-B", "bottleneck", "resnext", "densenet", "mobilenet", "shufflenet", "unet"]


def shrunk(network, part, seed):
    """Without a random part of the channels of each group."""
    analysis = analyse(network)
    random = np.random.default_rng(seed)
    groups = channels_of(analysis).groups
    return remove(network, analysis, [c for g in groups for c in random.permutation(g.channels)[: int(len(g.channels) * part)]])


def step(network, inputs):
    """One step of training on the graph module, as a user would take it."""
    network.train()
    optimizer = torch.optim.SGD(network.module.parameters(), lr=0.01)
    network.module(*inputs).float().square().mean().backward()
    optimizer.step()
    return network.eval()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", REPLAYABLE)
def test_network_pruned_twice_and_trained_returns_to_its_class_bit_by_bit(name):
    module, inputs = nets.build(name)
    x = inputs(3)
    pruned = step(shrunk(shrunk(trace(module, x), 0.3, 0), 0.3, 1), x)
    mine = surgery.transplant(pruned, copy.deepcopy(module))
    assert torch.equal(mine(*x), pruned(*x))
    assert not torch.equal(mine(*x), module(*x))
    assert sum(p.numel() for p in mine.parameters()) == pruned.parameter_count
    assert same(dict(mine.state_dict()), pruned.state_dict())
    again = shrunk(trace(mine, x), 0.2, 2)  # the attributes follow the sizes: the class is an ordinary network again
    assert again.parameter_count < pruned.parameter_count


@pytest.mark.parametrize("name", ["vgg", "constants"])
def test_plan_slices_the_original_weights_as_the_passes_did(name, tmp_path):
    module, inputs = nets.build(name)
    pruned = shrunk(shrunk(trace(module, inputs(2)), 0.4, 0), 0.3, 1)
    plan = surgery.read_plan(pruned.plan().write(tmp_path / "surgery.json"))
    assert plan == pruned.plan()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    assert same(surgery.apply(plan, module.state_dict()), pruned.state_dict())
    assert same(before, dict(module.state_dict()))


def test_plan_survives_copies_files_and_passes(tmp_path):
    module, inputs = nets.build("mobilenet")
    pruned = shrunk(trace(module, inputs(2)), 0.4, 0)
    loaded = Network.load(pruned.copy().then(**{"pass": "Nothing"}).save(tmp_path / "net"))
    assert loaded.plan() == pruned.plan()
    twice = shrunk(loaded, 0.3, 1)
    assert same(surgery.apply(twice.plan(), module.state_dict()), twice.state_dict())
    assert same(load_file(twice.save_weights(tmp_path / "weights.safetensors")), twice.state_dict())


def test_resnet_with_padded_shortcuts_returns_where_its_stream_kept_its_width():
    torch.manual_seed(0)
    module = nets.trained(CifarResNet(20))
    x = torch.randn(2, 3, 32, 32)
    inside = _inside_blocks(trace(module, x))
    mine = surgery.transplant(step(inside, (x,)), copy.deepcopy(module))
    assert torch.equal(mine(x), inside(x))
    assert mine.layer1[0].conv1.out_channels < 16
    with pytest.raises(UserError, match=r"CifarResNet's own code fixes sizes.*network\.module"):
        surgery.transplant(shrunk(trace(module, x), 0.5, 0), copy.deepcopy(module))


def _inside_blocks(network):
    analysis = analyse(network)
    groups = [g for g in channels_of(analysis).groups if g.name.startswith("layer") and g.name.endswith("conv1.weight")]
    assert len(groups) == 9
    return remove(network, analysis, [c for g in groups for c in g.channels[::2]])


def test_dropped_branches_give_zeros_in_the_class_that_calls_them():
    torch.manual_seed(0)
    module = nets.trained(CifarResNet(20))
    x = torch.randn(2, 3, 32, 32)
    network = trace(module, x)
    chosen = [b for b in branches(network) if b.module.startswith(("layer1.1", "layer3.2")) and "conv1.weight" in b.parameters[0]]
    for branch in chosen:
        network = without(network, next(b for b in branches(network) if b.parameters == branch.parameters))
    network = step(_inside_some(network), (x,))
    mine = surgery.transplant(network, copy.deepcopy(module))
    assert len(chosen) == 2
    assert isinstance(mine.layer1[1].conv2, surgery.Dropped)
    assert torch.equal(mine(x), network(x))
    assert "layer1.1.bn1.num_batches_tracked" in network.plan().removed


def _inside_some(network):
    analysis = analyse(network)
    groups = [g for g in channels_of(analysis).groups if g.name.endswith("conv1.weight") and g.name.startswith("layer")]
    return remove(network, analysis, [c for g in groups for c in g.channels[:4]])


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.inner, self.out = nn.Embedding(7, 8), nn.Linear(8, 8), nn.Linear(8, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(torch.relu(self.inner(self.table(tokens))))


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    tied, tokens = Tied(), torch.randint(0, 7, (2, 5))
    pruned = shrunk(trace(tied, tokens), 0.5, 0)
    assert pruned.plan().shape("out.weight") == pruned.plan().shape("table.weight") == (7, 4)
    sliced = surgery.apply(pruned.plan(), tied.state_dict())
    assert sliced["out.weight"] is sliced["table.weight"]
    mine = surgery.transplant(pruned, tied)
    assert mine.out.weight is mine.table.weight
    assert mine.table.embedding_dim == 4
    assert torch.equal(mine(tokens), pruned(tokens))


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, bidirectional=True, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_recurrent_layer_returns_with_fewer_units():
    torch.manual_seed(0)
    module, x = Reader().eval(), torch.randn(2, 5, 6)
    pruned = shrunk(trace(module, x), 0.5, 0)
    mine = surgery.transplant(pruned, module)
    assert mine.rnn.hidden_size < 8
    assert torch.equal(mine(x), pruned(x))


def test_feed_forward_of_an_encoder_returns_and_its_heads_say_why_not():
    module, inputs = nets.build("transformer")
    x = inputs(2)
    network = trace(module, x)
    analysis = analyse(network)
    wide = next(g for g in channels_of(analysis).groups if any("linear1" in name and d == 0 for name, d, _ in g.axes))
    pruned = remove(network, analysis, wide.channels[:10])
    mine = surgery.transplant(pruned, copy.deepcopy(module))
    torch.testing.assert_close(mine(*x), pruned(*x))
    half = shrunk(network, 0.5, 0)  # half of the heads and half of the width: what torch's attention can have
    torch.testing.assert_close(surgery.transplant(half, copy.deepcopy(module))(*x), half(*x))
    untouched = copy.deepcopy(module)
    with pytest.raises(UserError, match=r"self_attn' \(MultiheadAttention\) cannot have the planned sizes.*network\.module"):
        surgery.transplant(shrunk(network, 0.4, 0), untouched)
    assert same(dict(untouched.state_dict()), dict(module.state_dict()))


def test_graph_module_trains_on_and_exports():
    module, inputs = nets.build("squeeze-excite")
    x = inputs(2)
    network = step(shrunk(trace(module, x), 0.4, 0), x)
    program = torch.export.export(network.module, x)
    assert torch.equal(program.module()(*x), network(*x))


def test_pass_that_slices_without_saying_so_leaves_no_plan():
    network = trace(nn.Sequential(nn.Linear(4, 3)), torch.zeros(1, 4))
    network.module.get_submodule("0").weight = nn.Parameter(torch.zeros(2, 4))
    with pytest.raises(UserError, match=r"'0\.weight' has the shape \[2, 4\].*no surgery plan"):
        network.plan()


GOOD = {"edgepress_surgery": 1, "state_dict": {"weight": {"shape": [3, 2], "keep": {"0": [0, 2]}}, "bias": {"shape": [3]}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(edgepress_surgery=2), "no surgery plan of version 1"),
        (lambda d: d.update(state_dict=[]), "no 'state_dict'"),
        (lambda d: d["state_dict"]["weight"].update(keep={"0": [0, 3]}), "'weight' keeps in dimension 0 indices"),
        (lambda d: d["state_dict"]["weight"].update(keep={"0": [-1, 1]}), "'weight' keeps in dimension 0 indices"),
        (lambda d: d["state_dict"]["weight"].update(keep={"0": [1, 1]}), "'weight' keeps in dimension 0 indices"),
        (lambda d: d["state_dict"]["weight"].update(keep={"0": []}), "not a list of indices"),
        (lambda d: d["state_dict"]["weight"].update(keep={"0": [True]}), "not a list of indices"),
        (lambda d: d["state_dict"]["weight"].update(keep={"2": [0]}), "dimension '2'"),
        (lambda d: d["state_dict"]["weight"].update(keep={"-1": [0]}), "dimension '-1'"),
        (lambda d: d["state_dict"]["weight"].update(keep=[0]), "no mapping"),
        (lambda d: d["state_dict"]["weight"].update(shape="3x2"), "no shape"),
        (lambda d: d["state_dict"]["weight"].update(code="import os"), "is not made of"),
        (lambda d: d["state_dict"].update(weight=None), "is not made of"),
    ],
)
def test_strangers_plan_is_checked(change, message, tmp_path):
    content = copy.deepcopy(GOOD)
    change(content)
    (tmp_path / "surgery.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=message) as raised:
        surgery.read_plan(tmp_path / "surgery.json")
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, "null", "\x80"])
def test_what_is_no_json_is_no_plan(content, tmp_path):
    (tmp_path / "surgery.json").write_text(content, "latin-1")
    with pytest.raises(FileError):
        surgery.read_plan(tmp_path / "surgery.json")
    with pytest.raises(FileError):
        surgery.read_plan(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(2, 3, bias=False), "lacks 'bias'"),
        (nn.Linear(2, 4), r"'weight' has the shape \[4, 2\], the plan is for \[3, 2\]"),
        (nn.Sequential(nn.Linear(2, 3)), "has the unknown '0.weight' and 1 more"),
    ],
)
def test_plan_of_another_network_is_refused(module, message):
    plan = surgery.Plan.from_json(GOOD)
    for replay, target in ((surgery.apply, module.state_dict()), (surgery.apply_to_module, module)):
        with pytest.raises(UserError, match=message):
            replay(plan, target)
