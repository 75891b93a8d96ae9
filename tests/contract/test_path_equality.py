"""The promise: same seed, same tokens, whatever the drafter, the settings, the batch and the draft length.

float32, tiny models of every family, equality asserted outright. Matrices are chosen so that axes which do not
interact are not multiplied: every family meets every drafter at two temperatures; every sampling setting meets every
drafter on one family; hypothesis mixes the rest.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.errors import UnsupportedError
from tiny import DRAFTERS, EOS, FAMILIES, GENERIC, INSIDE, PROMPTS, make_model, target

SETTINGS = {
    "greedy": {},
    "cool": {"temperature": 0.7},
    "hot": {"temperature": 1.3},
    "top-p": {"temperature": 1.0, "top_p": 0.9},
    "top-k": {"temperature": 1.0, "top_k": 5},
    "min-p": {"temperature": 1.0, "min_p": 0.1},
    "repetition": {"temperature": 0.7, "repetition_penalty": 1.3},
    "presence and frequency": {"temperature": 0.7, "presence_penalty": 0.4, "frequency_penalty": 0.3},
    "greedy with penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
    "bias and minimum": {"temperature": 1.0, "logit_bias": {EOS: 3.0, 7: 1.0}, "min_new_tokens": 6},
    "uniform": {"temperature": 1.0, "noise": "uniform"},
    "uniform top-p": {"temperature": 0.8, "top_p": 0.9, "noise": "uniform"},
}


def plain(name, prompts, **options):
    return Engine(target(name), max_batch=8, check_integrity=True).generate(prompts, **options)


def drafted(name, drafter, prompts, *, max_batch=8, **options):
    engine = Engine(target(name), DRAFTERS[drafter](name), max_batch=max_batch, stand_down=False, check_integrity=True)
    return engine.generate(prompts, **options)


def same(ours, wanted):
    assert [o.tokens for o in ours] == [o.tokens for o in wanted]
    assert [o.finish_reason for o in ours] == [o.finish_reason for o in wanted]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("family", [*FAMILIES, *GENERIC])
def test_every_drafter_on_every_family(family, drafter):
    for temperature in (0.0, 0.9):
        options = {"max_new_tokens": 24, "temperature": temperature, "seed": 11}
        wanted = plain(family, PROMPTS[:3], **options)
        try:
            ours = drafted(family, drafter, PROMPTS[:3], **options)
        except UnsupportedError:
            assert drafter in INSIDE or drafter.split()[0] in INSIDE
            assert family in GENERIC, "only families outside the table may refuse, and only who looks inside"
            return
        same(ours, wanted)
        assert sum(o.stats.drafted for o in ours) > 0, "a contract kept by never drafting proves nothing"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_with_every_drafter(name, drafter):
    options = {"max_new_tokens": 30, "seed": 2, **SETTINGS[name]}
    same(drafted("llama", drafter, PROMPTS[:4], **options), plain("llama", PROMPTS[:4], **options))


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("max_batch", [1, 3, 8])
def test_batch_mates_change_nothing(drafter, max_batch):
    """Eight requests of different lengths, in passes of 1, 3 or 8: those that wait join when another has left."""
    options = {"max_new_tokens": 20, "temperature": 0.8, "seed": 4}
    alone = [plain("llama", [prompt], request=i, **options)[0] for i, prompt in enumerate(PROMPTS)]
    same(drafted("llama", drafter, PROMPTS, max_batch=max_batch, **options), alone)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_requests_that_join_late_with_settings_of_their_own(drafter):
    mixed = [
        {"temperature": 0.0, "max_new_tokens": 25},
        {"temperature": 1.2, "max_new_tokens": 9, "seed": 8},
        {"temperature": 0.7, "top_k": 6, "max_new_tokens": 17, "request": 5},
        {"temperature": 1.0, "repetition_penalty": 1.5, "max_new_tokens": 12},
    ]
    engine = Engine(target("llama"), DRAFTERS[drafter]("llama"), max_batch=3, stand_down=False, check_integrity=True)
    outputs, handles = {}, []
    for number, own in enumerate(mixed):
        handles.append(engine.submit(PROMPTS[number], **own))
        for progress in engine.step() + engine.step():
            if progress.chunk.output:
                outputs[progress.uid] = progress.chunk.output
    while engine.active:
        for progress in engine.step():
            if progress.chunk.output:
                outputs[progress.uid] = progress.chunk.output
    for number, own in enumerate(mixed):
        request = own.get("request", 0)
        wanted = plain("llama", [PROMPTS[number]], **{**own, "request": request})[0]
        assert outputs[handles[number]].tokens == wanted.tokens


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("spec", ["prompt_lookup:min_ngram=1", "suffix:min_probability=0.05", "layer_skip"])
def test_draft_lengths(spec, length):
    option = "," if ":" in spec else ":"
    engine = Engine(target("llama"), f"{spec}{option}draft_len={length}", stand_down=False, check_integrity=True)
    options = {"max_new_tokens": 25, "temperature": 0.6, "seed": length}
    ours = engine.generate(PROMPTS[:3], **options)
    same(ours, plain("llama", PROMPTS[:3], **options))
    if not spec.startswith("suffix"):
        assert max(r.depth for o in ours for r in o.rounds_detail) <= length


@settings(max_examples=60)
@given(
    drafter=st.sampled_from(list(DRAFTERS)),
    seed=st.integers(0, 2**64 - 1),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    count=st.integers(1, 4),
    max_new_tokens=st.integers(1, 20),
    eos=st.lists(st.integers(0, 39), max_size=12).map(tuple),
)
def test_any_seed_any_eos_any_length(drafter, seed, temperature, count, max_new_tokens, eos):
    """With a dozen eos ids out of forty, they fall at every offset inside accepted blocks."""
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed, "eos": eos}
    same(drafted("llama", drafter, PROMPTS[:count], **options), plain("llama", PROMPTS[:count], **options))


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_one_to_the_context_limit(drafter):
    """The last position of the context is used, never one more."""
    prompt = (PROMPTS[1] * 40)[:240]
    ours = drafted("llama", drafter, [prompt], max_new_tokens=100, ignore_eos=True)
    same(ours, plain("llama", [prompt], max_new_tokens=100, ignore_eos=True))
    assert len(ours[0].tokens) == 16
    assert ours[0].finish_reason == "length"


@pytest.mark.parametrize("family", [*FAMILIES, *GENERIC])
def test_greedy_equals_transformers_generate(family):
    model = target(family).model
    for prompt in PROMPTS[:5]:
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
        ours = Engine(target(family), "prompt_lookup:min_ngram=1").generate([prompt], max_new_tokens=30)[0]
        assert list(ours.tokens) == wanted[len(prompt) :].tolist()


def test_greedy_with_processors_equals_transformers_generate():
    model = target("llama").model
    for prompt in PROMPTS[:5]:
        wanted = model.generate(
            torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=1.3, min_new_tokens=8,
            pad_token_id=0,
        )[0]  # fmt: skip
        ours = Engine(target("llama"), "suffix").generate(
            [prompt], max_new_tokens=30, repetition_penalty=1.3, min_new_tokens=8
        )[0]
        assert list(ours.tokens) == wanted[len(prompt) :].tolist()


def test_custom_processors_see_each_nodes_own_prefix_once_and_in_order():
    seen = {}

    def spy(name):
        def processor(ids, scores):
            seen.setdefault(name, []).append(ids[0].tolist())
            return scores.index_fill(1, ids[0, -1:], float("-inf"))  # depends on the prefix: never repeat a token

        return processor

    options = {"max_new_tokens": 20, "temperature": 0.8, "ignore_eos": True}
    wanted = plain("llama", [PROMPTS[0]], processors=(spy("plain"),), **options)
    for drafter in DRAFTERS:
        same(drafted("llama", drafter, [PROMPTS[0]], processors=(spy(drafter),), **options), wanted)
        assert seen[drafter] == seen["plain"]


@pytest.mark.parametrize("drafter", ["layer_skip", "draft_model own"])
def test_acceptance_at_the_first_depth_does_not_depend_on_draft_length(drafter):
    """A dependence would mean stale drafter state. Greedy text is fixed, so this is an equality, not a statistic."""
    if drafter == "layer_skip":
        drafters = {n: make_drafter(f"layer_skip:draft_len={n}") for n in (1, 6)}
    else:
        from outpace.drafters.draft_model import DraftModel
        from tiny import small_target

        drafters = {n: DraftModel(model=small_target(), draft_len=n) for n in (1, 6)}
    right = {}
    for n, one in drafters.items():
        engine = Engine(target("llama"), one, stand_down=False)
        output = engine.generate([PROMPTS[0]], max_new_tokens=60, ignore_eos=True)[0]
        starts, position = {}, 0
        for played in output.rounds_detail:
            if played.drafted:
                starts[position] = played.accepted > 0
            position += len(played.tokens)
        right[n] = starts
    shared = right[1].keys() & right[6].keys()
    assert len(shared) > 5
    assert all(right[1][position] == right[6][position] for position in shared)


def test_a_perfect_drafter_is_accepted_whole_and_a_garbage_one_costs_no_token():
    from outpace.drafters import TokenDrafter
    from outpace.laws import Tree

    options = {"max_new_tokens": 31, "temperature": 1.0, "seed": 9, "ignore_eos": True}
    wanted = plain("llama", [PROMPTS[0]], **options)[0]

    class Oracle(TokenDrafter):
        name = "oracle"

        def guess(self, request):
            at = len(request.tokens) - request.prompt_length
            return Tree.chain(list(wanted.tokens[at : at + 5]))

    class Garbage(TokenDrafter):
        name = "garbage"

        def guess(self, request):
            at = len(request.tokens) - request.prompt_length
            right = wanted.tokens[at] if at < len(wanted.tokens) else 0
            return Tree.chain([(right + 1) % 40, 3, 4])

    perfect = Engine(target("llama"), Oracle(), stand_down=False).generate([PROMPTS[0]], **options)[0]
    assert perfect.tokens == wanted.tokens
    assert perfect.stats.accepted_per_drafted == 1.0
    assert perfect.rounds == 6, "31 tokens, six a round but the last"
    useless = Engine(target("llama"), Garbage(), stand_down=False).generate([PROMPTS[0]], **options)[0]
    assert useless.tokens == wanted.tokens
    assert useless.stats.accepted == 0
    assert useless.emitted_per_round == 1.0


def test_every_registered_drafter_is_under_contract():
    from outpace.drafters import DRAFTERS as REGISTERED

    covered = {name.split()[0] for name in DRAFTERS}
    assert set(REGISTERED) <= covered


@torch.inference_mode()
@pytest.mark.parametrize("family", [*FAMILIES, *GENERIC])
def test_the_tiny_models_are_worth_the_trouble(family):
    """Their laws are neither flat (ln 40 = 3.7 nats) nor one-hot, or equality would say little."""
    entropies = []
    for prompt in PROMPTS:
        p = torch.softmax(make_model(family)(torch.tensor([prompt])).logits[0, -1].float(), -1)
        entropies.append(float(-(p * p.clamp_min(1e-12).log()).sum()))
    assert 0.5 < sum(entropies) / len(entropies) < 3.3
