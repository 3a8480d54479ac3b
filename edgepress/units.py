"""How figures are written for people: bytes, times, counts, the metric. What was not measured says so."""

from __future__ import annotations

import math

__all__ = [
    "NOT_MEASURED",
    "format_bytes",
    "format_count",
    "format_gain",
    "format_metric",
    "format_ms",
    "format_points",
    "format_times",
]

NOT_MEASURED = "not measured"


def format_bytes(value: float | None) -> str:
    """Bytes in decimal units, as file managers and flash chips count.

    Example:
        >>> format_bytes(444_120), format_bytes(3_628_000), format_bytes(None)
        ('444 kB', '3.63 MB', 'not measured')
    """
    if value is None:
        return NOT_MEASURED
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f} B"


def format_ms(value_ns: float | None) -> str:
    """Nanoseconds, in milliseconds.

    Example:
        >>> format_ms(618_000), format_ms(40_600), format_ms(23_070_000)
        ('0.618 ms', '0.0406 ms', '23.1 ms')
    """
    return NOT_MEASURED if value_ns is None else f"{_three(value_ns / 1e6)} ms"


def format_count(value: float | None) -> str:
    """A count with its thousands, millions or billions.

    Example:
        >>> format_count(125_485_056), format_count(853_018), format_count(64)
        ('125 M', '853 k', '64')
    """
    if value is None:
        return NOT_MEASURED
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{_three(value / size)} {unit}"
    return f"{value:.0f}"


def format_metric(value: float | None) -> str:
    """A metric: two decimals for one that counts in percent, four for one that lives between 0 and 1.

    Example:
        >>> format_metric(93.39), format_metric(0.8312)
        ('93.39', '0.8312')
    """
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.2f}" if abs(value) >= 2 else f"{value:.4f}"


def format_points(value: float) -> str:
    """A difference of two metrics, without sign.

    Example:
        >>> format_points(1.0), format_points(0.776), format_points(-0.004)
        ('1.00', '0.78', '0.004')
    """
    return f"{abs(value):.2f}" if abs(value) >= 0.1 or not value else f"{abs(value):.2g}"


def format_times(value: float | None) -> str:
    """A factor.

    Example:
        >>> format_times(4.1), format_times(0.583), format_times(31.24)
        ('4.10×', '0.58×', '31.2×')
    """
    if value is None:
        return NOT_MEASURED
    return f"{value:.1f}×" if value >= 10 else f"{value:.2f}×" if value >= 0.1 else f"{value:.3g}×"


def format_gain(value: float, more: str, less: str, same: str, *, decided: bool = True) -> str:
    """A factor as a comparison, so that nothing is ever "0.58 times faster".

    Args:
        value: how many times more.
        more: the word for above 1.
        less: the word for below 1; the factor is turned round.
        same: the words for 1, or for a difference that could not be told from none.
        decided: whether the difference could be told from none.

    Example:
        >>> format_gain(4.1, "faster", "slower", "as fast"), format_gain(0.5, "faster", "slower", "as fast")
        ('4.10× faster', '2.00× slower')
    """
    if not decided or 0.995 <= value <= 1.005:
        return same
    return f"{format_times(value)} {more}" if value > 1 else f"{format_times(1 / value)} {less}"


def _three(value: float) -> str:
    """Three significant digits, never as an exponent."""
    if value <= 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
