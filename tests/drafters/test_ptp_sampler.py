"""The sampler behind the slots: nothing before it has learned, no look ahead, one chain in training and decoding."""

import itertools
import json
import warnings

import pytest
import torch

from outpace import Engine
from outpace.drafters.heads import DraftHead
from outpace.drafters.merged import Merged
from outpace.drafters.prompt_lookup import PromptLookup
from outpace.drafters.ptp import MODES, Ptp
from outpace.drafters.ptp.paths import spread
from outpace.drafters.ptp.sampler import ChainedSampler, follow, taught
from outpace.drafters.ptp.windows import Windows
from outpace.errors import ConfigError
from outpace.laws import Tree
from outpace.target import Target, read, run_behind
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, learned, make_model

OPTIONS = {"max_new_tokens": 24, "temperature": 1.0, "noise": "uniform", "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def exact():
    return Target(make_model(dtype=torch.float64).requires_grad_(False))


@pytest.fixture(scope="module")
def batch(exact):
    written = Engine(exact).generate(
        PROMPTS[:3], max_new_tokens=100, temperature=1.0, noise="uniform", seed=21, ignore_eos=True
    )
    documents = [
        Document([*o.prompt_tokens, *o.tokens], len(o.prompt_tokens), request=i, temperature=1.0)
        for i, o in enumerate(written)
    ]
    return assemble([documents], 400, exact)


def fresh(where, *, shaken=(), **options):
    """Initial weights; random where a name begins with one of `shaken`."""
    drafter = Ptp(**{"slots": 4, "rank": 4, "min_gain": 0.0, "budget": 64, **options})
    drafter.initialise(where, seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in drafter.module.named_parameters():
        if name.startswith(tuple(shaken)):
            parameter.data.normal_(std=0.2, generator=generator)
    return drafter


def losses_of(drafter, batch):
    torch.manual_seed(0)
    return drafter.objective(batch)


# At the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_sampler_that_has_learned_nothing_changes_no_loss(exact, batch, mode):
    options = {"mode": mode, "shaken": ("adapter", "embedding"), "read": "path" if MODES[mode].law else "auto"}
    without, zero = (losses_of(fresh(exact, sampler=s, **options), batch) for s in ("none", "chain"))
    assert torch.equal(without.sums, zero.sums)
    assert torch.equal(without.hits, zero.hits)
    both = losses_of(fresh(exact, sampler="chain", bare=1.0, **options), batch)
    torch.testing.assert_close(both.total, zero.total + without.total)
    if not MODES[mode].silent:
        assert torch.equal(without.total, zero.total), "a slot that is no draft has no loss behind the sampler"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_sampler_that_has_learned_nothing_changes_no_draft(exact, mode, temperature):
    options = {"mode": mode, "shaken": ("adapter", "embedding"), "read": "path" if MODES[mode].law else "auto"}
    rounds = []
    for sampler in ("none", "chain"):
        engine = Engine(exact, fresh(exact, sampler=sampler, **options).for_decoding(), stand_down=False)
        outputs = engine.generate(PROMPTS[:3], **{**OPTIONS, "temperature": temperature})
        rounds.append([o.rounds_detail for o in outputs])
        engine.close()
    assert rounds[0] == rounds[1]
    assert sum(r.drafted for output in rounds[0] for r in output) > 30


# The chain ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_a_token_before_is_told_to_later_slots_only(exact, batch, mode):
    """Token i is told to all that draft, the one k places on to those k places on; silent slots hear of none."""
    drafter = fresh(exact, mode=mode, sampler="chain", shaken=("sampler",))
    silent, lead = MODES[mode].silent, MODES[mode].lead
    reading = read(exact, batch.tokens, batch.documents, batch.positions)
    windows = Windows(torch.tensor([[30, 60]]), torch.ones(1, 2, dtype=torch.bool), 4, drafter.shape)
    hidden = torch.randn(1, 8, exact.hidden_size, dtype=torch.float64)
    before = taught(drafter.module.sampler, batch, reading, windows, hidden).view(1, 2, 4, -1)
    for ahead in range(-1, 5):
        tokens = batch.tokens.clone()
        tokens[0, 30 + ahead] = (tokens[0, 30 + ahead] + 1) % 40
        other = type(batch)(**{**vars(batch), "tokens": tokens})
        after = taught(drafter.module.sampler, other, reading, windows, hidden).view(1, 2, 4, -1)
        moved = (after - before).abs().amax(-1)[0] > 0
        # slot j reads the tokens before its own, i + j + lead, from token i on
        wanted = [j >= silent and 0 <= ahead <= j + lead - 1 for j in range(4)]
        assert moved[0].tolist() == wanted
        assert not bool(moved[1].any()), "the other window's own"
    for j in range(4):
        slots = hidden.clone()
        slots[0, j] += 1
        after = taught(drafter.module.sampler, batch, reading, windows, slots).view(1, 2, 4, -1)
        moved = (after - before).abs().amax(-1)[0] > 0
        assert moved[0].tolist() == [k == j or (k > j >= silent) for k in range(4)]


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
def test_decoding_follows_the_chain_that_training_unrolls(exact, batch, mode):
    """Given what decoding chose as the text, training's states give the same choices."""
    drafter = fresh(exact, mode=mode, sampler="chain", shaken=("sampler", "adapter", "embedding"))
    sampler, silent, lead = drafter.module.sampler, MODES[mode].silent, MODES[mode].lead
    start = 40
    reading = read(exact, batch.tokens, batch.documents, batch.positions)
    windows = Windows(torch.tensor([[start]]), torch.ones(1, 1, dtype=torch.bool), 4, drafter.shape)
    u = torch.rand(1, 4, dtype=torch.float64)
    rows = run_behind(
        exact, reading, drafter.module.embedding(u), windows.positions(batch.positions),
        windows.spans(batch.documents), drafter.module.adapter,
    )  # fmt: skip
    numbers = torch.rand(1, 4 - silent, dtype=torch.float64)
    tokens, _ = follow(
        sampler, exact, None, rows.hidden[:, silent:], batch.tokens[:, start], reading.hidden[:, start - 1], numbers,
        [drafter.shape.law],
    )  # fmt: skip
    written = batch.tokens.clone()
    written[0, start + 1 : start + 1 + tokens.shape[1]] = tokens[0, :, 0]
    told = type(batch)(**{**vars(batch), "tokens": written})
    states = taught(sampler, told, reading, windows, rows.hidden)[0, silent:]
    law = torch.softmax(exact.model.get_output_embeddings()(states), -1)
    picked = (law.cumsum(-1) <= numbers[0, :, None]).sum(-1) if drafter.shape.law else law.argmax(-1)
    assert picked.tolist() == tokens[0, :, 0].tolist()
    assert lead + silent == 1


@torch.no_grad()
def test_requests_that_draw_and_greedy_ones_share_a_chain(exact):
    sampler = ChainedSampler(exact.hidden_size, 8, 1e-6).double()
    sampler.down_proj.weight.normal_()
    head = DraftHead(exact, 25, "target", torch.arange(0, 40)[5:30])
    slots, states = torch.randn(2, 3, exact.hidden_size).double(), torch.randn(2, exact.hidden_size).double()
    token, numbers = torch.tensor([7, 9]), torch.rand(2, 3, dtype=torch.float64)
    noise = torch.zeros(2, 3, 25)
    noise[1] = -torch.empty(3, 25).exponential_().log()
    for draws, race in itertools.product(itertools.product((False, True), repeat=2), (None, noise)):
        tokens, scores = follow(sampler, exact, head, slots, token, states, numbers, draws, 3, race)
        assert tokens.shape == (2, 3, 3)
        assert 5 <= int(tokens.min()) <= int(tokens.max()) < 30, "of the draft vocabulary"
        for b in range(2):
            row = slice(b, b + 1)
            own = None if race is None else race[row]
            alone = follow(sampler, exact, head, slots[row], token[row], states[row], numbers[row], draws[row], 3, own)
            assert torch.equal(alone[0], tokens[row])
            torch.testing.assert_close(alone[1], scores[row])


def test_other_candidates_than_the_likeliest_are_leaves():
    paths = spread([[1, 2], [3, 4], [5, 6]], [[0.6, 0.3]] * 3, 20, leaves=True)
    assert set(paths) == {(1,), (2,), (1, 3), (1, 4), (1, 3, 5), (1, 3, 6)}
    assert len(spread([[1, 2], [3, 4], [5, 6]], [[0.6, 0.3]] * 3, 20)) == 14


# Learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [0, 30])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_reach_every_part(exact, batch, mode, vocabulary):
    drafter = fresh(
        exact, mode=mode, sampler="chain", vocabulary=vocabulary, shaken=("sampler", "adapter", "embedding")
    )
    losses_of(drafter, batch).total.backward()
    for name, parameter in drafter.module.named_parameters():
        assert float(parameter.grad.abs().max()) > 0, name
    assert all(p.grad is None for p in exact.model.parameters())


def test_the_loss_has_the_gradient_of_its_value(exact, batch):
    """By finite differences, through the chain and the pieces of the head."""
    drafter = fresh(exact, mode="categorical", sampler="chain", shaken=("sampler", "adapter", "embedding"))
    drafter.module.double()
    losses_of(drafter, batch).total.backward()
    for name, parameter in drafter.module.named_parameters():
        if not name.startswith(("sampler", "embedding")):
            continue
        with torch.no_grad():
            direction = torch.randn(parameter.shape, dtype=torch.float64)
            sides = []
            for sign in (1, -1):
                parameter += sign * 1e-5 * direction
                sides.append(float(losses_of(drafter, batch).total))
                parameter -= sign * 1e-5 * direction
        found = float((parameter.grad * direction).sum())
        assert found == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("mode", ["one_hot", "mask"])
def test_a_drafter_with_a_sampler_learns_more_in_the_same_steps(mode):
    target = Target(make_model(dtype=torch.float32).requires_grad_(False))
    written = Engine(target).generate(
        PROMPTS, max_new_tokens=60, temperature=1.0, noise="uniform", seed=3, ignore_eos=True
    )
    documents = [Document([*o.prompt_tokens, *o.tokens], len(o.prompt_tokens), temperature=1.0) for o in written]
    batch = assemble([documents[:4], documents[4:]], 300, target)
    reached = []
    for sampler in ("none", "chain"):
        drafter = fresh(target, mode=mode, rank=8, sampler=sampler)
        optimizer = torch.optim.AdamW(drafter.module.parameters(), lr=5e-3)
        torch.manual_seed(0)
        for _ in range(60):
            optimizer.zero_grad()
            drafter.objective(batch).total.backward()
            optimizer.step()
        with torch.no_grad():
            reached.append(float(drafter.objective(batch).extra["right_in_a_row"]))
    assert reached[1] > reached[0] + 0.2


def test_replaying_an_answer_counts_the_rounds_that_decoding_takes(exact):
    """What training calls a hit is one while decoding: by arg-max, so that no number is drawn anew."""
    written = Engine(exact).generate(
        [PROMPTS[0]], max_new_tokens=120, temperature=1.0, noise="uniform", seed=21, ignore_eos=True
    )[0]
    batch = assemble(
        [[Document([*written.prompt_tokens, *written.tokens], len(written.prompt_tokens), temperature=1.0)]], 128, exact
    )
    drafter = fresh(exact, mode="mask", rank=8, sampler="chain", read="argmax", vocabulary=38)
    drafter.recipe = drafter.recipe.replace(loss="hard")
    optimizer = torch.optim.AdamW(drafter.module.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        losses_of(drafter, batch).total.backward()
        optimizer.step()
    drafter.calibrate([batch])
    counted = drafter.module.calibration
    engine = Engine(exact, drafter, stand_down=False)
    output = engine.generate(
        [PROMPTS[0]], max_new_tokens=120, temperature=1.0, noise="uniform", seed=21, ignore_eos=True
    )[0]
    engine.close()
    assert output.tokens == written.tokens
    assert output.rounds < 80, "it learned something, or this says nothing"
    assert abs(float(counted.reached[0]) - output.rounds) <= 2, "but for both ends"
    assert abs(float(counted.passed[0]) - output.stats.accepted_at[0]) <= 2


def test_a_bfloat16_target_trains_in_its_own_dtype(batch):
    target = Target(make_model(dtype=torch.bfloat16).requires_grad_(False))
    drafter = fresh(target, mode="categorical", sampler="chain", vocabulary=30, shaken=("sampler",))
    documents = [Document(batch.tokens[0, :100].numpy(), 10, temperature=1.0)]
    losses = losses_of(drafter, assemble([documents], 128, target))
    losses.total.backward()
    assert all(
        p.grad.dtype == torch.float32 and bool(torch.isfinite(p.grad).all()) for p in drafter.module.parameters()
    )


# A draft vocabulary ------------------------------------------------------------------------------------------------


def test_tokens_outside_the_draft_vocabulary_have_no_loss_and_are_no_hit(exact, batch):
    drafter = Ptp(slots=4, rank=4, mode="categorical", sampler="chain", vocabulary=30)
    counts = torch.bincount(batch.tokens[batch.answer], minlength=40)
    drafter.prepare(counts, exact)
    drafter.initialise(exact, seed=0)
    ids = drafter.module.head.ids
    wanted = counts.double()
    wanted[list(exact.eos)] = float("inf")
    assert set(ids.tolist()) == set(wanted.sort(descending=True, stable=True).indices[:30].tolist())
    covered = float(counts[ids].sum() / counts.sum())
    assert covered < 1
    losses = losses_of(drafter, batch)
    assert float(losses.hits.sum()) <= float(losses.counts.sum())
    rare = torch.ones(40, dtype=torch.bool)
    rare[ids] = False
    tokens = batch.tokens.clone()
    tokens[:] = int(rare.nonzero()[0])
    none = losses_of(drafter, type(batch)(**{**vars(batch), "tokens": tokens}))
    assert float(none.total) == 0
    assert float(none.hits.sum()) == 0


def test_a_vocabulary_as_large_as_the_targets_is_the_targets(exact):
    assert fresh(exact, sampler="chain", vocabulary=40).module.head is None
    assert fresh(exact, sampler="chain", vocabulary=39).module.head.size == 39


# Checkpoints and company -------------------------------------------------------------------------------------------


def test_a_saved_sampler_drafts_the_same_and_older_checkpoints_have_none(exact, tmp_path):
    drafter = fresh(exact, mode="mask", sampler="chain", sampler_size=24, vocabulary=33, shaken=("sampler", "adapter"))
    drafter.save_pretrained(tmp_path / "new", dtype=torch.float64)
    loaded = Ptp.from_pretrained(tmp_path / "new")
    rounds = []
    for one in (drafter, loaded):
        engine = Engine(exact, one, stand_down=False)
        rounds.append(engine.generate([PROMPTS[0]], **OPTIONS)[0].rounds_detail)
        engine.close()
    assert rounds[0] == rounds[1]
    assert loaded.module.sampler.gate_proj.weight.shape == (24, 3 * exact.hidden_size)
    with pytest.raises(ConfigError, match="'sampler' of a trained 'ptp' cannot be changed"):
        Ptp.from_pretrained(tmp_path / "new", sampler="none")
    fresh(exact, mode="mask").save_pretrained(tmp_path / "old", dtype=torch.float64)
    where = next((tmp_path / "old").glob("*.json"))
    config = json.loads(where.read_text())
    for name in ("sampler", "sampler_size", "vocabulary", "bare"):
        del config["options"][name]
    where.write_text(json.dumps(config))
    old = Ptp.from_pretrained(tmp_path / "old")
    old.fit(exact)
    assert old.module.sampler is None
    assert not old.needs.taps


@pytest.mark.parametrize("kind", ["chain", "eagle"])
def test_a_merged_one_drafts_as_it_does_alone(exact, kind):
    """States of slots are not those of the accepted path: merging hands them over as they were."""

    class Silent(PromptLookup):
        def guess(self, request):
            del request
            return Tree()

    options = {"mode": "categorical", "sampler": kind, "shaken": ("sampler", "join", "adapter", "embedding")}
    plain = Engine(exact).generate(PROMPTS[:2], **OPTIONS)
    rounds = []
    for drafter in (fresh(exact, **options), Merged([Silent(), fresh(exact, **options)])):
        engine = Engine(exact, drafter, stand_down=False)
        outputs = engine.generate(PROMPTS[:2], **OPTIONS)
        assert [o.tokens for o in outputs] == [o.tokens for o in plain]
        rounds.append([[(r.drafted, r.accepted) for r in o.rounds_detail] for o in outputs])
        engine.close()
    assert rounds[0] == rounds[1]


@pytest.mark.parametrize("options", ["", ",sampler=chain", ",sampler=chain,vocabulary=30", ",branches=3"], ids=str)
def test_laws_that_read_no_numbers_race_with_gumbel_noise(exact, options):
    """So hot that laws hardly depend on context, noise decides: slots that race with it hit, by arg-max few do."""
    spec = f"ptp:mode=mask,rank=4,slots=4,temperature=30{options}"
    found = {}
    for way in ("auto", "argmax"):
        engine = Engine(exact, learned(exact, f"{spec},read={way}"), stand_down=False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            output = engine.generate([PROMPTS[0]], max_new_tokens=60, temperature=30.0, seed=3, ignore_eos=True)[0]
        engine.close()
        found[way] = output.emitted_per_round
    assert found["auto"] > found["argmax"] + 0.2, found


def test_numbers_in_slots_and_gumbel_noise_are_warned_about(exact):
    engine = Engine(exact, learned(exact, "ptp:mode=categorical,rank=4,sampler=chain"), stand_down=False)
    with pytest.warns(UserWarning, match="noise='gumbel' decides tokens otherwise"):
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=1.0, noise="gumbel")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        engine.generate([PROMPTS[0]], max_new_tokens=4, temperature=1.0, noise="uniform")
    engine.close()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocabulary": 30}, "belong to a sampler; pass sampler=chain"),
        ({"sampler_size": 8}, "belong to a sampler; pass sampler=chain"),
        ({"bare": 0.5}, "belong to a sampler; pass sampler=chain"),
        ({"sampler": "chain", "bare": -1.0}, "bare 0 or more"),
        ({"sampler": "chain", "mode": "categorical", "inverse": True}, "without a sampler"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Ptp(**options)
