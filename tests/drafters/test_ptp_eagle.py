"""EAGLE-3's network behind the slots: as good as it was before it hears any, and no look ahead when it does."""

import dataclasses
import zlib

import pytest
import torch

from outpace import Engine
from outpace.drafters.eagle import Eagle3
from outpace.drafters.growth import Plan, born, extend
from outpace.drafters.ptp import Ptp, two_pass
from outpace.drafters.ptp.eagle import hear_windows
from outpace.drafters.ptp.windows import Windows
from outpace.drafters.rows import unrolled_losses
from outpace.errors import CheckpointError, ConfigError, UnsupportedError
from outpace.laws import Noise, NoiseDice, Sampler, Settings
from outpace.target import Target, read, run_behind
from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, make_model

TREE = {"draft_len": 4, "branches": 3, "nodes": 10}
OPTIONS = {"max_new_tokens": 32, "seed": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def exact():
    return Target(make_model(dtype=torch.float64, sharpness=2.0).requires_grad_(False))


@pytest.fixture(scope="module")
def single():
    """Of the dtype that is trained for."""
    return Target(make_model(sharpness=2.0).requires_grad_(False))


def shake(module, *names):
    """Random numbers where a parameter's name begins with one of these, the same whatever else is shaken."""
    for name, parameter in module.named_parameters():
        if name.startswith(names):
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            parameter.data.normal_(std=0.2, generator=generator)


def fresh(where, *, shaken=(), **options):
    drafter = Ptp(
        **{"mode": "mask", "sampler": "eagle", "slots": 4, "rank": 4, "min_gain": 0.0, "budget": 64, **TREE, **options}
    )
    drafter.initialise(where, seed=0)
    shake(drafter.module, *shaken)
    return drafter


def batch_of(drafter):
    target = drafter.target
    written = Engine(target).generate(PROMPTS[:3], max_new_tokens=60, temperature=1.0, seed=21, ignore_eos=True)
    documents = [
        Document([*o.prompt_tokens, *o.tokens], len(o.prompt_tokens), request=i, temperature=1.0)
        for i, o in enumerate(written)
    ]
    batch = assemble([documents[:2], documents[2:]], 200, target, shifts=drafter.shifts)
    batch.taps = read_taps(batch, drafter.training_taps)
    return batch


def slots_of(drafter, batch, windows):
    reading = read(batch.target, batch.tokens, batch.documents, batch.positions)
    embeds = drafter.module.embed(torch.zeros(*windows.starts.shape, windows.slots), torch.zeros(windows.starts.shape))
    return run_behind(
        batch.target, reading, embeds.flatten(1, 2), windows.positions(batch.positions),
        windows.spans(batch.documents), drafter.module.adapter,
    ).hidden  # fmt: skip


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_before_it_hears_anything_it_drafts_as_eagle3_does(exact, temperature, tmp_path):
    """Slots run, and add nothing yet."""
    eagle = Eagle3(**TREE, vocabulary=30)
    eagle.initialise(exact, seed=2)
    shake(eagle.module, "")
    eagle.save_pretrained(tmp_path / "eagle3", dtype=torch.float64)
    ours = fresh(exact, vocabulary=30, shaken=("adapter", "embedding"))
    ours.begin_with(tmp_path / "eagle3")
    found = []
    for drafter in (eagle.for_decoding(), ours.for_decoding()):
        engine = Engine(exact, drafter, stand_down=False)
        outputs = engine.generate(PROMPTS[:3], temperature=temperature, **OPTIONS)
        found.append([[(r.drafted, r.accepted, r.tokens) for r in o.rounds_detail] for o in outputs])
        engine.close()
    assert found[0] == found[1]
    assert sum(r[1] for output in found[0] for r in output) > 5


def test_drafts_change_once_it_hears_and_texts_do_not(exact):
    plain = Engine(exact).generate(PROMPTS, temperature=0.9, **OPTIONS)
    rounds = []
    for shaken in ((), ("adapter", "embedding"), ("adapter", "embedding", "join")):
        engine = Engine(exact, fresh(exact, shaken=("net", *shaken)).for_decoding(), stand_down=False)
        outputs = engine.generate(PROMPTS, temperature=0.9, **OPTIONS)
        engine.close()
        assert [o.tokens for o in outputs] == [o.tokens for o in plain]
        rounds.append([[(r.drafted, r.accepted) for r in o.rounds_detail] for o in outputs])
    assert rounds[0] == rounds[1] != rounds[2]


def test_with_one_slot_a_draft_is_as_long_as_was_asked_for(exact):
    drafter = fresh(exact, shaken=("net",), budget=0, branches=1, nodes=0, draft_len=3)
    engine = Engine(exact, drafter.for_decoding(), stand_down=False)
    output = engine.generate(PROMPTS[0], **OPTIONS)[0]
    engine.close()
    assert output.rounds_detail[0].drafted == 3


def test_slots_of_an_older_round_are_not_heard(exact, monkeypatch):
    drafter = fresh(exact, shaken=("net", "join", "adapter", "embedding")).for_decoding()
    engine, ran = Engine(exact, drafter, stand_down=False), []
    scouts, paths = drafter.scouts, drafter._eagle.paths

    def every_second(context, draft):
        ran.append(len(ran) % 2 == 0)
        drafter._plan = None
        return scouts(context, draft) if ran[-1] else None

    def told(context, heard):
        assert [state is not None for state in heard.values()] == ([ran[-1]] if ran else [False])
        return paths(context, heard)

    monkeypatch.setattr(drafter, "scouts", every_second)
    monkeypatch.setattr(drafter._eagle, "paths", told)
    engine.generate([PROMPTS[0]], **OPTIONS)
    engine.close()
    assert len(ran) > 4


def test_a_window_is_heard_by_its_row_from_its_step_on(single):
    drafter = fresh(single, shaken=("net", "join"))
    batch = batch_of(drafter)
    windows = Windows(torch.tensor([[30, 60], [20, 0]]), torch.tensor([[True, True], [True, False]]), 4, drafter.shape)
    hidden = torch.randn(2, 8, single.hidden_size)
    before = torch.stack(outputs_of(drafter, batch, windows, hidden))
    silent = torch.stack(outputs_of(drafter, batch, None, None))
    heard = (before - silent).abs().amax(-1) > 0  # [steps, B, T]
    wanted = torch.zeros_like(heard)
    wanted[:, 0, 29] = wanted[:, 0, 59] = wanted[:, 1, 19] = True
    assert torch.equal(heard, wanted), "rows in front of real windows, and no other"
    for j in range(4):
        slots = hidden.clone()
        slots[0, 4 + j] += 1  # of the window that begins at 60
        moved = (torch.stack(outputs_of(drafter, batch, windows, slots)) - before).abs().amax(-1) > 0
        assert moved[:, 0, 59].tolist() == [step >= j for step in range(4)]
        moved[:, 0, 59] = False
        assert not bool(moved.any())


def outputs_of(drafter, batch, windows, hidden):
    """What the network says at each step, [B, T, H], as it is read."""
    seen = []
    hear = None if windows is None else hear_windows(drafter.module.join, windows, hidden)

    def spy(y, step):
        seen.append(y if hear is None else hear(y, step))
        return seen[-1]

    with torch.no_grad():
        unrolled_losses(drafter.module.net, batch, drafter.recipe.replace(depths=4), hear=spy)
    return seen


@torch.no_grad()
def test_decoding_grows_what_training_unrolls(single):
    """A chain drafted behind slots, taken for the text: training's states at that place choose the same tokens."""
    drafter = fresh(single, shaken=("net", "join", "adapter", "embedding"), branches=1, nodes=4)
    drafter.module.join.down_proj.weight *= 20
    batch, start = batch_of(drafter), 40
    windows = Windows(torch.tensor([[start], [start]]), torch.ones(2, 1, dtype=torch.bool), 4, drafter.shape)
    states = slots_of(drafter, batch, windows)
    eagle, net = drafter._eagle, drafter.module.net
    cache = eagle.follower.cache
    cache.reserve(slots=1, capacity=128)
    cache.truncate(0, 0)
    first = int((batch.documents[0, :start] != batch.documents[0, start - 1]).sum())  # of the document
    features = torch.cat([batch.taps[name] for name in net.taps], -1)[:1, first:start]
    tokens = batch.tokens[:1, first + 1 : start + 1]
    extend(net, single.embed, cache, features, tokens, torch.tensor([start - first]), 128)
    hear = eagle._hear([states[0]])
    drafted, _, _ = born(net, single.embed, cache, Plan(depth=4, branches=1, nodes=4), 1, 128, None, hear)
    deaf, _, _ = born(net, single.embed, cache, Plan(depth=4, branches=1, nodes=4), 1, 128, None)
    assert drafted.tolist() != deaf.tolist(), "or this says nothing about slots"
    written = batch.tokens.clone()
    written[0, start + 1 : start + 5] = drafted[0]
    told = dataclasses.replace(batch, tokens=written)
    told.taps = batch.taps  # of the text as it was: rows up to the window's are the same
    said = [net.head.to_target(net.head(net.readout(y[0, start - 1])).argmax()) for y in
            outputs_of(drafter, told, windows, states)]  # fmt: skip
    assert torch.stack(said).tolist() == drafted[0].tolist()


@pytest.mark.parametrize("mode", ["mask", "categorical"])
def test_gradients_reach_every_part(single, mode):
    drafter = fresh(single, mode=mode, vocabulary=30, shaken=("net", "join", "adapter", "embedding"))
    losses = drafter.objective(batch_of(drafter))
    losses.total.backward()
    for name, parameter in drafter.module.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().sum()) > 0, name
    assert losses.counts.shape == (4,)
    assert "gained" in losses.extra


def test_what_became_of_heard_guesses_is_counted(single):
    drafter = fresh(single, shaken=("net",))
    batch = batch_of(drafter)
    drafter.objective(batch)
    counted = drafter.module.calibration
    windows = batch.tokens.numel() / 4  # at density 1, of four slots
    assert windows / 2 < float(counted.reached[0]) <= windows, "some begin at the end of an answer"
    assert bool((counted.reached[1:] <= counted.passed[:-1]).all())
    assert bool((counted.passed <= counted.reached).all())


def test_a_checkpoint_comes_back_whole(exact, tmp_path):
    drafter = fresh(exact, vocabulary=30, shaken=("net", "join", "adapter", "embedding"))
    drafter.save_pretrained(tmp_path / "ptp", dtype=torch.float64)
    found = []
    for one in (drafter.for_decoding(), Ptp.from_pretrained(tmp_path / "ptp")):
        engine = Engine(exact, one, stand_down=False)
        outputs = engine.generate(PROMPTS[:2], temperature=0.9, **OPTIONS)
        found.append([[(r.drafted, r.accepted) for r in o.rounds_detail] for o in outputs])
        engine.close()
    assert found[0] == found[1]


def test_where_its_numbers_decide_nothing_no_slots_are_run(exact):
    drafter = fresh(exact, mode="categorical", shaken=("net", "join", "adapter", "embedding")).for_decoding()
    ran, scouts = [], drafter.scouts
    drafter.scouts = lambda context, draft: ran.append(scouts(context, draft)) or ran[-1]
    engine = Engine(exact, drafter, stand_down=False)
    with pytest.warns(UserWarning, match="no slots are run, and EAGLE-3's network drafts without them"):
        engine.generate([PROMPTS[0]], temperature=1.0, **OPTIONS)
    assert set(ran) == {None}
    engine.generate([PROMPTS[0]], temperature=1.0, noise="uniform", **OPTIONS)
    engine.close()
    assert ran[-3] is not None


def test_agreement_is_counted_where_slots_carry_numbers(exact):
    drafter = fresh(exact, mode="categorical")
    batch = batch_of(drafter)
    drafter.calibrate([dataclasses.replace(batch, **{
        name: getattr(batch, name)[:1] for name in ("tokens", "documents", "positions", "answer", "temperature")
    })])  # fmt: skip
    assert 0 < drafter.module.agreement.share(0.7) < 1


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "one_hot"}, "pass mode=mask or mode=categorical"),
        ({"bare": 0.5}, "leave bare away"),
        ({"sampler": "hydra"}, "one of none, chain, eagle"),
        ({"nodes": -1}, "nodes and draft_len at least 0"),
        ({"mode": "categorical", "inverse": True}, "leave one away"),
    ],
)
def test_what_does_not_go_together_is_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Ptp(**{"mode": "mask", "sampler": "eagle", **options})


def test_two_passes_are_for_slots(exact):
    sampler = Sampler(Settings(temperature=1.0, noise="uniform"), NoiseDice(Noise(5), 0, "uniform"))
    with pytest.raises(ConfigError, match="decode 'eagle' with an Engine"):
        two_pass(exact, fresh(exact), sampler, PROMPTS[0], 8)


def test_a_model_outside_the_family_table_is_refused():
    with pytest.raises(UnsupportedError, match="use sampler=chain or sampler=none"):
        fresh(Target(make_model("stablelm")))


def test_what_cannot_be_begun_with_is_refused_in_words(exact, tmp_path):
    eagle, drafter = Eagle3(**TREE, vocabulary=20, head="own"), fresh(exact, vocabulary=30)
    eagle.initialise(exact, seed=2)
    eagle.save_pretrained(tmp_path / "eagle3")
    with pytest.raises(CheckpointError, match=r"was trained with .*vocabulary=20, and this 'ptp' has .*vocabulary=30"):
        drafter.begin_with(tmp_path / "eagle3")
    other = Eagle3(**TREE, vocabulary=30, norm_output=False, layers=2)
    other.initialise(exact, seed=2)
    other.save_pretrained(tmp_path / "other")
    for one in (drafter, eagle):
        with pytest.raises(
            CheckpointError, match=r"trained with layers=2, .*norm_output=False, and this .* has layers=1"
        ):
            one.begin_with(tmp_path / "other")
    with pytest.raises(CheckpointError, match="is no folder of a drafter, and none of that name ships for"):
        drafter.begin_with("medusa")
    drafter.save_pretrained(tmp_path / "ptp")
    with pytest.raises(CheckpointError, match="holds drafter 'ptp', which 'eagle3' cannot begin with"):
        eagle.begin_with(tmp_path / "ptp")
    again = fresh(exact, vocabulary=30, shaken=("net", "join"))
    again.begin_with(tmp_path / "ptp")
    assert float(again.module.join.down_proj.weight.abs().sum()) == 0, "its own kind it takes whole"


@pytest.mark.parametrize("vocabulary", [12, 30, 0])
def test_weights_may_go_on_with_another_draft_vocabulary(vocabulary, exact, tmp_path):
    """Rows of the target's head come with the ids: nothing of the weights depends on them."""
    first = Eagle3(**TREE, vocabulary=20)
    first.initialise(exact, seed=2)
    first.save_pretrained(tmp_path / "eagle3", dtype=torch.float32)
    counts = torch.arange(exact.vocabulary)
    for drafter, net in (
        (one := Eagle3(**TREE, vocabulary=vocabulary), lambda: one.module),
        (two := Ptp(mode="mask", sampler="eagle", slots=4, rank=4, vocabulary=vocabulary), lambda: two.module.net),
    ):
        drafter.prepare(counts, exact)
        drafter.initialise(exact, seed=3)
        ids = net().head.ids.clone()
        drafter.begin_with(tmp_path / "eagle3")
        assert torch.equal(net().head.ids, ids), "the ids of this run's corpus"
        assert len(ids) == (vocabulary or exact.vocabulary)
        assert torch.equal(net().fc.weight, first.module.fc.weight)
        full = exact.model.get_output_embeddings().weight
        hidden = torch.randn(3, 32, dtype=full.dtype)
        torch.testing.assert_close(net().head(hidden), (hidden @ full.T)[:, ids])
