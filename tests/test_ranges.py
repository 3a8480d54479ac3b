"""Ranges from what streams by, and the one description of a quantization."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepress.compress.errors import RecipeError
from edgepress.compress.quantization import CALIBRATORS, PRECISIONS, Numbers, Quantization, quantization
from edgepress.targets.kernels import expected_speed
from edgepress.targets.ranges import Statistics, scale_of


def seen(values: np.ndarray, parts: int = 7) -> Statistics:
    statistics = Statistics()
    for part in np.array_split(values, parts):
        statistics.update(part)
    return statistics


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=200), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_whatever_the_pieces_the_range_is_inside_what_was_seen(values, parts):
    array = np.array(values, np.float32)
    statistics = seen(array, parts)
    assert statistics.range("minmax") == (array.min(), array.max())
    for calibrator in CALIBRATORS:
        low, high = statistics.range(calibrator)
        assert min(array.min(), 0) - 1e-3 <= low <= high <= max(array.max(), 0) + 1e-3, calibrator


def test_the_histogram_does_not_depend_on_the_order_in_which_values_grow():
    values = np.random.default_rng(0).laplace(size=20_000).astype(np.float32) ** 3
    one, other = seen(np.sort(np.abs(values))), seen(np.sort(np.abs(values))[::-1])
    for calibrator in ("percentile", "mse", "entropy"):
        assert one.range(calibrator) == pytest.approx(other.range(calibrator)), calibrator


def test_percentile_leaves_out_the_outermost():
    values = np.concatenate([np.linspace(-1, 1, 100_000), [50.0, -60.0]])
    low, high = seen(values).range("percentile")
    assert -1.1 < low < -0.9
    assert 0.9 < high < 1.1


def squared_error(values: np.ndarray, low: float, high: float) -> float:
    scale, zero = scale_of(low, high)
    rounded = np.clip(np.round(values / scale) + zero, -128, 127)
    return float(np.mean(((rounded - zero) * scale - values) ** 2))


@pytest.mark.parametrize("power", [1, 3])
def test_mse_beats_min_max_where_there_are_outliers(power):
    values = np.random.default_rng(1).normal(size=200_000).astype(np.float32) ** power
    statistics = seen(values)
    assert squared_error(values, *statistics.range("mse")) < squared_error(values, *statistics.range("minmax"))


def test_numbers_that_are_next_to_nothing_count_as_zeros():
    statistics = seen(np.array([4e-41, 0.0, 1e-35]), parts=1)
    for calibrator in CALIBRATORS:
        assert 0 <= statistics.range(calibrator)[1] <= 1e-30, calibrator


def test_a_range_without_negative_values_stays_so():
    values = np.maximum(np.random.default_rng(2).normal(size=10_000), 0)
    assert all(seen(values).range(calibrator)[0] >= 0 for calibrator in CALIBRATORS)


def test_nan_and_infinity_are_left_out_and_nothing_gives_nothing():
    statistics = Statistics()
    assert statistics.range("mse") == (0.0, 0.0)
    statistics.update(np.array([np.nan, 1.0, np.inf, -2.0]))
    assert statistics.range("minmax") == (-2.0, 1.0)


@given(st.floats(-100, 100), st.floats(-100, 100), st.sampled_from([4, 8, 16]), st.booleans())
@settings(deadline=None)
def test_a_scale_reaches_both_ends_and_has_zero_on_its_grid(a, b, bits, symmetric):
    low, high = min(a, b), max(a, b)
    scale, zero = scale_of(low, high, bits, symmetric=symmetric)
    top = 2 ** (bits - 1) - 1
    assert -top - 1 <= zero <= top
    if high - low > 1e-3:
        assert (top - zero) * scale >= high - scale
        assert (-top - 1 - zero) * scale <= low + scale


def test_what_holds_for_a_layer():
    how = quantization("int8", calibrator="mse", layers={"features.*": "int16x8", "op:softmax": "fp32", "features.3": "fp32"})
    assert how.of("features.1", "conv").activations == Numbers(16)
    assert how.of("features.3", "conv").weights is None  # the last pattern that matches
    assert how.of("head", "softmax").name == "fp32"
    assert how.of("head", "linear") == quantization("int8", calibrator="mse")


def test_every_precision_describes_itself():
    assert {name: q.calibrated for name, q in PRECISIONS.items()} == {
        "fp32": False, "fp16": False, "bf16": False, "int8": True, "int8-dynamic": False, "int16x8": True, "w4a8": True,
        "int4": False,
    }  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda: quantization("int7"),
        lambda: quantization("int8", calibrator="best"),
        lambda: quantization("int8", layers={"head": "float"}),
        lambda: Quantization("int8", layers={"head": ""}),
    ],
)
def test_unknown_names_are_refused_with_those_that_are_known(make):
    with pytest.raises(RecipeError, match=r"fp32|minmax"):
        make()


def test_what_to_expect_of_every_precision_is_said_for_both_formats():
    for name in PRECISIONS:
        for file_format in ("onnx", "tflite"):
            speed, reason = expected_speed(file_format, name, {"cpu_features": ["asimd", "asimddp"]})
            assert reason or speed in ("fast", "as fp32")
    assert expected_speed("tflite", "int8", {"cpu_features": ["avx2"]})[0] == "perhaps"
    assert expected_speed("tflite", "int8", {})[0] == "fast"  # nothing is known of the CPU
