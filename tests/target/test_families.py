"""A tree block behind a ragged cache gives the logits of separate plain passes; the cache is a fresh prefill's."""

import pytest
import torch
import transformers as hf

from outpace.errors import ConfigError, UnsupportedError
from outpace.laws import Tree
from outpace.target import Block, Target
from outpace.target.families import Family, find_family
from tiny import FAMILIES, GENERIC, PROMPTS, SHAPE, make_model

EVERY = [*FAMILIES, *GENERIC]
TREES = [Tree([2, 3, 4, 5, 6], [-1, -1, 0, 2, 0]), Tree([7, 8], [-1, 0]), Tree()]


@pytest.fixture(scope="module", params=EVERY)
def target(request):
    return Target(make_model(request.param, dtype=torch.float64))


def path_to(tree, node):
    path = []
    while node >= 0:
        path.append(tree.tokens[node])
        node = tree.parents[node]
    return path[::-1]


@torch.inference_mode()
def test_tree_rows_equal_plain_passes_and_the_cache_a_fresh_prefill(target):
    prompts = PROMPTS[:3]
    roots = [9, 10, 11]
    cache = target.new_cache(slots=3)
    for slot, prompt in enumerate(prompts):
        target.prefill(prompt, cache, slot=slot)
    block = Block.of(roots, TREES, cache.lengths, target.device)
    block_without_padding = Block.of(roots[:1], TREES[:1], cache.lengths[:1], target.device)
    block_without_padding.check()
    logits = target.run(block, cache).logits
    for b, tree in enumerate(TREES):
        for node in range(-1, len(tree)):
            ids = torch.tensor([[*prompts[b], roots[b], *path_to(tree, node)]])
            plain = target.model(ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[b, node + 1], plain, atol=1e-10, rtol=1e-10)

    kept = [[0, 1, 3, 4], [0, 1, 2], [0]]
    cache.commit(kept)
    cache.check_integrity([length + 1 for length in cache.lengths])
    for b, rows in enumerate(kept):
        text = [*prompts[b], roots[b], *(TREES[b].tokens[row - 1] for row in rows[1:])]
        fresh = target.new_cache()
        target.prefill(text, fresh)
        for layer in range(target.layers_total):
            for ours, wanted in zip(cache.entries(layer, b), fresh.entries(layer, 0), strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-10, rtol=1e-10)


@torch.inference_mode()
def test_long_prompts_are_prefilled_in_chunks(target, monkeypatch):
    prompt = [token % 40 for token in range(3, 60)]
    whole, parts = target.new_cache(), target.new_cache()
    target.prefill(prompt, whole)
    monkeypatch.setattr("outpace.target.model.PREFILL_CHUNK", 13)
    target.prefill(prompt, parts)
    assert whole.lengths == parts.lengths == [57]
    for layer in range(target.layers_total):
        for one, other in zip(whole.entries(layer, 0), parts.entries(layer, 0), strict=True):
            torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10)


@torch.inference_mode()
def test_model_is_left_as_it_was(target):
    before = target.config._attn_implementation
    ids = torch.tensor([PROMPTS[0]])
    plain = target.model(ids).logits
    cache = target.new_cache()
    target.prefill(PROMPTS[0], cache)
    assert target.config._attn_implementation == before
    assert torch.equal(target.model(ids).logits, plain)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in target.model.modules())


@torch.inference_mode()
def test_post_norm_tap_is_the_heads_input(target):
    cache = target.new_cache()
    read = target.run(Block.chain([PROMPTS[0]], [0], target.device), cache, taps={"post_norm"})
    head = target.model.get_output_embeddings()
    want = target.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True, use_cache=False).hidden_states[-1]
    torch.testing.assert_close(read.taps["post_norm"], want, atol=1e-10, rtol=1e-10)
    assert head(want).shape == read.logits.shape


def test_every_family_of_the_table_is_tested():
    covered = {find_family(config(**{**SHAPE, **extra})).name for config, _, extra in FAMILIES.values()}
    assert covered == {family.name for family in __import__("outpace.target.families", fromlist=["FAMILIES"]).FAMILIES}


def test_families_outside_the_table_say_what_they_cannot_give():
    target = Target(make_model("stablelm"))
    assert target.family is None
    with pytest.raises(UnsupportedError, match="only the tap 'post_norm'"):
        target.run(Block.chain([[1]], [0], target.device), target.new_cache(), taps={"out:0"})
    with pytest.raises(UnsupportedError, match="layers cannot be skipped"):
        target.view([0])
    with pytest.raises(UnsupportedError, match="cannot stop in the middle"):
        target.begin(Block.chain([[1]], [0], target.device), target.new_cache(), upto=1)


def test_a_forward_that_ignores_positions_is_refused_at_load():
    model = make_model("stablelm")
    forward = model.forward

    def deaf(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else torch.zeros_like(position_ids), **kwargs)

    model.forward = deaf
    with pytest.raises(UnsupportedError, match="does not give the same logits"):
        Target(model)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: hf.MambaForCausalLM(hf.MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=2)),
            "cannot take it back",
        ),
        (
            lambda: hf.T5ForConditionalGeneration(
                hf.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "encoder-decoder",
        ),
        (
            lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2)),
            "outside the family",
        ),
    ],
    ids=["recurrent", "encoder-decoder", "alibi"],
)
def test_models_that_cannot_work_are_refused_with_the_reason(make, words):
    with pytest.raises(UnsupportedError, match=words):
        Target(make())


def test_attention_without_row_masks_is_refused():
    model = make_model("stablelm")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="attn_implementation='sdpa'"):
        Target(model)


def test_a_family_row_is_all_it_takes():
    row = Family("again", ("llama",))
    assert (row.embed, row.layers, row.norm, row.head) == (
        "model.embed_tokens",
        "model.layers",
        "model.norm",
        "lm_head",
    )


@pytest.mark.parametrize("tap", ["3", "out:9", "in:-1", "middle", "out"])
def test_unknown_taps_are_refused_by_name(tap):
    target = Target(make_model())
    with pytest.raises(ConfigError, match="unknown tap"):
        target.run(Block.chain([[1]], [0], target.device), target.new_cache(), taps={tap})
