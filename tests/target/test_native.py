"""Compiled passes: the numbers of the passes they replace, and a row's bits whatever stands beside it."""

import dataclasses

import pytest
import torch

from outpace import Engine
from outpace.laws import Tree
from outpace.target import Block, GatedLoRA, Scouts, Target
from outpace.target.native import build
from outpace.target.native.product import product
from outpace.target.native.structs import MOST_ROWS
from tiny import FAMILIES, PROMPTS, make_model

TAPS = ("embed", "in:1", "out:2", "pre_norm", "post_norm")
MOST = {torch.float32: 3e-6, torch.bfloat16: 6e-2}  # PyTorch's passes round to bfloat16 after every operation
compiled = pytest.mark.skipif(build.why_not(torch.float32) is not None, reason=str(build.why_not(torch.float32)))


def made(name="llama", dtype=torch.float32, **options):
    target = Target(make_model(name, dtype=dtype, **options), path="fast")
    assert target.compiled
    return target


def filled(target, *prompts):
    cache = target.new_cache(slots=len(prompts))
    for slot, prompt in enumerate(prompts):
        target.prefill(prompt, cache, slot=slot)
    return cache


def uncompiled(target, *arguments, **options):
    """A pass through PyTorch's operations."""
    native, target.fast.native = target.fast.native, None
    try:
        return target.run(*arguments, **options)
    finally:
        target.fast.native = native


def gap(found, wanted):
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def with_scouts(target, block, count=3):
    """A block and scouts that see the root and each other, with an adapter that does something."""
    torch.manual_seed(0)
    batch, rows = block.tokens.shape
    sees = torch.zeros(batch, count, rows + count, dtype=torch.bool)
    sees[:, :, 0] = True
    sees[:, :, rows:] = torch.ones(count, count, dtype=torch.bool).tril()
    adapter = GatedLoRA.for_all_layers(target.model, 5).to(target.dtype).requires_grad_(False)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.5)
    positions = block.positions[:, :1] + 1 + torch.arange(count)
    embeds = torch.randn(batch, count, target.hidden_size).to(target.dtype)
    return dataclasses.replace(block, scouts=Scouts(positions, sees, embeds=embeds, adapter=adapter)), adapter


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", FAMILIES)
def test_trees_with_scouts_give_the_numbers_of_the_passes_they_replace(name, dtype):
    target = made(name, dtype)
    cache = filled(target, PROMPTS[0], PROMPTS[4])
    trees = [Tree([1, 2, 3, 4, 5], [-1, 0, 0, -1, 2]), Tree([7, 8], [-1, 0])]
    block, adapter = with_scouts(target, Block.of([9, 11], trees, cache.lengths, target.device))
    with target.adapted(adapter):
        found = target.run(block, cache, taps=TAPS)
        entries = [[t.clone() for t in layer] for layer in cache.tensors()]
        cache.drop()
        wanted = uncompiled(target, block, cache, taps=TAPS)
    assert gap(found.logits, wanted.logits) <= MOST[dtype]
    assert gap(found.scout_logits, wanted.scout_logits) <= MOST[dtype]
    assert max(gap(found.taps[tap], wanted.taps[tap]) for tap in TAPS) <= MOST[dtype]
    for ours, theirs in zip(entries, cache.tensors(), strict=True):
        assert max(gap(a, b) for a, b in zip(ours, theirs, strict=True)) <= MOST[dtype]


@compiled
@torch.inference_mode()
def test_an_adapter_on_some_modules_reaches_those_alone():
    target = made()
    cache = filled(target, PROMPTS[0])
    block, _ = with_scouts(target, Block.chain([[3, 5]], cache.lengths, target.device))
    adapter = GatedLoRA.for_layers(target.model, ("k_proj", "up_proj", "down_proj"), 3).requires_grad_(False)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.5)
    block = dataclasses.replace(block, scouts=dataclasses.replace(block.scouts, adapter=adapter))
    with target.adapted(adapter):
        found = target.run(block, cache).scout_logits
        cache.drop()
        assert gap(found, uncompiled(target, block, cache).scout_logits) <= 3e-6
        cache.drop()
        for up in adapter.up.values():
            up.zero_()  # in place: no pointer moves
        assert gap(target.run(block, cache).scout_logits, found) > 1e-3


def one_by_one(target, prompt, tokens):
    """Logits of plain decoding, [L, V]."""
    cache = filled(target, prompt)
    read = []
    for token in tokens:
        read.append(target.run(Block.chain([[token]], cache.lengths, target.device), cache).logits[0, 0])
        cache.commit([[0]])
    return torch.stack(read)


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_has_the_bits_of_plain_decoding(name, dtype):
    """Chains of all lengths, both branches of a tree, beside another request, with scouts: bit for bit."""
    target = made(name, dtype)
    path = torch.randint(3, 40, (19,), generator=torch.Generator().manual_seed(3)).tolist()
    plain = one_by_one(target, PROMPTS[0], path)
    cache = filled(target, PROMPTS[0], PROMPTS[4])
    for count in range(2, len(path) + 1):
        logits = target.run(Block.chain([path[:count]], cache.lengths[:1], target.device), cache).logits
        cache.drop()
        assert torch.equal(logits[0], plain[:count]), f"a chain of {count}"
    other = [7, *path[2:4]]
    branch = one_by_one(target, PROMPTS[0], [path[0], *other])
    tokens = [path[1], other[0], path[2], other[1], path[3], 8, other[2]]
    trees = [Tree(tokens, [-1, -1, 0, 1, 2, 2, 3]), Tree([5], [-1])]
    block, adapter = with_scouts(target, Block.of([path[0], 4], trees, cache.lengths, target.device))
    with target.adapted(adapter):
        logits = target.run(block, cache).logits[0]
        cache.drop()
    assert torch.equal(logits[[0, 1, 3, 5]], plain[:4])
    assert torch.equal(logits[[0, 2, 4, 7]], branch)
    assert not torch.equal(logits[1], logits[2])


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("hidden", [72, 96])
def test_long_texts_and_many_rows_keep_the_bits(hidden, dtype):
    """Past every size that anything is cut into, with head sizes and widths that nothing divides evenly.

    72 is no multiple of what a matrix unit multiplies at once, 96 is three times that.
    """
    shape = {
        "hidden_size": hidden,
        "head_dim": 20,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 131,
    }
    target = made(dtype=dtype, intermediate_size=100, max_position_embeddings=1024, **shape)
    text = torch.randint(3, 130, (700,), generator=torch.Generator().manual_seed(1)).tolist()
    plain = one_by_one(target, text[:600], text[600:670])
    cache = filled(target, text[:600])
    found = target.run(Block.chain([text[600:670]], cache.lengths, target.device), cache).logits[0]
    assert torch.equal(found, plain)
    cache.drop()
    wanted = uncompiled(target, Block.chain([text[600:670]], cache.lengths, target.device), cache).logits[0]
    assert gap(found, wanted) <= MOST[dtype]


@compiled
@torch.inference_mode()
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_no_bit(threads):
    target = made()
    wanted = one_by_one(target, PROMPTS[0], [4, 5, 6])
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(one_by_one(target, PROMPTS[0], [4, 5, 6]), wanted)
    finally:
        torch.set_num_threads(before)


@compiled
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [("medusa", torch.float32), *((spec, dtype) for spec in ("eagle3", "lookahead") for dtype in MOST)],
)
def test_drafts_of_trees_leave_the_text_alone(spec, dtype):
    from tiny import learned

    target = Target(make_model(dtype=dtype, sharpness=1.5).requires_grad_(False))
    drafter = spec if spec == "lookahead" else learned(target, spec, shaken=True)
    options = {"max_new_tokens": 60, "temperature": 1.0, "seed": 2, "ignore_eos": True}
    wanted = Engine(target).generate(PROMPTS[:3], **options)
    found = Engine(target, drafter, stand_down=False).generate(PROMPTS[:3], **options)
    assert [o.tokens for o in found] == [o.tokens for o in wanted]
    assert sum(o.stats.drafted for o in found) > 0


@compiled
@torch.inference_mode()
def test_more_rows_than_it_takes_go_another_way():
    target = made(max_position_embeddings=1024)
    cache = target.new_cache()
    block = Block.chain([[5] * (MOST_ROWS + 1)], [0], target.device)
    assert not target.fast.native.fits(block)
    assert torch.isfinite(target.run(block, cache).logits).all()


@compiled
def test_gradients_go_another_way():
    target = made()
    block = Block.chain([[5, 6]], [0], target.device)
    assert not target.fast.native.fits(block)
    with torch.no_grad():
        assert target.fast.native.fits(block)


@compiled
@torch.no_grad()
@pytest.mark.parametrize("dtype", MOST)
@pytest.mark.parametrize("shape", [(40, 24), (13, 7), (100, 576), (1, 33)])
def test_a_product_alone(shape, dtype):
    x, weight, bias = (torch.randn(size).to(dtype) for size in ((21, shape[1]), shape, (shape[0],)))
    found = product(x, weight, bias)
    torch.testing.assert_close(found.float(), x.float() @ weight.float().T + bias.float(), atol=2e-2, rtol=2e-2)
    for rows in range(1, 21):
        assert torch.equal(product(x[:rows], weight, bias), found[:rows])
    assert product(x[:, ::2], weight[:, ::2], None) is None, "not as the kernel reads it"
    assert product(x.double(), weight.double(), None) is None
    assert product(x[:1].repeat(MOST_ROWS + 1, 1), weight, None) is None


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_threads(dtype):
    """More of them than processors too: they then sleep where they meet."""
    target = made(dtype=dtype)
    block = Block.of([5, 7], [Tree([3, 4, 9], [-1, 0, -1]), Tree()], [4, 3], target.device)
    own, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            with torch.no_grad():
                found.append(target.run(block, filled(target, [1, 2, 3, 4], [4, 5, 6])).logits)
    finally:
        torch.set_num_threads(own)
    assert all(torch.equal(one, found[0]) for one in found)


@compiled
def test_without_a_compiler_passes_run_and_the_reason_is_known(monkeypatch):
    monkeypatch.setenv("OUTPACE_NATIVE", "off")
    target = Target(make_model())
    assert not target.compiled
    assert "OUTPACE_NATIVE=off" in target.fast.native_reason
    assert len(Engine(target).generate([PROMPTS[0]], max_new_tokens=3)[0].tokens) == 3
