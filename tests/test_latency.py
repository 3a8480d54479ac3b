import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from edgepress.compress.errors import DeviceError, FileError, UserError
from edgepress.compress.network import trace
from edgepress.compress.pruning.layers import Layer
from edgepress.targets import latency, probe_onnx, probe_tflite
from edgepress.targets.agent import probes
from edgepress.targets.devices import find_device
from edgepress.targets.export import export
from edgepress.targets.latency import LatencyTable
from edgepress.targets.runtimes import open_runtime

CONV = ((3, 3), (1, 1), (1, 1), (1, 1))
IMAGE = (8, 6, 6)
EXAMPLES = {
    "conv": Layer("conv", (IMAGE,), (16, 3, 3), (3, 3), (2, 2), (1, 1), (1, 1), 1, "relu"),
    "depthwise": Layer("depthwise", (IMAGE,), IMAGE, *CONV, 1, "relu6"),
    "conv_transpose": Layer("conv_transpose", (IMAGE,), (4, 12, 12), (4, 4), (2, 2), (1, 1), (1, 1)),
    "linear": Layer("linear", ((8,),), (5,), activation="relu"),
    "matmul": Layer("matmul", ((2, 5, 4), (2, 4, 5)), (2, 5, 5)),
    "max_pool": Layer("max_pool", (IMAGE,), (8, 3, 3), (3, 3), (2, 2), (1, 1)),
    "avg_pool": Layer("avg_pool", (IMAGE,), (8, 3, 3), (2, 2), (2, 2), (0, 0)),
    "mean": Layer("mean", (IMAGE,), (8,)),
    "cat": Layer("cat", (IMAGE, IMAGE), (16, 6, 6)),
    "pad": Layer("pad", (IMAGE,), (12, 6, 6)),
    "slice": Layer("slice", (IMAGE,), (8, 3, 3)),
    "add": Layer("add", (IMAGE, IMAGE), IMAGE, activation="relu"),
    "mul": Layer("mul", (IMAGE, (8, 1, 1)), IMAGE),
    "input": Layer("input", (), (3, 6, 6)),
}
MORE = [
    Layer("conv", ((8, 20),), (4, 10), (3,), (2,), (1,), (1,)),  # one-dimensional
    Layer("conv", ((8, 6, 6),), (8, 6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 2),  # in groups
    Layer("linear", ((5, 8),), (5, 12)),  # of a sequence
    Layer("add", ((12,), (12,)), (12,)),
]


def example(operator):
    return EXAMPLES.get(operator, Layer(operator, (IMAGE,), IMAGE))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("module", [probe_onnx, probe_tflite], ids=["onnx", "tflite"])
def test_every_probe_runs(module, precision):
    write, open_ = (module.onnx_probe, probes._onnx) if module is probe_onnx else (module.tflite_probe, probes._tflite)
    failed = []
    for layer in [example(name) for name in (*module.OPERATORS, "input")] + MORE:
        for copies in (1, 3):
            try:
                open_(write(layer, copies, precision), 1, layer.operator == "input")()
            except Exception as error:
                failed.append((layer, copies, error))
    assert not failed


def test_probes_hold_the_layer_as_often_as_asked():
    import onnx
    from ai_edge_litert import schema_py_generated as schema

    layer = dataclasses.replace(EXAMPLES["conv"], inputs=((8, 9, 9),), output=(16, 5, 5))
    graph = schema.ModelT.InitFromPackedBuf(probe_tflite.tflite_probe(layer, 4, "int8"), 0).subgraphs[0]
    shapes = [tuple(graph.tensors[o.outputs[0]].shape) for o in graph.operators]
    assert shapes.count((1, 5, 5, 16)) == 4
    assert all(graph.tensors[i].type == schema.TensorType.INT8 for i in graph.outputs)
    nodes = onnx.load_from_string(probe_onnx.onnx_probe(layer, 4, "int8")).graph.node
    assert sum(n.op_type == "Conv" for n in nodes) == 1 + 4 + 4  # one before, and a reader behind each
    assert sum(n.op_type == "Relu" for n in nodes) == 1 + 4


# ---- the table


class Staircase(LatencyTable):
    """A table whose measurements are a formula."""

    def __init__(self, cache, formula, **arguments):
        super().__init__("litert", "int8", cache=cache, **arguments)
        self.formula, self.measured = formula, []

    def _measure(self, layers):
        self.measured += layers
        return {layer: self.formula(layer) for layer in layers}


def tiles(layer):
    return 100.0 * -(-layer.inputs[0][0] // 4) * -(-layer.output[0] // 16)


def conv(inputs, output):
    return Layer("conv", ((inputs, 8, 8),), (output, 8, 8), *CONV)


def test_a_staircase_is_followed_exactly_and_from_few_measurements(tmp_path):
    table = Staircase(tmp_path, tiles)
    generator = np.random.default_rng(0)
    layers = [conv(*(int(n) for n in generator.integers(1, 900, 2))) for _ in range(100)]
    layers += [conv(a, 512) for a in range(400, 800)]
    assert table.seconds(layers) == pytest.approx([tiles(layer) * 1e-9 for layer in layers])
    assert len(table.measured) < 1.6 * 4 * 300  # four corners at most, shared by many


def test_times_are_not_interpolated_across_a_cliff(tmp_path):
    def cliff(layer):
        return layer.output[0] * (1.0 if layer.output[0] < 300 else 2.0)

    table = Staircase(tmp_path, cliff)
    counts = [200, 280, 290, 296, 304, 310, 330, 700]
    layers = [Layer("mul", ((n, 8, 8), (n, 8, 8)), (n, 8, 8)) for n in counts]
    assert table.seconds(layers) == pytest.approx([cliff(layer) * 1e-9 for layer in layers])


def test_what_is_known_is_not_measured_again(tmp_path):
    first = Staircase(tmp_path, tiles)
    expected = first.seconds([conv(8, 16), conv(8, 24), conv(8, 16)])
    second = Staircase(tmp_path, lambda layer: 0.0)
    assert second.seconds([conv(8, 16), conv(8, 24), conv(8, 16)]) == pytest.approx(expected)
    assert not second.measured


def test_two_open_tables_agree_on_the_first_measurement(tmp_path):
    first, second = Staircase(tmp_path, lambda _: 100.0), Staircase(tmp_path, lambda _: 200.0)
    first.seconds([conv(8, 8)])
    assert second.seconds([conv(8, 8), conv(8, 16)]) == pytest.approx([100e-9, 200e-9])
    first._store.add({conv(8, 16): 300.0})
    assert first.seconds([conv(8, 16)]) == pytest.approx([200e-9])


def test_two_processes_may_write_at_once(tmp_path):
    path = tmp_path / "table.jsonl"
    code = """
import sys
from pathlib import Path
from edgepress.compress.pruning.layers import Layer
from edgepress.targets.latency import _Store
store, mine = _Store(Path(sys.argv[1])), int(sys.argv[2])
for i in range(100):
    store.add({Layer("conv", ((8 * j, 8, 8),), (mine, i, j), (3, 3)): float(mine) for j in range(1, 9)})
"""
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in (1, 2)]
    assert [w.wait() for w in workers] == [0, 0]
    lines = path.read_text().splitlines()
    assert len(lines) == 2 * 100 * 8
    assert all(json.loads(line)["ns"] == json.loads(line)["output"][0] for line in lines)
    assert len(latency._Store(path).times) == 2 * 100 * 8


def test_damaged_lines_are_left_out(tmp_path):
    table = Staircase(tmp_path, tiles)
    table.seconds([conv(8, 16)])
    with table.path.open("a") as file:
        file.write('nonsense\n{"operator": "conv"}\n[1]\n{"operator": "conv", "inputs": [[8, 8')
    again = Staircase(tmp_path, tiles)
    again.seconds([conv(8, 16)])
    assert not again.measured


def test_drift_is_taken_out_by_the_reference(tmp_path, monkeypatch):
    table = LatencyTable("litert", "int8", cache=tmp_path)
    for speed in (1.0, 3.0):
        monkeypatch.setattr(LatencyTable, "_slopes", lambda self, layers, s=speed: [s * 100 * x.output[0] for x in layers])
        assert table.seconds([conv(8, int(10 * speed))]) == pytest.approx([1e-9 * 1000 * speed])


def test_real_layers_are_timed_and_kept(tmp_path):
    for runtime in ("litert", "onnxruntime"):
        table = LatencyTable(runtime, "int8", cache=tmp_path)
        small, large = table.seconds([conv(8, 8), dataclasses.replace(conv(64, 64))])
        assert 0 < small < large < 0.1
        assert LatencyTable(runtime, "int8", cache=tmp_path).seconds([conv(8, 8)])[0] == small


def test_what_stands_beside_a_layer_in_its_probe_is_taken_off(tmp_path, monkeypatch):
    # a mean is timed behind a convolution of its own, which is timed in front of a reader of its own
    times = {"tail": 10.0, "conv": 10.0 + 30.0, "mean": 30.0 + 7.0}
    monkeypatch.setattr(LatencyTable, "_slopes", lambda self, layers: [times[x.operator] for x in layers])
    assert LatencyTable("onnxruntime", cache=tmp_path).seconds([EXAMPLES["mean"]]) == pytest.approx([7e-9])


def test_a_layer_that_cannot_be_measured_costs_what_it_moves(tmp_path):
    table = Staircase(tmp_path, lambda layer: float(layer.output[0]))
    strange = Layer("fft_rfft", ((9, 10),), (9, 20))
    assert table.seconds([strange])[0] == pytest.approx(90e-9)
    assert table.measured == [Layer("mul", ((90,), (90,)), (90,))]


def test_layers_are_timed_on_the_device(tmp_path):
    place = find_device("local")
    table = LatencyTable("litert", "int8", cache=tmp_path, device=place)
    assert table.seconds([conv(8, 8)])[0] > 0
    place.environment = lambda: {
        "cpu": "Cortex-A76",
        "cpu_features": ["asimddp"],
        "packages": {"tflite-runtime": "2.14.0"},
        "emulated": None,
    }
    place.name = "ssh://board"
    other = LatencyTable("litert", "int8", threads=4, cache=tmp_path, device=place)
    assert other.path.name.startswith("cortex-a76-")
    assert "-tflite-runtime-2.14.0-int8-4t-" in other.path.name
    with pytest.raises(DeviceError, match="onnxruntime is not installed on ssh://board"):
        LatencyTable("onnxruntime", cache=tmp_path, device=place)
    place.environment = lambda: {"emulated": "qemu runs this process"}
    with pytest.raises(DeviceError, match="is an emulated machine"):
        LatencyTable("litert", cache=tmp_path, device=place)


def test_a_shape_that_the_runtime_refuses_costs_what_it_moves(tmp_path, monkeypatch):
    whole = latency._KINDS["litert"]
    broken = dataclasses.replace(
        whole, write=lambda layer, n, p: b"nothing" if layer.operator == "conv" and n == 1 else whole.write(layer, n, p)
    )
    monkeypatch.setitem(latency._KINDS, "litert", broken)
    monkeypatch.setattr(latency, "_REFERENCE", Layer("add", ((8, 8, 8),) * 2, (8, 8, 8)))
    assert 0 < LatencyTable("litert", "int8", cache=tmp_path).seconds([conv(64, 64)])[0] < 1e-3


def test_mistakes_get_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no runtime 'tensorrt'"):
        LatencyTable("tensorrt", cache=tmp_path)
    with pytest.raises(UserError, match="'int4' is no precision"):
        LatencyTable("litert", "int4", cache=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot keep measured times"):
        LatencyTable("litert", cache=tmp_path / "file" / "folder")


# ---- what the tables found out about slices


class Strided(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = self.conv(x)
        y = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return y.mean((2, 3)) + x[:, :, ::3, :].mean((2, 3)).sum(1, keepdim=True) + x[:, :, 1::2].mean((1, 2, 3))[:, None]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_strided_slices_become_poolings_in_tflite_files(tmp_path, precision):
    from ai_edge_litert import schema_py_generated as schema

    torch.manual_seed(0)
    network = trace(Strided().eval(), torch.zeros(1, 3, 9, 9))
    artifact = export(network, tmp_path / "net.tflite", precision, [torch.randn(8, 3, 9, 9)])
    model = schema.ModelT.InitFromPackedBuf(artifact.path.read_bytes(), 0)
    codes = [model.operatorCodes[o.opcodeIndex].builtinCode for o in model.subgraphs[0].operators]
    assert codes.count(schema.BuiltinOperator.MAX_POOL_2D) == 2  # rows and columns in one
    assert schema.BuiltinOperator.STRIDED_SLICE in codes  # the one that starts elsewhere
    x = np.random.default_rng(0).standard_normal((4, 3, 9, 9)).astype(np.float32)
    wanted = network.predict(x)
    assert open_runtime(artifact).predict(x) == pytest.approx(wanted, abs=1e-5 if precision == "fp32" else 0.1)
