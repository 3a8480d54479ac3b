"""The range of an activation, from what streams by: a histogram in bounded memory, and rules that read ranges off it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgepress.compress.quantization import Calibrator

__all__ = ["Statistics", "between_ends", "scale_of"]

_BINS = 2048
_PERCENTILE = 99.99
_AVERAGE = 0.9
_NOTHING = 1e-30  # up to here a value counts as zero
_CANDIDATES = 64

Range = tuple[float, float]


class Statistics:
    """What is remembered of a tensor's values: memory does not grow with how many are seen.

    The histogram covers ``[-limit, limit]`` in a fixed number of bins. A larger value doubles the limit as often as needed, and
    each doubling joins the bins in pairs: no bin's edge ever moves, so nothing is redistributed. Zeros are only counted: every
    grid has them.

    Example:
        >>> seen = Statistics()
        >>> for batch in (np.linspace(-1, 3, 1000), np.linspace(0, 100, 3)):
        ...     seen.update(batch)
        >>> seen.range("minmax"), seen.count
        ((-1.0, 100.0), 1003)
    """

    def __init__(self, bins: int = _BINS, *, histogram: bool = True) -> None:
        self.count = 0
        self.low, self.high = np.inf, -np.inf
        self._average: Range | None = None
        self._limit = 0.0
        self._histogram = np.zeros(bins if histogram else 0, np.int64)  # 'minmax' and 'average' need none

    def update(self, values: NDArray[np.floating]) -> None:
        """See some more values, of one example or of a small batch; NaN and infinity are left out."""
        flat = np.asarray(values, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            flat = flat[np.isfinite(flat)]
        if not flat.size:
            return
        low, high = float(flat.min()), float(flat.max())
        self.count += flat.size
        self.low, self.high = min(self.low, low), max(self.high, high)
        old = self._average
        blend = _AVERAGE if old else 0.0
        self._average = tuple(blend * a + (1 - blend) * b for a, b in zip(old or (low, high), (low, high), strict=True))  # type: ignore[assignment]
        self._widen(max(-low, high))
        bins = len(self._histogram)
        if self._limit and bins:
            at = ((flat[flat != 0] + self._limit) * (bins / (2 * self._limit))).astype(np.int64)
            self._histogram += np.bincount(np.clip(at, 0, bins - 1), minlength=bins)

    def _widen(self, reach: float) -> None:
        if not self._limit and reach > _NOTHING:
            self._limit = float(2.0 ** np.ceil(np.log2(reach)))
        while self._limit and reach > self._limit:
            pairs = self._histogram.reshape(-1, 2).sum(1)
            quarter = len(pairs) // 2
            self._histogram = np.concatenate([np.zeros(quarter, np.int64), pairs, np.zeros(quarter, np.int64)])
            self._limit *= 2

    def range(self, calibrator: Calibrator, levels: int = 255) -> Range:
        """(lowest, highest) value that is to be represented.

        ``minmax``: everything seen. ``average``: a moving average of each update's extremes. ``percentile``: without the
        outermost 0.01 % on either side. ``mse``: the range whose rounding and clipping errors, together, are the least squared.
        ``entropy``: the range that loses the least information (Migacz 2017, 8-bit Inference with TensorRT), one-sided where
        all values are.

        Args:
            calibrator: the rule.
            levels: steps of the integer grid.
        """
        if not self.count:
            return 0.0, 0.0
        if calibrator == "average":
            assert self._average is not None
            return self._average
        if calibrator == "minmax" or not self._limit:
            return float(self.low), float(self.high)
        if calibrator == "percentile":
            return self._percentile()
        candidates = self._candidates()
        weigh = self._squared_error if calibrator == "mse" else self._divergence
        low, high = min(candidates, key=lambda r: weigh(r, levels))
        return min(max(low, float(self.low)), high), high

    def _edges(self) -> NDArray[np.float64]:
        return np.linspace(-self._limit, self._limit, len(self._histogram) + 1)

    def _percentile(self) -> Range:
        counts, edges = self._histogram.copy(), self._edges()
        counts[len(counts) // 2] += self.count - counts.sum()
        shares = np.cumsum(counts) / self.count
        tail = 1 - _PERCENTILE / 100
        low = edges[np.searchsorted(shares, tail, side="right")]
        high = edges[min(int(np.searchsorted(shares, 1 - tail, side="left")) + 1, len(shares))]
        return float(max(low, self.low)), float(min(high, self.high))

    def _candidates(self) -> list[Range]:
        """Ranges that shrink towards zero: both ends together, and each alone."""
        parts = np.linspace(1.0, 0.15, _CANDIDATES).tolist()
        low, high = min(float(self.low), 0.0), max(float(self.high), 0.0)
        both = [(low * p, high * p) for p in parts]
        lone = [(low, high * p) for p in parts[1:]] + [(low * p, high) for p in parts[1:]] if low < 0 < high else []
        return both + lone

    def _squared_error(self, within: Range, levels: int) -> float:
        edges = self._edges()
        centres = (edges[1:] + edges[:-1]) / 2
        low, high = within
        step = max((high - low) / levels, 1e-30)
        inside = step**2 / 12
        beyond = np.maximum(low - centres, 0) + np.maximum(centres - high, 0)
        return float((self._histogram * np.where(beyond > 0, beyond**2, inside)).sum())

    def _divergence(self, within: Range, levels: int) -> float:
        """Kullback-Leibler divergence of the quantized histogram from the clipped one."""
        edges = self._edges()
        centres = (edges[1:] + edges[:-1]) / 2
        low, high = within
        inside = (centres >= low) & (centres <= high)
        if inside.sum() < 2:
            return np.inf
        p = self._histogram[inside].astype(float)
        p[0] += self._histogram[centres < low].sum()
        p[-1] += self._histogram[centres > high].sum()
        source = self._histogram[inside].astype(float)
        level = np.minimum(((centres[inside] - low) / max((high - low) / levels, 1e-30)).astype(int), levels - 1)
        used = (source > 0).astype(float)
        sums, counts = np.bincount(level, source, levels), np.bincount(level, used, levels)
        q = np.divide(sums, counts, out=np.zeros(levels), where=counts > 0)[level] * used
        both = p > 0
        p, q = p / p.sum(), (q + 1e-9) / (q + 1e-9).sum()
        return float((p[both] * np.log(p[both] / q[both])).sum())


def scale_of(low: float, high: float, bits: int = 8, *, symmetric: bool = False) -> tuple[float, int]:
    """Scale and zero point (of signed integers) of a range, which is widened to hold zero.

    Example:
        >>> scale_of(0.0, 255.0), scale_of(-127.0, 1.0, symmetric=True)
        ((1.0, -128), (1.0, 0))
    """
    low, high, top = min(low, 0.0), max(high, 0.0), 2 ** (bits - 1) - 1
    if symmetric:
        return max(-low, high) / top or 1.0, 0
    scale = (high - low) / (2 * top + 1) or 1.0
    return scale, round(-low / scale) - top - 1


def between_ends(values: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Which values are not held at an end of an activation like ReLU6: those that are neither the least nor the greatest, where
    more than one is.

    Example:
        >>> between_ends(np.float32([0, 0, 2, 5])).tolist()
        [False, False, True, True]
    """
    free = np.ones(values.shape, bool)
    for end in (values.min(), values.max()):
        held = values == end
        if held.sum() > 1:
            free &= ~held
    return free
