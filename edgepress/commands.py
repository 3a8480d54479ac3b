"""What the commands of the command line do; `edgepress.cli` parses their arguments."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepress.compress.network import Network
    from edgepress.compress.task import Task

    from .compare import Benched

__all__ = ["bench", "compress", "devices", "export", "inspect", "micro", "profile", "tasks", "verify"]

ACCEPTED, OURS, YOURS, OVER_BUDGET, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; a fault of edgepress; a mistake in what was given; no file met the budget; Ctrl-C."""

_SHOWN = 64  # calibration examples: a quantized file is compared on half of them
_FAR = 0.1  # an error of the outputs, over their variance, that nobody should overlook


def compress(arguments: argparse.Namespace) -> int:
    """Prune, distil, quantize, export, check and measure; exit 3 where no file met the budget."""
    from dataclasses import replace

    from .pipeline import press
    from .recipe import default_recipe, read_recipe
    from .report import table, to_json

    recipe = read_recipe(arguments.recipe) if arguments.recipe else default_recipe()
    formats, precisions = (
        tuple(chosen) for chosen in (arguments.format or recipe.formats, arguments.precision or recipe.precisions)
    )
    recipe = replace(recipe, formats=formats, precisions=precisions)
    if arguments.time_budget is not None:
        recipe = recipe.within(arguments.time_budget)
    out = Path(arguments.out) if arguments.out else None
    report = press(
        arguments.task, device=arguments.device, max_drop=arguments.max_drop, out=out, recipe=recipe, threads=arguments.threads
    )
    if arguments.json:
        _print_json(to_json(report))
    else:
        _print(table(report))
        print(f"Report: {(out or Path('runs') / report.task) / 'report.html'}")
    return ACCEPTED if report.accepted else OVER_BUDGET


def export(arguments: argparse.Namespace) -> int:
    """Write a task's network into one file and check it."""
    from edgepress.compress.quantization import quantization
    from edgepress.targets.calibration import halves
    from edgepress.targets.export import export
    from edgepress.targets.verify import verify

    network, task = _network(arguments.source)
    calibration = task.calibration_batches if task is not None else None
    how = quantization(arguments.precision, calibrator=arguments.calibrator, layers=dict(arguments.layer))
    artifact = export(network, arguments.file, how, calibration)
    shown = halves(calibration, _SHOWN)[1] if calibration is not None and how.weights is not None else None
    parity = verify(artifact, network, shown)
    if not parity.ok:
        artifact.path.unlink(missing_ok=True)
        print(f"edgepress: {artifact.path} was not delivered: {parity.reason}", file=sys.stderr)
        return OVER_BUDGET
    if arguments.json:
        found = {"max_abs": parity.max_abs, "max_rel": parity.max_rel, "output_error": parity.error}
        _print_json({**_described(artifact), **found})
    else:
        print(f"{artifact.path}: {artifact.format} {artifact.precision}, {artifact.bytes:,} bytes, {_parity(parity)}")
    if parity.error > _FAR:
        print(
            f"edgepress: warning: the outputs are off by {100 * parity.error:.0f} % of their variance. Judge the file on your "
            "data; `edgepress sensitivity` names the layers that do it, and --layer leaves them in floats.",
            file=sys.stderr,
        )
    return ACCEPTED


def bench(arguments: argparse.Namespace) -> int:
    """Measure files; exit 2 where one of them failed. On an emulated board instructions are counted."""
    if arguments.device.startswith("emulated://"):
        return _count(arguments)
    from edgepress.targets.measure import Plan

    from .compare import bench as run
    from .report import bench_table

    rows = run(
        arguments.files,
        device=arguments.device,
        threads=arguments.threads,
        runtimes=arguments.runtime or (),
        task=arguments.task,
        plan=Plan(sustained_s=60 * arguments.sustained),
    )
    measured = [row.measurement for row in rows if row.measurement is not None]
    if arguments.json:
        _print_json({"files": [_benched(row) for row in rows], "environment": measured[0].environment if measured else None})
    elif measured:
        _print(bench_table(rows))
    for row in rows:
        if row.error:
            print(f"edgepress: {row.error}", file=sys.stderr)
    return YOURS if any(row.error for row in rows) else ACCEPTED


def _count(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from edgepress.compress.progress import bar
    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.devices.count import count_instructions

    from .tables import count_table

    core = arguments.device.removeprefix("emulated://")
    artifacts = [read_artifact(file) for file in arguments.files]
    counts = []
    with bar("Count instructions") as update:
        for i, artifact in enumerate(artifacts):
            counts.append(count_instructions(artifact, core))
            update((i + 1) / len(artifacts), artifact.path.name)
    if arguments.json:
        _print_json({"counts": [{**asdict(count), "artifact": _described(count.artifact)} for count in counts]})
    else:
        _print(count_table(counts))
    return ACCEPTED


def profile(arguments: argparse.Namespace) -> int:
    """Show where the time of one run goes."""
    from dataclasses import asdict

    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.profile import profile as run

    from .tables import profile_table

    found = run(read_artifact(arguments.file), threads=arguments.threads, runs=arguments.runs)
    if arguments.json:
        computed = {"rows_ns": found.rows_ns, "overhead": found.overhead, "covered": found.covered, "caution": found.caution}
        _print_json({**asdict(found), **computed})
    else:
        _print(profile_table(found, arguments.by, arguments.depth))
    return ACCEPTED


def devices(arguments: argparse.Namespace) -> int:
    """Say what each device is; exit 2 where one cannot be reached."""
    from edgepress.compress.errors import DeviceError
    from edgepress.targets.devices import KINDS, find_device

    from .tables import device_table

    found: dict[str, dict[str, Any]] = {}
    failed = False
    for name in arguments.names or ["local"]:
        try:
            with contextlib.closing(find_device(name)) as place:
                found[name] = place.environment()
        except DeviceError as error:
            failed = True
            print(f"edgepress: {error}", file=sys.stderr)
    if arguments.json:
        _print_json(found)
    else:
        for name, facts in found.items():
            _print(device_table(name, facts))
        if not arguments.names:
            print("Other devices:")
            for kind, what in KINDS.items():
                if kind != "local":
                    print(f"  {kind:<24} {what}")
    return YOURS if failed else ACCEPTED


def micro(arguments: argparse.Namespace) -> int:
    """Run an int8 file in TensorFlow Lite Micro; exit 3 where it does not run, or not right."""
    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.microcontroller import check_microcontroller, write_c_array

    artifact = read_artifact(arguments.file)
    found = check_microcontroller(artifact, arena_bytes=arguments.arena)
    written = write_c_array(artifact, Path(arguments.c), found) if arguments.c and found.ok else ()
    if arguments.json:
        facts = {k: getattr(found, k) for k in ("ok", "reason", "version", "operators", "missing", "arena_bytes", "max_lsb")}
        _print_json({**_described(artifact), **facts, "written": written})
    elif found.ok:
        same = "equal to" if found.exact else f"at most {found.max_lsb} steps from"
        print(
            f"{artifact.path.name}: runs in TensorFlow Lite Micro {found.version} in an arena of {found.arena_bytes:,} bytes, "
            f"{same} LiteRT's reference kernels on {found.examples} examples"
        )
        for path in written:
            print(f"Written: {path}")
    else:
        print(f"edgepress: {found.reason}", file=sys.stderr)
    return ACCEPTED if found.ok else OVER_BUDGET


def verify(arguments: argparse.Namespace) -> int:
    """Compare a file, on a device, with the network that it came from."""
    from edgepress.compress.task import metrics
    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.devices import find_device
    from edgepress.targets.verify import verify

    network, task = _network(arguments.source)
    artifact = read_artifact(arguments.file)
    values: dict[str, float] = {}
    with contextlib.closing(find_device(arguments.device)) as place:
        parity = verify(artifact, network, device=place)
        if parity.ok and task is not None:
            with contextlib.closing(place.open(artifact)) as runtime:
                values = metrics(task, runtime.predict)
    if arguments.json:
        result = {
            "ok": parity.ok,
            "reason": parity.reason,
            "max_abs": parity.max_abs,
            "max_rel": parity.max_rel,
            "metrics": values,
        }
        _print_json({**_described(artifact), **result})
    else:
        print(f"{artifact.path}: {_parity(parity) if parity.ok else parity.reason}")
        for name, value in values.items():
            print(f"  {name} {value:.4g}, by this file")
    return ACCEPTED if parity.ok else OVER_BUDGET


def inspect(arguments: argparse.Namespace) -> int:
    """Show what can be pruned, and what freezes the rest."""
    from dataclasses import asdict

    from edgepress.compress.pruning import inspect
    from edgepress.compress.shorten import branches

    from .report import inspect_table

    network, _ = _network(arguments.source)
    found = inspect(network)
    removable = branches(network)
    if arguments.json:
        sizes = {"parameters": network.parameter_count, "macs": network.macs(), "bytes": network.bytes}
        _print_json({**sizes, **asdict(found), "branches": [asdict(b) for b in removable], "history": list(network.history)})
    else:
        print(
            f"{network.parameter_count:,} parameters, {network.macs() / 1e6:.2f} million MACs, {network.bytes:,} bytes of weights"
        )
        _print(inspect_table(found))
        if removable:
            print("Residual branches that Shorten can leave out: " + ", ".join(b.module for b in removable))
    return ACCEPTED


def sensitivity(arguments: argparse.Namespace) -> int:
    """Show which layers lose what a quantized file loses."""
    from dataclasses import asdict

    from edgepress.compress.errors import UserError
    from edgepress.targets.calibration import halves
    from edgepress.targets.sensitivity import sensitivity as run

    from .tables import sensitivity_table

    network, task = _network(arguments.source)
    if task is None or task.calibration_batches is None:
        raise UserError("Layers are tried on calibration data: give a task with calibration_batches.")
    seen, shown = halves(task.calibration_batches, 2 * arguments.examples)
    suffix = f".{arguments.format}"
    error, found = run(network, suffix, arguments.precision, seen, shown, instead=arguments.instead, clock=arguments.clock)
    if arguments.json:
        _print_json({"error": error, "layers": [asdict(entry) for entry in found]})
    else:
        _print(sensitivity_table(error, found))
    return ACCEPTED


def tasks(arguments: argparse.Namespace) -> int:
    """List the built-in tasks."""
    from .tasks import BUILT_IN

    if arguments.json:
        _print_json({name: what for name, (what, _) in BUILT_IN.items()})
    else:
        for name, (what, _) in BUILT_IN.items():
            print(f"{name:<18} {what}")
        print("file.py:function   your own: a function that returns an edgepress.Task (docs/your-own-network.md)")
    return ACCEPTED


# ---- pieces


def _network(source: str) -> tuple[Network, Task | None]:
    """A network saved by edgepress, or the original of a task."""
    from edgepress.compress.network import Network, trace

    from .tasks import load_task

    if Path(source).is_dir():
        return Network.load(source), None
    task = load_task(source)
    return trace(task.model, task.inputs), task


def _described(artifact: Any) -> dict[str, Any]:
    plain = {k: getattr(artifact, k) for k in ("format", "precision", "bytes", "sha256")}
    return {"path": str(artifact.path), **plain}


def _benched(row: Benched) -> dict[str, Any]:
    plain = {**_described(row.artifact), "error": row.error or None}
    taken, speedup = row.measurement, row.speedup
    if taken is None or speedup is None:
        return plain
    return {
        **plain,
        "device": taken.device,
        "runtime": f"{taken.runtime} {taken.runtime_version}",
        "threads": taken.threads,
        "latency": {k: getattr(taken, k) for k in ("p50_ns", "p90_ns", "p99_ns", "mean_ns")},
        "per_second": taken.per_second,
        "speedup": {"value": speedup.value, "low": speedup.low, "high": speedup.high, "verdict": speedup.verdict},
        "cold_start": {"load_ns": taken.load_ns, "first_ns": taken.first_ns, "compile_ns": taken.compile_ns},
        "peak_bytes": taken.peak_bytes,
        "joules": taken.joules,
        "metrics": row.metrics,
        "apart": row.apart,
        "noise": taken.noise,
        "samples_ns": taken.samples_ns,
    }


def _parity(parity: Any) -> str:
    return (
        f"differs from the network by at most {parity.max_abs:.2g} ({parity.max_rel:.2g} relative) on {parity.examples} examples"
    )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _print(renderable: Any) -> None:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(renderable)
