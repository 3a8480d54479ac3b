"""Statistics of timings: percentiles, ratios with an interval, and the reasons not to believe them.

Samples come in rounds: the files that are compared take turns, and each turn yields a handful of samples. Samples of one
round share the machine's state of that moment (frequency, caches, neighbours), so a round, not a sample, is what is
independent; intervals are made by resampling rounds.

Sources: Kalibera and Jones, *Rigorous benchmarking in reasonable time*, ISMM 2013 (resample the level that varies); Efron and
Tibshirani, *An Introduction to the Bootstrap*, 1993, ch. 13 (percentile interval); Hesterberg, *What teachers should know
about the bootstrap*, The American Statistician 69(4), 2015 (the expanded interval for few rounds). The 10 % of
`noise_reasons` is that of ``torch.utils.benchmark``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = ["MAX_DRIFT", "MAX_SPREAD", "Ratio", "Rounds", "drift", "noise_reasons", "percentile", "ratio_of_medians", "spread"]

Rounds = Sequence[Sequence[float]]
"""Samples by round; rounds may differ in length, none is empty."""

MAX_SPREAD = 0.10
"""Interquartile range over median above which a machine counts as noisy."""

MAX_DRIFT = 0.05
"""Relative change of the median between the first and the second half above which a machine counts as drifting."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Ratio:
    """How many times faster one file is than another, with a 95 % interval.

    Example:
        >>> str(Ratio(2.5, 2.4, 2.6)), Ratio(2.5, 2.4, 2.6).decided
        ('2.50x (2.40 to 2.60)', True)
        >>> Ratio(1.01, 0.98, 1.03).verdict
        'cannot tell'
    """

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves 1 out, so that the sign of the difference is known."""
        return self.low > 1 or self.high < 1

    @property
    def verdict(self) -> str:
        """'faster', 'slower' or 'cannot tell'."""
        if not self.decided:
            return "cannot tell"
        return "faster" if self.low > 1 else "slower"

    def __str__(self) -> str:
        digits = 2 if self.value >= 0.1 else 4
        return f"{self.value:.{digits}f}x ({self.low:.{digits}f} to {self.high:.{digits}f})"


def percentile(rounds: Rounds, q: float) -> float:
    """The q-th percentile of all samples, linear between neighbours (Hyndman and Fan's type 7, numpy's default).

    Example:
        >>> percentile([[1, 2], [3, 4, 5]], 50)
        3.0
    """
    return float(np.percentile(_pooled(rounds), q))


def spread(rounds: Rounds) -> float:
    """Interquartile range over median of all samples.

    Example:
        >>> spread([[1, 2, 3], [4, 5]])
        0.6666666666666666
    """
    low, middle, high = np.percentile(_pooled(rounds), [25, 50, 75])
    return float((high - low) / middle)


def drift(rounds: Rounds) -> float:
    """Relative change of the rounds' typical median from the first half of the run to the second.

    Example:
        >>> round(drift([[10.0], [10.0], [11.0], [11.0]]), 3)
        0.1
    """
    medians = [float(np.median(r)) for r in rounds]
    half = len(medians) // 2
    if not half:
        return 0.0
    return float(np.median(medians[-half:]) / np.median(medians[:half]) - 1)


def ratio_of_medians(baseline: Rounds, other: Rounds, *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """Median of ``baseline`` over median of ``other``, with a 95 % interval from a paired bootstrap over rounds.

    Round i of both was taken at the same moment, so both are resampled together. With few rounds a percentile interval is
    too narrow; its levels are widened as Hesterberg (2015) derives from Student's t.

    Args:
        baseline: samples by round; the file to compare with.
        other: as many rounds; above 1 means that this one is faster.
        resamples: bootstrap resamples.
        seed: of the resampling; the same samples give the same interval.

    Raises:
        ValueError: the numbers of rounds differ, or there are fewer than two.

    Example:
        >>> ratio_of_medians([[20.0, 20.0]] * 5, [[10.0, 10.0]] * 5)
        Ratio(value=2.0, low=2.0, high=2.0)
    """
    count = len(baseline)
    if count != len(other) or count < 2:
        raise ValueError(f"A paired interval needs equally many rounds, two at least; got {count} and {len(other)}.")
    picks = np.random.default_rng(seed).integers(count, size=(resamples, count))
    weights = np.stack([np.bincount(pick, minlength=count) for pick in picks])
    ratios = _weighted_medians(baseline, weights) / _weighted_medians(other, weights)
    tail = _expanded_tail(count)
    low, high = np.quantile(ratios, [tail, 1 - tail])
    value = float(np.median(_pooled(baseline)) / np.median(_pooled(other)))
    return Ratio(value, min(float(low), value), max(float(high), value))


def noise_reasons(rounds: Rounds) -> list[str]:
    """Why samples should not be trusted, in words; empty where they may be.

    Example:
        >>> noise_reasons([[100, 101]] * 10)
        []
        >>> noise_reasons([[100, 150]] * 10)
        ['half of the samples differ by 40 % of their median']
    """
    reasons = []
    if (width := spread(rounds)) > MAX_SPREAD:
        reasons.append(f"half of the samples differ by {width:.0%} of their median".replace("%", " %"))
    if abs(change := drift(rounds)) > MAX_DRIFT:
        word = "slower" if change > 0 else "faster"
        reasons.append(f"the second half of the rounds was {abs(change):.0%} {word} than the first".replace("%", " %"))
    return reasons


def _pooled(rounds: Rounds) -> np.ndarray:
    return np.concatenate([np.asarray(r, dtype=np.float64) for r in rounds])


def _weighted_medians(rounds: Rounds, weights: np.ndarray) -> np.ndarray:
    """Medians of the samples with each round repeated ``weights[i]`` times, for every row of ``weights``."""
    values = _pooled(rounds)
    owner = np.repeat(np.arange(len(rounds)), [len(r) for r in rounds])
    order = np.argsort(values, kind="stable")
    values, owner = values[order], owner[order]
    medians = np.empty(len(weights))
    for i, row in enumerate(weights):
        below = np.cumsum(row[owner])
        lower = np.searchsorted(below, below[-1] / 2)
        upper = np.searchsorted(below, below[-1] / 2, side="right")
        medians[i] = (values[lower] + values[upper]) / 2
    return medians


def _expanded_tail(count: int) -> float:
    """Quantile level of each tail for a 95 % interval from ``count`` rounds: phi(-sqrt(n / (n - 1)) * t)."""
    return _NORMAL.cdf(-math.sqrt(count / (count - 1)) * _student_t(count - 1))


def _student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; 0.1 % low at three degrees of freedom, less above)."""
    z = _NORMAL.inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
