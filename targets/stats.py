"""Statistics of timings: percentiles, ratios with an interval, and the reasons not to believe them.

Samples come in rounds: the files that are compared take turns, and each turn yields a handful of samples. Samples of one
round share the machine's state of that moment (frequency, caches, neighbours), so a round, not a sample, is what is
independent; and two files' turns of one round share it with each other, so what is compared is each round's own ratio.

Sources: Wilcoxon, *Individual comparisons by ranking methods*, Biometrics Bulletin 1(6), 1945 (signed ranks); Hodges and
Lehmann, *Estimates of location based on rank tests*, Annals of Mathematical Statistics 34(2), 1963, with the interval as in
Hollander, Wolfe and Chicken, *Nonparametric Statistical Methods*, 3rd ed. 2014, section 3.3; Kalibera and Jones, *Rigorous
benchmarking in reasonable time*, ISMM 2013 (the level that varies is what repeats); Mytkowicz et al., *Producing wrong data
without doing anything obviously wrong!*, ASPLOS 2009 (where a program lies in memory moves its time by percents). The 10 % of
`noise_reasons` is that of ``torch.utils.benchmark``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = [
    "MAX_DRIFT",
    "MAX_SPREAD",
    "RESOLUTION",
    "Ratio",
    "Rounds",
    "drift",
    "noise_reasons",
    "paired_ratio",
    "percentile",
    "spread",
]

Rounds = Sequence[Sequence[float]]
"""Samples by round; rounds may differ in length, none is empty."""

MAX_SPREAD = 0.10
"""Interquartile range over median above which a machine counts as noisy."""

MAX_DRIFT = 0.05
"""Relative change of the median between the first and the second half above which a machine counts as drifting."""

RESOLUTION = 0.01
"""The least difference that is told. The same file loaded twice lies elsewhere in memory, and that alone moves its time by some
parts in a thousand, in every round alike: no interval from the rounds of one run can see that."""

_FEW = 6  # rounds, below which signed ranks have no 95 % interval
_MOST = 200  # rounds; more are joined with their neighbours

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Ratio:
    """How many times faster one file is than another, with a 95 % interval.

    Example:
        >>> str(Ratio(2.5, 2.4, 2.6)), Ratio(2.5, 2.4, 2.6).decided
        ('2.50x (2.40 to 2.60)', True)
        >>> Ratio(1.01, 0.98, 1.03).verdict, Ratio(1.003, 1.002, 1.004).verdict
        ('cannot tell', 'cannot tell')
    """

    value: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 1 and what is within 1 % of it, so that the sign of the difference is known."""
        return self.low > 1 + RESOLUTION or self.high < 1 / (1 + RESOLUTION)

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


def paired_ratio(baseline: Rounds, other: Rounds) -> Ratio:
    """How many times as long ``baseline`` takes as ``other``, from the ratios of their medians in each round.

    The value is the Hodges-Lehmann estimate of the rounds' log ratios (the median of the means of all pairs of them), the
    interval is that of Wilcoxon's signed ranks: a slow spell of the machine falls on both files of a round, and where it falls
    on one of them, that round is one rank among the others, however slow it was. With fewer than six rounds, which have no such
    interval, it is Student's t. Of more than 200 rounds neighbours are joined, which also evens out spells longer than a round.

    Args:
        baseline: samples by round; the file to compare with.
        other: as many rounds; above 1 means that this one is faster.

    Raises:
        ValueError: the numbers of rounds differ, or there are fewer than two.

    Example:
        >>> paired_ratio([[20.0, 20.0]] * 6, [[10.0, 10.0]] * 6)
        Ratio(value=2.0, low=2.0, high=2.0)
    """
    count = len(baseline)
    if count != len(other) or count < 2:
        raise ValueError(f"A paired interval needs equally many rounds, two at least; got {count} and {len(other)}.")
    logs = np.array([math.log(np.median(a) / np.median(b)) for a, b in zip(baseline, other, strict=True)])
    if count > _MOST:
        logs = np.array([np.median(part) for part in np.array_split(logs, _MOST)])
    if count < _FEW:
        value = float(logs.mean())
        half = _student_t(count - 1) * float(logs.std(ddof=1)) / math.sqrt(count)
        low, high = value - half, value + half
    else:
        first, second = np.triu_indices(len(logs))
        means = np.sort((logs[first] + logs[second]) / 2)
        outside = _signed_rank_tail(len(logs))
        value, low, high = float(np.median(means)), float(means[outside]), float(means[-1 - outside])
    return Ratio(math.exp(value), math.exp(low), math.exp(high))


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


def _signed_rank_tail(count: int) -> int:
    """How many of the sorted means of pairs lie outside a 95 % interval at each end, by the exact law of signed ranks."""
    law = np.zeros(count * (count + 1) // 2 + 1)  # the chance of each sum of ranks
    law[0] = 1.0
    for rank in range(1, count + 1):
        law[rank:] = (law[rank:] + law[:-rank]) / 2
        law[:rank] /= 2
    return max(int(np.searchsorted(np.cumsum(law), 0.025, side="right")) - 1, 0)


def _student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5; low by 11 % at one degree of freedom, 0.1 % at three)."""
    z = _NORMAL.inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom**power for power, term in enumerate(terms, start=1))
