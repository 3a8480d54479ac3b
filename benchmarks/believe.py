"""Whether `edgepress bench` can be believed: the same file twice, a planted slow-down, and the runtimes' own loops beside it.

    python benchmarks/believe.py [--runs 100] [--slower 0.10] [--seconds 1.5]

Files of matrix products, made here: `A` holds 40 of them, `slow` 10 % more. Three questions:

- A/A: A against itself, `--runs` times. The verdict must be 'cannot tell' in 95 % of them at least.
- planted: A against `slow`, as often. 'slower' must be found in 95 % at least.
- own: our median against a plain loop of the runtime's own Python interface (100 calls to warm up, then perf_counter around each
  call), in turns within one process, for an ONNX and a TFLite file. It must be within 3 %.

What bounds it: a machine that other work shares. `busy` is how many cores that took meanwhile; `noisy` in how many runs
edgepress itself warned. The last line is JSON; the exit code is 0 where all three hold.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import edgepress as ep
from edgepress.targets.agent import sessions
from edgepress.targets.agent.turns import Turn, interleave
from edgepress.targets.devices.local import Local
from edgepress.targets.runtimes import random_feeds

GOAL, NEAR = 0.95, 0.03


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--slower", type=float, default=0.10)
    parser.add_argument("--seconds", type=float, default=1.5, help="of measuring in each run, about")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = products(Path(folder) / "a.onnx", 40)
        slow = products(Path(folder) / "slow.onnx", round(40 * (1 + arguments.slower)))
        plan = ep.Plan(rounds=20, min_round_s=arguments.seconds / 40, warmup_s=0.1)
        same = verdicts([first, first], plan, arguments.runs, "cannot tell")
        planted = verdicts([first, slow], plan, arguments.runs, "slower")
        own = {suffix: beside(network(Path(folder) / f"net.{suffix}")) for suffix in ("onnx", "tflite")}
    print(f"{'question':<22} {'right':>7} {'of':>4} {'noisy':>6} {'busy':>5}")
    for name, row in (("A/A", same), (f"planted {arguments.slower:.0%}", planted)):
        print(f"{name:<22} {row['right']:>7} {row['runs']:>4} {row['noisy']:>6} {row['busy']:>5.2f}")
    for suffix, row in own.items():
        print(f"{'own loop, ' + suffix:<22} ours {row['ours_us']:.1f} us, theirs {row['theirs_us']:.1f} us: {row['apart']:+.1%}")
    met = all(row["right"] >= GOAL * row["runs"] for row in (same, planted)) and all(abs(r["apart"]) < NEAR for r in own.values())
    print(json.dumps({"met": met, "same": same, "planted": planted, "own": own}))
    return 0 if met else 3


def products(path: Path, count: int) -> ep.Artifact:
    """A file of ``count`` matrix products in a row."""
    from onnx import TensorProto, helper, numpy_helper, save

    weight = numpy_helper.from_array(np.eye(64, dtype=np.float32) * 0.99, "w")
    nodes = [helper.make_node("MatMul", [f"t{i}", "w"], [f"t{i + 1}"]) for i in range(count)]
    ports = [helper.make_tensor_value_info(f"t{i}", TensorProto.FLOAT, [64, 64]) for i in (0, count)]
    graph = helper.make_graph(nodes, "products", ports[:1], ports[1:], [weight])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return ep.read_artifact(path)


def verdicts(files: list[ep.Artifact], plan: ep.Plan, runs: int, wanted: str) -> dict[str, float]:
    """How often the second file is judged as it should be."""
    right, noisy, busy = 0, 0, []
    place = Local()
    for i in range(runs):
        baseline, other = ep.measure(files, place, plan=plan)
        right += ep.ratio(baseline, other).verdict == wanted
        noisy += baseline.noise is not None or other.noise is not None
        busy.append(baseline.environment["other_cores"] or 0.0)
        print(f"{wanted}: {right} of {i + 1}", file=sys.stderr, end="\r", flush=True)
    place.close()
    return {"runs": runs, "right": right, "noisy": noisy, "busy": round(statistics.mean(busy), 2)}


def network(path: Path) -> ep.Artifact:
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    return ep.export(ep.trace(nn.Sequential(*layers).eval(), torch.randn(1, 16, 32, 32)), path)


def beside(artifact: ep.Artifact, turns: int = 60) -> dict[str, float]:
    """Our median and that of a plain loop, taking turns in this process: what measures on a device is loaded here."""
    feeds = random_feeds(artifact)
    ours, theirs = [], []
    loop, session = LOOPS[artifact.format](artifact, feeds), sessions.load(str(artifact.path))
    plan = vars(ep.Plan(rounds=5, min_round_s=0.02, warmup_s=0.05))
    for _ in range(turns):
        turn = Turn(session, feeds)
        interleave([turn], plan)
        ours += [sample for samples in turn.rounds for sample in samples]
        theirs += timed(loop)
    a, b = statistics.median(ours), statistics.median(theirs)
    return {"ours_us": a / 1e3, "theirs_us": b / 1e3, "apart": a / b - 1}


def timed(call: Callable[[], object], calls: int = 200) -> list[int]:
    for _ in range(100):
        call()
    samples = []
    for _ in range(calls):
        start = time.perf_counter_ns()
        call()
        samples.append(time.perf_counter_ns() - start)
    return samples


def _onnx_loop(artifact: ep.Artifact, feeds: list[np.ndarray]) -> Callable[[], object]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    named = {port.name: feed for port, feed in zip(artifact.inputs, feeds, strict=True)}
    return lambda: session.run(None, named)


def _tflite_loop(artifact: ep.Artifact, feeds: list[np.ndarray]) -> Callable[[], object]:
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(artifact.path), num_threads=1)
    interpreter.allocate_tensors()
    [into], [out] = interpreter.get_input_details(), interpreter.get_output_details()

    def call() -> object:
        interpreter.set_tensor(into["index"], feeds[0])
        interpreter.invoke()
        return interpreter.get_tensor(out["index"])

    return call


LOOPS = {"onnx": _onnx_loop, "tflite": _tflite_loop}


if __name__ == "__main__":
    sys.exit(main())
