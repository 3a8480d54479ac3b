"""Int8 files of real trained networks: ours against what the peers make, as their documentation says.

    EDGEPRESS_DATA=... python benchmarks/quantization.py [--networks resnet20-cifar10 mobilenetv1-imagenet ...] [--examples 1000]
        [--calibration 200] [--skip-peers] [--keep FOLDER]

What the numbers mean: every file comes from the same traced network and the same first `--calibration` examples of the task's
calibration data. `score` is the task's own metric of the file, run by its runtime on the task's test examples (the first
`--examples` of them); `agrees` is on how many of those its first choice is the float network's, in percent, where the network
classifies. `ms` is the p50 at one thread and batch 1, all files of a network in turns in one run; `x` is the ratio to the float
file of the SAME runtime, with its 95 % interval. `s`, `cpu` and `MB` are wall time, CPU seconds and peak memory of a process of
its own that goes from the traced network to the file, the float file in between included (the rows `float` say what that alone
takes), the libraries imported before the clock starts; `idle` of the MB were taken then.

The peers: `quantize_static` is ONNX Runtime's, QDQ, per channel, after quant_pre_process, uint8 activations and int8 weights,
with reduce_range where the CPU has no VNNI, as its documentation wants; `nncf` is nncf.quantize without options;
`ai-edge-quantizer` is static_wi8_ai8 with its own Quantizer.calibrate. A peer that fails is a row that says why. `published` is
the int8 file that MLPerf Tiny published of its network: nobody knows what it took to make, and those of `mlperf-kws` and
`mlperf-ad` come from other trainings than the weights, so only their scores compare.

What bounds them: accuracy is bounded by the number of test examples (of 1,000, one point is ten) and by the float network's
own; speed by the CPU's instructions. ONNX Runtime's U8S8 kernels add pairs of products in 16 bits on x86 CPUs without VNNI and
SATURATE: the same file may be right on one CPU and wrong on another, so the first line says what this one has. Another process
on the core makes `ms` meaningless and `x` wide: where the measurement was noisy, the line below the table says so.

The last line is JSON; the exit code is 0 where ours is there in both formats, agrees no less than the best peer of its format
(scores, where nothing is classified), and is not slower than the fastest one by more than the interval; else 3, and `unmet` says
why.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import dataclasses
import importlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import edgepress as ep
from edgepress.compress.task import Predict, input_batches, metrics
from edgepress.models.packs import data_folder
from edgepress.targets.layout import stored
from edgepress.targets.measure import noise_warning, try_measure
from edgepress.targets.silence import silence
from edgepress.tasks import BUILT_IN

NETWORKS = tuple(name for name in BUILT_IN if name != "digits")
Arrays = list[np.ndarray]

# ---- how each file is made, in a process of its own


def float_file(network: ep.Network, examples: Arrays, path: Path) -> None:
    ep.export(network, path)


def ours(network: ep.Network, examples: Arrays, path: Path) -> None:
    ep.export(network, path, "int8", lambda: (tuple(x[i : i + 20] for x in examples) for i in range(0, len(examples[0]), 20)))


def quantize_static(network: ep.Network, examples: Arrays, path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType
    from onnxruntime.quantization import quantize_static as quantize
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, feeds: Iterator[dict[str, np.ndarray]]):
            self.feeds = feeds

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.feeds, None)

    plain, prepared = path.with_suffix(".float.onnx"), path.with_suffix(".prepared.onnx")
    artifact = ep.export(network, plain)
    quant_pre_process(str(plain), str(prepared))
    quantize(
        str(prepared),
        str(path),
        Reader(feeds(artifact, examples)),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=not has_vnni(),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def nncf_default(network: ep.Network, examples: Arrays, path: Path) -> None:
    import nncf
    import onnx

    artifact = ep.export(network, path.with_suffix(".float.onnx"))
    onnx.save(nncf.quantize(onnx.load(artifact.path), nncf.Dataset(list(feeds(artifact, examples)))), path)


def ai_edge_quantizer(network: ep.Network, examples: Arrays, path: Path) -> None:
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    artifact = ep.export(network, path.with_suffix(".float.tflite"))
    (signature,) = Interpreter(str(artifact.path)).get_signature_list()
    worker = quantizer.Quantizer(str(artifact.path))
    worker.load_quantization_recipe(recipe.static_wi8_ai8())
    ranges = worker.calibrate({signature: list(feeds(artifact, examples))})
    worker.quantize(ranges).export_model(str(path), overwrite=True)


def feeds(artifact: ep.Artifact, examples: Arrays) -> Iterator[dict[str, np.ndarray]]:
    """One example at a time, in the file's layout and types."""
    for i in range(len(examples[0])):
        yield {port.name: stored(x[i : i + 1], port) for port, x in zip(artifact.inputs, examples, strict=True)}


@dataclasses.dataclass(frozen=True)
class Method:
    name: str
    suffix: str
    make: Callable[[ep.Network, Arrays, Path], None]
    imports: tuple[str, ...]
    peer: bool = False


ONNX, TFLITE = ("onnx", "onnxscript", "onnxruntime"), ("litert_torch", "ai_edge_litert.interpreter")
METHODS = (
    Method("float", ".onnx", float_file, ONNX),
    Method("quantize_static", ".onnx", quantize_static, (*ONNX, "onnxruntime.quantization"), peer=True),
    Method("nncf", ".onnx", nncf_default, (*ONNX, "nncf"), peer=True),
    Method("ours", ".onnx", ours, (*ONNX, "nncf")),
    Method("float", ".tflite", float_file, TFLITE),
    Method("ai-edge-quantizer", ".tflite", ai_edge_quantizer, (*TFLITE, "ai_edge_quantizer.quantizer"), peer=True),
    Method("ours", ".tflite", ours, (*TFLITE, "ai_edge_quantizer.quantizer")),
)


def work(number: int, folder: Path, path: Path) -> dict[str, Any]:
    """Make one file; seconds and bytes that it took, or why it failed. Runs in a fresh process."""
    import torch

    torch.set_num_threads(1)
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # nncf sends nothing without it
    method = METHODS[number]
    try:
        with silence():
            for module in method.imports:
                importlib.import_module(module)
            network = ep.Network.load(folder / "network")
        examples = [np.load(file, mmap_mode="r") for file in sorted(folder.glob("calibration-*.npy"))]
        idle, started, computed = status_bytes("VmRSS"), time.monotonic(), time.process_time()
        with silence():
            method.make(network, examples, path)
        took = {"seconds": time.monotonic() - started, "cpu_seconds": time.process_time() - computed}
        return {**took, "peak_bytes": status_bytes("VmHWM"), "idle_bytes": idle}
    except Exception as error:  # a peer may raise anything
        return {"failed": first_line(error)}


def status_bytes(key: str) -> int:
    """Of this process; ru_maxrss would count its parent's memory too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def has_vnni() -> bool:
    flags = Path("/proc/cpuinfo").read_text()
    return "avx512_vnni" in flags or "avx_vnni" in flags


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


# ---- what each file is worth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--examples", type=int, help="test examples that judge; all where it is not given")
    parser.add_argument("--calibration", type=int, default=200, help="examples that calibrate")
    parser.add_argument("--skip-peers", action="store_true")
    parser.add_argument("--keep", type=Path, help="a folder for the files")
    arguments = parser.parse_args()
    kernels = "VNNI" if has_vnni() else "no VNNI: ONNX Runtime's U8S8 kernels can saturate here"
    print(f"This CPU has {kernels}.", flush=True)
    results, unmet = [], []
    for name in arguments.networks:
        try:
            task = BUILT_IN[name][1](examples=arguments.examples)
        except ep.UserError as error:
            unmet.append(f"{name}: {error}")
            continue
        with contextlib.ExitStack() as stack:
            folder = arguments.keep / name if arguments.keep else Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            result = compared(task, folder, arguments.calibration, [m for m in METHODS if not (m.peer and arguments.skip_peers)])
        show(result)
        unmet += [f"{name}: {reason}" for reason in result["unmet"]]
        results.append(result)
    for reason in unmet:
        print("unmet:", reason)
    print(json.dumps({"vnni": has_vnni(), "unmet": unmet, "networks": results}))
    return 3 if unmet else 0


def compared(task: ep.Task, folder: Path, calibration: int, methods: Sequence[Method]) -> dict[str, Any]:
    """Every file of one network: made, judged, and timed in turns."""
    network = ep.trace(task.model, *task.inputs)
    network.save(folder / "network")
    for i, array in enumerate(first_examples(task, calibration)):
        np.save(folder / f"calibration-{i}.npy", array)
    reference: list[np.ndarray] = []
    scores = metrics(task, recorded(network.predict, reference))
    classifies = task.metric in ("accuracy", "agreement")
    rows = []
    for method in methods:
        row = {"file": method.name, "format": method.suffix[1:], "peer": method.peer, **made(method, folder)}
        print(f"{task.name}: {row['file']} {row['format']} {row.get('failed', '')}", file=sys.stderr, flush=True)
        rows.append(row)
        if "failed" not in row:
            judge(row, task, reference if classifies else None)
    for row in published(task) if any(method.peer for method in methods) else []:
        judge(row, task, None)
        rows.append(row)
    noise = timed([row for row in rows if "failed" not in row])
    result = {"network": task.name, "metric": task.metric, "float": scores, "rows": rows, "noise": noise}
    result["unmet"] = shortcomings(rows, task)
    for row in rows:
        row.pop("artifact", None)
        row.pop("measurement", None)
    return result


def first_examples(task: ep.Task, count: int) -> Arrays:
    taken: list[tuple[np.ndarray, ...]] = []
    for batch in input_batches(task.calibration_batches):
        taken.append(tuple(x.numpy() for x in batch))
        if sum(len(x[0]) for x in taken) >= count:
            break
    return [np.concatenate(parts)[:count] for parts in zip(*taken, strict=True)]


def made(method: Method, folder: Path) -> dict[str, Any]:
    path = folder / f"{method.name}{method.suffix}"
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        try:
            row = pool.submit(work, METHODS.index(method), folder, path).result()
        except concurrent.futures.process.BrokenProcessPool:
            row = {"failed": "the process died"}
    if "failed" not in row:
        try:
            row["artifact"] = ep.read_artifact(path)
            row["bytes"] = row["artifact"].bytes
        except ep.FileError as error:
            row["failed"] = str(error)
    return row


def published(task: ep.Task) -> list[dict[str, Any]]:
    """The published int8 file of one of MLPerf Tiny's networks; its four-dimensional inputs have the channels last."""
    path = data_folder() / "deploy" / f"{task.name.replace('-', '_')}_int8.tflite"
    if not path.is_file():
        return []
    artifact = ep.read_artifact(path)
    ports = tuple(dataclasses.replace(port, channels_last=len(port.shape) == 4) for port in artifact.inputs)
    artifact = dataclasses.replace(artifact, inputs=ports)
    return [{"file": "published", "format": "tflite", "peer": True, "artifact": artifact, "bytes": artifact.bytes}]


def recorded(predict: Predict, kept: list[np.ndarray]) -> Predict:
    """The same, with the first choices of the first output kept."""

    def watched(*inputs: np.ndarray) -> Any:
        outputs = predict(*inputs)
        kept.append(np.asarray(outputs[0] if isinstance(outputs, tuple) else outputs).argmax(-1))
        return outputs

    return watched


def judge(row: dict[str, Any], task: ep.Task, reference: list[np.ndarray] | None) -> None:
    """The file in a process of the device's agent: one that crashes its runtime is a row that says so."""
    kept: list[np.ndarray] = []
    place = ep.find_device("local")
    try:
        with contextlib.closing(place.open(row["artifact"])) as runtime:
            row["scores"] = metrics(task, recorded(runtime.predict, kept))
    except ep.UserError as error:
        row["failed"] = first_line(error)
        return
    finally:
        place.close()
    if reference is not None:
        row["agrees"] = 100.0 * float((np.concatenate(kept) == np.concatenate(reference)).mean())


def timed(rows: list[dict[str, Any]]) -> str | None:
    """Time all files in turns, and put each beside the float file of its format."""
    if not rows:
        return None
    found = try_measure([row["artifact"] for row in rows], plan=ep.Plan(rounds=20, min_round_s=0.05, budget_s=120))
    for row, outcome in zip(rows, found, strict=True):
        if isinstance(outcome, ep.Measurement):
            row["measurement"], row["p50_ms"] = outcome, outcome.p50_ns / 1e6
        else:
            row["failed"] = first_line(outcome)
    for row in rows:
        base = [r for r in rows if r["file"] == "float" and r["format"] == row["format"]]
        if base and "measurement" in row and "measurement" in base[0]:
            speed = ep.ratio(base[0]["measurement"], row["measurement"])
            row |= {"faster": speed.value, "low": speed.low, "high": speed.high}
    return noise_warning([row["measurement"] for row in rows if "measurement" in row])


def shortcomings(rows: list[dict[str, Any]], task: ep.Task) -> list[str]:
    """Where ours is missing, worse or slower than a peer of the same format."""
    reasons = []
    for kind in ("onnx", "tflite"):
        (mine,) = [row for row in rows if row["file"] == "ours" and row["format"] == kind]
        if "failed" in mine:
            reasons.append(f"{kind}: ours failed: {mine['failed']}")
            continue
        for row in rows:
            if not row["peer"] or row["format"] != kind or "failed" in row:
                continue
            agrees = "agrees" in mine and "agrees" in row
            own, other = (r["agrees"] if agrees else r["scores"][task.metric] for r in (mine, row))
            if (own < other) if agrees or task.higher_is_better else (own > other):
                reasons.append(f"{kind}: {'agrees' if agrees else task.metric} {own:.2f} where {row['file']} has {other:.2f}")
            speed = ep.ratio(row["measurement"], mine["measurement"])
            if speed.high < 1:
                reasons.append(f"{kind}: {1 / speed.value:.2f}x the time of {row['file']} (at least {1 / speed.high:.2f}x)")
    return reasons


def show(result: dict[str, Any]) -> None:
    metric = result["metric"]
    others = "".join(f", {k} {v:.2f}" for k, v in result["float"].items() if k != metric)
    print(f"\n{result['network']}: float network {metric} {result['float'][metric]:.2f}{others}")
    print(f"{'file':<26}  score agrees     kB       ms     x 95 %              s    cpu     MB  idle")
    for row in result["rows"]:
        name = f"{row['file']} .{row['format']}"
        if "failed" in row:
            print(f"{name:<26} failed: {row['failed']}")
            continue
        agrees = f"{row['agrees']:.2f}" if "agrees" in row else "-"
        speed = f"{row['faster']:>5.2f} {row['low']:.2f} to {row['high']:.2f}" if "faster" in row else "-"
        took = ""
        if "seconds" in row:
            took = f"{row['seconds']:>6.1f} {row['cpu_seconds']:>6.1f}"
            took += f" {row['peak_bytes'] / 1e6:>6.0f} {row['idle_bytes'] / 1e6:>5.0f}"
        print(
            f"{name:<26} {row['scores'][metric]:>6.2f} {agrees:>6} {row['bytes'] / 1e3:>6.0f} {row['p50_ms']:>8.3f} {speed:<18} "
            + took
            + "".join(f"  {k} {v:.2f}" for k, v in row["scores"].items() if k != metric)
        )
    if result["noise"]:
        print(result["noise"])


if __name__ == "__main__":
    sys.exit(main())
