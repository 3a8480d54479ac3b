import numpy as np
import pytest

from edgepress.targets.stats import (
    Ratio,
    _expanded_tail,
    _student_t,
    drift,
    noise_reasons,
    percentile,
    ratio_of_medians,
    spread,
)


def rounds_of(level, *, rounds=20, samples=40, between=0.02, within=0.03, seed=0, shared=None):
    """Lognormal samples: each round has its own level, as on a real machine."""
    random = np.random.default_rng(seed)
    levels = shared if shared is not None else np.exp(random.normal(0, between, rounds))
    return [level * at * np.exp(random.normal(0, within, samples)) for at in levels]


@pytest.mark.parametrize(("q", "value"), [(0, 1.0), (50, 5.5), (90, 9.1), (99, 9.91), (100, 10.0)])
def test_percentile_must_match_known_numbers(q, value):
    assert percentile([[10, 2, 3], [4], [5, 6, 7, 8, 9, 1]], q) == pytest.approx(value)


def test_spread_must_be_the_interquartile_range_over_the_median():
    assert spread([[10, 20], [30], [40, 50]]) == pytest.approx((40 - 20) / 30)


def test_drift_must_compare_the_halves_of_the_run():
    assert drift([[100.0]] * 5 + [[120.0]] * 5) == pytest.approx(0.2)
    assert drift([[100.0]] * 5 + [[80.0]] * 5) == pytest.approx(-0.2)
    assert drift([[100.0]]) == 0.0


@pytest.mark.parametrize(("freedom", "value"), [(4, 2.77645), (9, 2.26216), (19, 2.09302), (99, 1.98422)])
def test_student_t_must_match_its_table(freedom, value):
    assert _student_t(freedom) == pytest.approx(value, rel=1e-3)


def test_expanded_tail_must_widen_for_few_rounds_and_vanish_for_many():
    assert _expanded_tail(5) < _expanded_tail(20) < 0.025
    assert _expanded_tail(100_000) == pytest.approx(0.025, abs=1e-4)


def test_ratio_of_the_same_file_must_say_that_it_cannot_tell():
    told = [
        ratio_of_medians(rounds_of(100, seed=2 * i), rounds_of(100, seed=2 * i + 1), resamples=500).decided for i in range(100)
    ]
    assert sum(told) <= 10  # 5 expected of a 95 % interval


def test_ratio_must_find_a_planted_tenth():
    for seed in range(20):
        found = ratio_of_medians(rounds_of(110, seed=seed), rounds_of(100, seed=seed + 1000), resamples=500)
        assert found.verdict == "faster"
        assert found.low < 1.1 < found.high or abs(found.value - 1.1) < 0.02
    slower = ratio_of_medians(rounds_of(100, seed=1), rounds_of(110, seed=2))
    assert slower.verdict == "slower"
    assert slower.high < 1 < 1 / slower.value


def test_ratio_must_pair_rounds_so_that_shared_drift_does_not_blur_it():
    shared = np.linspace(1.0, 1.6, 20)
    paired = ratio_of_medians(rounds_of(103, shared=shared, within=0.002), rounds_of(100, shared=shared, within=0.002, seed=1))
    assert paired.decided
    assert paired.high - paired.low < 0.01
    shuffled = rounds_of(100, shared=shared[np.random.default_rng(0).permutation(20)], within=0.002, seed=1)
    unpaired = ratio_of_medians(rounds_of(103, shared=shared, within=0.002), shuffled)
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_ratio_must_resample_rounds_and_not_samples():
    few, many = (ratio_of_medians(rounds_of(100, samples=n), rounds_of(100, samples=n, seed=1)) for n in (40, 1000))
    # 25 times the samples of the same rounds know little more: the rounds' own levels remain
    assert many.high - many.low > 0.5 * (few.high - few.low)


def test_ratio_must_be_that_of_the_medians_and_lie_in_its_interval():
    first, second = rounds_of(250, seed=3), rounds_of(100, seed=4)
    found = ratio_of_medians(first, second)
    assert found.value == pytest.approx(np.median(np.concatenate(first)) / np.median(np.concatenate(second)))
    assert found.low <= found.value <= found.high
    assert found == ratio_of_medians(first, second)


def test_ratio_must_take_rounds_of_unequal_length():
    assert ratio_of_medians([[2.0], [2.0, 2.0]], [[1.0, 1.0, 1.0], [1.0]]) == Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("first", "second"), [([[1.0]] * 3, [[1.0]] * 4), ([[1.0]], [[1.0]])])
def test_ratio_must_refuse_rounds_that_cannot_be_paired(first, second):
    with pytest.raises(ValueError, match="equally many rounds"):
        ratio_of_medians(first, second)


def test_noise_must_name_spread_and_drift_and_nothing_on_a_quiet_machine():
    assert noise_reasons(rounds_of(100, between=0.005, within=0.01)) == []
    assert noise_reasons([[100.0, 100.0, 140.0, 140.0]] * 10) == ["half of the samples differ by 33 % of their median"]
    drifting = noise_reasons([[100.0]] * 10 + [[109.0]] * 10)
    assert drifting == ["the second half of the rounds was 9 % slower than the first"]
