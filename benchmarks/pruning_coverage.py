"""Which architectures can be pruned, trained and written to files: edgepress beside torch-pruning 1.6.1, on the same zoo.

    pip install 'edgepress[bench]'
    python benchmarks/pruning_coverage.py [--only NAME ...] [--jobs 2] [--no-tflite] [--out runs/coverage]

What the numbers mean: every network loses half of each group's channels, drawn at random (edgepress) or by magnitude
(torch-pruning). `before` and `after` count weights, `MACs` is what is left of the multiply-accumulates. `oracle` is the largest
difference between the pruned network and the original with the removed channels' weights zeroed, over its largest output, at
batch sizes 1 and 3. `ONNX` and `TFLite` are the same between the exported file, run by ONNX Runtime or LiteRT, and the pruned
network.

A network counts for edgepress where it shrinks, the oracle's error is below 1e-5, one step of training gives finite weights, and
both files are within 1e-3. It counts for torch-pruning where the model shrinks, runs at both batch sizes with outputs of the same
shapes, and takes the training step; files are not asked of it. torch-pruning is told which layers make the outputs and how many
heads each attention has, and attention modules learn their new sizes, as its documentation shows.

Each network runs in a process of its own, so that a hang or a crash counts as a failure and stops nothing else; finished rows are
kept in `--out` and used again. The last line is JSON; the exit code is 0 where edgepress has no failure.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode
from zoo import ZOO, resized

from edgepress.compress.errors import UserError
from edgepress.compress.network import Network, trace
from edgepress.compress.pruning import Analysis, Channels, analyse, channels_of, masked, relative_error, remove
from edgepress.targets.export import export
from edgepress.targets.verify import verify

BATCHES = 1, 3
ORACLE, FILE = 1e-5, 1e-3
CPU_S, TIMEOUT_S = 120, 900

Inputs = tuple[Tensor, ...]


# ---- edgepress


def ours(model: nn.Module, inputs: Inputs, folder: Path, suffixes: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """What happened, step by step; an exception ends it."""
    network = trace(model, inputs)
    analysis = analyse(network)
    gone = half(channels_of(analysis))
    smaller = remove(network, analysis, gone)
    before, after = network.parameter_count, smaller.parameter_count
    yield {"parameters": [before, after], "macs": [network.macs(), smaller.macs()]}
    oracle = masked(analysis, gone)
    error = max(_error(smaller, oracle, resized(inputs, n)) for n in BATCHES)
    yield {"oracle": error}
    trained(smaller.copy().train(), resized(inputs, 4))
    yield {"trained": True}
    for suffix in suffixes:
        yield {suffix: written(smaller, network, folder / f"pruned.{suffix}")}


def half(channels: Channels, seed: int = 0) -> list[int]:
    """Half of each group's channels, drawn at random, but never all of them."""
    draw = np.random.default_rng(seed)
    picked = [draw.choice(g.channels, len(g.channels) // 2, replace=False) for g in channels.groups]
    return [int(i) for ids in picked for i in ids]


def written(smaller: Network, network: Network, path: Path) -> float | str:
    """The error of the pruned network's file, or why there is none."""
    try:
        parity = verify(export(smaller, path), smaller)
    except UserError as error:
        return f"{_unpruned(network, path)}{error}"
    return parity.max_rel if parity.ok else f"{_unpruned(network, path)}{parity.reason}"


def _unpruned(network: Network, path: Path) -> str:
    """'converter fails unpruned: ' where pruning has no part in it."""
    with contextlib.suppress(UserError):
        if verify(export(network, path), network).ok:
            return ""
    return "converter fails unpruned: "


def _error(network: Network, oracle: Callable[..., Any], inputs: Inputs) -> float:
    with torch.no_grad():
        return relative_error(network(*inputs), oracle(*inputs))


# ---- torch-pruning


def theirs(model: nn.Module, inputs: Inputs) -> Iterator[dict[str, Any]]:
    """The same through torch-pruning: output layers ignored, heads told, sizes of attention updated."""
    import torch_pruning as tp

    heads = {layer: count for _, layers, count in attention(model) for layer in layers}
    ignored = outputs(model, inputs)
    shapes = [tuple(x.shape[1:]) for x in answers(model, resized(inputs, 3))]
    before, macs = size(model), multiplications(model, inputs)
    pruner = tp.pruner.BasePruner(
        model,
        inputs,  # a tuple or list is given to the model as its arguments
        importance=tp.importance.MagnitudeImportance(),
        global_pruning=False,
        pruning_ratio=0.5,
        ignored_layers=ignored,
        num_heads=dict(heads),
        channel_groups={},
        in_channel_groups={},
        out_channel_groups={},
    )
    pruner.step()
    for module, layers, _ in attention(model):
        update(module, layers[0], pruner.num_heads.get(layers[0]))
    yield {"parameters": [before, size(model)]}
    assert size(model) < before, "the model did not shrink"
    for n in BATCHES:
        got = [tuple(x.shape[1:]) for x in answers(model, resized(inputs, n))]
        assert got == shapes, f"outputs of shape {got} instead of {shapes}"
    yield {"macs": [macs, multiplications(model, inputs)]}
    trained(model.train(), resized(inputs, 4))
    yield {"trained": True}


_PROJECTIONS = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"), ("qkv",), ("c_attn",), ("query_key_value",),
)  # fmt: skip
_HEADS = "num_attention_heads", "num_heads", "n_heads"


def attention(model: nn.Module) -> Iterator[tuple[nn.Module, list[nn.Module], int]]:
    """(attention module, its projections, number of heads), found by the names that model libraries use."""
    for module in model.modules():
        count = next((getattr(module, name) for name in _HEADS if isinstance(getattr(module, name, None), int)), None)
        if count is None and hasattr(module, "config"):
            count = next((getattr(module.config, name) for name in _HEADS if hasattr(module.config, name)), None)
        for names in _PROJECTIONS:
            layers = [getattr(module, name) for name in names if isinstance(getattr(module, name, None), nn.Module)]
            if len(layers) == len(names) and isinstance(count, int):
                yield module, layers, count
        if isinstance(module, nn.MultiheadAttention):
            yield module, [module], module.num_heads


def update(module: nn.Module, projection: nn.Module, count: int | None) -> None:
    """The sizes that an attention module remembers, after its projections shrank."""
    width = getattr(projection, "out_features", None)
    if isinstance(module, nn.MultiheadAttention) or count is None or width is None:
        return
    packed = 3 if len([n for n in ("qkv", "query_key_value") if hasattr(module, n)]) else 1
    values = {"all_head_size": width // packed, "inner_dim": width, "head_dim": width // packed // count}
    values |= {
        "attention_head_size": width // packed // count,
        "key_value_proj_dim": width // count,
        "dim": width,
        "embed_dim": width,
    }
    for name, value in values.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)


def outputs(model: nn.Module, inputs: Inputs) -> list[nn.Module]:
    """The layers whose filters are the network's outputs, which torch-pruning has to be told; from our own labels."""
    network = trace(model, inputs)
    analysis = analyse(network)
    return [model.get_submodule(name) for name in dict.fromkeys(_output_layers(analysis)) if _has(model, name)]


def _output_layers(analysis: Analysis) -> Iterator[str]:
    labels = analysis.labels
    frozen = [labels.find(ids) for _, reason, ids in labels.log if reason == "the network's output"]
    roots = np.unique(np.concatenate(frozen)) if frozen else np.zeros(0, np.int64)
    for parameter in analysis.parameters.values():
        if parameter.tensor.dim() > 1 and np.isin(labels.find(parameter.labels[0]), roots).any():
            yield from (name.rpartition(".")[0] for name in parameter.names)  # a tied weight stands in several layers


def _has(model: nn.Module, name: str) -> bool:
    return bool(name) and name in dict(model.named_modules())


# ---- both


def answers(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor)]


def trained(model: Any, inputs: Inputs) -> None:
    """One step of gradient descent: weights must move and stay finite."""
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    optimizer = torch.optim.SGD(weights, lr=1e-3)
    leaves = [x for x in pytree.tree_leaves(model(*inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
    torch.stack([x.square().mean() for x in leaves]).sum().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in weights), "training gives weights that are not finite"
    assert any(not torch.equal(p, old) for p, old in zip(weights, before, strict=True)), "training moves nothing"


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def multiplications(model: nn.Module, inputs: Inputs) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(*(x[:1] for x in inputs))
    return counter.get_total_flops() // 2


# ---- one process per network and tool


def row_of(name: str, tool: str, suffixes: tuple[str, ...]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    row: dict[str, Any] = {"name": name}
    model, inputs = ZOO[name]()
    try:
        with tempfile.TemporaryDirectory() as folder:
            steps = ours(model, inputs, Path(folder), suffixes) if tool == "ours" else theirs(model, inputs)
            for step in steps:
                row |= step
    except Exception as error:
        row["failure"] = _sentence(error)
        row["trace"] = traceback.format_exc()[-3000:]
    return row


def _sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, UserError | AssertionError) and text else f"{type(error).__name__}: {text}"


@dataclass(frozen=True)
class Job:
    """One network through one tool, and the file that keeps its row."""

    name: str
    tool: str
    suffixes: tuple[str, ...]
    path: Path

    def row(self) -> dict[str, Any] | None:
        """The row, where it is there and whole."""
        if not self.path.is_file():
            return None
        row: dict[str, Any] = json.loads(self.path.read_text())
        return row if "failure" in row or all(suffix in row for suffix in self.suffixes) else None

    def run(self) -> None:
        """In a process of its own, which the system ends when its time is up: a busy machine makes nobody fail."""
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        self.write(row_of(self.name, self.tool, self.suffixes))

    def write(self, row: dict[str, Any]) -> None:
        self.path.write_text(json.dumps(row))


def warmed() -> None:
    """What every process needs, once, before they are forked; nothing that starts a thread."""
    torch.set_num_threads(1)
    for module in ("transformers", "litert_torch", "torch_pruning"):
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        export(trace(nn.Linear(2, 2), torch.zeros(1, 2)), Path(folder) / "warm.onnx")


def run(jobs: list[Job], at_once: int) -> Iterator[Job]:
    """Each job as it ends; one that hangs or crashes leaves a row that says so."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(jobs), dict[Any, tuple[Job, float]]()
    while waiting or running:
        while waiting and len(running) < at_once:
            job = waiting.pop(0)
            process = context.Process(target=job.run)
            job.path.unlink(missing_ok=True)
            process.start()
            running[process] = job, time.monotonic() + TIMEOUT_S
        multiprocessing.connection.wait([p.sentinel for p in running], timeout=1)
        for process, (job, deadline) in list(running.items()):
            if process.is_alive() and time.monotonic() < deadline:
                continue
            late = process.is_alive() or process.exitcode == -signal.SIGKILL
            process.kill()
            process.join()
            del running[process]
            if not job.path.is_file():
                job.write({"name": job.name, "failure": f"no answer in {CPU_S} s" if late else f"crashed ({process.exitcode})"})
            yield job


# ---- the table


def verdict(row: dict[str, Any], suffixes: tuple[str, ...]) -> str:
    """Why a row of ours counts as a failure; '' where it does not."""
    if failure := row.get("failure"):
        return str(failure)
    if row["parameters"][1] >= row["parameters"][0]:
        return "nothing could be pruned"
    if not row["oracle"] < ORACLE:
        return f"the oracle differs by {row['oracle']:.1e}"
    return "; ".join(f"{s}: {row[s]}" for s in suffixes if isinstance(row[s], str))


def line(row: dict[str, Any], other: dict[str, Any]) -> str:
    sizes = "{:>8} {:>8}".format(*row.get("parameters", ("", "")))
    macs = f"{row['macs'][1] / row['macs'][0]:>6.2f}" if row.get("macs", [0])[0] else f"{'':>6}"
    errors = " ".join(f"{number(row.get(key)):>8}" for key in ("oracle", "onnx", "tflite"))
    return f"{row['name']:<28} {sizes} {macs} {errors}  {other.get('failure', 'ok')[:70]}"


def number(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) else "failed" if isinstance(value, str) else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(ZOO), metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--no-tflite", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/coverage"), help="where finished rows are kept")
    arguments = parser.parse_args()

    names = arguments.only or list(ZOO)
    suffixes = ("onnx",) if arguments.no_tflite else ("onnx", "tflite")
    arguments.out.mkdir(parents=True, exist_ok=True)
    pairs = {
        name: (
            Job(name, "ours", suffixes, arguments.out / f"{name}.json"),
            Job(name, "theirs", (), arguments.out / f"{name}.peer.json"),
        )
        for name in names
    }
    todo = [job for pair in pairs.values() for job in pair if job.row() is None]
    if todo:
        warmed()
    for job in run(todo, arguments.jobs):
        print(f"{job.name}, {job.tool}: {(job.row() or {}).get('failure', 'done')[:100]}", file=sys.stderr, flush=True)
    return table([(mine.row() or {}, other.row() or {}) for mine, other in pairs.values()], suffixes)


def table(rows: list[tuple[dict[str, Any], dict[str, Any]]], suffixes: tuple[str, ...]) -> int:
    print(f"{'network':<28} {'before':>8} {'after':>8} {'MACs':>6} {'oracle':>8} {'ONNX':>8} {'TFLite':>8}  torch-pruning")
    for mine, other in rows:
        print(line(mine, other))
        if why := verdict(mine, suffixes):
            print(f"    {why[:300]}")
    return summary(rows, suffixes)


def summary(rows: list[tuple[dict[str, Any], dict[str, Any]]], suffixes: tuple[str, ...]) -> int:
    pruned = sum(not verdict(mine, ()) for mine, _ in rows)
    whole = sum(not verdict(mine, suffixes) for mine, _ in rows)
    peers = sum("failure" not in other for _, other in rows)
    n = len(rows)
    print(f"edgepress: {pruned} of {n} pruned exactly, {whole} of {n} with every file ({', '.join(suffixes)}) right")
    print(f"torch-pruning: {peers} of {n} shrink, run and train")
    ran = [mine | {"torch_pruning": other.get("failure", "ok"), "why": verdict(mine, suffixes)} for mine, other in rows]
    for row in ran:
        row.pop("trace", None)
    print(json.dumps({"networks": n, "pruned": pruned, "whole": whole, "torch_pruning": peers, "rows": ran}))
    return 0 if whole == n else 3


if __name__ == "__main__":
    sys.exit(main())
