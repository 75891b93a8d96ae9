"""Drafters with a cache of their own, in the real loop: what is in the cache, and what a draft depends on."""

import pytest
import torch

from drafters.learned import fresh
from outpace import Engine
from outpace.drafters import Context
from outpace.drafters.eagle import Eagle, Eagle3
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, target

MAKERS = {
    "eagle": lambda: Eagle(),
    "eagle3": lambda: Eagle3(layers=2, draft_len=4, branches=3, nodes=9, vocabulary=30),
    "mtp": lambda: MTP(draft_len=3, branches=1, nodes=3, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=2, nodes=6, vocabulary=0),
}


@torch.inference_mode()
@pytest.mark.parametrize("name", MAKERS)
def test_the_cache_is_a_fresh_reading_of_true_features_after_every_round(name, monkeypatch):
    """Ragged batch, requests of different lengths, some standing down for a while: no guess is ever kept."""
    drafter = fresh(MAKERS[name](), awake=False)
    twin = drafter.for_decoding()
    checked = 0
    grow = drafter.grow

    def watch(batch, width, draws):
        nonlocal checked
        for seat, request in enumerate(drafter.seats.requests):
            tokens = request.tokens
            rows = len(tokens) - 1
            assert drafter.cache.lengths[seat] == int(drafter.cache.at[seat]) == rows
            if not rows:
                continue
            one = assemble([[Document(tokens, 1)]], len(tokens), target())
            taps = read_taps(one, drafter.needs.taps)
            twin.seats.requests, twin.cache.lengths[:] = [], [0] * len(twin.cache.lengths)
            twin.cache.reserve(slots=1, capacity=drafter.cache.capacity)
            twin.cache.truncate(0, 0)
            features = torch.cat([taps[tap] for tap in drafter.module.taps], -1)[0, :rows]
            twin._read(Context(target(), None), {0: (features, tokens[1:])}, rows, slots=[0])
            for ours, want in (
                (drafter.cache.keys[:, seat, :, :rows], twin.cache.keys[:, 0, :, :rows]),
                (drafter.cache.values[:, seat, :, :rows], twin.cache.values[:, 0, :, :rows]),
                (drafter.cache.top[seat], twin.cache.top[0]),
            ):
                torch.testing.assert_close(ours, want, atol=2e-4, rtol=1e-3)
            checked += 1
        return grow(batch, width, draws)

    monkeypatch.setattr(drafter, "grow", watch)
    engine = Engine(target(), drafter, max_batch=3, stand_down=False, check_integrity=True)
    decide = engine.pace.decide

    def pauses(requests):
        decide(requests)
        for request in requests:
            request.speculate = not 4 <= request.round_index < 12

    monkeypatch.setattr(engine.pace, "decide", pauses)
    engine.generate(PROMPTS[:5], max_new_tokens=18, temperature=0.8, ignore_eos=True)
    assert checked > 20


@pytest.mark.parametrize("name", ["eagle3", "mtp"])
def test_the_first_draft_token_does_not_depend_on_how_many_follow(name):
    """A dependence would mean that keys of guesses were kept (spec: the classic silent bug)."""
    firsts = {}
    for length in (1, 5):
        make = {"eagle3": lambda n: Eagle3(draft_len=n, branches=1, nodes=n, vocabulary=0), "mtp": lambda n: MTP(
            draft_len=n, branches=1, nodes=n, vocabulary=0)}[name]  # fmt: skip
        drafter = fresh(make(length), awake=False)
        seen = firsts[length] = {}
        propose = drafter.propose

        def spy(context, propose=propose, seen=seen):
            draft = propose(context)
            seen[len(context.requests[0].tokens)] = int(draft.tokens[0, 0])
            return draft

        drafter.propose = spy
        Engine(target(), drafter, stand_down=False).generate([PROMPTS[0]], max_new_tokens=40, ignore_eos=True)
    shared = firsts[1].keys() & firsts[5].keys()
    assert len(shared) > 10
    assert all(firsts[1][at] == firsts[5][at] for at in shared)


@pytest.mark.parametrize("name", [*MAKERS, "medusa"])
def test_a_prompt_of_one_token_has_nothing_to_draft_from_and_costs_no_text(name):
    from outpace.drafters.medusa import Medusa

    drafter = fresh({**MAKERS, "medusa": lambda: Medusa(heads=2, vocabulary=0)}[name]())
    ours = Engine(target(), drafter, stand_down=False).generate([[20]], max_new_tokens=10, ignore_eos=True)[0]
    assert ours.tokens == Engine(target()).generate([[20]], max_new_tokens=10, ignore_eos=True)[0].tokens
    assert ours.rounds_detail[0].drafted == 0
    assert ours.rounds_detail[1].drafted > 0


def test_the_drafter_is_read_in_one_pass_per_round(monkeypatch):
    drafter = fresh(Eagle3(draft_len=3, branches=1, nodes=3, vocabulary=0), awake=False)
    widths = []
    read = drafter._read

    def spy(context, rows, static, *, slots):
        widths.append((static, slots))
        return read(context, rows, static, slots=slots)

    monkeypatch.setattr(drafter, "_read", spy)
    engine = Engine(target(), drafter, stand_down=False)
    out = engine.generate([PROMPTS[0]], max_new_tokens=20, ignore_eos=True)[0]
    assert widths[0] == (7, [0]), "the prompt, alone"
    reads = [width for width, _ in widths[1:]]
    assert set(reads) <= {1, 2, 3, 4}, "no more rows than are owed, on a CPU"
    assert len(reads) <= out.rounds
