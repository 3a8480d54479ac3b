"""The main job on a real network: ResNet-56 on CIFAR-10 to an int8 file that is measured and judged by its own runtime.

    EDGEPRESS_DATA=... python benchmarks/resnet56_cifar10.py [--minutes 33] [--out runs/resnet56]

What the numbers mean: accuracy is the file's own on the 10,000 test images, run by its runtime; times are p50 at one thread,
batch 1, all files interleaved in one run; ratios are to the original network's fp32 file in ONNX Runtime. What bounds them: the
original int8 file shows what quantization alone gives; the rest is fewer blocks, and their number bounds it. The goal is an
int8 file of at least 92.4 %, at least 4 times faster and 6 times smaller than the original, within 45 minutes on two cores.
The last line is JSON; the exit code is 0 where the goal is met.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import edgepress as ep

ACCURACY, FASTER, SMALLER, MINUTES = 92.4, 4.0, 6.0, 45.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=33.0, help="of distillation")
    parser.add_argument("--macs", type=float, default=0.64, help="multiply-accumulates to keep")
    parser.add_argument("--parameters", type=float, default=0.59, help="weights to keep")
    parser.add_argument("--out", default="runs/resnet56-cifar10")
    arguments = parser.parse_args()

    started = time.monotonic()
    recipe = ep.Recipe(
        (
            ep.Shorten(macs=arguments.macs, parameters=arguments.parameters),
            ep.Distill(epochs=200, minutes=arguments.minutes, lr=0.05),
        )
    )
    report = ep.press("resnet56-cifar10", max_drop=1.0, out=arguments.out, recipe=recipe, threads=1)
    minutes = (time.monotonic() - started) / 60

    original = next(f for f in report.files if f.artifact.path.name == "original-fp32.onnx")
    rows = [_row(file, original) for file in report.files]
    print(f"{'file':<22} {'accuracy':>8} {'ms':>7} {'x':>5} {'95 %':>14} {'kB':>6} {'smaller':>8}")
    for r in rows:
        times = f"{r['p50_ns'] / 1e6:>7.3f} {r['faster']:>5.2f} {r['low']:.2f} to {r['high']:.2f}".ljust(28)
        print(f"{r['file']:<22} {r['accuracy']:>8.2f} {times} {r['bytes'] / 1000:>6.0f} {r['smaller']:>8.2f}")
    met = [r for r in rows if r["accuracy"] >= ACCURACY and r["faster"] >= FASTER and r["smaller"] >= SMALLER]
    print(f"{minutes:.1f} minutes in all; goal {'met' if met and minutes <= MINUTES else 'not met'}")
    for warning in report.warnings:
        print("warning:", warning)
    print(json.dumps({"minutes": minutes, "met": [r["file"] for r in met], "files": rows, "seconds": report.seconds}))
    return 0 if met and minutes <= MINUTES else 3


def _row(file, original) -> dict[str, float | str]:
    speedup = ep.ratio(original.measurement, file.measurement)
    return {
        "file": file.artifact.path.name,
        "accuracy": file.metrics["accuracy"],
        "p50_ns": file.measurement.p50_ns,
        "faster": speedup.value,
        "low": speedup.low,
        "high": speedup.high,
        "bytes": file.artifact.bytes,
        "smaller": original.artifact.bytes / file.artifact.bytes,
    }


if __name__ == "__main__":
    sys.exit(main())
