"""Tables for the terminal: a report, a comparison of files, what pruning sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgepress.targets.measure import noise_warning

from .units import NOT_MEASURED, format_bytes, format_count, format_metric, format_ms, format_points, format_times

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from edgepress.compress.pruning import Inspection
    from edgepress.targets.measure import Measurement
    from edgepress.targets.stats import Ratio

    from .report import FileResult, Report

__all__ = ["bench_table", "inspect_table", "table"]


def table(report: Report) -> RenderableType:
    """A run's files; below them why some were rejected, the warnings and the recommendation."""
    from rich.console import Group
    from rich.text import Text

    grid = _grid(("file", "size", report.metric, "drop", "p50", "faster ±95 %", "verdict"), words=("file", "verdict"))
    for file in report.files:
        grid.add_row(*_row(report, file), style="bold" if file is report.best else "dim" if file.original else "")
    reasons = [Text(f"{f.name}: {f.reason}", style="dim") for f in report.files if not f.accepted and not f.original]
    sparse = [Text(f"{f.name}: {f.sparse_note} against its dense twin.") for f in report.files if f.sparse_note]
    notes = [Text(f"Warning: {warning}", style="yellow") for warning in report.warnings]
    verdict = Text.assemble(("Recommended: " if report.best else "", "bold"), report.summary)
    return Group(grid, Text(""), *reasons, *sparse, *notes, verdict)


def bench_table(measured: Sequence[Measurement], ratios: Sequence[Ratio]) -> RenderableType:
    """Files that were measured in one run, each with its speed against the first.

    Args:
        measured: of one `edgepress.targets.measure.measure`.
        ratios: of each, the first against itself included.
    """
    from rich.console import Group
    from rich.text import Text

    heads = ("file", "runtime", "size", "memory", "p50", "p90", "p99", "faster ±95 %")
    grid = _grid(heads, words=("file", "runtime"))
    for i, (times, speed) in enumerate(zip(measured, ratios, strict=True)):
        cells = [
            times.artifact.path.name,
            times.runtime,
            format_bytes(times.artifact.bytes),
            format_bytes(times.peak_bytes),
            *(format_ms(value) for value in (times.p50_ns, times.p90_ns, times.p99_ns)),
            _factor(speed) if i else "baseline",
        ]
        grid.add_row(*(Text(_dash(cell)) for cell in cells))
    same = [m.artifact.path.name for m, r in zip(measured[1:], ratios[1:], strict=True) if not r.decided]
    notes = [Text(f"Cannot tell which is faster: {measured[0].artifact.path.name} or {name}.") for name in same]
    if warning := noise_warning(measured):
        notes.append(Text(f"Warning: {warning}", style="yellow"))
    first = measured[0]
    where = f"{first.environment.get('cpu', first.device)}, {first.threads} thread{'s' * (first.threads != 1)}, "
    return Group(grid, Text(""), *notes, Text(f"{where}{len(first.samples_ns)} interleaved rounds.", style="dim"))


def inspect_table(found: Inspection) -> RenderableType:
    """The groups of channels that pruning may take from, and what holds the others in place."""
    from rich.console import Group
    from rich.text import Text

    groups = _grid(("group", "channels", "weights", "MACs per channel"), words=("group",))
    for group in found.groups:
        cells = (group.name, str(group.channels), str(len(group.weights)), format_count(group.macs_per_channel))
        groups.add_row(*map(Text, cells))
    if not found.frozen:
        return groups
    frozen = _grid(("held in place by", "weights", "because"), words=("held in place by", "because"))
    for item in found.frozen:
        where = f"{item.operator} ({item.line})" if item.line else item.operator
        frozen.add_row(*map(Text, (where, str(len(item.weights)), item.reason)))
    return Group(groups, Text(""), frozen)


def _grid(heads: Sequence[str], words: Sequence[str]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for head in heads:
        grid.add_column(Text(head), justify="left" if head in words else "right", overflow="fold")
    return grid


def _row(report: Report, file: FileResult) -> list[Text]:
    from rich.text import Text

    cells = [
        file.name,
        _size(file),
        format_metric((file.metrics or {}).get(report.metric)),
        _drop(file.drop),
        format_ms(file.measurement.p50_ns if file.measurement else None),
        "baseline" if file.name == report.baseline else _factor(file.speedup),
    ]
    word, colour = ("original", "") if file.original else ("accepted", "green") if file.accepted else ("rejected", "red")
    return [*(Text(_dash(cell)) for cell in cells), Text(word, style=colour)]


def _size(file: FileResult) -> str:
    plain = format_bytes(file.artifact.bytes)
    return plain if file.deflated_bytes is None else f"{plain} ({format_bytes(file.deflated_bytes)} deflated)"


def _dash(cell: str) -> str:
    return "–" if cell == NOT_MEASURED else cell


def _drop(drop: float | None) -> str:
    if drop is None or not math.isfinite(drop):
        return NOT_MEASURED
    return ("−" if drop < 0 else "") + format_points(drop)  # a true minus: the file is better than the original


def _factor(speed: Ratio | None) -> str:
    if speed is None:
        return NOT_MEASURED
    half = max(speed.high - speed.value, speed.value - speed.low)
    return f"{format_times(speed.value)} ±{half:.2f}" if speed.value >= 0.1 else f"{format_times(speed.value)} ±{half:.4f}"
