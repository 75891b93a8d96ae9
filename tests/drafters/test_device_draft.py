"""Drafts through fused kernels, run by Triton's interpreter: the trees, rows and outputs of `growth`."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from drafters.learned import fresh
from outpace.drafters.device import fused
from outpace.drafters.device import plan as plan_module
from outpace.drafters.device.contract import DraftKey
from outpace.drafters.device.following import FollowingDraft
from outpace.drafters.device.fused import FusedDraft, device_draft
from outpace.drafters.device.plan import rounded
from outpace.drafters.eagle import Eagle, Eagle2, Eagle3
from outpace.drafters.growth import Draws, children
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.target import Target
from outpace.target.fast.plan import Projection
from outpace.target.skinny import in_eight_bits
from tiny import make_model, target
from uncaptured import plain_attention

FUSED = {
    "eagle3": lambda: Eagle3(draft_len=3, branches=3, nodes=11, vocabulary=30),
    "eagle3 full": lambda: Eagle3(draft_len=3, branches=2, nodes=30, vocabulary=0, layers=2, head="own"),
    "eagle3 chain": lambda: Eagle3(draft_len=3, branches=1, nodes=3, vocabulary=30),
    "eagle3 one": lambda: Eagle3(draft_len=1, branches=4, nodes=4, vocabulary=30),
    "eagle3 3.0": lambda: Eagle3(
        draft_len=3, branches=2, nodes=6, fc_norm=False, norm_output=False, norm_before_residual=True
    ),
    "eagle3 normed fc": lambda: Eagle3(draft_len=3, branches=2, nodes=6, fc_norm=False, norm_before_fc=True),
    "eagle2": lambda: Eagle2(draft_len=3, branches=2, nodes=7),
    "mtp": lambda: MTP(draft_len=3, branches=2, nodes=7, vocabulary=30),
    "mtp 2": lambda: MTP(draft_len=3, branches=2, nodes=7, order="hidden_embed", chain_norm="none", tap="pre_norm"),
}


def filled(drafter, seed):
    """A cache of three seats with kept rows, and the round that the next draft begins with."""
    generator = torch.Generator().manual_seed(seed)
    cache = drafter.cache
    cache.reserve(slots=4, capacity=256)
    for tensor in (cache.keys, cache.values, cache.top):
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    cache.lengths[:] = [130, 0, 7, 0]
    cache.at.copy_(torch.tensor(cache.lengths))
    rows = 16
    taps = {name: torch.randn(4, rows, 32, generator=generator) for name in drafter.module.taps}
    path = torch.stack([torch.randperm(rows, generator=generator) for _ in range(4)])
    emitted = torch.randint(0, 40, (4, rows + 4), generator=generator)[:, 1 : 1 + rows]
    return taps, path, emitted, torch.tensor([2, 0, 1, 0])


def eight(projection):
    """What `rounded_product` makes of large weights, for weights of any size and dtype."""
    numbers, scales = in_eight_bits(projection.weight)
    return Projection(numbers, projection.bias, scales)


@torch.no_grad()
def round_in_place(module):
    """Give a network the numbers that eight bits stand for."""
    for layer in module.modules():
        if getattr(layer, "weight", None) is not None and layer.weight.ndim == 2:
            numbers, scales = in_eight_bits(layer.weight)
            layer.weight.copy_(numbers * scales[:, None])


def drawn(sampled, heats, depth, size, coupling, generator):
    """Draws for requests of these temperatures; "both": numbers for the first, noise for the others."""
    if sampled == "greedy":
        return None
    heat = torch.tensor(heats)
    raced = torch.tensor([sampled == "gumbel" or (sampled == "both" and b > 0) for b in range(len(heats))])
    race = None
    if sampled != "uniform":
        race = -torch.empty(len(heats), depth, size).exponential_(generator=generator).log()
        race = race * (raced & (heat > 0))[:, None, None]
    u = None if sampled == "gumbel" else torch.rand(len(heats), depth, generator=generator)
    return Draws(heat, race, u, heat * ~raced, coupling)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "sampled", "bits"),
    [*((name, kind, 32) for name in ("eagle3", "mtp") for kind in ("greedy", "uniform")),
     *((name, "gumbel", 32) for name in FUSED), ("eagle3", "gumbel", 8), ("mtp", "gumbel", 8)],
)  # fmt: skip
def test_a_fused_draft_is_the_one_growth_makes(name, sampled, bits, monkeypatch):
    if bits == 8:
        monkeypatch.setattr(plan_module, "rounded_product", eight)
    if name != "eagle3":  # attention's kernels take most of the time here
        monkeypatch.setattr(fused, "tree_attention", plain_attention)
    drafter = fresh(FUSED[name]())
    if bits == 8:
        round_in_place(drafter.module)
    generator = torch.Generator().manual_seed(1)
    draws = drawn(sampled, [0.8, 1.2, 0.0, 0.5], drafter.shape.depth, drafter.module.head.size, 0.3, generator)
    found = []
    for make in (FollowingDraft, device_draft):
        draft = make(drafter)
        drafter.cache.generation += 1
        drafter.cache.reserve(slots=4, capacity=256)
        taps, path, emitted, counts = filled(drafter, 5)
        draft.collect(taps, path, emitted, counts)
        draft.collect({k: v + 1 for k, v in taps.items()}, path, emitted, counts + 1, warm=True)
        key = DraftKey(drafter.cache.generation, 256)
        draft.draft(key, 4, draws, warm=True)
        assert drafter.cache.at.tolist() == [130, 0, 7, 0], "warming up leaves no traces"
        tokens, parents = draft.draft(key, 4, draws)
        cache = drafter.cache
        kept = [t[:, seat, :, : cache.at[seat]].clone() for t in (cache.keys, cache.values) for seat in range(4)]
        raw = draft.owed(4).features
        found.append((tokens, parents, cache.at.tolist(), cache.top.clone(), kept, raw))
    assert isinstance(draft, FusedDraft)
    wanted, ours = found
    assert ours[2] == wanted[2] == [132, 0, 8, 0]
    assert torch.equal(ours[5], wanted[5])
    torch.testing.assert_close(ours[3], wanted[3], atol=2e-5, rtol=2e-5)
    for one, two in zip(ours[4], wanted[4], strict=True):
        torch.testing.assert_close(one, two, atol=2e-5, rtol=2e-5)
    assert (ours[0][[1, 3]] == -1).all()
    assert (wanted[0][[1, 3]] == -1).all()
    for seat in (0, 2):
        assert ours[0][seat].tolist() == wanted[0][seat].tolist()
        assert ours[1][seat].tolist() == wanted[1][seat].tolist()


@torch.inference_mode()
@pytest.mark.parametrize("sampled", ["greedy", "uniform", "gumbel", "both"])
@pytest.mark.parametrize(("vocabulary", "k"), [(2500, 3), (33000, 2), (1024, 8), (7, 7)])
def test_the_best_children_over_many_tiles(vocabulary, k, sampled):
    """Ties, a drawn token that is among the best and one that is not, a greedy request beside a warm one."""
    drafter = fresh(Eagle3(draft_len=2, branches=k, nodes=30, vocabulary=0))
    drafter.cache.reserve(slots=3, capacity=256)
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 2 * torch.randn(3 * k, vocabulary, generator=generator)
    logits[0, [1, vocabulary - 1]] = float(logits[0].max()) + 1  # a tie between tiles
    for coupling in (0.0, 0.3, 0.9):
        draws = drawn(sampled, [0.7, 1.5, 0.0], 2, vocabulary, coupling, generator)
        run = fused._Run(device_draft(drafter), DraftKey(0, 256), 3, draws)
        values = -torch.rand(3 * k, generator=generator)
        births = torch.arange(3 * k, dtype=torch.int32) % k
        run.children(logits, values, births, 2)
        best, ids = children(logits.view(3, k, -1), k, draws, 2)
        found = run.values[:, k:].view(3, k, k)
        torch.testing.assert_close(found, values.view(3, k, 1) + best, atol=2e-5, rtol=2e-5)
        tokens = run.tokens[:, k:].view(3, k, k)
        clear = torch.ones_like(tokens, dtype=torch.bool)  # ids of equal values are free
        clear[:, :, 1:] &= (best[:, :, 1:] - best[:, :, :-1]).abs() > 1e-5
        clear[:, :, :-1] &= (best[:, :, 1:] - best[:, :, :-1]).abs() > 1e-5
        assert torch.equal(tokens[clear], ids[clear])
        assert tokens[0, 0].tolist()[:2] == [1, vocabulary - 1] or sampled != "greedy"
        assert torch.equal(run.parents[:, k:], births.view(3, k).repeat_interleave(k, 1))


@torch.inference_mode()
def test_numbers_that_are_none_draft_nothing():
    drafter = fresh(Eagle3(draft_len=2, branches=2, nodes=6, vocabulary=30))
    drafter.cache.reserve(slots=1, capacity=256)
    run = fused._Run(device_draft(drafter), DraftKey(0, 256), 1, None)
    run.children(torch.full((1, 30), float("nan")), None, None, 1)
    assert run.tokens[0, :2].tolist() == [-1, -1]


@pytest.mark.parametrize("make", [lambda: Eagle(), lambda: MTPHeads(heads=2), lambda: Eagle3(branches=20, draft_len=2)])
def test_what_does_not_fit_takes_the_functions_of_growth(make):
    draft = device_draft(fresh(make()))
    assert type(draft) is FollowingDraft


def test_joining_weights_leaves_the_module_what_it_was():
    drafter = fresh(Eagle3(layers=2))
    before = {name: tensor.clone() for name, tensor in drafter.module.state_dict().items()}
    plan = drafter.module.fused_plan()
    after = drafter.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert plan.blocks[0].qkv.weight.data_ptr() == drafter.module.midlayer.self_attn.q_proj.weight.data_ptr()
    assert drafter.module.fused_plan().blocks[0].qkv.weight.data_ptr() == plan.blocks[0].qkv.weight.data_ptr()
    assert target().hidden_size * 2 == plan.blocks[0].qkv.weight.shape[1]


@pytest.mark.parametrize("make", [FUSED["eagle3 full"], FUSED["mtp"], FUSED["eagle2"]])
def test_large_weights_in_bfloat16_are_drafted_in_eight_bits(make, monkeypatch):
    monkeypatch.setattr(plan_module, "_LEAST", 2048)
    drafter = make()
    drafter.initialise(Target(make_model(dtype=torch.bfloat16)))
    plan = drafter.for_decoding().module.fused_plan()
    found = rounded(plan)

    def products(plan):
        named = {name: getattr(plan, name) for name in ("fuse", "join", "head")}
        for number, block in enumerate(plan.blocks):
            named |= {(number, name): getattr(block, name) for name in ("qkv", "out", "gate_up", "down")}
        return {name: product for name, product in named.items() if product is not None}

    before, after = products(plan), products(found)
    large = {name for name, product in before.items() if product.weight.numel() >= 2048}
    assert before.keys() == after.keys()
    assert large
    assert large != before.keys()
    for name, product in after.items():
        if name not in large:
            assert product is before[name], "small ones keep their bits"
            continue
        weight = before[name].weight
        assert (product.weight.dtype, product.weight.shape) == (torch.int8, weight.shape)
        assert (product.scales.dtype, product.scales.shape) == (torch.float32, weight.shape[:1])
        assert product.bias is before[name].bias
        apart = (product.weight * product.scales[:, None] - weight.float()).abs()
        assert (apart <= 0.5001 * product.scales[:, None]).all()
    monkeypatch.setenv("OUTPACE_INT8", "off")
    assert all(product is before[name] for name, product in products(rounded(plan)).items())
    monkeypatch.delenv("OUTPACE_INT8")
    exact = fresh(make()).module.fused_plan()
    assert all(product.scales is None for product in products(rounded(exact)).values()), "float32 keeps its bits"


def test_a_module_that_was_moved_is_planned_anew():
    drafter = fresh(Eagle3())
    draft = drafter.device_draft()
    assert drafter.device_draft() is draft
    drafter.module.double().float()
    assert drafter.device_draft() is not draft
    assert drafter.device_draft() is drafter.device_draft()
