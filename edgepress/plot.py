"""The two plots of the page, as inline SVG: files by time, metric and size; channels of every layer before and after.

Everything is computed here from plain values, so that the page needs no script and no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from .units import format_bytes, format_metric, format_ms, format_points

__all__ = ["Dot", "bars", "scatter", "shares"]

_WIDTH, _HEIGHT = 1040, 470
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 24, 22, 52
_MAX_RADIUS = 24.0
_CHAR = 7.0  # mean advance of the label font at 12 px; a little generous, so that labels keep clear of each other


@dataclass(frozen=True)
class Dot:
    """One file in the scatter plot.

    Args:
        label: shown beside it.
        p50_ns: median time of one run.
        value: the deciding metric.
        bytes: size of the file; the area of the marker.
        format: ``'onnx'`` or ``'tflite'``; its colour.
        state: ``'accepted'``, ``'rejected'`` or ``'original'``; how it is filled.
    """

    label: str
    p50_ns: float
    value: float
    bytes: int
    format: str
    state: str


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    end: bool = False  # text is set from its right end, so that another font's width cannot push it into its marker

    def overlap(self, other: _Box) -> float:
        width = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        height = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(width, 0.0) * max(height, 0.0)


class _Axis:
    """Values to pixels, with round ticks."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False):
        self.log, self.start, self.end = log, start, end
        self.low, self.high = (math.log10(low), math.log10(high)) if log else (low, high)

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            return _log_ticks(10**self.low, 10**self.high)
        step = _round_step((self.high - self.low) / 7)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.8)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]


# ---- metric against time


def scatter(
    dots: Sequence[Dot],
    metric: str,
    *,
    reference: float | None = None,
    max_drop: float = 0.0,
    higher_is_better: bool = True,
    baseline_ns: float | None = None,
) -> str:
    """Files by time (x) and metric (y, better is up), marker area by size; an empty string where there is nothing to show.

    Args:
        dots: the files that have both a time and a metric.
        metric: its name.
        reference: the original network's; the budget line lies ``max_drop`` below it.
        max_drop: points that may be lost.
        higher_is_better: which way the metric is better; the axis is turned round where lower is.
        baseline_ns: time of the baseline; files to its right are slower.

    Example:
        >>> scatter([Dot("a.onnx", 2e6, 93.4, 3_600_000, "onnx", "original")], "accuracy")[:4]
        '<svg'
    """
    dots = [d for d in dots if d.p50_ns > 0 and math.isfinite(d.value)]
    if not dots:
        return ""
    sign = 1 if higher_is_better else -1
    budget = None if reference is None else reference - sign * max_drop
    x = _time_axis([d.p50_ns for d in dots] + ([baseline_ns] if baseline_ns else []))
    y, floor = _metric_axis([d.value for d in dots], reference, budget, max_drop, sign)
    marks = _placed(dots, x, y, floor, sign)
    parts = [_frame(x, y, metric, higher_is_better), _limits(x, y, budget, baseline_ns)]
    lines = [_Box(x(baseline_ns / 1e6) - 2, _TOP, 4, _HEIGHT)] if baseline_ns else []
    if budget is not None:
        note, box = _budget_note(f"budget {format_metric(budget)} ({format_points(max_drop)} points)", y(budget), marks)
        parts.append(note)
        lines += [_Box(_LEFT, y(budget) - 2, _WIDTH, 4), box]
    parts += [*_circles(marks), *_labels(marks, lines)]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="scatter" '
        f'aria-label="{escape(metric)} against time of one run, marker area by file size">{"".join(parts)}</svg>'
    )


def _time_axis(times_ns: Sequence[float]) -> _Axis:
    low, high = min(times_ns) / 1e6, max(times_ns) / 1e6
    start, end = _LEFT, _WIDTH - _RIGHT
    if high / low > 10:
        return _Axis(low / 1.5, high * 1.5, start, end, log=True)
    margin = 0.12 * (high - low) or 0.2 * high
    return _Axis(max(0.0, low - max(margin, 0.15 * low)), high + margin, start, end)


def _metric_axis(
    values: Sequence[float], reference: float | None, budget: float | None, max_drop: float, sign: int
) -> tuple[_Axis, float | None]:
    """The axis, and the value at which files that are far worse are drawn: one collapsed file must not flatten the rest."""
    marks = [v for v in (reference, budget) if v is not None]
    floor = None
    if reference is not None:
        reach = 4 * max(max_drop, 0.01 * abs(reference))
        kept = [sign * v for v in values if sign * (reference - v) <= reach]
        if len(kept) < len(values):
            worst, best = min([*kept, *(sign * m for m in marks)]), max([*kept, sign * reference])
            floor = sign * (worst - 0.3 * ((best - worst) or reach))
            values = [*(sign * v for v in kept), floor]
    low, high = min([*values, *marks]), max([*values, *marks])
    margin = 0.14 * (high - low) or 0.02 * abs(high) or 1.0
    ends = (_HEIGHT - _BOTTOM, _TOP) if sign > 0 else (_TOP, _HEIGHT - _BOTTOM)
    return _Axis(low - margin, high + margin, *ends), floor


def _frame(x: _Axis, y: _Axis, metric: str, higher_is_better: bool) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 10}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x.ticks():
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="tick" x="{at:.1f}" y="{bottom + 19}" text-anchor="middle">{tick:g}</text>')
    scale = ", logarithmic" if x.log else ""
    better = "" if higher_is_better else " (lower is better, axis reversed)"
    parts.append(f'<line class="axis" x1="{_LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>')
    parts.append(f'<text class="name" x="{right}" y="{_HEIGHT - 10}" text-anchor="end">median time of one run, ms{scale}</text>')
    parts.append(f'<text class="name" x="{_LEFT - 50}" y="{_TOP - 8}">{escape(metric)}{better}</text>')
    return "".join(parts)


def _limits(x: _Axis, y: _Axis, budget: float | None, baseline_ns: float | None) -> str:
    """The budget line, the baseline's time, and the field that is within both."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    edge = x(baseline_ns / 1e6) if baseline_ns else None
    if budget is not None:
        at = y(budget)
        width = (edge if edge is not None else right) - _LEFT
        parts.append(f'<rect class="field" x="{_LEFT}" y="{_TOP}" width="{width:.1f}" height="{at - _TOP:.1f}"/>')
        parts.append(f'<line class="budget" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
    if edge is not None:
        parts.append(f'<line class="baseline" x1="{edge:.1f}" y1="{_TOP}" x2="{edge:.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="note" x="{edge - 6:.1f}" y="{bottom - 8}" text-anchor="end">baseline</text>')
    return "".join(parts)


@dataclass(frozen=True)
class _Mark:
    """A file's marker in pixels; one that has fallen is drawn at the edge of the scale."""

    dot: Dot
    x: float
    y: float
    radius: float
    fallen: bool

    @property
    def box(self) -> _Box:
        return _Box(self.x - self.radius, self.y - self.radius, 2 * self.radius, 2 * self.radius)


def _placed(dots: Sequence[Dot], x: _Axis, y: _Axis, floor: float | None, sign: int) -> list[_Mark]:
    """Large ones first, so that small ones stay visible."""
    largest = max(d.bytes for d in dots) or 1
    marks = []
    for dot in dots:
        value, fallen = dot.value, False
        if floor is not None and sign * (floor - dot.value) > 0:
            value, fallen = floor, True
        radius = max(5.0, _MAX_RADIUS * math.sqrt(dot.bytes / largest))
        marks.append(_Mark(dot, x(dot.p50_ns / 1e6), y(value), radius, fallen))
    return sorted(marks, key=lambda m: -m.radius)


def _budget_note(text: str, at: float, marks: Sequence[_Mark]) -> tuple[str, _Box]:
    """What the budget line means, written where it covers no marker."""
    width = len(text) * _CHAR
    places = [_Box(left, top, width, 18) for top in (at + 2, at - 20) for left in (_WIDTH - _RIGHT - width - 4, _LEFT + 6)]
    box = min(places, key=lambda p: sum(p.overlap(m.box) for m in marks))
    right = box.x > _WIDTH / 2
    anchor = f'x="{box.x + width if right else box.x:.1f}" text-anchor="{"end" if right else "start"}"'
    return f'<text class="note warn" {anchor} y="{box.y + 13:.1f}">{escape(text)}</text>', box


def _circles(marks: Sequence[_Mark]) -> Iterator[str]:
    for mark in marks:
        dot = mark.dot
        title = f"{dot.label}: {format_ms(dot.p50_ns)}, {format_metric(dot.value)}, {format_bytes(dot.bytes)}"
        yield (
            f'<circle class="dot {escape(dot.format)} {dot.state}" cx="{mark.x:.1f}" cy="{mark.y:.1f}" r="{mark.radius:.1f}">'
            f"<title>{escape(title)}</title></circle>"
        )


def _labels(marks: Sequence[_Mark], lines: Sequence[_Box]) -> Iterator[str]:
    """Names beside their markers: each takes the first place that is free, the least covered one where none is."""
    taken = [*lines, *(mark.box for mark in marks)]
    for mark in sorted(marks, key=lambda m: m.y):
        text = mark.dot.label + (f" · {format_metric(mark.dot.value)}, off scale ↓" if mark.fallen else "")
        places = _candidates(mark.x, mark.y, mark.radius, len(text) * _CHAR)
        box = min(places, key=lambda c: _cost(c[1], taken) + c[0])[1]
        taken.append(box)
        end = min(max(mark.x, box.x), box.x + box.width)
        if math.hypot(end - mark.x, box.y + 8 - mark.y) > mark.radius + 16:
            yield f'<line class="leader" x1="{mark.x:.1f}" y1="{mark.y:.1f}" x2="{end:.1f}" y2="{box.y + 8:.1f}"/>'
        at, anchor = (box.x + box.width, "end") if box.end else (box.x, "start")
        yield f'<text class="label" x="{at:.1f}" y="{box.y + 12:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _candidates(px: float, py: float, radius: float, width: float) -> Iterator[tuple[float, _Box]]:
    """Places for a label with how little each is liked: beside, above and below, then further off."""
    for ring, gap in enumerate((5.0, 22.0, 44.0, 70.0, 100.0)):
        off = radius + gap
        for i, (cx, cy) in enumerate(
            ((px + off, py), (px - off - width, py), (px - width / 2, py - off - 4), (px - width / 2, py + off + 4),
             (px + off * 0.75, py - off * 0.75), (px + off * 0.75, py + off * 0.75),
             (px - off * 0.75 - width, py - off * 0.75), (px - off * 0.75 - width, py + off * 0.75))
        ):  # fmt: skip
            yield 8 * ring + i, _Box(cx, cy - 8, width, 16, cx + width < px)


def _cost(box: _Box, taken: Sequence[_Box]) -> float:
    outside = max(_LEFT - box.x, 0) + max(box.x + box.width - (_WIDTH - _RIGHT), 0)
    outside += max(_TOP - box.y, 0) + max(box.y + box.height - (_HEIGHT - _BOTTOM), 0)
    return sum(box.overlap(other) for other in taken) + 50 * outside


# ---- channels before and after

_ROW = 18
_TEXT = 11


def bars(layers: Sequence[tuple[str, int, int]]) -> str:
    """Output channels of every layer: before as a pale bar, after as a dark one inside it, both as numbers.

    Args:
        layers: name, before, after; after is 0 where the layer is gone.

    Example:
        >>> bars([("conv1", 64, 24)])[:4], bars([])
        ('<svg', '')
    """
    if not layers:
        return ""
    longest = max(len(name) for name, _, _ in layers)
    columns = 1 if len(layers) <= 12 else 2 if len(layers) <= 80 or longest > 24 else 3
    rows = math.ceil(len(layers) / columns)
    gap = 36
    width = (_WIDTH - gap * (columns - 1)) / columns
    name_width = min(longest * 6.3 + 8, width * 0.42)
    largest = max(max(before, after) for _, before, after in layers) or 1
    parts = [
        _bar(layer, (i // rows) * (width + gap), (i % rows) * _ROW, width, name_width, largest) for i, layer in enumerate(layers)
    ]
    height = rows * _ROW + 4
    label = "output channels of every layer before and after"
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" class="bars" aria-label="{label}">{"".join(parts)}</svg>'


def shares(rows: Sequence[tuple[str, float, float]]) -> str:
    """Where time goes: a bar for each row, with its microseconds and its share.

    Args:
        rows: name, nanoseconds, share of the whole from 0 to 1.

    Example:
        >>> shares([("conv1", 1200.0, 0.75)])[:4], shares([])
        ('<svg', '')
    """
    if not rows:
        return ""
    name_width = min(max(len(name) for name, _, _ in rows) * 6.3 + 8, _WIDTH * 0.42)
    largest, room = max(ns for _, ns, _ in rows) or 1.0, _WIDTH - name_width - 8 - 130
    parts = []
    for i, (name, ns, share) in enumerate(rows):
        start, top = name_width + 8, i * _ROW
        size, numbers = ns / largest * room, f"{ns / 1e3:.1f} µs, {share:.0%}"
        parts.append(
            f"<g><title>{escape(name)}</title>"
            f'<text class="layer" x="{name_width:.1f}" y="{top + _ROW / 2 + 4:.1f}" text-anchor="end">'
            f"{escape(_shortened(name, max(4, int(name_width / 6.3) - 1)))}</text>"
            f'<rect class="after" x="{start:.1f}" y="{top + 3:.1f}" height="{_ROW - 6}" rx="2" width="{size:.1f}"/>'
            f'<text class="count" x="{start + size + 8:.1f}" y="{top + _ROW / 2 + 4:.1f}">{numbers}</text></g>'
        )
    label = "time of each module in one run"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {len(rows) * _ROW + 4}" role="img" class="bars" aria-label="{label}">{"".join(parts)}</svg>'
    )


def _bar(layer: tuple[str, int, int], left: float, top: float, width: float, name_width: float, largest: int) -> str:
    name, before, after = layer
    start, middle = left + name_width + 8, top + _ROW / 2
    room = width - name_width - 8 - 92
    state = "gone" if after == 0 else "same" if after == before else "cut"
    fits = max(4, int(name_width / 6.3) - 1)
    short = _shortened(name, fits)
    title = f"{name}: {before} channels, {'gone' if after == 0 else after}"
    numbers = "gone" if after == 0 else f"{after}" if after == before else f"{before} → {after}"
    numbers = f"{before} → gone" if after == 0 else numbers
    end = start + max(before, after) / largest * room
    place = f'x="{start:.1f}" y="{top + 3:.1f}" height="{_ROW - 6}" rx="2"'
    return (
        f'<g class="{state}"><title>{escape(title)}</title>'
        f'<text class="layer" x="{left + name_width:.1f}" y="{middle + 4:.1f}" text-anchor="end">{escape(short)}</text>'
        f'<rect class="before" {place} width="{before / largest * room:.1f}"/>'
        f'<rect class="after" {place} width="{after / largest * room:.1f}"/>'
        f'<text class="count" x="{end + 8:.1f}" y="{middle + 4:.1f}">{numbers}</text></g>'
    )


def _shortened(name: str, size: int) -> str:
    """A dotted name in ``size`` characters: words become initials from the left; numbers tell layers apart and stay."""
    words = name.split(".")
    for i, word in enumerate(words[:-1]):
        if len(".".join(words)) <= size:
            break
        words[i] = word if word.isdigit() else word[:1]
    short = ".".join(words)
    return short if len(short) <= size else f"{short[: size - 1]}…"
