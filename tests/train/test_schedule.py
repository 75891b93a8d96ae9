import itertools

import pytest

from outpace.drafters.learning import Recipe
from outpace.train.schedule import Progress, rate


def test_rates_rise_then_fall_to_the_final_share():
    recipe = Recipe(lr=2.0, warmup=0.1, final_lr=0.1)
    assert rate(recipe, 0.0) == 0.0
    assert rate(recipe, 0.05) == pytest.approx(1.0)
    assert rate(recipe, 0.1) == pytest.approx(2.0)
    assert rate(recipe, 0.55) == pytest.approx(2.0 * 0.55)
    assert rate(recipe, 1.0) == pytest.approx(0.2)
    assert rate(recipe.replace(schedule="linear"), 0.55) == pytest.approx(2.0 * 0.55)
    assert rate(recipe.replace(schedule="constant"), 0.9) == 2.0


def test_steps_are_counted_exactly():
    progress = Progress(steps=7)
    shares = []
    while not progress.over:
        progress.plan(1e9, 1.0)  # the clock has no say
        progress.advance()
        shares.append(progress.share)
    assert shares == pytest.approx([i / 7 for i in range(1, 8)])


@pytest.mark.parametrize("slowdown", [0.5, 1.0, 3.0])
def test_by_the_clock_the_schedule_ends_when_the_time_does(slowdown):
    """Steps take one second, then `slowdown` seconds from the middle on; the share is one at the end, never before."""
    progress, elapsed, step = Progress(seconds=100.0), 0.0, 0
    shares = [0.0]
    while not progress.over:
        pace = 1.0 if elapsed < 50 else slowdown
        progress.advance()
        elapsed += pace
        step += 1
        shares.append(progress.share)
        if step % 10 == 0 or step == 1 or progress.over:
            progress.plan(elapsed, pace)
    assert 97 <= elapsed <= 100 + 10 * slowdown
    assert shares[-1] == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(shares))
