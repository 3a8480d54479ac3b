import numpy as np
import pytest

from edgepress.targets.stats import (
    RESOLUTION,
    Ratio,
    _signed_rank_tail,
    _student_t,
    drift,
    noise_reasons,
    paired_ratio,
    percentile,
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


@pytest.mark.parametrize(("rounds", "critical"), [(6, 0), (8, 3), (10, 8), (15, 25), (20, 52), (50, 434)])
def test_signed_ranks_must_match_their_table(rounds, critical):
    # Hollander, Wolfe and Chicken (2014), two-sided 5 %
    assert _signed_rank_tail(rounds) == critical


@pytest.mark.parametrize("rounds", [2, 4, 6, 20, 300])
def test_ratio_of_the_same_file_must_say_that_it_cannot_tell(rounds):
    def one(seed):
        return rounds_of(100, rounds=rounds, samples=10, seed=seed)

    found = [paired_ratio(one(2 * i), one(2 * i + 1)) for i in range(200)]
    assert sum(not r.low <= 1 <= r.high for r in found) <= 18  # 10 expected of a 95 % interval; 18 or more are 1 in 100
    assert sum(r.decided for r in found) <= 18


def test_a_spell_that_falls_on_one_file_must_be_one_rank_among_the_others():
    random = np.random.default_rng(0)
    right = 0
    for seed in range(100):
        first, second = rounds_of(100, seed=seed, between=0.005), rounds_of(110, seed=seed + 1000, between=0.005)
        for rounds in (first, second):
            for i in random.permutation(20)[:2]:
                rounds[i] = rounds[i] * 5
        right += paired_ratio(first, second).verdict == "slower"
    assert right >= 90


def test_differences_below_what_loading_a_file_twice_makes_must_not_be_told():
    shared = np.ones(20)
    for part, verdict in ((0.3, "cannot tell"), (3, "faster")):
        slower = rounds_of(100 * (1 + part * RESOLUTION), shared=shared, within=0.0005)
        found = paired_ratio(slower, rounds_of(100, shared=shared, within=0.0005, seed=1))
        assert found.low > 1
        assert found.verdict == verdict


def test_ratio_must_find_a_planted_tenth():
    for seed in range(20):
        found = paired_ratio(rounds_of(110, seed=seed), rounds_of(100, seed=seed + 1000))
        assert found.verdict == "faster"
        assert found.low < 1.1 < found.high or abs(found.value - 1.1) < 0.02
    slower = paired_ratio(rounds_of(100, seed=1), rounds_of(110, seed=2))
    assert slower.verdict == "slower"
    assert slower.high < 1 < 1 / slower.value


def test_ratio_must_pair_rounds_so_that_shared_drift_does_not_blur_it():
    shared = np.linspace(1.0, 1.6, 20)
    paired = paired_ratio(rounds_of(103, shared=shared, within=0.002), rounds_of(100, shared=shared, within=0.002, seed=1))
    assert paired.decided
    assert paired.high - paired.low < 0.01
    shuffled = rounds_of(100, shared=shared[np.random.default_rng(0).permutation(20)], within=0.002, seed=1)
    unpaired = paired_ratio(rounds_of(103, shared=shared, within=0.002), shuffled)
    assert unpaired.high - unpaired.low > 10 * (paired.high - paired.low)


def test_ratio_must_count_rounds_and_not_samples():
    few, many = (paired_ratio(rounds_of(100, samples=n), rounds_of(100, samples=n, seed=1)) for n in (40, 1000))
    # 25 times the samples of the same rounds know little more: the rounds' own levels remain
    assert many.high - many.low > 0.5 * (few.high - few.low)


@pytest.mark.parametrize("rounds", [3, 20, 500])
def test_ratio_must_be_close_to_that_of_the_medians_and_turn_round_with_its_files(rounds):
    first, second = rounds_of(250, rounds=rounds, seed=3), rounds_of(100, rounds=rounds, seed=4)
    found, turned = paired_ratio(first, second), paired_ratio(second, first)
    assert found.value == pytest.approx(np.median(np.concatenate(first)) / np.median(np.concatenate(second)), rel=0.03)
    assert found.low <= found.value <= found.high
    assert (turned.low, turned.value, turned.high) == pytest.approx((1 / found.high, 1 / found.value, 1 / found.low))


def test_ratio_must_take_rounds_of_unequal_length():
    assert paired_ratio([[2.0], [2.0, 2.0]], [[1.0, 1.0, 1.0], [1.0]]) == Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize(("first", "second"), [([[1.0]] * 3, [[1.0]] * 4), ([[1.0]], [[1.0]])])
def test_ratio_must_refuse_rounds_that_cannot_be_paired(first, second):
    with pytest.raises(ValueError, match="equally many rounds"):
        paired_ratio(first, second)


def test_noise_must_name_spread_and_drift_and_nothing_on_a_quiet_machine():
    assert noise_reasons(rounds_of(100, between=0.005, within=0.01)) == []
    assert noise_reasons([[100.0, 100.0, 140.0, 140.0]] * 10) == ["half of the samples differ by 33 % of their median"]
    drifting = noise_reasons([[100.0]] * 10 + [[109.0]] * 10)
    assert drifting == ["the second half of the rounds was 9 % slower than the first"]
