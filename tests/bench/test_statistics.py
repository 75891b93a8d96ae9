import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace.bench.loops import loops
from outpace.bench.statistics import Estimate, estimate, geometric_mean, median, paired_ratios, percentiles


def test_geometric_mean_of_a_ratio_and_its_inverse_is_one():
    assert geometric_mean([4.0, 0.25]) == pytest.approx(1.0)
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_an_interval_of_equal_ratios_has_no_width():
    found = estimate([1.5] * 10, seed=0, resamples=200)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))
    assert found.claim == "faster"


def test_two_prompts_give_no_interval_and_no_claim():
    found = estimate([1.5, 2.0], seed=0, resamples=200)
    assert found.low is None
    assert found.claim == "no difference shown"
    assert estimate([], seed=0, resamples=200) is None


def test_a_difference_is_claimed_only_where_the_interval_excludes_one():
    assert Estimate(1.1, 0.99, 1.2, 9).claim == "no difference shown"
    assert Estimate(1.1, 1.01, 1.2, 9).claim == "faster"
    assert Estimate(0.9, 0.8, 0.99, 9).claim == "slower"


def test_the_bootstrap_interval_is_that_of_the_log_mean():
    """Against the normal approximation: 400 prompts with logs of deviation 0.2 give +-1.96 * 0.2 / 20."""
    logs = np.random.default_rng(3).normal(0.3, 0.2, 400)
    found = estimate(list(np.exp(logs)), seed=1, resamples=4000)
    spread = 1.96 * logs.std() / 20
    assert math.log(found.low) == pytest.approx(logs.mean() - spread, abs=0.003)
    assert math.log(found.high) == pytest.approx(logs.mean() + spread, abs=0.003)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """100 experiments of 30 prompts: 95 % nominal; below 86 covered has odds under 1 in 1000 for true coverage 0.94."""
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(100):
        found = estimate(list(np.exp(generator.normal(0.1, 0.3, 30))), seed=trial, resamples=400)
        covered += math.log(found.low) <= 0.1 <= math.log(found.high)
    assert covered >= 86


def test_ratios_are_paired_within_a_repetition_and_the_median_counts():
    base = {("a", 0): 10.0, ("a", 1): 20.0, ("a", 2): 10.0, ("b", 0): 10.0}
    other = {("a", 0): 5.0, ("a", 1): 10.0, ("a", 2): 1.0, ("c", 0): 1.0}
    assert paired_ratios(base, other) == {"a": 2.0}


def test_medians_of_two_are_geometric():
    assert median([2.0, 8.0]) == pytest.approx(4.0)
    assert median([3.0, 1.0, 2.0]) == 2.0


def test_percentiles():
    assert percentiles([]) is None
    assert percentiles([1.0, 2.0, 3.0])["p50"] == 2.0


@given(st.lists(st.integers(0, 50), min_size=0, max_size=30), st.integers(1, 12), st.integers(0, 3))
def test_a_text_that_ends_in_repetitions_loops(start, period, extra):
    stretch = list(range(100, 100 + period))
    repeats = max(3, -(-24 // period)) + extra
    assert loops(start + stretch * repeats) is not None
    assert "repeat a stretch" in loops(start + stretch * repeats)


@given(st.integers(0, 200))
def test_a_text_without_repetition_does_not_loop(length):
    assert loops(list(range(length))) is None


def test_a_few_repeated_words_are_no_loop():
    assert loops([1, 2, 3, 4, 5, 6, 7, 7, 7, 7]) is None
    assert loops(list(range(50)) + [9, 8] * 5) is None


def test_a_list_that_goes_round_with_small_changes_loops_too():
    text = [token for i in range(12) for token in (*range(20), 1000 + i)]
    assert "8-grams" in loops(text)
