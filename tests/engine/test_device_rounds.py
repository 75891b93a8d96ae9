"""Rounds on the device, played by Triton's interpreter: the text of plain decoding, the drafts of `propose`."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace import Engine
from outpace.drafters.device import fused
from outpace.drafters.device.following import FollowingDraft
from outpace.drafters.eagle import Eagle, Eagle2, Eagle3
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.ptp import Ptp
from outpace.engine import engine as engine_module
from outpace.engine.device import rounds as rounds_module
from outpace.engine.device.lanes import Flight
from spies import paths_laid, served_each, submit_all, trees_proposed
from tiny import DEFAULT_PATHS, PROMPTS
from uncaptured import Mark, uncaptured_target

MAKERS = {
    "eagle3": lambda: Eagle3(draft_len=3, branches=2, nodes=6, vocabulary=30, taps=("in:0", "in:1")),
    "eagle3 chain": lambda: Eagle3(draft_len=3, branches=1, nodes=3, layers=2, vocabulary=0, taps=("in:1", "pre_norm")),
    "eagle": lambda: Eagle(paths=DEFAULT_PATHS[:7]),
    "eagle2": lambda: Eagle2(draft_len=3, branches=2, nodes=5),
    "mtp": lambda: MTP(draft_len=3, branches=2, nodes=6, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=2, nodes=5, vocabulary=30),
    "medusa": lambda: Medusa(heads=2, nodes=5, vocabulary=30),
    "ptp": lambda: Ptp(mode="mask", sampler="eagle", slots=3, rank=4, branches=2, nodes=6, budget=7, vocabulary=30),
    "ptp reads": lambda: Ptp(
        mode="categorical", sampler="eagle", slots=4, rank=4, branches=2, nodes=5, budget=9, any_temperature=True
    ),
}  # fmt: skip


@pytest.fixture
def _unfused(monkeypatch):
    """Drafts by the functions of `growth`: the interpreter takes long over fused kernels."""
    monkeypatch.setattr(fused, "device_draft", FollowingDraft)


def awake(drafter, target):
    """Random weights that guess well now and then: near the target's own top state where a drafter starts there."""
    drafter.initialise(target, seed=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in drafter.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return drafter


def device_trees(engine):
    """What the engine lays into the rows of each pass, per request: {tokens committed: set of paths}."""
    found = {}
    lay = rounds_module.lay

    def spy(tokens, parents, depth, room, vocabulary, inputs):
        rows = lay(tokens, parents, depth, room, vocabulary, inputs)
        for b, request in enumerate(engine._context.requests):
            found[request.sampler.dice.request, int(inputs.lengths[b]) + 1] = paths_laid(inputs, b)
        return rows

    return found, spy


@pytest.mark.parametrize(
    ("name", "temperature", "fuses"),
    [
        *((name, heat, False) for name in MAKERS for heat in (0.0, 0.8)),
        ("eagle3", 0.8, True),
        ("mtp", 0.0, True),
        ("ptp", 0.8, True),
    ],
)
def test_the_text_is_that_of_plain_decoding_and_the_drafts_are_those_of_propose(name, temperature, fuses, monkeypatch):
    if not fuses:
        monkeypatch.setattr(fused, "device_draft", FollowingDraft)
    target = uncaptured_target(monkeypatch)
    options = {"max_new_tokens": 10, "temperature": temperature, "seed": 5, "ignore_eos": True}
    options["noise"] = "uniform" if name == "ptp reads" else "gumbel"
    prompts = [PROMPTS[0], PROMPTS[3]]
    wanted = Engine(target, path="readable").generate(prompts, **options)
    drafter = awake(MAKERS[name](), target)
    readable = drafter.for_decoding()
    said = trees_proposed(readable)
    read = Engine(target, readable, path="readable", stand_down=False).generate(prompts, **options)
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    monkeypatch.setattr(drafter, "propose", None)  # not to be called
    found, spy = device_trees(engine)
    monkeypatch.setattr(rounds_module, "lay", spy)
    outputs = engine.generate(prompts, **options)
    assert [o.tokens for o in outputs] == [o.tokens for o in wanted]
    shared = found.keys() & said.keys()
    assert len(shared) >= 6
    assert {key: found[key] for key in shared} == {key: said[key] for key in shared}
    for ours, theirs in zip(outputs, read, strict=True):
        assert ours.rounds_detail == theirs.rounds_detail
        assert ours.stats.accepted_at == theirs.stats.accepted_at
        assert ours.stats.reached == theirs.stats.reached


def test_while_drafts_of_the_host_rest_rounds_run_ahead(monkeypatch):
    target = uncaptured_target(monkeypatch)
    options = {"max_new_tokens": 24, "temperature": 0.8, "seed": 5, "ignore_eos": True}
    wanted = Engine(target, path="readable").generate(PROMPTS[:2], **options)
    engine = Engine(target, "prompt_lookup:min_ngram=1,draft_len=3", check_integrity=True)
    under_way = []
    decide = engine.pace.decide

    def pauses(requests):
        decide(requests)
        for request in requests:
            at = request.round_index % 8
            request.speculate, request.rest = at < 3, max(0, 7 - at) if at >= 3 else 0

    rounds = engine._device_rounds()
    play = rounds.play

    def spy(context, *args):
        found = play(context, *args)
        under_way.append((context.requests[0].speculate, context.requests[0].rest, len(rounds._flying)))
        return found

    monkeypatch.setattr(engine.pace, "decide", pauses)
    monkeypatch.setattr(rounds, "play", spy)
    assert [o.tokens for o in engine.generate(PROMPTS[:2], **options)] == [o.tokens for o in wanted]
    assert {ahead for speculates, rest, ahead in under_way if speculates or not rest} == {0}
    assert {ahead for speculates, rest, ahead in under_way[:-2] if rest} == {1}


@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize("name", ["eagle3", "medusa", "ptp"])
def test_requests_join_leave_and_stand_down(name, monkeypatch):
    """Seats move, rounds launched ahead are thrown away, drafts pause: what is owed is never lost nor read twice."""
    target = uncaptured_target(monkeypatch)
    lengths = [3, 14, 9, 12, 7]
    options = {"temperature": 0.8, "seed": 5, "ignore_eos": True}

    def text(engine):
        uids = submit_all(engine, PROMPTS[:5], lengths, **options)
        decide = engine.pace.decide

        def pauses(requests):
            decide(requests)
            for request in requests:
                request.speculate = request.round_index % 6 < 4 or request.sampler.dice.request == 1

        engine.pace.decide = pauses
        done, steps = {}, 0
        while engine.active:
            for progress in engine.step():
                if progress.chunk.output is not None:
                    done[progress.uid] = progress.chunk.output.tokens
            steps += 1
            if steps == 5:
                done[uids[3]] = engine.cancel(uids[3]).tokens[:0]
        return [done[uid] for uid in uids]

    wanted = text(Engine(target, path="readable", max_batch=3))
    drafter = awake(MAKERS[name](), target)
    readable = drafter.for_decoding()
    said = trees_proposed(readable)
    assert text(Engine(target, readable, path="readable", max_batch=3, stand_down=False)) == wanted
    engine = Engine(target, drafter, max_batch=3, stand_down=False, check_integrity=True)
    found, spy = device_trees(engine)
    monkeypatch.setattr(rounds_module, "lay", spy)
    assert text(engine) == wanted
    shared = {key for key in found.keys() & said.keys() if found[key] and said[key]}
    assert len(shared) > 15
    assert {key: found[key] for key in shared} == {key: said[key] for key in shared}


LAWS = [
    {"temperature": 0.9, "top_p": 0.7},
    {"temperature": 1.2, "top_k": 5, "noise": "uniform"},
    {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {},
]


@pytest.mark.usefixtures("_unfused")
@pytest.mark.parametrize(("name", "laws"), [(None, LAWS), ("medusa", LAWS[2:3])], ids=["plain", "medusa"])
def test_truncated_laws_of_all_kinds_stay_on_the_device(name, laws, monkeypatch):
    target = uncaptured_target(monkeypatch)
    common = {"max_new_tokens": 5, "seed": 5, "ignore_eos": True}
    options = [{"request": i, **common, **law} for i, law in enumerate(laws)]
    plain = Engine(target, path="readable")
    wanted = [plain.generate(p, **o)[0].tokens for p, o in zip(PROMPTS, options, strict=False)]
    drafter = awake(MAKERS[name](), target) if name else None
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    monkeypatch.setattr(engine_module, "play_round", None)  # not to be called
    assert served_each(engine, PROMPTS, options) == wanted


@pytest.mark.usefixtures("_unfused")
def test_steady_state_captures_nothing_and_settings_may_change(monkeypatch):
    target = uncaptured_target(monkeypatch)
    drafter = awake(MAKERS["eagle3"](), target)
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    plain = Engine(target, path="readable")
    options = {"max_new_tokens": 5, "seed": 5, "ignore_eos": True}
    for changes in (
        {"temperature": 0.9},
        {"temperature": 0.0},
        {"temperature": 0.9, "processors": (lambda _, scores: scores / 2,)},
    ) * 2:
        seen = target.fast.capture.graphs
        found = engine.generate(PROMPTS[0], **options, **changes)[0]
        assert found.tokens == plain.generate(PROMPTS[0], **options, **changes)[0].tokens
    assert target.fast.capture.graphs == seen


@pytest.mark.usefixtures("_unfused")
def test_no_room_for_a_draft_is_an_error_that_names_the_shape_and_leaves_the_engine_usable(monkeypatch):
    from outpace.errors import OutOfMemoryError

    target = uncaptured_target(monkeypatch)
    drafter = awake(MAKERS["eagle3"](), target)
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    capture = target.fast.capture_work

    def full(work, what, warm=None):
        if "drafts" in what:
            raise OutOfMemoryError(f"no GPU memory to capture {what}")
        return capture(work, what, warm)

    options = {"max_new_tokens": 8, "ignore_eos": True}
    with monkeypatch.context() as patch:
        patch.setattr(target.fast, "capture_work", full)
        with pytest.raises(OutOfMemoryError, match=r"rounds of 1 x 8 rows .* drafts of 6 nodes behind up to 256 rows"):
            engine.generate(PROMPTS[0], **options)
    wanted = Engine(target, path="readable").generate(PROMPTS[0], **options)
    assert engine.generate(PROMPTS[0], **options)[0].tokens == wanted[0].tokens


@pytest.mark.parametrize(("drafted", "wanted"), [(True, (3.0, 4.0, 1.0)), (False, (0.0, 7.0, 1.0))])
def test_the_parts_of_a_round_add_up_to_it(drafted, wanted):
    """The device's clock says where parts end; the draft's end is nobody's where there was none."""
    begin, end = Mark(), Mark()
    begin.at, end.at = 5.0, 5.008
    stamps = torch.tensor([1_764_000_000_002_000_000, 1_764_000_000_006_000_000, 1_764_000_000_007_000_000])
    flight = Flight(torch.zeros(1, 8), stamps, {}, drafted, begin, end)
    assert flight.spans() == pytest.approx(wanted)


def test_trees_too_wide_to_be_laid_are_drafted_on_the_host(monkeypatch):
    monkeypatch.setattr(rounds_module, "WIDEST", 5)
    target = uncaptured_target(monkeypatch)
    drafter = awake(MAKERS["eagle3"](), target)
    options = {"max_new_tokens": 6, "ignore_eos": True}
    wanted = Engine(target, path="readable").generate(PROMPTS[0], **options)
    monkeypatch.setattr(rounds_module, "lay", None)  # not to be called
    found = Engine(target, drafter, stand_down=False).generate(PROMPTS[0], **options)
    assert found[0].tokens == wanted[0].tokens
    assert found[0].stats.drafted > 0
