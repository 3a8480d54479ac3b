"""The command line."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from edgepress import __version__
from edgepress.compress.errors import UserError
from edgepress.compress.quantization import CALIBRATORS, PRECISIONS

from . import commands
from .commands import ACCEPTED, INTERRUPTED, OURS, YOURS

__all__ = ["main"]

_EPILOG = """exit codes: 0 done, accepted; 3 no file met the budget (files are kept, the report says by how much);
2 a mistake in what was given; 1 a fault of edgepress; 130 interrupted."""
_DEVICE = "where the files run: local, cuda, ssh://user@host, adb://serial, emulated://core (default: local)"


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
    command.add_argument(
        "--time-budget", type=_duration, metavar="TIME", help="for all training together: 20m, 1h (default: the recipe's epochs)"
    )
    command.add_argument("--format", type=_list, metavar="LIST", help="of onnx,tflite (default: the recipe's)")
    command.add_argument("--precision", type=_list, metavar="LIST", help=f"of {','.join(PRECISIONS)} (default: the recipe's)")
    _measuring_arguments(command)


def _export_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a task, or a folder with a network that edgepress saved")
    command.add_argument("file", help="what to write; the suffix, .onnx or .tflite, chooses the format")
    command.add_argument(
        "--precision", choices=PRECISIONS, default="fp32", help="int8, int16x8 and w4a8 need a task with calibration_batches"
    )
    command.add_argument(
        "--calibrator", choices=CALIBRATORS, default="mse", help="how ranges are taken from that data (default: mse)"
    )
    command.add_argument(
        "--layer",
        type=_override,
        action="append",
        default=[],
        metavar="PATTERN=PRECISION",
        help="another precision for some modules or operators: 'head.*=fp32', 'op:softmax=fp32'; may be given again",
    )


def _sensitivity_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a task with calibration_batches")
    command.add_argument("--format", choices=("onnx", "tflite"), default="onnx", help="of the file (default: onnx)")
    command.add_argument("--precision", choices=PRECISIONS, default="int8", help="of the file (default: int8)")
    command.add_argument("--instead", choices=PRECISIONS, default="fp32", help="of the layer that is left (default: fp32)")
    command.add_argument(
        "--examples", type=_positive, default=64, metavar="N", help="to calibrate, and as many to look at (default: 64)"
    )
    command.add_argument("--clock", action="store_true", help="also measure what each layer takes longer in floats")


def _bench_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "files", nargs="+", help=".onnx, .tflite and .pt2 files, from edgepress or not; the first is the baseline"
    )
    _measuring_arguments(command)
    command.add_argument(
        "--runtime", type=_list, metavar="LIST", help="of onnxruntime,onnxruntime:xnnpack,onnxruntime:cuda,onnxruntime:tensorrt,"
        "litert,litert:no-xnnpack,tflite-runtime,tensorflow,torch,torch:inductor,torch:max-autotune,torch:cudagraphs,torch:aoti, "
        "torch's also with :bf16 or :fp16 behind it: each file is run by each that can (default: the first installed)",
    )  # fmt: skip
    command.add_argument("--task", help="judge the files on the device by this task's data and metric")
    command.add_argument(
        "--sustained",
        type=_minutes,
        default=0.0,
        metavar="MINUTES",
        help="go on for so long, to see whether the device throttles",
    )


def _devices_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("names", nargs="*", help="local, cuda, ssh://user@host, adb://serial, emulated://core (default: local)")


def _profile_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", help="an .onnx, .tflite or .pt2 file, from edgepress or not")
    command.add_argument("--threads", type=_positive, default=1, metavar="N", help="of the runtime (default: 1)")
    command.add_argument("--runs", type=_positive, default=50, metavar="N", help="that the medians are over (default: 50)")
    command.add_argument("--by", choices=("step", "operator", "module"), default="step", help="what a row is (default: step)")
    command.add_argument("--depth", type=_positive, metavar="N", help="with --by module: so many parts of a module's path")


def _micro_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", help="an int8 .tflite file")
    command.add_argument("--arena", type=_positive, metavar="BYTES", help="the memory that there is for tensors")
    command.add_argument("--c", metavar="FILE", help="write the file as a C array, with its header beside it: net.cc")


def _verify_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("file", help="an .onnx or .tflite file")
    command.add_argument("source", help="the task, or the folder with the saved network, that it must agree with")
    command.add_argument("--device", default="local", metavar="DEVICE", help=_DEVICE)


def _inspect_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="a task, or a folder with a network that edgepress saved")


def _measuring_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", default="local", metavar="DEVICE", help=_DEVICE)
    command.add_argument("--threads", type=_positive, default=1, metavar="N", help="of the runtimes (default: 1)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0.")
    return int(text)


def _override(text: str) -> tuple[str, str]:
    pattern, separator, precision = text.rpartition("=")
    if not separator or not pattern or precision not in PRECISIONS:
        raise argparse.ArgumentTypeError(f"'{text}' is not PATTERN=PRECISION, the precision one of {', '.join(PRECISIONS)}.")
    return pattern, precision


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of minutes above 0.")
    return value


def _duration(text: str) -> float:
    """Minutes of '90s', '20m', '1.5h'; a plain number is minutes."""
    units = {"s": 1 / 60, "m": 1.0, "h": 60.0}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return _minutes(number) * unit
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"'{text}' is no time above 0: write 90s, 20m or 1.5h.") from None


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",") if item.strip()]


_Command = tuple[Callable[[argparse.Namespace], int], str, str, Callable[[argparse.ArgumentParser], None]]
_COMMANDS: dict[str, _Command] = {
    "compress": (
        commands.compress,
        "prune, distil, quantize, export, check and measure a task's network",
        "edgepress compress digits --max-drop 1.0 --out runs/digits",
        _compress_arguments,
    ),
    "export": (
        commands.export,
        "write a task's network, as it is, into one file and check it",
        "edgepress export my_task.py:build net.tflite --precision int8",
        _export_arguments,
    ),
    "sensitivity": (
        commands.sensitivity,
        "show which layers lose what a quantized file loses",
        "edgepress sensitivity my_task.py:build --format tflite",
        _sensitivity_arguments,
    ),
    "bench": (
        commands.bench,
        "measure files against each other in one interleaved run",
        "edgepress bench net.onnx net.tflite --threads 1",
        _bench_arguments,
    ),
    "devices": (
        commands.devices,
        "say what a device is: CPU, memory, runtimes, sensors",
        "edgepress devices ssh://pi@raspberrypi",
        _devices_arguments,
    ),
    "profile": (
        commands.profile,
        "show where the time of one run goes, operator by operator",
        "edgepress profile net.tflite --by module --depth 1",
        _profile_arguments,
    ),
    "micro": (
        commands.micro,
        "run an int8 .tflite in TensorFlow Lite Micro: operators, arena, outputs; write it as C",
        "edgepress micro net.tflite --c net.cc",
        _micro_arguments,
    ),
    "verify": (
        commands.verify,
        "run a file and compare it with the network it came from",
        "edgepress verify net.tflite my_task.py:build",
        _verify_arguments,
    ),
    "inspect": (
        commands.inspect,
        "show what of a network can be pruned, and what freezes the rest",
        "edgepress inspect resnet56-cifar10",
        _inspect_arguments,
    ),
    "tasks": (commands.tasks, "list the built-in tasks", "edgepress tasks", lambda command: None),
}
