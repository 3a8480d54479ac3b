"""PyTorch's runtimes on an NVIDIA GPU: what each network takes in each of them, and whether our clock is to be believed.

    python benchmarks/gpu.py [--networks resnet56 mobilenet] [--batches 1 64] [--modes eager inductor cudagraphs aoti]
        [--precisions fp32 bf16 fp16] [--rounds 20] [--device cuda] [--cpu]

What the numbers mean: networks of random weights (time does not depend on them) are written as .pt2 files and measured by
`measure`, all runtimes of a network and batch in turns in one run. `p50` is the median of one run, waited for, with inputs and
outputs on the GPU. `ready` is what passes before the first answer: loading, compiling, first run; the JSON has the compiling
alone, and the most memory that PyTorch held on the GPU. `timer` is
`torch.utils.benchmark.Timer` on the very callable that our agent times, taking turns with our agent's own loop in one process;
`ours/timer` is the ratio of their medians in that process with its 95 % interval. On a GPU the Timer's statement ends in a
synchronize, as one run does for whoever waits for it: CUDA events leave out the host's part of that, and so the ratio may
fall below 1 where a run is short. `pipelined` is the Timer without it: runs queued one behind the other. fp32 convolutions
may use TF32, PyTorch's default (`environment` says so). 2:4 sparsity is one fp16 linear layer, dense against semi-structured,
of equal weights.

The last line is JSON; with a GPU it is also written to benchmarks/results/. Without one this says so and ends; --cpu runs the
same on the CPU, without CUDA graphs and fp16. Needs PyTorch 2.11 or later and numpy.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.benchmark import Timer

from edgepress.compress.errors import DeviceError, UserError
from edgepress.targets.agent.frames import Failure
from edgepress.targets.agent.sessions import Session
from edgepress.targets.agent.torch_session import open_program, session_of
from edgepress.targets.agent.turns import Turn, interleave
from edgepress.targets.artifact import Artifact, read_artifact
from edgepress.targets.devices import find_device
from edgepress.targets.measure import Measurement, Plan, try_measure
from edgepress.targets.stats import paired_ratio, percentile

RESULTS = Path(__file__).parent / "results"
MODES = {"eager": "torch", "inductor": "torch:inductor", "cudagraphs": "torch:cudagraphs", "aoti": "torch:aoti"}
PRECISIONS = {"fp32": "", "bf16": ":bf16", "fp16": ":fp16"}


# ---- networks


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shortcut = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(self.body(x) + shortcut)


def resnet(depth: int = 56) -> nn.Module:
    """He et al. 2016, section 4.2: 6n+2 layers for 32x32 images."""
    blocks: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inputs = 16
    for outputs in (16, 32, 64):
        for i in range((depth - 2) // 6):
            blocks.append(Residual(inputs, outputs, 2 if i == 0 and outputs > 16 else 1))
            inputs = outputs
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mobilenet() -> nn.Module:
    """Depthwise and 1x1 convolutions in turn, as in MobileNetV1 (Howard et al. 2017), for 224x224 images."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    inputs = 32
    for outputs, stride in [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]:
        layers += [nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()]
        layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet56": (resnet, 32),
    "mobilenet": (mobilenet, 224),
    "resnet8": (lambda: resnet(8), 32),
}


def written(name: str, folder: Path) -> Artifact:
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    example = torch.zeros(2, 3, size, size)
    program = torch.export.export(make().eval(), (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    torch.export.save(program, folder / f"{name}.pt2")
    return read_artifact(folder / f"{name}.pt2")


# ---- times


def against_timer(artifact: Artifact, feed: np.ndarray, runtime: str, plan: Plan) -> dict[str, Any]:
    """Our loop and PyTorch's Timer on one callable, taking turns in this process."""
    program = open_program(str(artifact.path), runtime, 1)
    session = session_of(program, runtime)
    inputs, on_gpu = program.placed([feed]), program.device.type == "cuda"
    with program.settings():
        call = program.call_for(inputs)

    def timer(statement: str) -> Callable[[Sequence[Any]], Callable[[int], int]]:
        made = Timer(statement, globals={"call": call, "inputs": inputs, "torch": torch}, num_threads=1)

        def timed(runs: int) -> int:
            with program.settings():
                return round(made.timeit(runs).mean * runs * 1e9)

        return lambda feeds: timed

    statements = {"timer": "call(*inputs)" + ("; torch.cuda.synchronize()" if on_gpu else ""), "pipelined": "call(*inputs)"}
    turns = [Turn(session, [feed])]
    for name in statements if on_gpu else ("timer",):
        other = Session(name, torch.__version__, session.run)
        other.stopwatch, other.step_ns = timer(statements[name]), session.step_ns
        turns.append(Turn(other, [feed]))
    interleave(turns, vars(plan))
    found = paired_ratio(*(tuple(map(tuple, turn.rounds)) for turn in (turns[0], turns[1])))
    medians = {f"{turn.session.name}_ns": percentile(turn.rounds, 50) for turn in turns[1:]}
    return {**medians, "ours_over_timer": [found.value, found.low, found.high]}


def measured(
    artifact: Artifact, batch: int, runtimes: Sequence[str], device: str, plan: Plan
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """One network and batch in all runtimes, in one run; then each against the Timer."""
    shape = [batch, *(int(size or 1) for size in artifact.inputs[0].shape[1:])]
    feed = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = try_measure([artifact] * len(runtimes), device, 1, plan, [[feed]] * len(runtimes), runtimes)
    rows: list[dict[str, Any]] = []
    environment: dict[str, Any] | None = None
    for runtime, outcome in zip(runtimes, found, strict=True):
        row: dict[str, Any] = {"network": artifact.path.stem, "batch": batch, "runtime": runtime}
        if isinstance(outcome, Measurement):
            environment = outcome.environment
            ready = (outcome.load_ns or 0) + (outcome.first_ns or 0)
            row |= {"p50_ns": outcome.p50_ns, "p90_ns": outcome.p90_ns, "ready_s": ready / 1e9, "noise": outcome.noise}
            row |= {"compile_ns": outcome.compile_ns, "peak_bytes": outcome.peak_bytes}
            try:
                row |= against_timer(artifact, feed, runtime, plan)
            except Failure as failure:  # it ran in the agent's process, and does not in this one
                row["error"] = f"it has a p50 of {outcome.p50_ns / 1e3:.1f} us, and no Timer's: {failure.fields['detail']}"
        else:
            row["error"] = str(outcome)
        rows.append(row)
        print(line(row), flush=True)
    return rows, environment


def line(row: dict[str, Any]) -> str:
    name = f"{row['network']:10} {row['batch']:5} {row['runtime']:22}"
    if "error" in row:
        return f"{name} {row['error']}"
    value, low, high = row["ours_over_timer"]
    ours, timer, pipelined = (f"{row[k] / 1e3:10.1f}" if k in row else " " * 10 for k in ("p50_ns", "timer_ns", "pipelined_ns"))
    return f"{name} {ours} {timer} {pipelined} {value:8.3f} ({low:.3f} to {high:.3f}) {row['ready_s']:8.1f}"


# ---- 2:4 sparsity


def semi_structured(module: nn.Module, weights: Sequence[str]) -> nn.Module:
    """Hand 2:4 weights of linear layers to the sparse tensor cores, in place.

    Args:
        module: in fp16 or bf16, on a GPU.
        weights: names of weights of which, of every four neighbours along the inputs, at most two are not zero; those of
            `Sparsify` are in ``network.history[-1]["found"]["layers"]``, under ``"weight"``. Only those of linear layers are
            taken: PyTorch has no such convolution. They must have multiples of 32 rows and 64 columns.
    """
    for name in weights:
        path, _, leaf = name.rpartition(".")
        layer = module.get_submodule(path)
        weight = getattr(layer, leaf)
        if weight.dim() == 2:
            setattr(layer, leaf, nn.Parameter(torch.sparse.to_sparse_semi_structured(weight.detach()), requires_grad=False))
    return module


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest of every four neighbours, zeros for the others."""
    groups = weight.reshape(-1, 4)
    return (groups * torch.zeros_like(groups).scatter(1, groups.abs().topk(2, 1).indices, 1)).reshape(weight.shape)


def sparsity(plan: Plan, device: str, size: int = 4096, batches: Sequence[int] = (64, 1024, 4096)) -> list[dict[str, Any]]:
    """One linear layer, dense and 2:4, in turns; only on a GPU that has the sparse tensor cores (8.0 or later)."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return [{"error": "this GPU has no sparse tensor cores"}]
    try:
        with torch.cuda.device(device):
            return _dense_against_sparse(plan, size, batches)
    except RuntimeError as error:  # what multiplies 2:4 weights, cuSPARSELt or CUTLASS, is not in every build
        print(f"2:4: {error}", flush=True)
        return [{"error": str(error).splitlines()[0]}]


def _dense_against_sparse(plan: Plan, size: int, batches: Sequence[int]) -> list[dict[str, Any]]:
    layer = nn.Linear(size, size).half().cuda().requires_grad_(False)
    layer.weight.copy_(two_of_four(layer.weight))
    dense = nn.Sequential(layer)
    sparse = nn.Sequential(nn.Linear(size, size)).half().cuda().requires_grad_(False)
    sparse.load_state_dict(dense.state_dict())
    semi_structured(sparse, ["0.weight"])
    rows = []
    for batch in batches:
        x = torch.randn(batch, size, device="cuda").half()
        with torch.inference_mode():
            difference = float((dense(x) - sparse(x)).abs().max())
        turns = [Turn(_layer(name, layer, x), [x]) for name, layer in (("dense", dense), ("2:4", sparse))]
        interleave(turns, vars(plan))
        first, second = (tuple(map(tuple, turn.rounds)) for turn in turns)
        found = paired_ratio(first, second)
        rows.append({"batch": batch, "size": size, "dense_ns": percentile(first, 50), "sparse_ns": percentile(second, 50),
                     "faster": [found.value, found.low, found.high], "largest_difference": difference})  # fmt: skip
        print(f"2:4 fp16 linear {size}x{size}, batch {batch}: {found}, largest difference {difference:.4f}", flush=True)
    return rows


def _layer(name: str, layer: nn.Module, x: torch.Tensor) -> Session:
    def stopwatch(feeds: Sequence[Any]) -> Callable[[int], int]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def timed(runs: int) -> int:
            total = 0.0
            with torch.inference_mode():
                for _ in range(runs):
                    start.record()
                    layer(x)
                    end.record()
                    end.synchronize()
                    total += start.elapsed_time(end)
            return round(total * 1e6)

        return timed

    session = Session(name, torch.__version__, lambda feeds: [layer(x)])
    session.stopwatch, session.step_ns = stopwatch, 500
    return session


# ---- the whole


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["resnet56", "mobilenet"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="cuda", help="cuda, or cuda:1 for the second GPU")
    parser.add_argument(
        "--cpu", action="store_true", help="the same on the CPU: it tries this program, and says nothing of a GPU"
    )
    return parser.parse_args()


def main() -> int:
    asked = arguments()
    device = "local" if asked.cpu else asked.device
    try:
        place = find_device(device)
        place.environment()
        place.close()
    except DeviceError as error:
        print(f"{error} Nothing was measured; --cpu tries this on the CPU.")
        return 0
    os.environ["EDGEPRESS_TORCH_DEVICE"] = "cpu" if asked.cpu else asked.device
    modes = [mode for mode in asked.modes if not (asked.cpu and mode == "cudagraphs")]
    precisions = [name for name in asked.precisions if not (asked.cpu and name == "fp16")]
    runtimes = [MODES[mode] + PRECISIONS[name] for name in precisions for mode in modes]
    plan = Plan(rounds=asked.rounds, timeout_s=600)
    rows: list[dict[str, Any]] = []
    environment: Any = None
    print(
        f"{'network':10} {'batch':>5} {'runtime':22} {'p50 us':>10} {'timer us':>10} {'pipelined':>10} ours/timer {'ready s':>22}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.networks:
            artifact = written(name, Path(folder))
            for batch in asked.batches:
                more, found = measured(artifact, batch, runtimes, device, plan)
                rows, environment = rows + more, found or environment
    document = {"rows": rows, "environment": environment, "sparsity": None if asked.cpu else sparsity(plan, asked.device)}
    if not asked.cpu:
        gpu = re.sub(r"\W+", "-", str((environment or {}).get("gpu", "gpu"))).lower()
        RESULTS.mkdir(exist_ok=True)
        target = RESULTS / f"{gpu}-{time.strftime('%Y-%m-%d', time.gmtime())}.json"
        target.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        raise SystemExit(str(error)) from None
