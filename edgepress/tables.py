"""Tables for the terminal: a report, a comparison of files, what pruning sees."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from edgepress.targets.measure import noise_warning

from .units import NOT_MEASURED, format_bytes, format_count, format_metric, format_ms, format_points, format_times

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from edgepress.compress.pruning import Inspection
    from edgepress.targets.devices.count import InstructionCount
    from edgepress.targets.measure import Measurement
    from edgepress.targets.profile import Profile
    from edgepress.targets.sensitivity import Sensitivity
    from edgepress.targets.stats import Ratio

    from .compare import Benched
    from .report import FileResult, Report

__all__ = ["bench_table", "count_table", "device_table", "inspect_table", "profile_table", "table"]


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


def bench_table(rows: Sequence[Benched]) -> RenderableType:
    """Files that were measured in one run, each with its speed against the first that ran.

    Args:
        rows: of one `edgepress.compare.bench`, one measured at least.
    """
    from rich.console import Group
    from rich.text import Text

    measured = [row.measurement for row in rows if row.measurement is not None]
    columns = _bench_columns(rows)
    grid = _grid([head for head, _ in columns], words=("file", "runtime"))
    for row in rows:
        cells = [cell(row) for _, cell in columns]
        grid.add_row(*(Text(_dash(cell)) for cell in cells))
    first = measured[0]
    same = [r.artifact.path.name for r in rows if r.speedup and r.measurement is not first and not r.speedup.decided]
    notes = [Text(f"Cannot tell which is faster: {first.artifact.path.name} or {name}.") for name in same]
    if warning := noise_warning(measured):
        notes.append(Text(f"Warning: {warning}", style="yellow"))
    where = f"{first.environment.get('cpu') or first.device}, {first.threads} thread{'s' * (first.threads != 1)}, "
    return Group(grid, Text(""), *notes, Text(f"{where}{len(first.samples_ns)} interleaved rounds.", style="dim"))


def _bench_columns(rows: Sequence[Benched]) -> list[tuple[str, Callable[[Benched], str]]]:
    """Heads and what stands below them; energy, metrics and agreement only where there are any."""
    baseline = next(row for row in rows if row.measurement is not None)

    def of(value: Callable[[Measurement], str]) -> Callable[[Benched], str]:
        return lambda row: value(row.measurement) if row.measurement is not None else NOT_MEASURED

    columns: list[tuple[str, Callable[[Benched], str]]] = [
        ("file", lambda row: row.artifact.path.name),
        ("runtime", of(lambda m: f"{m.runtime} {m.runtime_version}")),
        ("size", lambda row: format_bytes(row.artifact.bytes)),
        ("memory", of(lambda m: format_bytes(m.peak_bytes))),
        ("cold", of(lambda m: format_ms(m.load_ns + m.first_ns if m.load_ns is not None and m.first_ns is not None else None))),
        ("p50", of(lambda m: format_ms(m.p50_ns))),
        ("p90", of(lambda m: format_ms(m.p90_ns))),
        ("p99", of(lambda m: format_ms(m.p99_ns))),
        ("faster ±95 %", lambda row: "baseline" if row is baseline else _factor(row.speedup)),
    ]
    if any(row.measurement and row.measurement.compile_ns is not None for row in rows):
        seconds = of(lambda m: NOT_MEASURED if m.compile_ns is None else f"{m.compile_ns / 1e9:.3g} s")
        columns.insert(5, ("compile", seconds))
    if any(row.measurement and row.measurement.joules is not None for row in rows):
        columns.append(("energy", of(lambda m: NOT_MEASURED if m.joules is None else f"{m.joules * 1e3:.3g} mJ")))
    for name in dict.fromkeys(name for row in rows for name in row.metrics or ()):
        columns.append((name, lambda row, name=name: format_metric((row.metrics or {}).get(name))))  # type: ignore[misc]
    if any(row.apart is not None for row in rows):
        columns.append(("apart", lambda row: NOT_MEASURED if row.apart is None else f"{row.apart:.2g}"))
    return columns


def device_table(name: str, facts: dict[str, Any]) -> RenderableType:
    """What a device says of itself, one fact a line."""
    from rich.text import Text

    cores, memory = facts.get("cores"), facts.get("memory_bytes")
    load = facts.get("load_average")
    lines = {
        "CPU": f"{facts.get('cpu')} ({facts.get('architecture')}), {cores} cores",
        "features": " ".join(facts.get("cpu_features") or []),
        "memory": format_bytes(memory) if memory else None,
        "governor": facts.get("governor"),
        "clock": f"{facts['mhz']:.0f} MHz" if facts.get("mhz") else None,
        "temperature": f"{facts['celsius']:.0f} degrees Celsius" if facts.get("celsius") is not None else None,
        "power": facts.get("power_sensor") or "no sensor: energy is not measured",
        "load": f"{load[0]} of {cores} cores" if load else None,
        "system": f"{facts.get('os')}, Python {facts.get('python')}",
        "packages": ", ".join(f"{k} {v}" for k, v in (facts.get("packages") or {}).items()),
        "emulated": f"yes: {facts['emulated']}; its time means nothing" if facts.get("emulated") else None,
        "virtual": "yes: its host's other guests make noise" if facts.get("virtual_machine") else None,
    }
    grid = _grid((name, ""), words=(name, ""))
    for key, value in lines.items():
        if value:
            grid.add_row(Text(key, style="dim"), Text(str(value)))
    return grid


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


def count_table(counts: Sequence[InstructionCount]) -> RenderableType:
    """Instructions of one inference on an emulated core, against the first file; never a time."""
    from rich.console import Group
    from rich.text import Text

    classes = list(dict.fromkeys(name for count in counts for name, n in count.by_class.items() if n))
    grid = _grid(("file", "runtime", "instructions", "fewer", *classes), words=("file", "runtime"))
    for count in counts:
        cells = [count.artifact.path.name, f"{count.runtime} {count.version}", f"{count.per_inference:,}"]
        cells.append("baseline" if count is counts[0] else f"{counts[0].per_inference / count.per_inference:.2f}×")
        cells += [format_count(count.by_class.get(name, 0)) for name in classes]
        grid.add_row(*map(Text, cells))
    note = f"One inference, one thread, on an emulated {counts[0].core}. Instructions are no time: cores run some at once."
    return Group(grid, Text(""), Text(note, style="dim"))


def profile_table(found: Profile, by: str = "step", depth: int | None = None) -> RenderableType:
    """Where the time of one run goes.

    Args:
        found: of `edgepress.targets.profile.profile`.
        by: ``'step'``, one row for each operator as it ran; ``'operator'`` or ``'module'``, their sums, the slowest first.
        depth: of a module's path; the whole path where None.
    """
    from rich.console import Group
    from rich.text import Text

    if by == "step":
        notes = {id(remark.op): remark.reason for remark in (*found.fallbacks, *found.converts)}
        grid = _grid(("µs", "share", "operator", "module", "kernel", "note"), words=("operator", "module", "kernel", "note"))
        for row in found.rows:
            cells = (f"{row.median_ns / 1e3:.1f}", f"{row.share:.1%}", row.operator, row.module or row.name, row.kernel)
            grid.add_row(*map(Text, (*cells, notes.get(id(row), ""))))
    else:
        grid = _grid(("µs", "share", by), words=(by,))
        for name, spent, share in found.by_operator() if by == "operator" else found.by_module(depth):
            grid.add_row(*map(Text, (f"{spent / 1e3:.1f}", f"{share:.1%}", name or "–")))
    head = (
        f"{found.subject} in {found.runtime} {found.version}, {found.threads} thread{'s' * (found.threads != 1)}: "
        f"{format_ms(found.plain_ns)}; with the profiler {format_ms(found.profiled_ns)}. The rows are {found.covered:.0%} of it."
    )
    sums = [
        Text(f"{len(remarks)} {what}, {sum(r.op.share for r in remarks):.1%} of the rows' time.")
        for remarks, what in ((found.fallbacks, "fell back to slower kernels"), (found.converts, "only convert"))
        if remarks
    ]
    caution = [Text(f"Warning: {found.caution}.", style="yellow")] if found.caution else []
    return Group(Text(head), Text(""), grid, Text(""), *sums, *caution, Text(found.method, style="dim"))


def sensitivity_table(error: float, found: Sequence[Sensitivity]) -> RenderableType:
    """What each layer, left in floats, takes off the error of a quantized file, the most first."""
    from rich.console import Group
    from rich.text import Text

    clocked = any(entry.ns is not None for entry in found)
    heads = ("left in floats", "error", "gain", *(["µs"] if clocked else []), "dB")
    grid = _grid(heads, words=("left in floats",))
    for entry in found:
        cells = [entry.module, f"{entry.error:.2e}", f"{entry.gain / error:+.1%}" if error else "–"]
        cells += [f"{(entry.ns or 0.0) / 1e3:+.1f}"] if clocked else []
        grid.add_row(*map(Text, [*cells, "–" if entry.snr_db is None else f"{entry.snr_db:.1f}"]))
    note = (
        "Error: squared difference of the outputs from the network's, over their variance. "
        "dB: signal over error of what the layer gives where all are quantized; the first low one is where it goes wrong."
    )
    return Group(Text(f"All quantized: error {error:.2e}."), Text(""), grid, Text(""), Text(note, style="dim"))


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
