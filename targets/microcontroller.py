"""Int8 files for microcontrollers: run in TensorFlow Lite Micro (TFLM), held against LiteRT's reference kernels, written as C."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgepress.compress import errors
from edgepress.compress.errors import DeviceError, FileError, UserError

from .artifact import Artifact, Port
from .runtimes import random_feeds
from .tflm import FLOAT_TOLERANCE, MOST_ARENA, REFERENCE, TFLM, distance, load, operator_kinds

__all__ = ["Microcontroller", "check_microcontroller", "write_c_array"]

_ALIGNMENT = 16  # of a file in memory
_EXAMPLES = 8  # random ones, where none are given
_CHILD = "from edgepress.targets.tflm import serve; serve()"
_SUFFIXES = (".cc", ".cpp", ".c")


@dataclass(frozen=True)
class Microcontroller:
    """What became of a file in TFLM.

    Args:
        artifact: the file.
        version: of the package tflite-micro.
        operators: kinds of operators in the file, for a `MicroMutableOpResolver`.
        missing: those of them that TFLM has no kernel for.
        arena_bytes: the smallest arena in which TFLM runs the file here, with 8-byte pointers and the portable kernels; None
            where it does not run. Found by trying, to 16 bytes.
        examples: how many were run and compared.
        max_lsb: the largest difference of integer outputs from LiteRT's reference kernels, in steps; None where not compared.
        max_rel: the largest difference of float outputs over the largest float output; None where not compared.
        differing: where outputs differ, the operators that give another result than the reference kernel on the same inputs.
        reason: why the file should not be deployed, in a sentence; empty where nothing speaks against it.
    """

    artifact: Artifact
    version: str
    operators: tuple[str, ...]
    missing: tuple[str, ...] = ()
    arena_bytes: int | None = None
    examples: int = 0
    max_lsb: int | None = None
    max_rel: float | None = None
    differing: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it runs, fits and computes what it should."""
        return not self.reason

    @property
    def exact(self) -> bool:
        """Whether all integer outputs were equal, bit for bit, and float outputs within rounding."""
        return self.max_lsb == 0 and self.max_rel is not None and self.max_rel <= FLOAT_TOLERANCE


def check_microcontroller(
    artifact: Artifact,
    feeds: Sequence[np.ndarray] | None = None,
    arena_bytes: int | None = None,
    *,
    timeout_s: float = 120.0,
) -> Microcontroller:
    """Run an int8 ``.tflite`` file in TFLM's interpreter and compare its outputs with LiteRT's reference kernels.

    Both run in a process of their own, so a file that crashes one of them does not take edgepress along. TFLM runs in the
    smallest arena that it accepts. Outputs must be equal bit for bit. Where they are not, every operator is compared on its own,
    fed with what TFLM fed it, and one difference is no fault: a step in a FULLY_CONNECTED, where LiteRT's reference kernel
    rounds once, in floating point, and TFLM's twice, in integers.

    Args:
        artifact: what `read_artifact` or `export` gave. An open batch is 1.
        feeds: one array ``[N, ...]`` per input, in the file's own layout and types; the N examples are run one after the other.
            Random ones where None.
        arena_bytes: what the board has for the arena; not checked where None.
        timeout_s: for all runs together.

    Raises:
        FileError: the file is not for TFLM (not TFLite, only floats, open sizes other than the batch), or crashes it.
        UserError: the feeds do not fit the file.
        DeviceError: the package tflite-micro is not installed, or there was no answer in time.

    Source: LiteRT's rounding: https://github.com/google-ai-edge/LiteRT/issues/8567

    Example:
        >>> check_microcontroller(Artifact(Path("net.onnx"), "onnx", "int8", (), (), "", 0))
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.FileError: TFLM runs .tflite files, and net.onnx is none: export the network as int8 .tflite.
    """
    _refuse(artifact, arena_bytes)
    arrays = _examples(artifact) if feeds is None else [np.asarray(feed) for feed in feeds]
    pieces = _pieces(artifact, arrays)
    with tempfile.TemporaryDirectory(prefix="edgepress-") as folder:
        for i, array in enumerate(pieces):
            np.save(os.path.join(folder, f"input-{i}.npy"), array, allow_pickle=False)
        request = {"path": str(artifact.path), "folder": folder, "inputs": len(pieces), "sha256": artifact.sha256}
        facts = _ask(artifact, request, timeout_s)
        found = Microcontroller(
            artifact=artifact,
            version=facts.get("version", ""),
            operators=tuple(facts.get("operators", ())),
            missing=tuple(facts.get("missing", ())),
            arena_bytes=facts.get("arena_bytes"),
        )
        if found.missing or "refused" in facts:
            return dataclasses.replace(found, reason=_refusal(artifact, facts))
        wanted, got = (load(folder, name, facts["outputs"]) for name in ("reference", "tflm"))
    found = dataclasses.replace(found, examples=len(pieces[0]) if pieces else 1, **_differences(wanted, got))
    places = facts.get("differing", ())
    named = tuple(f"operator {at}, {kind}, by {_amount(apart, integers)}" for at, kind, apart, integers in places)
    return dataclasses.replace(found, differing=named, reason=_judge(found, places, arena_bytes))


def _refuse(artifact: Artifact, arena_bytes: int | None) -> None:
    name = artifact.path.name
    if artifact.format != "tflite":
        raise FileError(f"TFLM runs .tflite files, and {name} is none: export the network as int8 .tflite.")
    if artifact.precision in ("fp32", "fp16"):
        raise FileError(f"{name} computes in floating point, which microcontrollers do not: export it with the precision int8.")
    for port in artifact.inputs:
        if None in port.shape[1:]:
            sizes = ", ".join("?" if size is None else str(size) for size in port.shape)
            raise FileError(f"{name} leaves sizes of its input '{port.name}' open, [{sizes}]: TFLM needs all but the batch.")
    # before any array of that size is made
    taken = sum(math.prod(size or 1 for size in port.shape) * np.dtype(port.dtype).itemsize for port in artifact.inputs)
    if taken > MOST_ARENA:
        raise FileError(f"{name} takes {taken:,} bytes of input: no microcontroller has so much memory.")
    if arena_bytes is not None and arena_bytes < 1:
        raise UserError(f"An arena of {arena_bytes} bytes holds nothing: give the bytes that the board has for it.")


def _examples(artifact: Artifact) -> list[np.ndarray]:
    drawn = [random_feeds(artifact, seed) for seed in range(_EXAMPLES)]
    return [np.concatenate(arrays) if arrays[0].ndim else arrays[0] for arrays in zip(*drawn, strict=True)]


def _pieces(artifact: Artifact, feeds: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each input an array of runs, ``[runs, *shape of one run]``."""
    if len(feeds) != len(artifact.inputs):
        raise UserError(f"{artifact.path.name} takes {len(artifact.inputs)} inputs and was given {len(feeds)}.")
    shapes = [tuple(1 if size is None else size for size in port.shape) for port in artifact.inputs]
    runs = {len(feed) / shape[0] for feed, shape in zip(feeds, shapes, strict=True) if shape and feed.ndim}
    whole = len(runs) < 2 and all(count >= 1 and count == int(count) for count in runs)
    for port, feed, shape in zip(artifact.inputs, feeds, shapes, strict=True):
        if not whole or feed.dtype != np.dtype(port.dtype) or feed.ndim != len(shape) or feed.shape[1:] != shape[1:]:
            raise UserError(
                f"{artifact.path.name} takes '{port.name}' as {port.dtype} {['N', *shape[1:]] if shape else []}, equally many "
                f"examples of each input; it was given {feed.dtype} {list(feed.shape)}."
            )
    count = int(next(iter(runs), 1))
    return [
        np.ascontiguousarray(feed).reshape(count, *shape) if shape else np.repeat(feed[None], count)
        for feed, shape in zip(feeds, shapes, strict=True)
    ]


def _refusal(artifact: Artifact, facts: dict[str, Any]) -> str:
    if missing := facts.get("missing"):
        kernel = "kernel" if len(missing) == 1 else "kernels"
        return (
            f"TFLM has no {kernel} for {', '.join(missing)}: change those layers of the network, or write the {kernel} yourself."
        )
    return f"{facts['stage']} cannot run {artifact.path.name}: {facts['refused']}."


def _differences(wanted: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict[str, Any]:
    """`max_lsb` and `max_rel` over all outputs."""
    apart = [(w.dtype.kind == "f", distance(w, g)) for w, g in zip(wanted, got, strict=True)]
    return {
        "max_lsb": max((int(steps) for floats, steps in apart if not floats), default=0),
        "max_rel": max((share for floats, share in apart if floats), default=0.0),
    }


def _amount(apart: float, integers: bool) -> str:
    return f"{apart:.0f} step{'s' * (apart != 1)}" if integers else f"{apart:.2g} of the largest value"


def _judge(found: Microcontroller, places: Sequence[Sequence[Any]], arena_bytes: int | None) -> str:
    """The reason against a file that ran."""
    name = found.artifact.path.name
    faults = [place for place in places if not (place[1] == "FULLY_CONNECTED" and place[3] and place[2] <= 1)]
    if not found.exact and (faults or not places):
        by = _amount(found.max_lsb, True) if found.max_lsb else _amount(found.max_rel or 0.0, False)
        at = f" Operator {faults[0][0]}, {faults[0][1]}, is the first that does." if faults else ""
        return f"TFLM computes other outputs of {name} than LiteRT's reference kernels, by up to {by}.{at}"
    if arena_bytes is not None and found.arena_bytes is not None and found.arena_bytes > arena_bytes:
        return f"{name} needs an arena of {found.arena_bytes:,} bytes, and there are {arena_bytes:,}."
    return ""


def _ask(artifact: Artifact, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Run the child; what it said, line by line, as one dict."""
    command = [sys.executable, "-P", "-c", _CHILD]
    try:
        done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True, errors="replace",
                              timeout=timeout_s, check=False)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{artifact.path.name} was not checked within {timeout_s:.0f} s: it hangs, or is too large.") from error
    except OSError as error:
        raise DeviceError(f"Cannot start a process to run TFLM in: {error.strerror or error}.") from error
    facts: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        with contextlib.suppress(ValueError):
            said = json.loads(line)
            facts.update(said if isinstance(said, dict) else {})
    if "error" in facts:
        raise getattr(errors, facts["error"])(facts["message"])
    answered = "outputs" in facts or bool(facts.get("missing"))  # what came after that only explains it
    if done.returncode < 0 and not answered:
        raise FileError(f"{artifact.path} cannot be checked: {_death(facts.get('stage', TFLM), -done.returncode)}.")
    if not answered and "refused" not in facts:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1].rstrip(".")
        raise DeviceError(f"The process that checks {artifact.path.name} failed (exit code {done.returncode}): {last}.")
    return facts


def _death(stage: str, number: int) -> str:
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    crashed = "crash" if stage == REFERENCE else "crashes"
    return f"{stage} {crashed} on it ({name})" if name != "SIGKILL" else "something, perhaps a want of memory, killed the process"


# ---- C


def write_c_array(artifact: Artifact, path: str | os.PathLike[str], checked: Microcontroller | None = None) -> tuple[Path, Path]:
    """Write a ``.tflite`` file as a C array with its header, to be compiled into a firmware.

    The array is called as ``xxd -i`` would call it: ``net_tflite`` and ``net_tflite_len`` in ``net.cc`` and ``net.h``.

    Args:
        artifact: what `read_artifact` or `export` gave.
        path: the source to write, ``.cc``, ``.cpp`` or ``.c`` (C11); the header goes beside it. Existing files are replaced,
            and only when the new ones are whole.
        checked: what `check_microcontroller` gave for this file: its arena goes into the header's comment.

    Returns:
        The source and the header.

    Raises:
        UserError: a name that no compiler takes, or ``checked`` of another file.
        FileError: the file is not TFLite, has changed since it was described, or the folder cannot be written.

    Example:
        >>> write_c_array(Artifact(Path("net.tflite"), "tflite", "int8", (), (), "", 0), "net.txt")
        Traceback (most recent call last):
        ...
        edgepress.compress.errors.UserError: net.txt is no name of a C source: end it in .cc, .cpp or .c.
    """
    from .export import write_file

    path = Path(path)
    header = path.with_suffix(".h")
    if path.suffix not in _SUFFIXES:
        raise UserError(f"{path.name} is no name of a C source: end it in .cc, .cpp or .c.")
    if not path.stem.isprintable() or set(path.name) & {'"', "\\"}:
        raise UserError("A C source includes its header by name: choose one without quotes, backslashes and control characters.")
    if artifact.format != "tflite":
        raise FileError(f"{artifact.path.name} is not a .tflite file: TFLM reads no other.")
    if checked is not None and checked.artifact.sha256 != artifact.sha256:
        raise UserError(f"{checked.artifact.path.name} was checked, and {artifact.path.name} is to be written: check that one.")
    data = _bytes(artifact)
    name = _identifier(path.stem)
    write_file(header, _header(artifact, name, checked).encode())
    write_file(path, _source(data, name, header.name, path.suffix).encode())
    return path, header


def _bytes(artifact: Artifact) -> bytes:
    try:
        data = artifact.path.read_bytes()
    except OSError as error:
        raise FileError(f"Cannot read {artifact.path}: {error.strerror or error}.") from error
    if hashlib.sha256(data).hexdigest() != artifact.sha256:
        raise FileError(f"{artifact.path} is not the file that was described: read it again.")
    return data


def _identifier(stem: str) -> str:
    """A name that C and C++ leave to programs: no keyword, no leading digit or underscore, no two underscores in a row.

    Example:
        >>> _identifier("my net-v2"), _identifier("2nd"), _identifier("int"), _identifier("__")
        ('my_net_v2_tflite', 'model_2nd_tflite', 'int_tflite', 'model_tflite')
    """
    words = re.findall(r"[A-Za-z0-9]+", stem)
    return "_".join([*(["model"] if not words or words[0][0].isdigit() else []), *words, "tflite"])


def _header(artifact: Artifact, name: str, checked: Microcontroller | None) -> str:
    guard = f"{name.upper()}_H_"
    kinds = ", ".join(dict.fromkeys(operator_kinds(_bytes(artifact))))
    lines = [
        f"{artifact.path.name}: {artifact.bytes} bytes, {artifact.precision}; real = (stored - zero point) * scale",
        f"SHA-256: {artifact.sha256}",
        *(f"input {_described(port)}" for port in artifact.inputs),
        *(f"output {_described(port)}" for port in artifact.outputs),
        f"operators: {kinds}",
    ]
    if checked is not None and checked.arena_bytes is not None:
        lines.append(f"arena: {checked.arena_bytes} bytes, aligned to 16, with the portable kernels on a 64-bit computer")
    comment = "\n".join(f"// {_plain(line)}" for line in lines)
    return f"""{comment}

#ifndef {guard}
#define {guard}

#ifdef __cplusplus
extern "C" {{
#endif

extern const unsigned char {name}[];
extern const unsigned int {name}_len;

#ifdef __cplusplus
}}
#endif

#endif  // {guard}
"""


def _described(port: Port) -> str:
    shape = ", ".join(str(1 if size is None else size) for size in port.shape)
    quantized = "" if port.scale is None else f", scale {port.scale!r}, zero point {port.zero_point}"
    return f"'{port.name}': {port.dtype} [{shape}]{quantized}"


def _plain(text: str) -> str:
    """Text from a file as part of a comment, which it must not end or go on after: printable ASCII without backslashes."""
    return "".join(c if " " <= c <= "~" and c != "\\" else "?" for c in text).replace("??", "? ?")


def _source(data: bytes, name: str, header: str, suffix: str) -> str:
    rows = (data[i : i + 12] for i in range(0, len(data), 12))
    body = "\n".join("  " + ", ".join(f"0x{byte:02x}" for byte in row) + "," for row in rows)
    aligned = "#include <stdalign.h>\n\n" if suffix == ".c" else ""
    return f"""{aligned}#include "{header}"

alignas({_ALIGNMENT}) const unsigned char {name}[] = {{
{body}
}};
const unsigned int {name}_len = {len(data)};
"""
