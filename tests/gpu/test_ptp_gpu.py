"""Parallel token prediction on CUDA: same tokens with and without it, and a training pass whose kernels agree."""

import copy

import pytest
import torch

from outpace import Engine
from outpace.drafters.ptp import MODES, Ptp
from outpace.target import Target
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

# flex attention needs heads of 16 or more; three query heads to a key head, as SmolLM2 has
WIDE = {"hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "intermediate_size": 192}


def make(dtype, **options):
    target = Target(make_model(dtype=dtype, **WIDE).cuda().requires_grad_(False))
    drafter = Ptp(**{"rank": 8, "min_gain": 0.0, **options})
    drafter.initialise(target, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in drafter.module.parameters():
        parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return target, drafter


def batch_of(target):
    outputs = Engine(target).generate(PROMPTS, max_new_tokens=60, temperature=1.0, seed=3, ignore_eos=True)
    documents = [
        Document([*o.prompt_tokens, *o.tokens], len(o.prompt_tokens), request=i, temperature=1.0)
        for i, o in enumerate(outputs)
    ]
    return assemble([documents[:4], documents[4:]], 320, target)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_same_tokens_with_and_without(mode, temperature):
    target, drafter = make(torch.float32, mode=mode)
    options = {"max_new_tokens": 40, "temperature": temperature, "seed": 9}
    plain = Engine(target).generate(PROMPTS, **options)
    engine = Engine(target, drafter, stand_down=False, check_integrity=True)
    assert [o.tokens for o in engine.generate(PROMPTS, **options)] == [o.tokens for o in plain]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 6e-2)])
def test_flex_and_dense_training_passes_agree(mode, dtype, tolerance):
    target, drafter = make(dtype, mode=mode)
    batch = batch_of(target)
    found = []
    for attention in ("dense", "flex"):
        drafter.attention = attention
        drafter.module.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = drafter.objective(batch)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in drafter.module.parameters()])
        found.append((float(losses.total), losses.counts.clone(), gradient))
    (dense, counts, g1), (flex, same, g2) = found
    assert torch.equal(counts, same)
    assert flex == pytest.approx(dense, rel=tolerance)
    assert float((g1 - g2).norm() / g1.norm()) < 10 * tolerance


@pytest.mark.parametrize("attention", ["dense", "flex"])
@pytest.mark.parametrize("mode", MODES)
def test_a_training_step_does_not_wait_for_the_device(mode, attention):
    target, drafter = make(torch.bfloat16, mode=mode, attention=attention)
    batch = batch_of(target)
    drafter.objective(batch).total.backward()  # warm: lazy initialisation may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drafter.objective(batch).total.backward()
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
