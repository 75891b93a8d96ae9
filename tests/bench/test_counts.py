"""Counts against closed forms, times against a clock that is told what time it is."""

import itertools

import pytest

from outpace import Engine, Settings
from outpace.bench.derive import _round_ms, break_even
from outpace.bench.methods import drive
from outpace.bench.overhead import bookkeeping_us_per_round
from outpace.bench.scripted import Scripted
from outpace.bench.stock import StockMethod
from outpace.bench.trials import Answer, Job, Record, Trial
from outpace.errors import ConfigError
from outpace.target import Target
from tiny import PROMPTS, make_model, target


def job(prompt, **settings):
    return Job(tuple(prompt), (), Settings(**{"max_new_tokens": 30, "ignore_eos": True, "request": 0, **settings}))


def scripted(right, draft_len, prompt, tokens=30, **settings):
    """A trial with a drafter that is right to a known depth, on the tiny model."""
    said = Engine(target()).generate([prompt], job(prompt, max_new_tokens=tokens, **settings).settings)[0].tokens
    drafter = Scripted(right, draft_len)
    drafter.learn(prompt, said)
    trial = drive(Engine(target(), drafter, stand_down=False), [job(prompt, max_new_tokens=tokens, **settings)])
    assert trial.answers[0].tokens == said
    return trial.answers[0]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 3}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("accepted", range(5))
def test_constant_acceptance_gives_the_closed_form(accepted, settings):
    """Of K = 4 draft tokens always a are right: a + 1 emitted a round, and every count follows."""
    answer = scripted([accepted], 4, PROMPTS[0], tokens=60, **settings)
    rounds = 60 // (accepted + 1)
    assert answer.passes == rounds
    assert answer.emitted / answer.passes == accepted + 1
    assert sum(r[1] for r in answer.rounds) == 60 - rounds
    assert answer.accepted_at[:accepted] == (rounds,) * accepted
    assert answer.reached[:accepted] == (rounds,) * accepted
    if accepted < 4:
        # the end cuts drafts that reach beyond it: what is refused is refused in all rounds with room for it
        room = sum(60 - (accepted + 1) * i - 1 > accepted for i in range(rounds))
        assert answer.reached[accepted] == room
        assert answer.accepted_at[accepted] == 0


def test_alternating_acceptance_gives_the_closed_form():
    """Right to depths 3, 1, 0 in turn: 7 tokens in 3 rounds, acceptance 2/3, 1/2, 1 given reached at depths 1 to 3."""
    answer = scripted([3, 1, 0], 4, PROMPTS[0], tokens=70)
    assert answer.passes == 30
    assert answer.accepted_at[:3] == (20, 10, 10)
    assert answer.reached[0] in (29, 30)  # the last round may have no room for a draft
    assert answer.reached[1:3] == (20, 10)


def test_a_draft_is_cut_where_the_text_ends():
    answer = scripted([2], 4, PROMPTS[0], tokens=30)
    assert [r[2] for r in answer.rounds] == [4] * 9 + [2]
    assert answer.reached == (10, 10, 9)
    assert answer.accepted_at == (10, 10, 0)


class Stepping:
    """An engine around a real one, each of whose steps takes a scripted time."""

    def __init__(self, engine, clock, seconds):
        self.engine, self.clock, self.seconds = engine, clock, iter(seconds)
        self.timing, self.target = engine.timing, engine.target

    def submit(self, *arguments):
        return self.engine.submit(*arguments)

    def cancel(self, uid):
        return self.engine.cancel(uid)

    def step(self):
        progress = self.engine.step()
        self.clock.sleep(next(self.seconds))
        return progress


def test_times_are_those_of_the_clock(clock):
    engine = Stepping(Engine(target()), clock, itertools.chain([0.5], itertools.repeat(0.01)))
    trial = drive(engine, [job(PROMPTS[0], max_new_tokens=11)], clock)
    assert trial.total_ms == pytest.approx(600.0, abs=0.1)
    assert trial.ms_per_token == pytest.approx(600.0 / 11, abs=0.1)
    answer = trial.answers[0]
    assert (answer.ttft_ms, answer.total_ms) == pytest.approx((500.0, 600.0), abs=0.1)


def test_each_request_of_a_batch_has_times_of_its_own(clock):
    engine = Stepping(Engine(target()), clock, itertools.repeat(1.0))
    trial = drive(engine, [job(PROMPTS[0], max_new_tokens=3), job(PROMPTS[1], max_new_tokens=5, request=1)], clock)
    assert [a.total_ms for a in trial.answers] == pytest.approx([3000.0, 5000.0], abs=0.1)
    assert [a.ttft_ms for a in trial.answers] == pytest.approx([1000.0, 1000.0], abs=0.1)
    assert trial.total_ms == pytest.approx(5000.0, abs=0.1)
    assert (trial.rounds, trial.emitted) == (5, 8)


def test_what_the_engine_adds_up_is_taken_as_a_difference():
    engine = Engine(target())
    first, second = (drive(engine, [job(PROMPTS[0])]) for _ in range(2))
    for trial in (first, second):
        assert set(trial.split_ms) == {"prefill", "draft", "pass", "walk", "other"}
        assert trial.rounds == 30
        assert 0 < sum(trial.split_ms.values()) <= trial.total_ms


def test_whatever_goes_wrong_the_engine_is_left_empty():
    engine = Engine(target())

    def clock():
        if engine.active:
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        drive(engine, [job(PROMPTS[0])], clock)
    assert engine.active == 0


def test_bookkeeping_is_timed_without_an_engine(clock):
    assert bookkeeping_us_per_round(clock) == pytest.approx(1.0, rel=0.01)  # one look at this clock a round


def test_break_even_from_costs_and_drafts():
    """A round costs 2 plain ones, all are drafted 3 deep: a + a^2 + a^3 = 1 at a = 0.5437."""
    answer = Answer(
        tokens=(), emitted=0, prompt_tokens=1, text="", finish_reason="length", ttft_ms=None, total_ms=0.0,
        rounds=((1, 0, 3, 3),) * 5,
    )  # fmt: skip
    found = break_even(20.0, 10.0, [answer])
    assert found["emitted_per_round"] == 2.0
    assert found["acceptance"] == pytest.approx(0.543689, abs=1e-5)
    assert break_even(50.0, 10.0, [answer])["acceptance"] is None  # four tokens a round cannot pay for five
    assert break_even(9.0, 10.0, [answer])["acceptance"] == 0.0
    assert break_even(9.0, 10.0, []) is None


def test_a_round_is_timed_without_the_prompt():
    """Ten rounds: prefill took 50 of 150 ms; or stock decoding read the prompt in its first pass, 60 ms."""
    plain = {"tokens": (), "emitted": 10, "prompt_tokens": 9, "text": "", "finish_reason": "length", "total_ms": 150.0}
    answer = Answer(**plain, ttft_ms=60.0)
    split = {"prefill": 50.0, "pass": 90.0}
    assert _round_ms([Trial(answers=(answer,), total_ms=150.0, split_ms=split, rounds=10)]) == 10.0
    assert _round_ms([Trial(answers=(answer,), total_ms=150.0, rounds=10)]) == 10.0
    assert _round_ms([Trial(answers=(Answer(**plain, ttft_ms=None),), total_ms=150.0)]) is None


def test_a_record_survives_json():
    answer = scripted([2], 4, PROMPTS[0])
    trial = Trial(answers=(answer,), total_ms=12.3456789, split_ms={"pass": 1.0}, rounds=10)
    from outpace.bench.trials import Cell

    record = Record(
        cell=Cell(1, 0.0, "natural"), repetition=0, unit=("a",), task="t", turn=0, method="m", status="ok", reason=None,
        at_s=1.5, trial=trial,
    )  # fmt: skip
    again = Record.from_dict(record.as_dict())
    assert again.key == record.key
    assert again.trial.answers[0].rounds == answer.rounds
    assert again.trial.answers[0].tokens == answer.tokens
    assert again.trial.total_ms == 12.346


class TestStock:
    """`transformers.generate`: same tokens, same stop rule, passes counted."""

    @pytest.fixture(scope="class")
    def model(self):
        return Target(make_model())

    @pytest.mark.parametrize("spec", ["transformers", "transformers:prompt_lookup_num_tokens=3"])
    @pytest.mark.parametrize("ignore_eos", [True, False])
    def test_greedy_tokens_and_counts(self, model, spec, ignore_eos):
        for prompt in PROMPTS[:4]:
            settings = Settings(max_new_tokens=20, ignore_eos=ignore_eos, request=0)
            plain = Engine(model).generate([prompt], settings)[0]
            trial = StockMethod(model, spec).answer([Job(tuple(prompt), (), settings)])
            answer = trial.answers[0]
            assert answer.tokens == plain.tokens
            assert answer.finish_reason == plain.finish_reason
            if spec == "transformers":
                assert answer.passes == answer.emitted
            assert 0 < answer.ttft_ms < answer.total_ms

    def test_a_padded_batch_says_what_each_prompt_alone_says(self, model):
        settings = Settings(max_new_tokens=12, request=0)
        jobs = [Job(tuple(prompt), (), settings) for prompt in PROMPTS[:3]]
        method = StockMethod(model, "transformers")
        together = method.answer(jobs).answers
        assert [a.tokens for a in together] == [method.answer([one]).answers[0].tokens for one in jobs]

    def test_an_assistant_is_loaded_by_name_and_forgets(self, spoken, model_dir):
        method = StockMethod(spoken, f"transformers:assistant_model={model_dir}")
        settings = Settings(max_new_tokens=16, ignore_eos=True, request=0)
        trial = method.answer([Job((5, 6, 7), (), settings)])
        plain = Engine(spoken).generate([[5, 6, 7]], settings)[0]
        assert trial.answers[0].tokens == plain.tokens
        assert trial.answers[0].passes < 16  # the model is its own perfect assistant
        method.forget()

    def test_sampling_does_not_touch_the_global_generator(self, model):
        import torch

        torch.manual_seed(5)
        want = torch.rand(1)
        torch.manual_seed(5)
        settings = Settings(max_new_tokens=5, temperature=0.8, request=0)
        StockMethod(model, "transformers").answer([Job((5, 6), (), settings)])
        assert torch.equal(torch.rand(1), want)

    @pytest.mark.parametrize("spec", ["transformers", "transformers:prompt_lookup_num_tokens=3"])
    def test_the_first_token_cannot_come_before_the_first_pass(self, model, spec, monkeypatch):
        """A clock on which a pass takes a second, and nothing else takes any time."""
        now = [0.0]
        hook = model.model.register_forward_hook(lambda *_: now.__setitem__(0, now[0] + 1.0))
        settings = Settings(max_new_tokens=8, ignore_eos=True, request=0)
        trial = StockMethod(model, spec).answer([Job(tuple(PROMPTS[0]), (), settings)], lambda: now[0])
        hook.remove()
        assert trial.answers[0].ttft_ms == 1000.0
        assert trial.total_ms == 1000.0 * trial.rounds

    def test_specs(self, model):
        assert StockMethod(model, "transformers:prompt_lookup_num_tokens=10").alone
        assert not StockMethod(model, "transformers:cache_implementation=static").alone
        with pytest.raises(ConfigError, match="unknown stock method"):
            StockMethod(model, "tranformers")
        with pytest.raises(ConfigError, match="needs a value"):
            StockMethod(model, "transformers:top_k")
