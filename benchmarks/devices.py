"""The table of devices.md: reference files on a device, and the instructions they take on emulated Arm cores.

    EDGEPRESS_DATA=... python benchmarks/devices.py [--device local] [--cores cortex-a53 cortex-a76] [--out runs/devices]

What the numbers mean: ResNet-20 (CIFAR-10), exported here, and the published files of MLPerf Tiny. Times are medians of one
interleaved run at one thread and batch 1, with p99; `faster` is against ResNet-20's fp32 ONNX file, with its 95 % interval.
Instructions are of one inference, one thread, counted on an emulated core: exact, and no time. Without a board
(docs/arm-board.md), give an empty `--cores`. Markdown goes to standard output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import edgepress as ep
from edgepress.models.packs import data_folder
from edgepress.targets.measure import noise_warning


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="local")
    parser.add_argument("--cores", nargs="*", default=["cortex-a53", "cortex-a76"])
    parser.add_argument("--out", default="runs/devices")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    files = reference_files(out)
    rows = ep.bench(list(files.values()), device=arguments.device)
    measured = [row.measurement for row in rows if row.measurement is not None]
    environment = measured[0].environment
    cores = {core: [ep.count_instructions(file, core).per_inference for file in files.values()] for core in arguments.cores}
    features = " ".join(environment["cpu_features"])
    print(f"{environment['cpu']} ({features}), {environment['cores']} cores, {environment['os']}; {environment['date'][:10]}.")
    print(", ".join(f"{k} {v}" for k, v in environment["packages"].items() if k in ("onnxruntime", "ai-edge-litert")) + ".\n")
    heads = ["file", "kB", "p50 µs", "p99 µs", "faster (95 %)", *[f"{core}, million instructions" for core in cores]]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for i, (name, row) in enumerate(zip(files, rows, strict=True)):
        cells = [name, f"{row.artifact.bytes / 1e3:.0f}"]
        if row.measurement is not None:
            cells += [f"{row.measurement.p50_ns / 1e3:.1f}", f"{row.measurement.p99_ns / 1e3:.1f}", str(row.speedup)]
        else:
            cells += [row.error, "", ""]
        print(f"| {' | '.join([*cells, *[f'{counts[i] / 1e6:.2f}' for counts in cores.values()]])} |")
    print(f"\n{noise_warning(measured) or 'The machine was quiet.'}")
    return 0


def reference_files(out: Path) -> dict[str, ep.Artifact]:
    task = ep.load_task("resnet20-cifar10")
    network = ep.trace(task.model, task.inputs)
    files = {
        f"ResNet-20 {precision} .{suffix}": ep.export(
            network, out / f"resnet20-{precision}.{suffix}", precision, task.calibration_batches if precision == "int8" else None
        )
        for suffix in ("onnx", "tflite")
        for precision in ("fp32", "int8")
    }
    for path in sorted((data_folder() / "deploy").glob("mlperf_*.tflite")):
        files[f"MLPerf Tiny {path.stem.removeprefix('mlperf_').replace('_', ' ')} .tflite"] = ep.read_artifact(path)
    return files


if __name__ == "__main__":
    sys.exit(main())
