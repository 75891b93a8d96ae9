"""Parallel token prediction on CUDA: same tokens with and without it, and a training pass whose kernels agree."""

import copy

import pytest
import torch

from outpace import Engine
from outpace.drafters.losses import row_losses
from outpace.drafters.ptp import MODES, Ptp
from outpace.drafters.ptp.rows import draw_scored, safety
from outpace.laws import infer_numbers, intervals, place_numbers
from outpace.target import Spans, Target
from outpace.target.behind import _range
from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# three query heads to a key head, as SmolLM2 has
WIDE = {"hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "intermediate_size": 192}


def make(dtype, **options):
    target = Target(make_model(dtype=dtype, **WIDE).cuda().requires_grad_(False))
    drafter = Ptp(**{"rank": 8, "min_gain": 0.0, **options})
    drafter.initialise(target, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in drafter.module.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return target, drafter


def batch_of(target, drafter=None):
    outputs = Engine(target).generate(
        PROMPTS, max_new_tokens=60, temperature=1.0, noise="uniform", seed=3, ignore_eos=True
    )
    documents = [
        Document([*o.prompt_tokens, *o.tokens], len(o.prompt_tokens), request=i, temperature=1.0)
        for i, o in enumerate(outputs)
    ]
    batch = assemble([documents[:4], documents[4:]], 320, target, shifts=() if drafter is None else drafter.shifts)
    if drafter is not None:
        batch.taps = read_taps(batch, drafter.training_taps)
    return batch


CHAIN, EAGLE = {"sampler": "chain", "vocabulary": 30}, {"sampler": "eagle", "vocabulary": 30}
TREE = {**EAGLE, "mode": "mask", "slots": 4, "branches": 3, "nodes": 10}


@pytest.mark.parametrize("noise", ["uniform", "gumbel"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "options",
    [*[{"mode": mode, **more} for mode in MODES for more in ({}, CHAIN)], TREE, {**TREE, "mode": "categorical"}],
    ids=str,
)
def test_same_tokens_with_and_without(options, temperature, noise):
    target, drafter = make(torch.float32, **options)
    options = {"max_new_tokens": 40, "temperature": temperature, "noise": noise, "seed": 9}
    plain = Engine(target).generate(PROMPTS, **options)
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS, **options)] == [o.tokens for o in plain]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 6e-2)])
def test_a_step_in_kernels_is_a_step_written_out(mode, dtype, tolerance):
    target, drafter = make(dtype, mode=mode)
    batch = batch_of(target)
    found = []
    for attention in ("dense", "fused"):
        drafter.attention = attention
        drafter.module.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = drafter.objective(batch)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in drafter.module.parameters()])
        found.append((float(losses.total), losses.counts.clone(), gradient))
    (dense, counts, g1), (fused, same, g2) = found
    assert torch.equal(counts, same)
    assert fused == pytest.approx(dense, rel=tolerance)
    assert float((g1 - g2).norm() / g1.norm()) < 10 * tolerance


KINDS = [
    *[{"mode": mode, **more} for mode in MODES for more in ({}, CHAIN, {"sampler": "chain", "bare": 0.5})],
    *[{"mode": mode, **EAGLE} for mode in ("mask", "categorical")],
]


@pytest.mark.parametrize("attention", ["dense", "fused"])
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_training_step_does_not_wait_for_the_device(attention, options):
    target, drafter = make(torch.bfloat16, attention=attention, **options)
    batch = batch_of(target, drafter)

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):  # as training does
            losses = drafter.objective(batch)
        losses.total.backward()

    step()  # warm: lazy initialisation may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_on_cuda_is_a_step_on_cpu():
    """A window at every place, so that both devices train on the same ones; numbers differ within their intervals."""
    target, drafter = make(torch.float32, density=100.0, attention="dense")
    batch = batch_of(target)
    with torch.no_grad():
        there = drafter.objective(batch)
    home = Target(copy.deepcopy(target.model).cpu())
    twin = Ptp(**drafter.options())
    twin.initialise(home, seed=0)
    twin.module.load_state_dict({k: v.cpu() for k, v in drafter.module.state_dict().items()})
    outputs = [row[doc > 0].tolist() for row, doc in zip(batch.tokens.cpu(), batch.documents.cpu(), strict=True)]
    assert sum(map(len, outputs)) == int((batch.documents > 0).sum())
    moved = {
        name: getattr(batch, name).cpu()
        for name in ("tokens", "documents", "positions", "answer", "temperature", "request", "bounds")
    }
    other = type(batch)(**moved, target=home, longest=batch.longest, answers=batch.answers)
    with torch.no_grad():
        here = twin.objective(other)
    assert torch.equal(there.counts.cpu(), here.counts)
    assert float(there.total) == pytest.approx(float(here.total), rel=0.05), "other places inside the intervals"


# Kernels against what they stand for. Gradients and outputs are compared as a whole: |a - b| / |b|.


def gap(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def by_mask(q, keys, values, own, mask):
    groups = q.shape[2] // keys.shape[2]
    k, v = (
        torch.cat(pair, 1).repeat_interleave(groups, 2).transpose(1, 2)
        for pair in zip((keys, values), own, strict=True)
    )
    scores = q.transpose(1, 2) @ k.transpose(2, 3) * q.shape[3] ** -0.5
    return (scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(
    ("slots", "heads", "key_heads", "size", "sliding"),
    [(8, 9, 3, 64, None), (16, 8, 2, 128, None), (5, 4, 4, 64, 70), (8, 32, 2, 128, None), (64, 3, 1, 64, None)],
)
def test_attention_behind_a_reading(slots, heads, key_heads, size, sliding, dtype, tolerance):
    """Against dense attention in float32 of the same numbers. Documents of 150, 300, 62 tokens, windows anywhere."""
    from outpace.target.behind_fused import attend

    torch.manual_seed(slots)
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor([150, 300, 62])).expand(2, -1).cuda()
    starts = torch.stack([torch.randperm(511)[:40].sort().values + 1 for _ in range(2)]).cuda()
    spans = Spans.of(starts, documents)
    positions = torch.arange(512, device="cuda") - Spans.of(torch.arange(512).expand(2, -1).cuda(), documents).firsts
    at = (positions.gather(1, starts)[..., None] + torch.arange(slots, device="cuda")).flatten(1)
    mask = spans.mask(512, 40 * slots, 40 * slots)
    if sliding is not None:
        mask &= at[:, :, None] - torch.cat([positions, at], 1)[:, None] < sliding
    shapes = [(heads, 40 * slots), (key_heads, 40 * slots), (key_heads, 40 * slots), (key_heads, 512), (key_heads, 512)]
    tensors = [torch.randn(2, rows, n, size, device="cuda").to(dtype) for n, rows in shapes]
    grad = torch.randn(2, 40 * slots, heads, size, device="cuda").to(dtype)
    found = [x.clone().requires_grad_() for x in tensors[:3]]
    wanted = [x.float().requires_grad_() for x in tensors[:3]]
    q, k, v = found
    out = attend(q, *tensors[3:], (k, v), _range(spans, at, positions, sliding), size**-0.5)
    out.backward(grad)
    q, k, v = wanted
    dense = by_mask(q, *(x.float() for x in tensors[3:]), (k, v), mask)
    dense.backward(grad.float())
    assert gap(out, dense) < tolerance
    for a, b in zip(found, wanted, strict=True):
        assert gap(a.grad, b.grad) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0])
def test_edges_and_draws_of_laws_read_off_logits(scale, dtype):
    from outpace.drafters.ptp.laws_fused import draw_rows, token_edges

    torch.manual_seed(0)
    logits = (scale * torch.randn(256, 49152, device="cuda")).to(dtype)
    for temperature in (1.0, 0.7):
        law = torch.softmax(logits.float() / temperature, -1)
        tokens = law.multinomial(1)[:, 0]
        within = torch.rand(256, dtype=torch.float64, device="cuda")
        low, high, total = token_edges(logits, tokens, torch.full((256,), temperature, device="cuda"))
        for found, wanted in zip((low / total, high / total), intervals(law, tokens), strict=True):
            # exp in float32 is off by 2^-24 of its argument, which reaches eight deviations
            assert float((found - wanted).abs().max()) < 1e-6 * max(1.0, scale)
        u, valid = place_numbers(low, high, total, within)
        there, both = infer_numbers(law, tokens, within)
        assert float((valid == both).double().mean()) > 0.98
        assert float((u - there).abs()[valid & both].max()) < 1e-6 * max(1.0, scale)
        back, _ = draw_scored(law, u)
        assert float((back == tokens)[valid].double().mean()) > 0.95, "intervals of likely tokens are long"
    law = torch.softmax(logits.float(), -1)
    wanted, score = draw_scored(law, u)
    found, *edges = draw_rows(logits, u)
    assert float((found == wanted).double().mean()) > 0.95
    assert float((safety(*edges, u) - score).abs().max()) < 1e-3


@pytest.mark.parametrize("kind", ["hard", "soft", "kl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_read_off_logits(kind, dtype, tolerance):
    from outpace.drafters.losses_fused import hard_rows, soft_rows

    torch.manual_seed(0)
    logits, taught = ((3 * torch.randn(128, 49152, device="cuda")).to(dtype) for _ in range(2))
    tokens, heat = torch.randint(49152, (128,), device="cuda"), torch.full((128,), 0.7, device="cuda")
    plain = logits.float().requires_grad_()
    wanted = row_losses(kind, plain, torch.softmax(taught.float() / 0.7, -1), tokens)
    wanted.sum().backward()
    gradient = logits.clone()
    if kind == "hard":
        loss, best, top = hard_rows(gradient, tokens)
    else:
        loss, best, top = soft_rows(gradient, taught, divergence=kind == "kl", temperature=heat)
    assert gap(loss, wanted.detach()) < 1e-4
    assert gap(gradient, plain.grad) < tolerance
    assert gap(top, torch.softmax(plain.detach(), -1).amax(-1)) < 1e-4
    assert torch.equal(logits.gather(1, best[:, None])[:, 0], logits.amax(-1)), "in bfloat16 several may be largest"
