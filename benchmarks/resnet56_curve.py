"""Accuracy against time for one network pressed ever further, beside its smaller siblings, in one run.

    EDGEPRESS_DATA=... python benchmarks/resnet56_curve.py [--points 0.62:25,0.45:25,0.32:25] [--out runs/resnet56-curve]

ResNet-56 on CIFAR-10 (93.39 %) is cut for the time of its int8 file (TFLite, or with ``--runtime onnxruntime`` ONNX, which gains
more without VNNI), channels and whole branches in one selection, then distilled from the original; the next point goes on from
the last. Each point is ``part:minutes``: the part of the original's predicted int8 time to keep, and the minutes of distillation
that follow. Beside it, the line that a pruner has to be above: ResNet-20, 32, 44 and 56 as their author trained them (200 epochs
each), quantized by the same exporter.

What the numbers mean: accuracy of the int8 file on the 10,000 test images, run by its runtime; times are p50 at one
thread, batch 1, all files interleaved in one run, as ratios to the original's fp32 file in ONNX Runtime. 'line' is what the
siblings reach at the same measured time, by straight lines between them. The goal is 6 times at 92.4 %, within 90 minutes on
two cores with VNNI; the record to aim for is 8 times at 92.9 %. The last line is JSON; the exit code is 0 where the goal is met.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

import edgepress as ep

FASTER, ACCURACY = 6.0, 92.4
SIBLINGS = (20, 32, 44, 56)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", default="0.62:25,0.45:25,0.32:25")
    parser.add_argument("--runtime", choices=["litert", "onnxruntime"], default="litert", help="of the int8 files")
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--out", default="runs/resnet56-curve")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)

    started = time.monotonic()
    task = ep.load_task("resnet56-cifar10")
    original = ep.trace(task.model, task.inputs).eval()
    files = {"ResNet-56 fp32": (ep.export(original, out / "resnet56.onnx", "fp32"), 0.0)}
    clock = ep.LatencyTable(arguments.runtime, "int8")
    ending = {"litert": "tflite", "onnxruntime": "onnx"}[arguments.runtime]
    network, before = original, 1.0
    for part, minutes in (map(float, point.split(":")) for point in arguments.points.split(",")):
        saved = out / f"{part:.3f}"
        if saved.is_dir():
            network = ep.Network.load(saved)
        else:
            prune = ep.Prune(ep.Fisher(), latency=part / before, clock=clock, depth=True, rounds=6, checkpoint=out / "prune")
            distil = ep.Distill(epochs=1000, minutes=minutes, lr=arguments.lr, checkpoint=out / f"{part:.3f}.checkpoint")
            network = distil(prune(network, task), task)
            network.save(saved)
        before = part
        artifact = ep.export(network, out / f"pressed-{part:.3f}.{ending}", "int8", task.calibration_batches)
        files[f"pressed to {part:.2f}"] = (artifact, (time.monotonic() - started) / 60)
    for depth in SIBLINGS:
        sibling = ep.load_task(f"resnet{depth}-cifar10")
        traced = ep.trace(sibling.model, sibling.inputs)
        path = out / f"resnet{depth}-int8.{ending}"
        files[f"ResNet-{depth}"] = (ep.export(traced, path, "int8", sibling.calibration_batches), 0.0)

    measured = dict(zip(files, ep.measure([a for a, _ in files.values()], device="local", threads=1), strict=True))
    base, rows = measured["ResNet-56 fp32"], []
    for name, (artifact, minutes) in files.items():
        runtime = ep.open_runtime(artifact, threads=2)
        faster = ep.ratio(base, measured[name])
        row = {"name": name, "accuracy": task.evaluate(runtime.predict)["accuracy"], "faster": faster.value}
        row |= {
            "low": faster.low,
            "high": faster.high,
            "p50_ns": measured[name].p50_ns,
            "bytes": artifact.bytes,
            "minutes": minutes,
        }
        runtime.close()
        rows.append(row)
    line = sorted((r["p50_ns"], r["accuracy"]) for r in rows if r["name"] in {f"ResNet-{d}" for d in SIBLINGS})
    print(f"{'file':<16} {'accuracy':>8} {'line':>6} {'x':>6} {'95 %':>14} {'kB':>6} {'minutes':>8}")
    for r in rows:
        r["line"] = float(np.interp(r["p50_ns"], *zip(*line, strict=True)))
        times = f"{r['faster']:>6.2f} {r['low']:>6.2f} to {r['high']:.2f}"
        print(
            f"{r['name']:<16} {r['accuracy']:>8.2f} {r['line']:>6.2f} {times:>21} {r['bytes'] / 1e3:>6.0f} {r['minutes']:>8.1f}"
        )
    met = [r["name"] for r in rows if r["accuracy"] >= ACCURACY and r["faster"] >= FASTER]
    print(f"goal {'met by ' + ', '.join(met) if met else 'not met'}")
    print(json.dumps({"met": met, "rows": rows}))
    return 0 if met else 3


if __name__ == "__main__":
    sys.exit(main())
