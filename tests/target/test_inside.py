"""What needs a look inside a pass: taps, begin/finish, views, scouts, adapters. Families of the table only."""

import pytest
import torch

from outpace.errors import CheckpointError, ConfigError, DraftError
from outpace.laws import Tree
from outpace.target import Block, GatedLoRA, Scouts, Target
from tiny import FAMILIES, PROMPTS, make_model

PROMPT = PROMPTS[0]
TREE = Tree([2, 3, 4], [-1, -1, 0])


@pytest.fixture(params=FAMILIES)
def target(request):
    return Target(make_model(request.param, dtype=torch.float64))


def prefilled(target):
    cache = target.new_cache()
    target.prefill(PROMPT, cache)
    return cache


def block_of(target, cache, scouts=None):
    block = Block.of([9], [TREE], cache.lengths, target.device)
    return Block(block.tokens, block.positions, block.sees, scouts)


def scouts_of(target, cache, **options):
    """Two scouts behind the root, the second seeing the first."""
    start = cache.lengths[0]
    sees = torch.zeros(1, 2, 6, dtype=torch.bool)
    sees[0, 0, [0, 4]] = True
    sees[0, 1, [0, 4, 5]] = True
    return Scouts(torch.tensor([[start + 1, start + 2]]), sees, **options)


@torch.inference_mode()
def test_taps_are_the_hidden_states_of_the_model(target):
    taps = {
        "embed",
        "pre_norm",
        "post_norm",
        *(f"{side}:{k}" for side in ("in", "out") for k in range(target.layers_total)),
    }
    cache = target.new_cache()
    read = target.run(Block.chain([PROMPT], [0], target.device), cache, taps=taps)
    states = target.model(torch.tensor([PROMPT]), output_hidden_states=True, use_cache=False).hidden_states
    assert set(read.taps) == taps
    torch.testing.assert_close(read.taps["embed"], states[0], atol=1e-10, rtol=1e-10)
    for k in range(target.layers_total):
        torch.testing.assert_close(read.taps[f"in:{k}"], states[k], atol=1e-10, rtol=1e-10)
        if k + 1 < target.layers_total:
            assert torch.equal(read.taps[f"out:{k}"], read.taps[f"in:{k + 1}"])
    assert torch.equal(read.taps["pre_norm"], read.taps[f"out:{target.layers_total - 1}"])
    torch.testing.assert_close(read.taps["post_norm"], states[-1], atol=1e-10, rtol=1e-10)


@torch.inference_mode()
@pytest.mark.parametrize("upto", [0, 1, 3])
def test_a_pass_may_stop_in_the_middle(target, upto):
    cache = prefilled(target)
    whole = target.run(block_of(target, cache), cache).logits
    cache.drop()
    passing = target.begin(block_of(target, cache), cache, upto=upto)
    assert passing.next_layer == upto
    assert torch.equal(target.finish(passing).logits, whole)


@torch.inference_mode()
def test_a_view_of_all_layers_is_the_target_and_fewer_are_another_model(target):
    cache = prefilled(target)
    block = block_of(target, cache)
    whole = target.run(block, cache).logits
    cache.drop()
    same = target.view(range(target.layers_total)).run(block, cache).logits
    cache.drop()
    fewer = target.view(range(1, target.layers_total)).run(block, cache).logits
    cache.drop()
    assert torch.equal(whole, same)
    assert not torch.allclose(whole, fewer)
    with pytest.raises(ConfigError, match="has layers 0 to"):
        target.view([99])


@torch.inference_mode()
def test_scratch_passes_leave_no_trace(target):
    cache = prefilled(target)
    before = [[t.clone() for t in cache.entries(layer, 0)] for layer in range(target.layers_total)]
    view = target.view(range(0, target.layers_total, 2))
    with cache.scratch():
        for token in (3, 4, 5):
            view.run(Block.chain([[token]], cache.lengths, target.device), cache)
            cache.commit([[0]])
    assert cache.lengths == [len(PROMPT)]
    after = [cache.entries(layer, 0) for layer in range(target.layers_total)]
    assert all(torch.equal(x, y) for a, b in zip(before, after, strict=True) for x, y in zip(a, b, strict=True))
    logits = target.run(block_of(target, cache), cache).logits
    fresh = prefilled(target)
    torch.testing.assert_close(logits, target.run(block_of(target, fresh), fresh).logits, atol=1e-12, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("source", ["tokens", "embeds", "build"])
def test_scouts_change_nothing_for_main_rows(target, source):
    cache = prefilled(target)
    alone = target.run(block_of(target, cache), cache).logits
    cache.drop()
    if source == "tokens":
        scouts = scouts_of(target, cache, tokens=torch.tensor([[5, 6]]))
    elif source == "embeds":
        scouts = scouts_of(target, cache, embeds=target.embed(torch.tensor([[5, 6]])))
    else:
        scouts = scouts_of(target, cache, build=lambda hidden: hidden[:, :2] * 0.5, enter=2)
    read = target.run(block_of(target, cache, scouts), cache)
    torch.testing.assert_close(read.logits, alone, atol=1e-12, rtol=0)
    assert read.scout_logits.shape == (1, 2, target.vocabulary)
    cache.commit([[0, 1]])
    assert cache.lengths == [len(PROMPT) + 2]


@torch.inference_mode()
def test_token_scouts_are_rows_like_any_other(target):
    """A scout that stands where a chain's next token would stand gives that token's logits."""
    cache = prefilled(target)
    scouts = scouts_of(target, cache, tokens=torch.tensor([[5, 6]]))
    read = target.run(block_of(target, cache, scouts), cache)
    for count, row in ((1, 0), (2, 1)):
        plain = target.model(torch.tensor([[*PROMPT, 9, *[5, 6][:count]]]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(read.scout_logits[0, row], plain, atol=1e-10, rtol=1e-10)


@torch.inference_mode()
def test_an_adapter_touches_gated_rows_only(target):
    adapter = GatedLoRA.for_layers(target.model, ("q_proj", "qkv_proj", "down_proj"), rank=2).double()
    cache = prefilled(target)
    other = GatedLoRA.for_all_layers(target.model, rank=3).double()
    for parameter in other.parameters():
        parameter.data.normal_()
    scouts = scouts_of(target, cache, tokens=torch.tensor([[5, 6]]), adapter=adapter)
    block = block_of(target, cache, scouts)
    base = target.run(block, cache)
    cache.drop()
    with target.adapted(adapter), target.adapted(other):
        fresh = target.run(block, cache)
        cache.drop()
        assert torch.equal(fresh.scout_logits, base.scout_logits), "a fresh adapter adds zero, another one nothing"
        for parameter in adapter.parameters():
            parameter.data.normal_()
        trained = target.run(block, cache)
        cache.drop()
    assert torch.equal(trained.logits, base.logits), "main rows are the base model's, bit for bit"
    assert not torch.allclose(trained.scout_logits, base.scout_logits)
    assert torch.equal(target.run(block, cache).scout_logits, base.scout_logits), "and it comes off again"


def test_an_adapter_for_another_model_is_refused():
    target = Target(make_model())
    other = GatedLoRA({"model.layers.0.self_attn.q_proj": (8, 8)}, rank=2)
    with pytest.raises(CheckpointError, match="expects a linear layer"), target.adapted(other):
        pass
    with pytest.raises(CheckpointError, match="no linear layer"):
        GatedLoRA.for_layers(target.model, ("nonsense",), rank=2)


def test_adapter_and_taps_let_gradients_through():
    target = Target(make_model(dtype=torch.float64))
    adapter = GatedLoRA.for_layers(target.model, ("q_proj",), rank=2).double()
    cache = target.new_cache()
    sees = torch.tensor([[[True, True, False, True]]])
    scouts = Scouts(torch.tensor([[2]]), sees, tokens=torch.tensor([[5]]), adapter=adapter)
    block = Block(torch.tensor([[1, 2, 3]]), torch.tensor([[0, 1, 2]]), None, scouts)
    with target.adapted(adapter):
        target.run(block, cache).scout_logits.sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in adapter.up.values())


def test_scouts_need_exactly_one_source():
    positions, sees = torch.zeros(1, 1), torch.ones(1, 1, 2, dtype=torch.bool)
    with pytest.raises(DraftError, match="exactly one of tokens"):
        Scouts(positions, sees)
    with pytest.raises(DraftError, match="enter at a layer above 0"):
        Scouts(positions, sees, tokens=torch.zeros(1, 1), enter=2)
