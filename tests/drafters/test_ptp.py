"""Parallel token prediction as a drafter: exact in every mode, one pass like two, refusals in words."""

import warnings

import pytest
import torch

from outpace import Engine
from outpace.drafters.ptp import MODES, Ptp, two_pass
from outpace.drafters.ptp.reference import draft_alone
from outpace.drafters.registry import make_drafter
from outpace.errors import CheckpointError, ConfigError
from outpace.laws import Noise, NoiseDice, Sampler, Settings
from outpace.target import Block, Scouts, Target
from tiny import FAMILIES, PROMPTS, make_model, target

OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "noise": "uniform", "seed": 5, "ignore_eos": True}


def random_ptp(where, *, seed=1, **options):
    """Random weights, the up-projections included."""
    drafter = Ptp(**{"rank": 4, "min_gain": 0.0, **options})
    drafter.initialise(where, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in drafter.module.parameters():
        parameter.data.normal_(std=0.2, generator=generator)
    drafter.module.to(where.dtype)
    return drafter


@pytest.fixture(scope="module")
def exact():
    return Target(make_model(dtype=torch.float64))


# Exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("budget", [1, 2, 5, 64])
def test_budgets_change_rounds_and_no_token(exact, mode, budget):
    plain = Engine(exact).generate(PROMPTS[:3], **OPTIONS)
    engine = Engine(exact, random_ptp(exact, mode=mode, budget=budget), stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS[:3], **OPTIONS)] == [o.tokens for o in plain]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("sampler", ["none", "chain"])
def test_two_passes_a_round_give_the_same_text(exact, mode, temperature, sampler):
    options = {**OPTIONS, "temperature": temperature}
    plain = Engine(exact).generate([PROMPTS[0]], **options)[0]
    settings = Settings(temperature=temperature, seed=5)
    draws = Sampler(settings, NoiseDice(Noise(5), 0, "uniform"), prompt_length=len(PROMPTS[0]))
    tokens, rounds = two_pass(exact, random_ptp(exact, mode=mode, sampler=sampler), draws, PROMPTS[0], 24)
    assert tuple(tokens) == plain.tokens
    assert rounds <= 12, "the drafting pass knows the next token too, so a round emits two at least"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", ["auto", "argmax"])
@pytest.mark.parametrize("sampler", ["none", "chain"])
def test_a_group_says_what_a_drafting_pass_of_its_own_would(exact, mode, read, sampler):
    """Scouts share a pass with the rows that verify, behind a node that may be the end; nothing of that shows."""
    drafter = random_ptp(exact, mode=mode, budget=64, read=read, sampler=sampler)
    engine = Engine(exact, drafter, stand_down=False)
    engine.submit(PROMPTS[0], **OPTIONS)
    compared = 0
    for _ in range(12):
        engine.step()
        request = engine._context.requests[0]
        ours = max(drafter._states[request].paths, key=len, default=())
        before = request.tokens[:-1]  # the group did not know the newest token, only its number
        numbers = Noise(5).grid(torch.tensor(0), torch.arange(len(before) + 20))
        cache = exact.new_cache()
        with torch.inference_mode():
            exact.prefill(before[:-1], cache)
            alone = draft_alone(exact, drafter, request.sampler, before, numbers, cache)
        assert alone[0] == request.tokens[-1]
        assert list(ours) == alone[1 : 1 + len(ours)]
        compared += len(ours)
    assert compared > 20
    engine.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", MODES)
@torch.inference_mode()
def test_real_rows_keep_their_bits_beside_slots_in_float32(family, mode):
    """Four main rows alone, and with 4, 8, 12 slots under a random adapter: products of multiples of four rows."""
    where = target(family)
    drafter = random_ptp(where, mode=mode)
    cache = where.new_cache()
    where.prefill(PROMPTS[4], cache)
    chain = Block.chain([[9, 2, 3, 4]], cache.lengths, where.device)
    alone = where.run(chain, cache).logits
    cache.drop()
    with where.adapted(drafter.module.adapter):
        for count in (4, 8, 12):
            u = torch.rand(1, count, dtype=torch.float64)
            sees = torch.cat([torch.ones(count, 4), torch.ones(count, count).tril()], 1).bool()[None]
            scouts = Scouts(
                torch.arange(20, 20 + count)[None], sees, embeds=drafter.module.embedding(u),
                adapter=drafter.module.adapter,
            )  # fmt: skip
            beside = where.run(Block(chain.tokens, chain.positions, None, scouts), cache)
            cache.drop()
            assert torch.equal(beside.logits, alone)
            without = Scouts(scouts.positions, sees, embeds=scouts.embeds)
            base = where.run(Block(chain.tokens, chain.positions, None, without), cache)
            cache.drop()
            assert not torch.equal(base.scout_logits, beside.scout_logits), "the adapter does something"
            assert torch.equal(base.logits, beside.logits)


@pytest.mark.parametrize("mode", ["one_hot", "categorical"])
@torch.inference_mode()
def test_what_a_guess_of_a_token_may_know_of_numbers(exact, mode):
    """one_hot: its own number decides it. categorical: its law does not depend on it (theorem 2)."""
    drafter, tokens = random_ptp(exact, mode=mode), PROMPTS[0]
    cache = exact.new_cache()
    exact.prefill(tokens[:-1], cache)
    sampler = Sampler(Settings(temperature=0), NoiseDice(Noise(5), 0))  # greedy: laws are read by arg-max
    numbers = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = []
    run = exact.run
    exact.run = lambda *a, **k: seen.append(run(*a, **k)) or seen[-1]
    try:
        with exact.adapted(drafter.module.adapter):
            for index in (None, len(tokens) + 3):  # the number of the fourth token to guess
                changed = numbers.clone()
                if index is not None:
                    changed[index] = 1 - changed[index]
                draft_alone(exact, drafter, sampler, tokens, changed, cache)
    finally:
        del exact.run
    lead = MODES[mode].lead
    difference = (seen[0].scout_logits - seen[1].scout_logits).abs().amax(-1)[0]
    predicted = torch.arange(drafter.slots) + lead  # guess number, counted from 0, of each slot
    knows = predicted >= 3 + lead
    assert bool((difference[~knows] == 0).all())
    assert bool((difference[knows] > 0).all())


# What it asks for, and what it refuses -----------------------------------------------------------------------------


def test_scouts_keep_to_the_budget_and_to_what_a_row_must_bring(exact):
    drafter = random_ptp(exact, budget=7)
    engine = Engine(exact, drafter, stand_down=False)
    counts = []
    original = drafter.scouts

    def watched(context, draft):
        found = original(context, draft)
        counts.append(found.count if found else 0)
        return found

    drafter.scouts = watched
    engine.generate(PROMPTS[:2], **OPTIONS)
    assert max(counts) == 7
    drafter.min_gain = 2.0
    drafter.ready(exact)
    counts.clear()
    engine.generate(PROMPTS[:1], **OPTIONS)
    assert max(counts) == 0, "no row brings two tokens"
    engine.close()


def test_two_drafters_on_one_target_do_not_feel_each_other(exact):
    first, second = random_ptp(exact, seed=1), random_ptp(exact, seed=2)
    alone = Engine(exact, first, stand_down=False)
    wanted = alone.generate([PROMPTS[0]], **OPTIONS)[0]
    other = Engine(exact, second, stand_down=False)
    again = alone.generate([PROMPTS[0]], **OPTIONS)[0]
    assert again.rounds_detail == wanted.rounds_detail
    alone.close()
    other.close()


def test_a_saved_drafter_drafts_the_same(exact, tmp_path):
    drafter = random_ptp(exact, slots=5, encoding="digits", temperature=0.9, top_k=7)
    drafter.save_pretrained(tmp_path, dtype=torch.float64)
    loaded = Ptp.from_pretrained(tmp_path, budget=9)
    rounds = []
    for one in (drafter, loaded):
        one.budget = 9
        engine = Engine(exact, one, stand_down=False)
        rounds.append(engine.generate([PROMPTS[0]], **{**OPTIONS, "temperature": 0.9, "top_k": 7})[0].rounds_detail)
        engine.close()
    assert rounds[0] == rounds[1]
    assert loaded.preset == Settings(temperature=0.9, top_k=7, noise="uniform")
    with pytest.raises(ConfigError, match="'slots' of a trained 'ptp' cannot be changed"):
        Ptp.from_pretrained(tmp_path, slots=6)
    with pytest.raises(CheckpointError, match="vocabulary size 40"):
        Engine(Target(make_model(vocab_size=44)), Ptp.from_pretrained(tmp_path))


def test_other_sampling_than_it_was_trained_for_is_warned_about_once_with_its_cost(exact):
    drafter = random_ptp(exact, temperature=0.7)
    engine = Engine(exact, drafter, stand_down=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=0.7, noise="uniform")
    with pytest.warns(UserWarning, match=r"trained for sampling with temperature=0.7.*how many was not measured"):
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=1.3, noise="uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=1.3, noise="uniform")
    drafter.module.agreement.count(torch.randn(50, 40), drafter.preset)
    with pytest.warns(UserWarning, match=r"decides the same token under both \d+ % of the time"):
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=1.0, noise="uniform")
    with pytest.warns(UserWarning, match="noise='gumbel' decides tokens otherwise"):
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=0.7, noise="gumbel")
    engine.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "two_hot"}, "did you mean 'one_hot'"),
        ({"encoding": "bits"}, "unknown encoding"),
        ({"slots": 1}, "slots must be at least 2"),
        ({"temperature": 0.0}, "greedy tokens do not depend on numbers"),
        ({"slots": 8, "draft_len": 8}, "beyond what 8 slots were trained for; pass at most 7, or train with slots=9"),
        ({"read": "path"}, "predict no law"),
        ({"inverse": True}, "needs mode='categorical'"),
        ({"top_p": 1.5, "density": 0}, "density and beta must be above 0"),
        ({"min_p": 2.0}, "min_p must be in"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Ptp(**options)


def test_without_weights_it_says_how_to_get_them():
    with pytest.raises(CheckpointError, match="has to be trained for"):
        Engine(target(), make_drafter("ptp"))


def test_numbers_of_any_request_are_the_paths_own(exact):
    """Identities beyond 63 bits are the same 64 bits as a signed integer."""
    drafter = random_ptp(exact)
    engine = Engine(exact, drafter, stand_down=False)
    for identity in (0, 3, (1 << 64) - 1):
        engine.submit(PROMPTS[0], temperature=1.0, noise="uniform", seed=9, request=identity, max_new_tokens=3)
    engine.step()
    requests = engine._context.requests
    index = torch.tensor([[8, 200, 11]] * 3)
    found = drafter._numbers(requests, index)
    for row, identity in zip(found, (0, 3, (1 << 64) - 1), strict=True):
        assert row.tolist() == [Noise(9).uniform(identity, i) for i in (8, 200, 11)]
    engine.close()
