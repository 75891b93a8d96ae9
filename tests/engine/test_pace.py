"""Standing down, against a fake clock: what it decides from, and that it costs no token."""

import pytest

from outpace import Engine
from outpace.drafters import RequestContext, TokenDrafter
from outpace.engine.output import Round
from outpace.engine.pace import Costs, Pace
from outpace.laws import Noise, NoiseDice, Sampler, Settings, Tree
from tiny import PROMPTS, target


def request():
    return RequestContext([1], 1, Sampler(Settings(), NoiseDice(Noise(0), 0)), 1000)


def play(pace, one, *, emitted, plain_ms, drafted_ms, rounds):
    """Rounds on a fake clock; returns in how many the request speculated."""
    speculated = 0
    for _ in range(rounds):
        pace.decide([one])
        if one.speculate:
            speculated += 1
            played = Round((0,) * emitted, emitted - 1, 4, 4)
        else:
            played = Round((0,), 0, 0, 0)
        pace.learn([one], [played], drafted_ms if one.speculate else plain_ms, "x")
        one.round_index += 1
    return speculated


def test_a_draft_that_pays_is_kept():
    pace, one = Pace(), request()
    assert play(pace, one, emitted=3, plain_ms=10, drafted_ms=14, rounds=300) > 280
    assert pace.notes(one) == ()


def test_a_draft_that_does_not_pay_stands_down_with_a_reason():
    pace, one = Pace(), request()
    speculated = play(pace, one, emitted=1, plain_ms=10, drafted_ms=14, rounds=400)
    assert speculated < 60
    assert "drafts emitted 1.00 tokens per round at 1.40 times the cost of a plain round" in pace.notes(one)[0]


def test_an_expensive_drafter_is_judged_at_once_and_remembered():
    pace, first, second = Pace(), request(), request()
    assert play(pace, first, emitted=1, plain_ms=10, drafted_ms=40, rounds=60) <= 8
    assert play(pace, second, emitted=1, plain_ms=10, drafted_ms=40, rounds=60) <= 4


def test_pauses_grow_and_end():
    pace, one = Pace(), request()
    play(pace, one, emitted=1, plain_ms=10, drafted_ms=14, rounds=200)
    pauses = [int(note.split(" for ")[1].split()[0]) for note in pace.notes(one)]
    assert pauses == sorted(pauses)
    assert len(set(pauses)) == len(pauses) >= 3
    assert play(pace, one, emitted=4, plain_ms=10, drafted_ms=14, rounds=800) > 300, "it notices when drafts pay again"


@pytest.mark.parametrize(("asked_ms", "most"), [(10.2, 200), (18, 60)])
def test_asking_in_vain_is_held_against_a_drafter_where_it_costs(asked_ms, most):
    """A round without a draft is no plain one if a drafter was asked for it."""
    pace, one, asked = Pace(), request(), 0
    for _ in range(200):
        pace.decide([one])
        asked += one.speculate
        pace.learn([one], [Round((0,), 0, 0, 0)], asked_ms if one.speculate else 10, "x")
        one.round_index += 1
    assert asked <= most
    assert asked > 180 or pace.notes(one)


def test_a_request_that_stands_down_says_for_how_long():
    pace, one, rests = Pace(), request(), []
    for _ in range(60):
        pace.decide([one])
        rests.append((one.speculate, one.rest))
        played = Round((0,), 0, 4, 4) if one.speculate else Round((0,), 0, 0, 0)
        pace.learn([one], [played], 40 if one.speculate else 10, "x")
        one.round_index += 1
    pauses = [rest for speculates, rest in rests if not speculates and rest]
    assert pauses[:15] == list(range(15, 0, -1))
    assert not any(rest for speculates, rest in rests if speculates)


def test_switched_off_it_never_interferes():
    pace, one = Pace(enabled=False), request()
    assert play(pace, one, emitted=1, plain_ms=10, drafted_ms=100, rounds=200) == 200


def test_a_dead_drafter_is_an_alarm_with_likely_causes():
    pace = Pace()

    def many_requests():
        for _ in range(60):
            play(pace, request(), emitted=1, plain_ms=10, drafted_ms=14, rounds=20)

    with pytest.warns(UserWarning, match="trained for this very target"):
        many_requests()
    one = request()
    assert pace.dead
    assert play(pace, one, emitted=1, plain_ms=10, drafted_ms=14, rounds=50) == 0


def test_one_slow_round_decides_nothing():
    costs = Costs()
    for ms in (10, 10, 900, 10, 10):
        costs.add(None, ms)
    for ms in (14, 14, 14):
        costs.add(4, ms)
    assert costs.ratio(4) == pytest.approx(1.4)
    assert costs.ratio(64) is None


def test_standing_down_costs_no_token():
    class Wrong(TokenDrafter):
        name = "wrong"

        def guess(self, request):
            return Tree.chain([3, 3, 3, 3, 3, 3])

    options = {"max_new_tokens": 150, "temperature": 0.9, "ignore_eos": True}
    engine = Engine(target(), Wrong())
    for calls in range(2):
        ours = engine.generate(PROMPTS[:2], seed=calls, **options)
        assert [o.tokens for o in ours] == [
            o.tokens for o in Engine(target()).generate(PROMPTS[:2], seed=calls, **options)
        ]
