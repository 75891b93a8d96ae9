"""The race: rounds in turn, clocks that one hiccup does not decide, and no belief in the impossible."""

import itertools

import pytest

from outpace import Engine, Settings, Target
from outpace.cli import compare
from outpace.engine import Output, Stats
from tiny import PROMPTS, make_model

SETTINGS = Settings(max_new_tokens=12, ignore_eos=True)


def lap(tokens, rounds, ms):
    stats = Stats(rounds=rounds, emitted=tokens)
    return compare.Lap(Output("", tuple(range(tokens)), (0,), "length", (), stats, "path"), ms)


@pytest.fixture
def engines():
    target = Target(make_model())
    return {"plain": Engine(target, None), "drafted": Engine(target, "prompt_lookup:min_ngram=1", stand_down=False)}


def test_a_race_emits_what_each_engine_emits_alone(engines):
    laps = compare.race(engines, PROMPTS[0], SETTINGS)
    assert list(laps) == ["plain", "drafted"]
    for name, engine in engines.items():
        assert laps[name].output.tokens == engine.generate([PROMPTS[0]], SETTINGS)[0].tokens


def test_one_hiccup_counts_as_four_rounds(engines, monkeypatch):
    """A clock on which every plain round takes 1 s, and the fifth 1000 s."""
    seconds = itertools.accumulate(itertools.chain(*([0, 1000.0 if i == 4 else 1.0] for i in range(12))))
    monkeypatch.setattr(compare, "perf_counter", lambda: next(seconds))
    laps = compare.race({"plain": engines["plain"]}, PROMPTS[0], SETTINGS)
    assert laps["plain"].ms == pytest.approx(1e3 * (11 + 4), rel=0.05)


def test_a_speed_beyond_emitted_per_round_is_not_believed():
    plain = lap(64, 64, 640.0)
    assert lap(64, 32, 400.0).believable(plain)
    assert not lap(64, 32, 100.0).believable(plain)
    assert lap(64, 32, 320.0).speed(plain) == pytest.approx(2.0)
