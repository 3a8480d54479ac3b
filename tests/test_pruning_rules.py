"""Single rules: what goes together, what is frozen and why, which constants are rewritten."""

import nets
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgepress.compress.network import trace
from edgepress.compress.pruning import analyse, channels_of, inspect, masked, relative_error, remove
from edgepress.compress.pruning.analysis import RULE_FAILED
from edgepress.compress.pruning.rules import RULES
from edgepress.compress.pruning.table import Rule
from edgepress.compress.randomness import FixedDraws


class Apply(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function, channels=8, after=8):
        super().__init__()
        self.a, self.function, self.b = nn.Conv2d(3, channels, 1), function, nn.Conv2d(after, 4, 1)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def traced(function, channels=8, after=8):
    torch.manual_seed(0)
    return trace(Apply(function, channels, after).eval(), torch.randn(2, 3, 6, 6))


def groups(network):
    return {g.axes: len(g.channels) for g in channels_of(analyse(network)).groups}


def calls(network, name):
    return [n for n in network.module.graph.nodes if n.op == "call_function" and f".{name}." in f".{n.target}."]


def halved(network):
    """The network with the odd channels of each group gone, checked against the oracle."""
    analysis = analyse(network)
    gone = [c for g in channels_of(analysis).groups for c in g.channels[1::2].tolist()]
    smaller = remove(network, analysis, gone)
    x = torch.randn(3, 3, 6, 6)
    with torch.no_grad(), FixedDraws():
        assert relative_error(smaller(x), masked(analysis, gone)(x)) < 1e-5
    return smaller


def test_unknown_operator_must_freeze_and_be_named_with_the_users_line():
    class Exponential(nn.Module):
        def forward(self, x):
            return torch.linalg.matrix_exp(x)

    found = inspect(traced(Exponential()))
    assert found.groups == ()
    unknown = [f for f in found.frozen if not f.known]
    assert [f.operator for f in unknown] == ["linalg_matrix_exp"]
    assert ("a.weight", 0) in unknown[0].weights
    assert "test_pruning_rules.py, line " in unknown[0].line
    assert "torch.linalg.matrix_exp" in unknown[0].line


def test_a_rule_that_fails_must_freeze_and_say_so(monkeypatch):
    def broken(a, c):
        return {}["no such key"]

    monkeypatch.setitem(RULES, "relu", Rule(broken))
    found = inspect(traced(torch.relu))
    assert found.groups == ()
    (frozen,) = [f for f in found.frozen if f.operator == "relu"]
    assert frozen.reason.startswith(RULE_FAILED)
    assert "KeyError" in frozen.reason


def test_inputs_and_outputs_must_stay():
    free = {axis[:2] for axes in groups(traced(torch.relu)) for axis in axes}
    assert free == {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    reasons = {f.reason for f in inspect(traced(torch.relu)).frozen}
    assert "the network's output" in reasons


def test_padded_channels_must_join_what_they_are_added_to():
    network = trace(nets.trained(nets.resnet("A")), torch.zeros(1, 3, 16, 16))
    found = {g.name: g for g in channels_of(analyse(network)).groups}
    stream = found["0.0.weight"]  # the first 8 channels run through all three stages
    assert len(stream.channels) == 8
    assert ("3.b.0.weight", 0, 1) in stream.axes
    assert len(found["3.b.0.weight"].channels) == 8  # those that the last stage added: 24 - 16


def test_padding_must_be_rewritten_to_what_is_kept():
    smaller = halved(traced(lambda x: F.pad(x, (0, 0, 0, 0, 2, 2)), 8, 12))
    (pad,) = calls(smaller, "pad")
    assert list(pad.args[1]) == [0, 0, 0, 0, 1, 1]
    assert smaller.module.get_parameter("b.weight").shape[1] == 6


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_padding_that_copies_channels_must_freeze(mode):
    def pad(x):
        return F.pad(x.flatten(2).transpose(1, 2), (1, 1), mode=mode).transpose(1, 2).unflatten(2, (6, 6))

    free = groups(traced(pad, 8, 10))
    assert not any(axis[0] == "a.weight" for axes in free for axis in axes)


def test_depthwise_groups_must_follow():
    smaller = halved(traced(nn.Conv2d(8, 16, 3, padding=1, groups=8), 8, 16))
    assert calls(smaller, "conv2d")[1].args[6] == 4
    assert smaller.module.get_parameter("function.weight").shape == (8, 1, 3, 3)


def test_grouped_convolution_must_lose_the_same_positions_in_every_group():
    axes = groups(traced(nn.Conv2d(8, 8, 3, padding=1, groups=2)))
    assert {axes[k] for k in axes} == {4}
    assert any(("function.weight", 0, 2) in k for k in axes)
    assert calls(halved(traced(nn.Conv2d(8, 8, 3, padding=1, groups=2))), "conv2d")[1].args[6] == 2


def test_chunk_must_become_a_split_with_sizes():
    def swap(x):
        a, b = x.chunk(2, 1)
        return torch.cat([b, a], 1)

    smaller = halved(traced(swap, 10, 10))
    assert not calls(smaller, "chunk")
    (split,) = calls(smaller, "split_with_sizes")
    assert sum(split.args[1]) == len(smaller.module.get_parameter("a.weight")) < 10


def test_no_part_of_a_split_may_become_empty():
    network = traced(lambda x: torch.cat([F.max_pool2d(x[:, :2], 1), x[:, 2:]], 1))
    analysis = analyse(network)
    found = channels_of(analysis).groups
    assert sorted(len(g.channels) for g in found) == [2, 6]


def test_a_view_must_follow_in_every_form():
    def view(x):
        n, c, h, w = x.shape
        return x.view(n, c, h * w).reshape(-1, c, h, w).flatten(2).unflatten(2, (h, w))

    smaller = halved(traced(view))
    assert smaller.module.get_parameter("b.weight").shape == (4, 4, 1, 1)


def test_heads_hidden_in_a_symbolic_size_must_follow():
    def merge(x):
        n, c, h, w = x.shape
        return x.view(n * c, h, w).relu().view(n, c, h, w)

    smaller = halved(traced(merge))
    assert smaller.module.get_parameter("a.weight").shape[0] == 4
    for batch in (1, 7):
        assert smaller(torch.randn(batch, 3, 6, 6)).shape == (batch, 4, 6, 6)


def test_a_size_read_at_run_time_must_count_what_it_counted():
    class Read(nn.Module):
        def forward(self, x):
            n, c, h, w = x.shape
            y = x.reshape(n * c, h * w).relu()
            return y.new_ones(y.shape[0], 1).add(y).reshape(n, c, h, w)

    network = traced(Read())
    graph = network.module.graph
    (view,) = [n for n in calls(network, "reshape") if len(n.args[1]) == 2]
    with graph.inserting_after(view):  # torch.export computes such sizes from the inputs' where it can
        read = graph.call_function(torch.ops.aten.sym_size.int, (view, 0))
    read.meta["val"] = view.meta["val"].shape[0]
    (ones,) = calls(network, "new_ones")
    ones.update_arg(1, [read, 1])
    network.module.recompile()
    assert halved(network).module.get_parameter("a.weight").shape[0] == 4


def test_squeeze_must_not_drop_an_axis_of_one_channel():
    network = traced(lambda x: x.mean((2, 3), keepdim=True).squeeze()[..., None, None].expand(-1, -1, 2, 2), 8)
    analysis = analyse(network)
    (group,) = channels_of(analysis).groups
    gone = group.channels[1:]
    smaller = remove(network, analysis, gone)
    x = torch.randn(3, 3, 6, 6)
    assert relative_error(smaller(x), masked(analysis, gone)(x)) < 1e-5


def test_an_integer_table_must_freeze_what_it_meets():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(8).view(1, 8, 1, 1))

        def forward(self, x):
            return x + self.table

    found = inspect(traced(Table()))
    assert found.groups == ()
    assert any(f.reason == "a table of integers" for f in found.frozen)


def test_a_statistic_over_channels_must_be_taken_over_the_kept_ones():
    halved(traced(lambda x: x / x.std(1, keepdim=True) + x.mean(1, keepdim=True)))
    halved(traced(lambda x: F.layer_norm(x, x.shape[1:])))


SWAP = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
FREE = {
    "largest": lambda x: x - x.max(1, keepdim=True)[0],
    "middle": lambda x: x - x.median(1, keepdim=True)[0],
    "largest of all": lambda x: x / x.abs().max(),
    "both ends": lambda x: x - torch.aminmax(x, dim=1, keepdim=True)[0],
    "standardised": lambda x: (x - torch.var_mean(x, 1, keepdim=True)[1]) / torch.std_mean(x, (1, 2), keepdim=True)[0],
    "logsumexp": lambda x: x - x.logsumexp(1, keepdim=True),
    "product": lambda x: x * x.sigmoid().prod(1, keepdim=True),
    "any": lambda x: x * (x > 1).any(1, keepdim=True),
    "rolled": lambda x: x.roll((3, 1), (1, 2)),
    "rolled back": lambda x: x.roll(-11, 1) * 2,
    "every other": lambda x: torch.cat([x[:, ::2].relu(), x[:, 1::2]], 1),
    "every fourth": lambda x: x[:, 2::4].sum(1, keepdim=True) * x,
    "chosen": lambda x: x[:, SWAP],
    "selected": lambda x: torch.index_select(x, 1, SWAP),
    "chosen twice": lambda x: torch.cat([x[:, [-1, 0, 0]], x[:, [3, 0, 1, 2, 7]]], 1),
    "flipped": lambda x: torch.fliplr(x),
    "diagonal": lambda x: x + torch.einsum("nchw,ndhw->ncd", x, x).diagonal(dim1=1, dim2=2)[..., None, None],
    "embedded": lambda x: (torch.diag_embed(x.mean((2, 3))) @ x.flatten(2)).unflatten(2, (6, 6)),
    "moved": lambda x: x.moveaxis(1, -1).moveaxis(-1, 1),
    "dot": lambda x: x * torch.linalg.vecdot(x, x.relu(), dim=1)[:, None],
    "turned": lambda x: torch.rot90(x, 1, (2, 3)),
    "counted": lambda x: x * torch.bucketize(x, torch.tensor([-0.5, 0.5])) + torch.searchsorted(torch.tensor([0.0, 1.0]), x),
    "sampled": lambda x: x + 0.1 * torch.randn_like(x) * torch.rand(x.shape[0], 1, 1, 1),
    "distance": lambda x: x * F.pairwise_distance(x.mT.mT.flatten(2).mT, x.flatten(2).relu().mT).view(-1, 1, 6, 6),
}


@pytest.mark.parametrize("name", FREE)
def test_operators_between_two_layers_must_leave_the_channels_free(name):
    smaller = halved(traced(FREE[name]))
    assert smaller.module.get_parameter("a.weight").shape[0] < 8
    assert smaller.module.get_parameter("b.weight").shape[1] < 8


COMPOSED = {
    "broadcast_tensors": lambda x: torch.mul(*torch.broadcast_tensors(x, x.mean((2, 3), keepdim=True))),
    "dsplit": lambda x: torch.cat([part.relu() for part in torch.dsplit(x, 2)], 2),
    "dstack": lambda x: torch.dstack([x, x]),
    "quantile": lambda x: x - torch.quantile(x.flatten(2), 0.3, dim=2)[..., None, None],
    "trapezoid": lambda x: x + torch.trapezoid(x, dim=3)[..., None],
    "linalg_matmul": lambda x: torch.linalg.matmul(x, x.mT),
    "linalg_matrix_norm": lambda x: x / torch.linalg.matrix_norm(x, keepdim=True),
    "special_log_softmax": lambda x: torch.special.log_softmax(x, 3),
    "one_hot": lambda x: x * F.one_hot(x.argmax(3), 6).float(),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_what_pytorch_composes_of_others_must_need_no_rule(name):
    assert name not in RULES
    network = traced(COMPOSED[name])
    torch.manual_seed(0)
    model, x = Apply(COMPOSED[name]).eval(), torch.randn(3, 3, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(network(x), model(x))
    smaller = halved(network)
    assert smaller.module.get_parameter("b.weight").shape[1] == 4


def test_stacked_sideways_must_be_like_cat():
    smaller = halved(traced(lambda x: torch.hstack([x, x.relu()]), 8, 16))
    assert smaller.module.get_parameter("b.weight").shape[1] == 8


def test_a_tensor_product_must_join_what_it_sums_over():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(10, 8))

        def forward(self, x):
            return torch.tensordot(x, self.weight, ([1], [1])).movedim(-1, 1)

    smaller = halved(traced(Product(), 8, 10))
    assert smaller.module.get_parameter("function.weight").shape == (5, 4)
    assert smaller.module.get_parameter("b.weight").shape[1] == 5


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * x.max(1, keepdim=True)[1], "its order or its index matters"),
        (lambda x: x[:, ::3].repeat(1, 2, 1, 1)[:, :4].repeat(1, 2, 1, 1), "sliced with a step that does not divide it"),
        (lambda x: x + torch.diagonal(x, 1, 2, 3).mean(-1)[..., None, None], None),
    ],
)
def test_what_depends_on_the_place_of_a_channel_must_freeze_and_say_so(function, why):
    network = traced(function)
    assert why is None or why in {f.reason for f in inspect(network).frozen}
    halved(network)


def test_the_table_must_hold_each_operator_once():
    assert {"conv2d", "batch_norm", "cat", "slice", "pad", "linear", "view", "lstm"} <= RULES.keys()
    assert all(callable(rule.relate) for rule in RULES.values())
