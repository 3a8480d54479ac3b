import json
import pickle
import zipfile
from collections import namedtuple

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from edgepress.compress.errors import FileError, TraceError, UserError
from edgepress.compress.network import Network, retrace, trace


class Mixed(nn.Module):
    """Everything whose mode matters: batch norm, three dropouts, a recurrent layer, attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.Dropout1d(0.5), nn.ReLU())
        self.rnn = nn.LSTM(8, 8, num_layers=2, batch_first=True, dropout=0.5)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.5, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        y, _ = self.rnn(self.conv(x).transpose(1, 2))
        return self.head(self.attention(y).mean(1))


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def test_network_equals_its_module_at_any_batch_size(mixed):
    network = trace(mixed, torch.randn(2, 4, 10))
    for batch in (1, 3, 17):
        x = torch.randn(batch, 4, 10)
        torch.testing.assert_close(network(x), mixed(x), rtol=1e-5, atol=1e-6)


def test_network_switches_every_operator_to_training_and_back(mixed):
    network = trace(mixed, torch.randn(2, 4, 10))
    x = torch.randn(4, 4, 10)
    before = network(x)
    network.train()
    assert network.training
    torch.manual_seed(1)
    one, two = network(x), network(x)
    assert (one - two).abs().max() > 1e-3  # dropout draws anew
    network.eval()
    assert torch.equal(network(x), network(x))
    assert not torch.equal(network(x), before)  # batch norm saw the batches
    torch.testing.assert_close(trace(mixed, x)(x), before, rtol=1e-5, atol=1e-6)  # and the user's module did not


@pytest.mark.parametrize(
    "layer", [nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5), nn.FeatureAlphaDropout(0.5), nn.RReLU()]
)
def test_network_evaluation_has_no_randomness_left(layer):
    network = trace(nn.Sequential(nn.Conv2d(2, 8, 1), layer), torch.randn(2, 2, 4, 4))
    x = torch.randn(2, 2, 4, 4)
    network.train()
    assert not torch.equal(network(x), network(x))
    network.eval()
    assert torch.equal(network(x), network(x))


def test_network_keeps_names_and_ties():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 4)
            self.out = nn.Linear(4, 10, bias=False)
            self.out.weight = self.embedding.weight

        def forward(self, x):
            return self.out(self.embedding(x))

    model = Tied()
    network = trace(model, torch.zeros(1, 3, dtype=torch.int64))
    assert set(network.state_dict()) == set(model.state_dict())
    assert network.parameter_count == 40


class Doubled(nn.Module):
    """A parametrization that changes the shape."""

    def forward(self, weight):
        return torch.cat([weight, -weight])


def parametrized(kind):
    layer = nn.LSTM(6, 4, batch_first=True) if "lstm" in kind else nn.Linear(6, 4)
    name = "weight_hh_l0" if "lstm" in kind else "weight"
    if kind.endswith("doubled"):
        nn.utils.parametrize.register_parametrization(layer, name, Doubled(), unsafe=True)
        layer.bias = None
    elif kind.endswith("pruned"):
        nn.utils.prune.l1_unstructured(layer, name, 0.5)
    else:
        source = nn.utils if "old" in kind else nn.utils.parametrizations
        getattr(source, kind.split()[-1])(layer, name)
    return layer


KINDS = ["weight_norm", "spectral_norm", "orthogonal", "doubled", "pruned", "old weight_norm", "old spectral_norm"]


@pytest.mark.parametrize("kind", [*KINDS, "lstm weight_norm", "lstm old weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_trace_folds_parametrizations_and_leaves_the_module_as_it_was(kind):
    torch.manual_seed(0)
    model, x = parametrized(kind), torch.randn(3, 5, 6)
    model.train()(x)  # a power iteration of spectral_norm; the older hooks hold a weight with a gradient
    before = {name: value.clone() for name, value in model.eval().state_dict().items()}
    network = trace(model, x)
    assert set(network.state_dict()) <= {"weight", "bias", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"}
    assert all(p.requires_grad for p in network.parameters())
    mine, theirs = (f(x)[0] if "lstm" in kind else f(x) for f in (network, model))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_network_keeps_buffers_that_are_no_weights(tmp_path):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
            self.register_buffer("positions", torch.arange(4.0), persistent=False)

        def forward(self, x):
            return (self.linear(x + self.positions) + self.mask).softmax(-1)

    network, x = trace(Masked(), torch.randn(2, 4, 4)), torch.randn(3, 4, 4)
    for turn in range(2):
        network.save(tmp_path / f"{turn}")
        loaded = Network.load(tmp_path / f"{turn}")
        assert torch.equal(loaded(x), network(x))
        network = loaded


Pair = namedtuple("Pair", "a b")


class Returning(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(2, 2), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


def test_trace_takes_nested_outputs_and_names_those_that_it_cannot():
    nested = trace(Returning(lambda y: {"a": y, "b": [y, (y + 1, None)]}), torch.ones(2, 2))
    assert [x.shape for x in nested.predict(np.ones((3, 2), np.float32))] == [(3, 2)] * 3
    for wrap, said in ((lambda y: Pair(y, y), "returns a Pair"), (lambda y: {"a": Mixed}, "returns a type")):
        with pytest.raises(TraceError, match=f"{said}: return tensors, or tuples, lists or dicts of tensors"):
            trace(Returning(wrap), torch.ones(2, 2))


def test_network_copies_share_nothing(mixed):
    network = trace(mixed, torch.randn(2, 4, 10))
    copy = network.copy()
    with torch.no_grad():
        for p in copy.parameters():
            p.zero_()
    copy.train()
    assert not network.training
    assert all(p.detach().abs().sum() > 0 for n, p in network.module.named_parameters() if n.endswith("weight"))


def test_network_saves_and_loads_without_pickle(tmp_path, mixed):
    x = torch.randn(2, 4, 10)
    network = trace(mixed, x).then(**{"pass": "Nothing", "macs": 0.5})
    network.save(tmp_path / "net")
    with zipfile.ZipFile(tmp_path / "net" / "program.pt2") as archive:
        for name in archive.namelist():
            assert not archive.read(name).startswith(b"\x80\x02"), name
    loaded = Network.load(tmp_path / "net")
    assert torch.equal(loaded(x), network(x))
    assert loaded.history == network.history
    loaded.train()(x).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.eval().save(tmp_path / "net")  # again, over the old one
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_network_loading_refuses_a_pickle(tmp_path):
    network = trace(nn.Linear(2, 2), torch.zeros(1, 2))
    network.save(tmp_path / "net")
    program = tmp_path / "net" / "program.pt2"
    with zipfile.ZipFile(program) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    whole = dict(entries)
    key = next(k for k in entries if k.endswith("model_weights_config.json"))
    entries[key] = json.dumps(json.loads(entries[key])).replace('"use_pickle": false', '"use_pickle": true').encode()
    with zipfile.ZipFile(program, "w") as archive:
        for name, blob in entries.items():
            archive.writestr(name, blob)
    with pytest.raises(FileError, match="asks for a pickle"):
        Network.load(tmp_path / "net")
    # a payload that torch unpickles by its name, whatever its flag says
    constants = next(k for k in entries if k.endswith("model_constants_config.json"))
    payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False, "tensor_meta": None}
    for extra, config, said in (
        ({}, {"config": {"c": payload}}, "asks for a pickle"),
        ({"archive/data/constants/opaque_obj_0": pickle.dumps({"a": 1})}, {"config": {}}, "unknown entry"),
        ({"archive/data/constants/model.pt": pickle.dumps({"a": 1})}, {"config": {}}, "unknown entry"),
    ):
        with zipfile.ZipFile(program, "w") as archive:
            for name, blob in {**whole, constants: json.dumps(config).encode(), **extra}.items():
                archive.writestr(name, blob)
        with pytest.raises(FileError, match=said):
            Network.load(tmp_path / "net")
    program.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FileError, match="damaged"):
        Network.load(tmp_path / "net")
    program.unlink()
    with pytest.raises(FileError, match=r"program\.pt2 is missing"):
        Network.load(tmp_path / "net")


def test_a_full_disk_is_said_and_leaves_the_old_network(tmp_path, monkeypatch):
    network = trace(nn.Linear(2, 2), torch.zeros(1, 2))
    network.save(tmp_path / "net")

    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("edgepress.compress.network.save_file", full)
    with pytest.raises(FileError, match=r"Cannot write the network to .*No space left on device"):
        trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "net")
    monkeypatch.undo()
    x = torch.randn(3, 2)
    assert torch.equal(Network.load(tmp_path / "net")(x), network(x))
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_macs_count_what_the_layers_multiply():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    network = trace(model, torch.zeros(1, 3, 8, 8))
    expected = 8 * 3 * 9 * 64 + 8 * 9 * 36 + 8 * 36 * 10
    assert network.macs() == expected
    assert sum(network.node_macs().values()) == expected


def test_retrace_gives_the_same_network(mixed):
    network = trace(mixed, torch.randn(2, 4, 10))
    x = torch.randn(3, 4, 10)
    assert torch.equal(retrace(network)(x), network(x))


def test_predict_takes_and_gives_numpy():
    class Two(nn.Module):
        def forward(self, a, b):
            return {"sum": a + b, "difference": a - b}

    network = trace(Two(), (torch.zeros(1, 2), torch.zeros(1, 2)))
    a, b = np.ones((3, 2), np.float32), np.zeros((3, 2), np.float32)
    total, difference = network.predict(a, b)
    assert isinstance(total, np.ndarray)
    assert np.array_equal(total, difference)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x
        return -x


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.view(2, -1)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Branching(), r"test_network\.py, line \d+ \(`if x\.sum\(\) > 0:`\).*torch\.where"),
        (FixedBatch(), r"test_network\.py, line \d+ \(`return x\.view\(2, -1\)`\)"),
        (FixedBatch(), r"on the example inputs but on no batch of another size .*take its size from them"),
        (nn.Linear(3, 2), r"does not run on the example inputs of shape \[2, 5\]"),
        (torch.relu, r"The network is a builtin_function_or_method: give a torch\.nn\.Module"),
    ],
)
def test_trace_says_what_is_wrong_in_one_sentence(model, said):
    with pytest.raises(TraceError, match=said):
        trace(model, torch.ones(2, 5))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"x": torch.ones(2, 5)}, "hold a dict: give a tensor"),
        ([[1.0, 2.0]], "hold a list: give a tensor"),
        (None, "hold a NoneType: give a tensor"),
        ((), "hold a NoneType: give a tensor"),
        (torch.ones(0, 5), r"of shape \[0, 5\] holds no example"),
    ],
)
def test_trace_says_what_example_inputs_must_be(given, said):
    with pytest.raises(TraceError, match=said):
        trace(nn.Linear(5, 2), given)


def test_trace_says_that_the_batch_is_fixed_where_no_line_is_known():
    with pytest.raises(TraceError, match="the code fixes the batch size"):
        trace(FixedBatch(), torch.ones(2, 4))


def test_trace_refuses_weights_that_are_not_numbers():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = float("nan")
    with pytest.raises(TraceError, match="'weight' holds NaN"):
        trace(model, torch.ones(1, 2))


def test_predict_says_which_input_does_not_fit():
    network = trace(nn.Linear(3, 2), torch.zeros(1, 3))
    for wrong, said in (
        ([np.zeros((2, 4), np.float32)], r"Input 1 has the shape \[2, 4\]; the network takes \[N, 3\]"),
        ([np.zeros((2, 3))], "Input 1 is float64; the network takes float32"),
        ([np.zeros((2, 3), np.float32)] * 2, "There are 2 inputs; the network takes 1"),
    ):
        with pytest.raises(UserError, match=said):
            network.predict(*wrong)


class _Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.inner = kind(8, 16, batch_first=True, **settings)

    def forward(self, x):
        return self.inner(x)[0]


@pytest.mark.parametrize(
    ("model", "example", "expected"),
    [
        (_Recurrent(nn.LSTM), torch.zeros(2, 10, 8), 10 * 4 * 16 * (8 + 16)),
        (_Recurrent(nn.GRU, bidirectional=True), torch.zeros(2, 10, 8), 2 * 10 * 3 * 16 * (8 + 16)),
        # projections in and out, the feed-forward, and both products of attention
        (
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
            torch.zeros(2, 10, 32),
            10 * (4 * 32 * 32 + 2 * 32 * 64) + 2 * 10 * 10 * 32,
        ),
    ],
    ids=["lstm", "gru", "attention"],
)
def test_multiplications_of_fused_layers_must_count(model, example, expected):
    network = trace(model.eval(), example)
    assert network.macs() == expected
    assert sum(network.node_macs().values()) == expected
    assert torch.backends.mkldnn.is_available() == torch.backends.mkldnn.enabled
