"""The CUDA kernels without CUDA: Triton's interpreter runs them on a CPU, against the model's own modules.

Where a GPU is there, tests/gpu runs the compiled kernels instead.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.engine.device.drafts import noise_ahead
from outpace.engine.device.kernels import Chance, Chooser, Keys
from outpace.engine.device.lanes import Lane
from outpace.engine.device.truncation import Cutter, Truncation
from outpace.laws import Noise, NoiseDice, Sampler, Settings, Tree, warp
from outpace.laws.rules import walk_path
from outpace.target import Block, GatedLoRA, Scouts, Target
from outpace.target.fast import forward as forward_module
from outpace.target.fast.entries import keep_entries, pointer_table
from outpace.target.fast.forward import Forward, Inputs
from outpace.target.fast.graphs import pack_bits
from outpace.target.fast.plan import joined_names, make_plan
from tiny import PROMPTS, make_model
from truncated import kept_ids

TAPS = ("in:1", "pre_norm", "post_norm")


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize("few", [True, False], ids=["fused", "rows"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3", "olmo2"])
def test_a_ragged_tree_gives_the_modules_numbers(name, few, monkeypatch):
    monkeypatch.setattr(forward_module, "few_rows", lambda plan: 64 if few else 0)
    layers = 6 if name == "gemma3" else 2
    target = Target(make_model(name, num_hidden_layers=layers, sharpness=4.0), path="readable")
    plan = make_plan(target)
    cache = target.new_cache(slots=2)
    for slot, prompt in enumerate([PROMPTS[0], PROMPTS[4]]):
        target.prefill(prompt, cache, slot=slot)
    trees = [Tree([1, 2, 3, 4], [-1, 0, 0, -1]), Tree([7, 8], [-1, 0])]
    block = Block.of([9, 11], trees, cache.lengths, target.device)
    wanted = target.run(block, cache, taps=TAPS)
    cache.drop()
    rows = block.rows
    inputs = Inputs.empty(2, rows, target.device, chain=False)
    inputs.tokens.copy_(block.tokens)
    inputs.positions.copy_(block.positions.reshape(-1))
    inputs.lengths.copy_(torch.tensor(cache.lengths))
    inputs.bits.copy_(pack_bits(block.sees).view(2 * rows, -1))
    run = Forward(plan, target.model.get_input_embeddings(), joined_names(target), pdl=False)
    found = run(inputs, cache.tensors(), splits=2, layer_ids=target.layer_ids, taps=TAPS)
    assert gap(found.logits, wanted.logits) < 1e-5
    assert max(gap(found.taps[tap], wanted.taps[tap]) for tap in TAPS) < 1e-5


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "layers", "taken", "few"),
    [("llama", "all", True, True), ("olmo2", "all", True, True), ("phi3", "all", True, True),
     ("qwen2", ("q_proj", "k_proj", "v_proj", "down_proj"), True, True), ("llama", "all", True, False),
     ("llama", ("q_proj", "up_proj", "down_proj"), False, True)],
)  # fmt: skip
def test_scouts_take_the_adapters_tails_and_main_rows_do_not(name, layers, taken, few, monkeypatch):
    monkeypatch.setattr(forward_module, "few_rows", lambda plan: 64 if few else 0)
    torch.manual_seed(0)
    target = Target(make_model(name, num_hidden_layers=1, sharpness=4.0), path="readable")
    adapter = (
        GatedLoRA.for_all_layers(target.model, 3, 6.0)
        if layers == "all"
        else GatedLoRA.for_layers(target.model, layers, 3, 6.0)
    )
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.3)
    cache = target.new_cache(slots=2)
    for slot, prompt in enumerate([PROMPTS[0], PROMPTS[4]]):
        target.prefill(prompt, cache, slot=slot)
    block = Block.of([9, 11], [Tree([1, 2, 3], [-1, 0, 0]), Tree([7, 8], [-1, 0])], cache.lengths, target.device)
    rows, count = block.rows, 3
    sees = torch.zeros(2, count, rows + count, dtype=torch.bool)
    sees[:, :, 0], sees[:, :, rows:] = True, torch.ones(count, count).tril().bool()
    positions = block.positions[:, :1] + 1 + torch.arange(count)
    scouts = Scouts(positions, sees, embeds=torch.randn(2, count, target.hidden_size), adapter=adapter)
    with target.adapted(adapter):
        wanted = target.run(replace(block, scouts=scouts), cache, taps=("post_norm",))
        cache.drop()
    inputs = Inputs.empty(2, rows, target.device, chain=False, embeds=scouts.embeds)
    inputs.tokens.copy_(block.tokens)
    inputs.positions.copy_(torch.cat([block.positions, positions], 1).view(-1))
    inputs.lengths.copy_(torch.tensor(cache.lengths))
    all_sees = torch.zeros(2, rows + count, rows + count, dtype=torch.bool)
    all_sees[:, :rows, :rows], all_sees[:, rows:] = block.sees, sees
    inputs.bits.copy_(pack_bits(all_sees).view(2 * (rows + count), -1))
    run = Forward(make_plan(target), target.model.get_input_embeddings(), joined_names(target), pdl=False)
    options = {"splits": 2, "layer_ids": target.layer_ids, "taps": ("post_norm",)}
    found = run(inputs, cache.tensors(), adapter=adapter, scout_logits=True, **options)
    assert (run.tails(adapter) is not None) == taken
    assert gap(found.logits, wanted.logits) < 1e-5
    assert gap(found.scout_logits, wanted.scout_logits) < 1e-5
    assert gap(found.taps["post_norm"], wanted.taps["post_norm"]) < 1e-5
    bare = run(inputs, cache.tensors(), **options)
    if taken and few:  # the same kernels for main rows, whatever is added to the others
        assert torch.equal(bare.taps["post_norm"][:, :rows], found.taps["post_norm"][:, :rows])
    assert gap(bare.logits, wanted.logits) < 1e-5
    assert bare.scout_logits is None
    for up in adapter.up.values():  # a product's parameters are views of what the kernels read
        up.mul_(0.0)
    without = run(inputs, cache.tensors(), adapter=adapter, **options)
    torch.testing.assert_close(without.taps["post_norm"], bare.taps["post_norm"])


def chosen_and_walked(
    logits, heat, cut, keys, positions, chance, *, noise=None, tokens=None, parents=None, lengths=None, room=None
):
    """What the kernels choose at every row, [B, R], the rows as the next round finds them, and what the walk left."""
    batch, rows, vocabulary = logits.shape
    inputs = Inputs.empty(batch, rows, logits.device, chain=False)
    trail = Lane(batch, rows, vocabulary, logits.device).trail
    inputs.positions.copy_(positions)
    given = (inputs.tokens, tokens), (inputs.parents, parents), (inputs.lengths, lengths), (trail.room, room)
    for to, value in given:
        if value is not None:
            to.copy_(value)
    chooser = Chooser(batch * rows, vocabulary, logits.device)
    chooser(logits, heat, cut, keys, positions, inputs, trail, chance=chance, noise=noise)
    assert not chooser.arrived.any(), "ready for the next round"
    return chooser.chosen.view(batch, rows), inputs, trail


def _signed(word):
    return word - (1 << 64) if word >= 1 << 63 else word


@torch.inference_mode()
@pytest.mark.parametrize("kinds", [("uniform",) * 3, ("gumbel",) * 3, ("gumbel", "uniform", "gumbel")], ids="/".join)
def test_choosing_and_walking_are_the_path_rule(kinds):
    batch, rows, vocabulary = 3, 5, 4500  # three tiles, the last one not full
    logits = 3 * torch.randn(batch, rows, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[0, 0, [7, 4000]] = float(logits[0, 0].max()) + 1  # a tie: the lower id
    temperatures, seeds, requests = [0.0, 0.8, 1.3], [1, 2**63 + 5, 7], [0, 3, 2**63 + 1]
    prefixes = [[0] * 4, [0] * 9, [0] * 2]
    depths = [0, 1, 1, 2, 3]
    positions = torch.tensor([[len(p) - 1 + d for d in depths] for p in prefixes])
    samplers = [
        Sampler(Settings(temperature=t, seed=s, noise=kind), NoiseDice(Noise(s), r, kind))
        for t, s, r, kind in zip(temperatures, seeds, requests, kinds, strict=True)
    ]
    raced = torch.tensor([int(t > 0 and kind == "gumbel") for t, kind in zip(temperatures, kinds, strict=True)])
    keys = Keys(torch.tensor([_signed(s) for s in seeds]), torch.tensor([_signed(r) for r in requests]), raced)
    chance = Chance("uniform" in kinds[1:], "gumbel" in kinds[1:])
    heat, cut = torch.tensor(temperatures), Truncation.room(batch, logits.device)
    laws = (logits, heat, cut, keys, positions.view(-1), chance)
    chosen, _, _ = chosen_and_walked(*laws)
    for b, sampler in enumerate(samplers):
        for row in range(rows):
            assert int(chosen[b, row]) == sampler.choose(logits[b, row], [0] * (int(positions[b, row]) + 1))
    if chance.gumbel:  # made once for the four positions of the rows
        all_ids = SimpleNamespace(size=vocabulary, vocabulary=vocabulary, index=None, reduced=False)
        noise, _ = noise_ahead(keys, positions[:, 0].contiguous(), 4, vocabulary, all_ids)
        assert torch.equal(chosen_and_walked(*laws, noise=noise)[0], chosen)
    parents = torch.tensor([[-2, 0, 0, 1, 3]] * batch)
    tokens = torch.tensor([[9, int(chosen[b, 0]), 1, int(chosen[b, 1]), 2] for b in range(batch)])
    tokens[2, 1], tokens[2, 2] = 5, chosen[2, 0]  # the second child is the right one
    before = torch.tensor([3, 8, 1])
    _, inputs, trail = chosen_and_walked(
        *laws, tokens=tokens, parents=parents, lengths=before, room=torch.tensor([3, 10, 2])
    )
    emitted, counts = trail.emitted, trail.counts
    for b, sampler in enumerate(samplers):
        wanted = walk_path(Tree(tokens[b, 1:].tolist(), [-1, -1, 0, 2]), logits[b], sampler, prefixes[b], 0)
        count = int(counts[b])
        assert tuple(emitted[b, 1 : count + 1].tolist()) == wanted.tokens
        assert tuple(trail.path[b, 1:count].tolist()) == tuple(node + 1 for node in wanted.nodes)
        last = wanted.nodes[-1] if wanted.nodes else -1
        assert emitted[b, -3:].tolist() == [4, 3, last in [-1, -1, 0, 2]]
    assert torch.equal(trail.results[0], emitted)
    assert trail.room.tolist() == [3 - int(counts[0]), 10 - int(counts[1]), 2 - int(counts[2])]
    assert torch.equal(trail.starts, before)
    assert torch.equal(inputs.lengths, before + counts)
    assert inputs.tokens[:, 0].tolist() == [int(emitted[b, counts[b]]) for b in range(batch)]
    assert torch.equal(inputs.tokens[:, 1:], tokens[:, 1:])
    assert torch.equal(inputs.positions.view(batch, rows)[:, 0], inputs.lengths)
    for turn in (1, 2, 0):  # each round has its place on the host
        for which in range(3):
            trail.stamp(which)
        assert int(trail.turn) == turn


@torch.inference_mode()
def test_no_law_is_no_token():
    logits = torch.full((1, 2, 50), float("nan"))
    one = torch.zeros(1, dtype=torch.int64)
    for heat, kind in ((0.0, 0), (1.0, 0), (1.0, 1)):
        keys = Keys(one, one, one + kind)
        for truncated in (False, True):
            cut = Truncation.room(1, logits.device)
            law = Settings(temperature=1.0, top_p=0.9, top_k=3, min_p=0.1) if truncated else Settings(temperature=1.0)
            chance = Chance(True, bool(kind), cut.load([law]))
            where = torch.zeros(2, dtype=torch.int64)
            chosen, _, _ = chosen_and_walked(logits, torch.tensor([heat]), cut, keys, where, chance)
            assert chosen.tolist() == [[-1, -1]]


CUTS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 0.0001},
    {"top_p": 0.9999},
    {"top_p": 1 - 1e-12},
    {"min_p": 0.02},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.8},
    {"top_p": 0.95, "min_p": 0.1},
    {"top_k": 30, "top_p": 0.9, "min_p": 0.05},
    {},
]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", CUTS, ids=str)
def test_a_truncated_law_keeps_what_warp_keeps(settings, dtype):
    """Also where bfloat16 makes ids tie at the edge, with forbidden ids, and at all temperatures of a batch.

    Sums run in another order, so ids that hold 1e-6 of the mass together may stand on the other side of the edge.
    """
    heats, rows, vocabulary = [0.3, 1.0, 1.7], 2, 1300
    logits = 3 * torch.randn(len(heats), rows, vocabulary, generator=torch.Generator().manual_seed(0))
    logits[:, 0, :40] = logits[:, 0, 40:80] = -0.0  # many ties
    logits[:, 0, 80:120] = 0.0
    logits[:, 1, 100:200] = float("-inf")
    logits = logits.to(dtype)
    laws = [Settings(temperature=heat, **settings) for heat in heats]
    cut = Truncation.room(4, logits.device)
    by = cut.load(laws)
    assert by._asdict() == {name: name in settings for name in ("top_k", "top_p", "min_p")}
    assert bool(by) == bool(settings)
    cutter = Cutter(8, vocabulary, logits.device, chunk=512)
    cutter(logits, torch.tensor([*heats, 0.0]), cut, by)
    for b, law in enumerate(laws):
        wanted, mass = warp(logits[b].float(), law) > 0, torch.softmax(logits[b].double() / law.temperature, -1)
        for row in range(rows):
            found = kept_ids(logits[b, row], int(cutter.cuts[2 * b + row]), int(cutter.lasts[2 * b + row]))
            found &= mass[row] > 0
            assert float(mass[row][found != wanted[row]].sum()) < (1e-6 if law.top_p else 1e-30)


@torch.inference_mode()
@pytest.mark.parametrize("kinds", [("uniform", "uniform"), ("gumbel", "gumbel"), ("gumbel", "uniform")], ids="/".join)
def test_truncated_choices_are_the_samplers(kinds):
    """Beside a request that truncates nothing and a greedy one."""
    given = [{"top_k": 12, "top_p": 0.7}, {"min_p": 0.05}, {}]
    rows, vocabulary = 5, 3000
    logits = 3 * torch.randn(4, rows, vocabulary, generator=torch.Generator().manual_seed(1)).bfloat16()
    laws = [
        *(Settings(temperature=0.9, noise=kinds[b % 2], seed=b, **some) for b, some in enumerate(given)),
        Settings(),
    ]
    dice = [NoiseDice(Noise(law.seed), b, law.noise) for b, law in enumerate(laws)]
    samplers = [Sampler(law, one) for law, one in zip(laws, dice, strict=True)]
    positions = torch.arange(rows).repeat(4)
    raced = torch.tensor([int(law.temperature > 0 and law.noise == "gumbel") for law in laws])
    keys = Keys(torch.arange(4), torch.arange(4), raced)
    cut = Truncation.room(4, logits.device)
    chance = Chance("uniform" in kinds, "gumbel" in kinds, cut.load(laws))
    heats = torch.tensor([law.temperature for law in laws])
    chosen, _, _ = chosen_and_walked(logits, heats, cut, keys, positions, chance)
    for b, sampler in enumerate(samplers):
        assert chosen[b].tolist() == [sampler.choose(logits[b, row], [0] * (row + 1)) for row in range(rows)]


@torch.inference_mode()
def test_an_accepted_branch_moves_in_every_layer_and_a_chain_stays():
    tensors = [(torch.randn(3, 2, 16, 8), torch.randn(3, 2, 16, 8)) for _ in range(2)]
    before = [[t.clone() for t in pair] for pair in tensors]
    path, counts = torch.tensor([[0, 2, 5, 0], [0, 1, 0, 0]]), torch.tensor([3, 2])
    lengths, slots = torch.tensor([4, 7]), torch.tensor([2, 0])
    keep_entries(pointer_table(tensors), tensors[0][0], path, counts, lengths, slots)
    for pair, old in zip(tensors, before, strict=True):
        for tensor, was in zip(pair, old, strict=True):
            assert torch.equal(tensor[2, :, 4:7], was[2, :, [4, 6, 9]])
            assert torch.equal(tensor[0], was[0])
            assert torch.equal(tensor[1], was[1])
