"""The command line: compress, export, bench, verify, inspect, tasks."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgepress import __version__
from edgepress.compress.errors import UserError

if TYPE_CHECKING:
    from edgepress.compress.network import Network
    from edgepress.compress.task import Task

__all__ = ["main"]

ACCEPTED, OURS, YOURS, OVER_BUDGET, INTERRUPTED = 0, 1, 2, 3, 130

_EPILOG = """exit codes: 0 done, accepted; 3 no file met the budget (files are kept, the report says by how much);
2 a mistake in what was given; 1 a fault of edgepress; 130 interrupted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = _parser().parse_args(argv)
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except UserError as error:
        return _failed(arguments, str(error), YOURS)
    except KeyboardInterrupt:
        goes_on = " The same command goes on after the last finished pass or epoch." if arguments.command == "compress" else ""
        return _failed(arguments, f"Interrupted; nothing that was finished is lost.{goes_on}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ACCEPTED
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        return _failed(arguments, f"{error.strerror or error}{where}.", YOURS)
    except Exception as error:
        text = f"edgepress failed: {type(error).__name__}: {error}. This is a fault of edgepress; --debug shows where."
        return _failed(arguments, text, OURS)


def _failed(arguments: argparse.Namespace, text: str, code: int) -> int:
    if arguments.debug:
        traceback.print_exc()
    print(f"edgepress: {text}", file=sys.stderr)
    return code


# ---- commands


def _compress(arguments: argparse.Namespace) -> int:
    from .pipeline import press
    from .recipe import default_recipe, read_recipe
    from .report import table, to_json

    recipe = read_recipe(arguments.recipe) if arguments.recipe else default_recipe()
    changes = {k: tuple(v) for k, v in (("formats", arguments.format), ("precisions", arguments.precision)) if v}
    if changes:
        from dataclasses import replace

        recipe = replace(recipe, **changes)
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


def _export(arguments: argparse.Namespace) -> int:
    from edgepress.targets.export import export
    from edgepress.targets.verify import verify

    network, task = _network(arguments.source)
    calibration = task.calibration_batches if task is not None else None
    artifact = export(network, arguments.file, arguments.precision, calibration)
    parity = verify(artifact, network)
    if not parity.ok:
        artifact.path.unlink(missing_ok=True)
        print(f"edgepress: {artifact.path} was not delivered: {parity.reason}", file=sys.stderr)
        return OVER_BUDGET
    if arguments.json:
        _print_json({**_described(artifact), "max_abs": parity.max_abs, "max_rel": parity.max_rel})
    else:
        print(f"{artifact.path}: {artifact.format} {artifact.precision}, {artifact.bytes:,} bytes, {_parity(parity)}")
    return ACCEPTED


def _bench(arguments: argparse.Namespace) -> int:
    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.measure import measure, ratio

    from .report import bench_table

    artifacts = [read_artifact(file) for file in arguments.files]
    measured = measure(artifacts, device=arguments.device, threads=arguments.threads)
    ratios = [ratio(measured[0], m) for m in measured]
    if arguments.json:
        _print_json(
            {"files": [_measured(m, r) for m, r in zip(measured, ratios, strict=True)], "environment": measured[0].environment}
        )
    else:
        _print(bench_table(measured, ratios))
    return ACCEPTED


def _verify(arguments: argparse.Namespace) -> int:
    from edgepress.compress.task import metrics
    from edgepress.targets.artifact import read_artifact
    from edgepress.targets.runtimes import open_runtime
    from edgepress.targets.verify import verify

    network, task = _network(arguments.source)
    artifact = read_artifact(arguments.file)
    parity = verify(artifact, network)
    values: dict[str, float] = {}
    if parity.ok and task is not None:
        runtime = open_runtime(artifact)
        try:
            values = metrics(task, runtime.predict)
        finally:
            runtime.close()
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


def _inspect(arguments: argparse.Namespace) -> int:
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


def _tasks(arguments: argparse.Namespace) -> int:
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


def _measured(measurement: Any, speedup: Any) -> dict[str, Any]:
    latency = {k: getattr(measurement, k) for k in ("p50_ns", "p90_ns", "p99_ns", "mean_ns")}
    return {
        **_described(measurement.artifact),
        "runtime": f"{measurement.runtime} {measurement.runtime_version}",
        "threads": measurement.threads,
        "latency": latency,
        "speedup": {"value": speedup.value, "low": speedup.low, "high": speedup.high},
        "peak_bytes": measurement.peak_bytes,
        "noise": measurement.noise,
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


# ---- arguments


class _Parser(argparse.ArgumentParser):
    """Wrong arguments get one sentence, with the nearest name where a command is misspelt."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice" in message and self.prog == "edgepress":
            word = message.split("'")[1]
            near = difflib.get_close_matches(word, _COMMANDS, 1)
            message = f"there is no command '{word}'" + (f"; did you mean '{near[0]}'?" if near else ".")
        self.exit(YOURS, f"edgepress: {message} See `{self.prog} --help`.\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="edgepress",
        description="A trained PyTorch network into the smallest, fastest file that still does the job.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edgepress {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", parser_class=_Parser)
    for name, (run, summary, example, add) in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}\n\n{_EPILOG}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        add(command)
        command.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
        command.set_defaults(run=run)
    return parser


def _compress_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("task", help="a built-in task's name, or your own as file.py:function")
    command.add_argument(
        "--recipe", metavar="FILE", help="the passes to run, in YAML (default: prune to 60 %% of the MACs, distil)"
    )
    command.add_argument("--out", metavar="FOLDER", help="where files and report go (default: runs/NAME)")
    command.add_argument(
        "--max-drop",
        type=float,
        default=1.0,
        metavar="POINTS",
        help="points of the task's metric that may be lost (default: 1.0)",
    )
    command.add_argument("--format", type=_list, metavar="LIST", help="of onnx,tflite (default: the recipe's)")
    command.add_argument("--precision", type=_list, metavar="LIST", help="of fp32,int8 (default: the recipe's)")
    _measuring_arguments(command)


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a task, or a folder with a network that edgepress saved")
    command.add_argument("file", help="what to write; the suffix, .onnx or .tflite, chooses the format")
    command.add_argument(
        "--precision", choices=("fp32", "int8"), default="fp32", help="int8 needs a task with calibration_batches"
    )


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", help=".onnx and .tflite files, from edgepress or not; the first is the baseline")
    _measuring_arguments(command)


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", help="an .onnx or .tflite file")
    command.add_argument("source", help="the task, or the folder with the saved network, that it must agree with")


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a task, or a folder with a network that edgepress saved")


def _measuring_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="local", help="where the files are measured (default: local)")
    command.add_argument("--threads", type=_positive, default=1, metavar="N", help="of the runtimes (default: 1)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0.")
    return int(text)


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


_Command = tuple[Callable[[argparse.Namespace], int], str, str, Callable[[argparse.ArgumentParser], None]]
_COMMANDS: dict[str, _Command] = {
    "compress": (
        _compress,
        "prune, distil, quantize, export, check and measure a task's network",
        "edgepress compress digits --max-drop 1.0 --out runs/digits",
        _compress_arguments,
    ),
    "export": (
        _export,
        "write a task's network, as it is, into one file and check it",
        "edgepress export my_task.py:build net.tflite --precision int8",
        _export_arguments,
    ),
    "bench": (
        _bench,
        "measure files against each other in one interleaved run",
        "edgepress bench net.onnx net.tflite --threads 1",
        _bench_arguments,
    ),
    "verify": (
        _verify,
        "run a file and compare it with the network it came from",
        "edgepress verify net.tflite my_task.py:build",
        _verify_arguments,
    ),
    "inspect": (
        _inspect,
        "show what of a network can be pruned, and what freezes the rest",
        "edgepress inspect resnet56-cifar10",
        _inspect_arguments,
    ),
    "tasks": (_tasks, "list the built-in tasks", "edgepress tasks", lambda command: None),
}
