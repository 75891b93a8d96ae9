"""Captured passes on a CUDA device: the same numbers as the model's modules, and rows that ignore their neighbours."""

import copy
import gc
import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from outpace import Engine
from outpace.laws import Tree
from outpace.target import Block, GatedLoRA, Scouts, Target
from tiny import FAMILIES, PROMPTS, make_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TAPS = ("embed", "in:1", "out:2", "pre_norm", "post_norm")
TREES = [Tree([1, 2, 3, 4, 5], [-1, 0, 0, -1, 2]), Tree([7, 8], [-1, 0])]


@pytest.fixture(scope="module", autouse=True)
def ieee():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture(scope="module", params=FAMILIES)
def small(request):
    return Target(make_model(request.param).cuda(), path="fast")


def filled(target, prompts, **options):
    cache = target.new_cache(slots=len(prompts), **options)
    for slot, prompt in enumerate(prompts):
        target.through("readable").prefill(prompt, cache, slot=slot)
    return cache


def gap(found, wanted):
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


@torch.inference_mode()
def test_a_tree_gives_the_modules_logits_and_taps(small):
    cache = filled(small, [PROMPTS[0], PROMPTS[4]])
    block = Block.of([9, 11], TREES, cache.lengths, small.device)
    wanted = small.through("readable").run(block, cache, taps=TAPS)
    cache.drop()
    for _ in range(2):  # captured, then replayed
        found = small.run(block, cache, taps=TAPS)
        cache.drop()
        assert gap(found.logits, wanted.logits) < 1e-5
        assert {name: gap(found.taps[name], wanted.taps[name]) < 1e-5 for name in TAPS} == dict.fromkeys(TAPS, True)


@torch.inference_mode()
def test_prefill_in_chunks_gives_the_modules_cache(small):
    prompt = [i * 7 % 40 for i in range(150)]
    cache = filled(small, [prompt])
    other = small.new_cache()
    small.prefill(prompt, other, taps=("post_norm",))
    assert other.lengths == cache.lengths
    for layer in range(small.layers_total):
        for one, two in zip(other.entries(layer, 0), cache.entries(layer, 0), strict=True):
            assert gap(one, two) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("gated", ["", "some", "all"])
def test_scouts_give_the_modules_logits_and_leave_main_rows_alone(small, gated):
    cache = filled(small, [PROMPTS[0], PROMPTS[4]])
    block = Block.of([9, 11], TREES, cache.lengths, small.device)
    rows, count = block.rows, 4
    sees = torch.zeros(2, count, rows + count, dtype=torch.bool, device="cuda")
    sees[:, :, 0] = True
    sees[:, :, rows:] = torch.ones(count, count, dtype=torch.bool, device="cuda").tril()
    positions = block.positions[:, :1] + 1 + torch.arange(count, device="cuda")
    some = GatedLoRA.for_layers(small.model, ("q_proj", "qkv_proj", "down_proj", "o_proj", "up_proj"), 4)
    adapter = (GatedLoRA.for_all_layers(small.model, 4) if gated == "all" else some).cuda()
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.5)
    embeds = torch.randn(2, count, small.hidden_size, device="cuda")
    scouts = Scouts(positions, sees, embeds=embeds, adapter=adapter if gated else None)
    plain = small.run(block, cache).logits
    cache.drop()
    with small.adapted(adapter) if gated else nullcontext():
        wanted = small.through("readable").run(replace(block, scouts=scouts), cache)
        cache.drop()
        found = small.run(replace(block, scouts=scouts), cache)
        cache.drop()
    assert gap(found.scout_logits, wanted.scout_logits) < 1e-5
    assert gap(found.logits, plain) < 1e-5


def test_every_family_of_the_table_has_a_fast_path(small):
    assert small.fast is not None
    assert small.fast.plan.still_holds(small)


@torch.inference_mode()
def test_no_shape_is_captured_twice(small):
    cache = filled(small, [PROMPTS[0]])
    fast = small.fast
    block = Block.of([9], TREES[:1], cache.lengths, small.device)
    small.run(block, cache)
    cache.commit([[0]])
    before = fast.capture.graphs
    for _ in range(5):
        block = Block.of([9], TREES[:1], cache.lengths, small.device)
        small.run(block, cache)
        cache.commit([[0, 1]])
    assert fast.capture.graphs == before


@torch.inference_mode()
def test_accepted_branches_move_in_one_launch(small):
    cache = filled(small, [PROMPTS[0], PROMPTS[4]])
    block = Block.of([9, 11], TREES, cache.lengths, small.device)
    starts = list(cache.lengths)
    small.run(block, cache)
    wanted = [
        [tensor[slot, :, [starts[slot] + row for row in rows]].clone() for slot, rows in enumerate(([0, 4], [0, 1, 2]))]
        for pair in cache.tensors()
        for tensor in pair
    ]
    cache.commit([[0, 4], [0, 1, 2]])
    found = [
        [tensor[slot, :, starts[slot] : cache.lengths[slot]] for slot in range(2)]
        for pair in cache.tensors()
        for tensor in pair
    ]
    for one, two in zip(found, wanted, strict=True):
        for a, b in zip(one, two, strict=True):
            assert torch.equal(a, b)


# --- rows do not depend on their neighbours, bit for bit, in bfloat16


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def wide(request):
    changes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 640, "vocab_size": 512}
    model = make_model(request.param, dtype=torch.bfloat16, sharpness=1.5, max_position_embeddings=2048, **changes)
    return Target(model.cuda(), path="fast")


@torch.inference_mode()
def test_a_row_has_the_same_bits_whatever_rides_beside_it(wide):
    prompt = [i * 13 % 512 for i in range(300)]
    cache = wide.new_cache(slots=4)
    for slot in range(4):
        wide.prefill(prompt[: len(prompt) - 40 * slot], cache, slot=slot)
    chain = [9, 5, 6, 7, 100, 3, 8, 2] * 8
    one = wide.run(Block.chain([chain[:1]], cache.lengths[:1], wide.device), cache).logits
    cache.drop()
    for rows in (2, 3, 8, 17, 32, 64):
        read = wide.run(Block.chain([chain[:rows]], cache.lengths[:1], wide.device), cache).logits
        cache.drop()
        assert torch.equal(read[:, :1], one), rows
        eight = read if rows == 8 else None
        if eight is not None:
            kept = eight
        if rows > 8:
            assert torch.equal(read[:, :8], kept), rows
    batched = wide.run(Block.chain([chain[:8]] * 4, cache.lengths, wide.device), cache).logits
    cache.drop()
    assert torch.equal(batched[:1], kept)
    tree = Tree([*chain[1:8], 50, 51, 52], [*range(-1, 6), -1, 7, 2])
    read = wide.run(Block.of([chain[0]], [tree], cache.lengths[:1], wide.device), cache).logits
    cache.drop()
    assert torch.equal(read[:, :8], kept)


@torch.inference_mode()
def test_main_rows_have_the_same_bits_beside_rows_with_an_adapter(wide):
    """In bfloat16, where tails are part of the products."""
    adapter = GatedLoRA.for_all_layers(wide.model, 16).to("cuda", torch.bfloat16)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.1)
    cache = wide.new_cache(slots=2)
    for slot in range(2):
        wide.prefill([i * 13 % 512 for i in range(200 - 60 * slot)], cache, slot=slot)
    block = Block.chain([[9, 5, 6, 7]] * 2, cache.lengths, wide.device)
    plain = wide.run(block, cache, taps=["post_norm"])
    cache.drop()
    for count in (1, 9, 20):
        sees = torch.ones(2, count, 4 + count, dtype=torch.bool, device="cuda").tril(4)
        positions = block.positions[:, -1:] + 1 + torch.arange(count, device="cuda")
        embeds = torch.randn(2, count, wide.hidden_size, device="cuda", dtype=torch.bfloat16)
        scouts = Scouts(positions, sees, embeds=embeds, adapter=adapter, logits=False)
        with wide.adapted(adapter):
            found = wide.run(replace(block, scouts=scouts), cache, taps=["post_norm"])
        cache.drop()
        assert torch.equal(found.logits, plain.logits), count
        assert torch.equal(found.taps["post_norm"][:, :4], plain.taps["post_norm"]), count


@torch.inference_mode()
def test_a_row_has_the_same_bits_in_a_larger_cache(wide):
    prompt = [i * 13 % 512 for i in range(300)]
    reads = []
    for capacity in (512, 2048):
        cache = wide.new_cache(capacity=capacity)
        wide.prefill(prompt, cache)
        reads.append(wide.run(Block.chain([[5, 6]], cache.lengths, wide.device), cache).logits)
        cache.drop()
        cache.lengths[0] = 290
        block = Block.chain([[5, 6]], [290], wide.device)
        reads.append(wide.run(block, cache).logits)
        cache.drop()
    assert torch.equal(reads[0], reads[2])
    assert torch.equal(reads[1], reads[3])


# --- attention against float64


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("size", "heads", "key_heads"), [(64, 9, 3), (128, 8, 2), (96, 4, 4)])
def test_tree_attention_against_float64(dtype, most, window, size, heads, key_heads):
    from outpace.target.fast.graphs import pack_bits
    from outpace.target.fast.tree_attention import Workspace, splits_for, tree_attention

    generator = torch.Generator("cuda").manual_seed(1)
    lengths, rows, capacity = [700, 3, 255], 19, 1024
    batch = len(lengths)
    make = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").to(dtype)  # noqa: E731
    query, keys, values = (
        make(batch * rows, heads, size),
        make(5, key_heads, capacity, size),
        make(5, key_heads, capacity, size),
    )
    parents = [-1, *[max(0, (i - 1) // 2) for i in range(1, rows)]]
    sees = torch.eye(rows, dtype=torch.bool)
    depth = [0] * rows
    for i in range(1, rows):
        sees[i] |= sees[parents[i]]
        depth[i] = depth[parents[i]] + 1
    sees = sees.repeat(batch, 1, 1).cuda()
    positions = torch.tensor([[length + d for d in depth] for length in lengths], device="cuda")
    slots = torch.tensor([4, 0, 2], device="cuda")
    splits = splits_for(capacity)
    out = tree_attention(
        query, keys, values, lengths=torch.tensor(lengths, device="cuda"), slots=slots,
        positions=positions.view(-1), bits=pack_bits(sees).view(batch * rows, -1), scaling=size**-0.5, window=window,
        workspace=Workspace(batch * rows, heads, size, splits, query.device),
    ).view(batch, rows, heads, size)  # fmt: skip
    worst = 0.0
    for b, length in enumerate(lengths):
        k, v = (
            t[slots[b], :, : length + rows].double().repeat_interleave(heads // key_heads, 0) for t in (keys, values)
        )
        score = query.view(batch, rows, heads, size)[b].double().transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(size)
        at = torch.cat([torch.arange(length, device="cuda"), positions[b]])
        seen = torch.cat([torch.ones(rows, length, dtype=torch.bool, device="cuda"), sees[b]], 1)
        if window is not None:
            seen = seen & (positions[b][:, None] - at < window)
        want = (score.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)
        worst = max(worst, float((out[b].double() - want).norm() / want.norm()))
    assert worst < most


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "heads", "key_heads", "rows"), [(64, 9, 3, 5), (128, 8, 2, 32)])
def test_attention_has_the_same_bits_however_far_it_may_read(dtype, size, heads, key_heads, rows):
    """Pieces lie where they lie, and are added up alike whether the last of them hold anything or not."""
    from outpace.target.fast.tree_attention import Workspace, splits_for, tree_attention

    generator = torch.Generator("cuda").manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, device="cuda").to(dtype)  # noqa: E731
    lengths = torch.tensor([1990, 3, 700], device="cuda")
    query, keys, values = make(3 * rows, heads, size), make(3, key_heads, 2048, size), make(3, key_heads, 2048, size)
    positions = (lengths[:, None] + torch.arange(rows, device="cuda")).flatten()

    def attend(splits):
        return tree_attention(
            query, keys, values, lengths=lengths, slots=torch.arange(3, device="cuda"), positions=positions, bits=None,
            scaling=size**-0.5, window=None, workspace=Workspace(3 * rows, heads, size, splits, query.device), pdl=True,
        )  # fmt: skip

    found = [attend(splits_for(reach)) for reach in (2048, 4096, 8192, 32768)]
    assert all(torch.equal(one, found[0]) for one in found[1:])


def test_joining_weights_copies_nothing_twice():
    model = make_model().cuda()
    before = copy.deepcopy(model.state_dict())
    first, second = Target(model, path="fast"), Target(model, path="fast")
    assert first.fast.plan.layers[0].qkv.weight.data_ptr() == second.fast.plan.layers[0].qkv.weight.data_ptr()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_capture_that_fails_leaves_the_engine_usable():
    target = Target(make_model().cuda(), path="fast")
    options = {"max_new_tokens": 12, "ignore_eos": True}
    wanted = Engine(target).generate(PROMPTS[0], **options)[0].tokens
    with pytest.raises(RuntimeError):
        target.fast.capture_work(lambda: torch.ones(1, device="cuda").item(), "what waits for the device", lambda: None)
    assert Engine(target).generate(PROMPTS[0], **options)[0].tokens == wanted


def test_garbage_that_holds_graphs_is_not_collected_in_a_capture():
    target = Target(make_model().cuda(), path="fast")
    x = torch.ones(4, device="cuda")
    ring = SimpleNamespace(graph=target.fast.capture_work(lambda: x + 1, "a sum"))
    ring.itself = ring
    del ring
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        made = target.fast.capture_work(lambda: ([[[]] for _ in range(100)], x + 2)[1], "another sum", lambda: None)
    finally:
        gc.set_threshold(*before)
    assert torch.equal(made(), x + 2)
