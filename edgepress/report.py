"""What a run found: every file with its figures and its verdict, as JSON, as a page and as a table.

The schema of ``report.json`` is documented in ``docs/report.md``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.compress.errors import FileError
from edgepress.targets.artifact import Artifact
from edgepress.targets.measure import Measurement
from edgepress.targets.stats import Ratio

from .page import render
from .tables import bench_table, inspect_table, table
from .units import format_gain, format_metric, format_points

if TYPE_CHECKING:
    from edgepress.targets.verify import Parity

__all__ = ["SCHEMA", "FileResult", "Layer", "Report", "bench_table", "inspect_table", "table", "to_json", "write"]

SCHEMA = 1
"""Version of the layout of ``report.json``; raised when a key changes its meaning or goes."""


@dataclass(frozen=True)
class Layer:
    """A layer of the network before and after.

    Args:
        name: as the module is called.
        kind: ``'conv'``, ``'linear'`` ...
        before: output channels in the original network.
        after: output channels in the compressed network; 0 where the layer is gone.
    """

    name: str
    kind: str
    before: int
    after: int


@dataclass(frozen=True)
class FileResult:
    """One file, what was measured of it, and what follows.

    Args:
        artifact: the file.
        metrics: the task's metrics as the file itself gives them in its runtime; None where not measured.
        drop: points of the deciding metric lost against the original network, from ``metrics``; negative where the file is
            better. The verdict may rest on other data: see ``Report.decided_on``.
        measurement: its times; None where not measured.
        speedup: against the baseline, with its interval.
        smaller: bytes of the baseline over bytes of this file.
        parity: how far its outputs are from the network's.
        accepted: whether it meets the budget and is not slower than the baseline.
        verdict: the same in one sentence, with the reason.
        original: the network as it was handed over, exported in fp32: something to compare with, not a result.
        deflated_bytes: of the file once compressed, where weights were made zero; None elsewhere.
        sparse_speedup: against its dense twin, the same network with numbers in place of the zeros, measured in the same run.
    """

    artifact: Artifact
    metrics: dict[str, float] | None
    drop: float | None
    measurement: Measurement | None
    speedup: Ratio | None
    smaller: float
    parity: Parity | None
    accepted: bool
    verdict: str
    original: bool = False
    deflated_bytes: int | None = None
    sparse_speedup: Ratio | None = None

    @property
    def name(self) -> str:
        """The file's name."""
        return self.artifact.path.name

    @property
    def reason(self) -> str:
        """The verdict without 'rejected', for where that has been said."""
        return self.verdict.removeprefix("rejected: ").rstrip(".")

    @property
    def sparse_note(self) -> str:
        """What the zeros bought in time, as measured; empty where there is no dense twin."""
        if self.sparse_speedup is None:
            return ""
        gain = {"faster": "a speed-up from sparsity", "slower": "sparsity slows this runtime down"}
        return f"{gain.get(self.sparse_speedup.verdict, 'no speed-up from sparsity on this runtime')}: {self.sparse_speedup}"


@dataclass(frozen=True)
class Report:
    """The outcome of one run.

    Args:
        task: its name.
        metric: the one that decides.
        higher_is_better: which way it is better.
        max_drop: points of it that may be lost.
        original: of the torch network as handed over: ``{"metrics": {...}, "parameters": int, "macs": int}``.
        baseline: name of the file that speed-ups refer to: the faster of the originals.
        files: the originals first, then what was made.
        layers: output channels before and after.
        passes: the history of the compressed network, one dict for each pass.
        decided_on: ``'validate'`` or ``'evaluate'``: the data that verdicts were taken on. Figures are of ``evaluate``.
        environment: of the device.
        warnings: sentences that a reader of the figures must know.
        seconds: of each stage.
        accepted: whether any file was.
        compressed: of the compressed torch network, with the keys of ``original`` that are known.
        profile: where the time of one run of the recommended (or closest) file goes: ``{"file": name, "covered": part of a run,
            "caution": sentence or None, "modules": [{"name", "ns", "share"}]}``; None where it was not measured on this computer.
    """

    task: str
    metric: str
    higher_is_better: bool
    max_drop: float
    original: dict[str, Any]
    baseline: str
    files: tuple[FileResult, ...]
    layers: tuple[Layer, ...]
    passes: tuple[dict[str, Any], ...]
    decided_on: str
    environment: dict[str, Any]
    warnings: tuple[str, ...]
    seconds: dict[str, float]
    accepted: bool
    compressed: dict[str, Any] = field(default_factory=dict)
    profile: dict[str, Any] | None = None

    @property
    def best(self) -> FileResult | None:
        """The file to deploy: of the accepted ones the fastest, of equally fast ones the smallest; None where there is none."""
        accepted = [f for f in self.files if f.accepted and not f.original]
        return min(accepted, key=_speed, default=None)

    @property
    def closest(self) -> FileResult | None:
        """The best of what was made, accepted or not: what to look at where nothing met the budget."""
        made = [f for f in self.files if not f.original and f.drop is not None]
        return self.best or min(made, key=lambda f: (max(f.drop or 0.0, self.max_drop), _speed(f)), default=None)

    @property
    def summary(self) -> str:
        """The verdict in one or two sentences."""
        if self.best is not None:
            return _recommendation(self, self.best)
        budget = f"at most {format_points(self.max_drop)} points of {self.metric} lost, and not slower than {self.baseline}"
        if self.closest is None:
            return f"No file was accepted ({budget}): none could be judged."
        return f"No file was accepted ({budget}). The closest, {self.closest.name}: {self.closest.reason}."


def _speed(file: FileResult) -> tuple[float, int]:
    return (file.measurement.p50_ns if file.measurement else math.inf, file.artifact.bytes)


def _recommendation(report: Report, file: FileResult) -> str:
    gains = [format_gain(file.smaller, "smaller", "larger", "as large")]
    if file.speedup is not None:
        gains.insert(0, format_gain(file.speedup.value, "faster", "slower", "as fast", decided=file.speedup.decided))
    text = f"{file.name} is {' and '.join(gains)} compared with {report.baseline}"
    if file.metrics is None or report.metric not in file.metrics:
        return f"{text}."
    text += f"; {report.metric} {format_metric(file.metrics[report.metric])}"
    if report.metric in report.original.get("metrics", {}):
        text += f", the original's {format_metric(report.original['metrics'][report.metric])}"
    return f"{text}."


# ---- JSON


def to_json(report: Report, folder: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """The report as plain values, laid out as ``docs/report.md`` documents.

    Args:
        report: the outcome of a run.
        folder: that paths are written relative to; only names where None.
    """
    from . import __version__

    best = report.best
    document = {
        "schema": SCHEMA,
        "edgepress": __version__,
        "task": report.task,
        "metric": report.metric,
        "higher_is_better": report.higher_is_better,
        "max_drop": report.max_drop,
        "decided_on": report.decided_on,
        "accepted": report.accepted,
        "summary": report.summary,
        "best": _path(best.artifact.path, folder) if best else None,
        "closest": _path(report.closest.artifact.path, folder) if report.closest else None,
        "baseline": report.baseline,
        "original": report.original,
        "compressed": report.compressed,
        "files": [_file(f, folder) for f in report.files],
        "layers": [dataclasses.asdict(layer) for layer in report.layers],
        "profile": report.profile,
        "passes": list(report.passes),
        "environment": report.environment,
        "warnings": list(report.warnings),
        "seconds": report.seconds,
    }
    plain: dict[str, Any] = _plain(document)
    return plain


def _file(file: FileResult, folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    measured = file.measurement
    return {
        "path": _path(file.artifact.path, folder),
        "original": file.original,
        "format": file.artifact.format,
        "precision": file.artifact.precision,
        "bytes": file.artifact.bytes,
        "deflated_bytes": file.deflated_bytes,
        "smaller": file.smaller,
        "sha256": file.artifact.sha256,
        "metrics": file.metrics,
        "drop": file.drop,
        "latency": _latency(measured) if measured else None,
        "speedup": dataclasses.asdict(file.speedup) if file.speedup else None,
        "sparse_speedup": dataclasses.asdict(file.sparse_speedup) | {"note": file.sparse_note} if file.sparse_speedup else None,
        "memory": {"peak_bytes": measured.peak_bytes, "idle_bytes": measured.idle_bytes}
        if measured and measured.peak_bytes is not None else None,
        "parity": dataclasses.asdict(file.parity) if file.parity else None,
        "accepted": file.accepted,
        "verdict": file.verdict,
    }  # fmt: skip


def _latency(measured: Measurement) -> dict[str, Any]:
    return {
        "device": measured.device,
        "runtime": measured.runtime,
        "runtime_version": measured.runtime_version,
        "threads": measured.threads,
        "p50_ns": measured.p50_ns,
        "p90_ns": measured.p90_ns,
        "p99_ns": measured.p99_ns,
        "mean_ns": measured.mean_ns,
        "rounds": len(measured.samples_ns),
        "samples": sum(map(len, measured.samples_ns)),
        "noise": measured.noise,
    }


def _samples(report: Report, folder: Path) -> dict[str, Any]:
    measured = [f for f in report.files if f.measurement]
    files = [
        {"path": _path(f.artifact.path, folder), "loops": f.measurement.loops, "rounds_ns": f.measurement.samples_ns}
        for f in measured
        if f.measurement
    ]
    return {"schema": SCHEMA, "files": files}


def _path(path: Path, folder: str | os.PathLike[str] | None) -> str:
    if folder is None:
        return path.name
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return path.name


def _plain(value: Any) -> Any:
    """Values that JSON knows; what is not a finite number becomes null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in (sorted(value, key=str) if isinstance(value, set | frozenset) else value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"type": type(value).__name__, **_plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})}
    if isinstance(value, bool | int | str) or value is None:
        return value
    if hasattr(value, "tolist") and not isinstance(value, float):  # numpy and torch
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value.as_posix() if isinstance(value, Path) else str(value)


# ---- files


def write(report: Report, folder: str | os.PathLike[str]) -> Path:
    """Write ``samples.json``, ``report.html`` and, last, ``report.json`` into a folder, which is made if need be.

    Each appears whole or not at all; a ``report.json`` that is there means that the others are too.

    Returns:
        The path of ``report.json``.

    Raises:
        FileError: the folder cannot be written.
    """
    folder = Path(folder)
    document = to_json(report, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "samples.json", json.dumps(_samples(report, folder), separators=(",", ":"), allow_nan=False))
        _write(folder / "report.html", render(document))
        _write(folder / "report.json", json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise FileError(f"Cannot write the report into {folder}: {error.strerror or error}.") from error
    return folder / "report.json"


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0o600 would hide the report from a web server
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
