"""The kernels that read laws off logits in Triton's interpreter, against the tensors they stand for."""

import math

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.drafters.losses import row_losses
from outpace.drafters.losses_fused import hard_rows, race_rows, soft_rows
from outpace.drafters.ptp import MODES, Ptp
from outpace.drafters.ptp.laws_fused import draw_rows, token_edges
from outpace.drafters.ptp.rows import draw_scored, safety
from outpace.laws import draw, infer_numbers, intervals, place_numbers
from outpace.target import Target
from outpace.train.packing import Document, assemble
from tiny import PROMPTS, make_model


def rows_of(scale, dtype, size=4500, rows=64):
    """More than one block of 4096; the likeliest id comes late in half of the rows."""
    generator = torch.Generator().manual_seed(int(scale))
    logits = scale * torch.randn(rows, size, generator=generator)
    logits[::2, -7] = logits[::2].amax(1) + 1
    return logits.to(dtype), torch.softmax(logits.to(dtype).float(), -1).multinomial(1, generator=generator)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_edges_are_those_of_the_law_and_numbers_give_the_tokens_back(scale, dtype, temperature):
    logits, tokens = rows_of(scale, dtype)
    law = torch.softmax(logits.float() / temperature, -1)
    within = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high, total = token_edges(logits, tokens, torch.full((64,), temperature))
    for found, wanted in zip((low / total, high / total), intervals(law, tokens), strict=True):
        torch.testing.assert_close(found, wanted, atol=3e-7, rtol=0)
    u, valid = place_numbers(low, high, total, within)
    there, both = infer_numbers(law, tokens, within)
    assert bool(valid[both].all())
    torch.testing.assert_close(u[both], there[both], atol=3e-7, rtol=0)
    back = torch.tensor([draw(row, float(number)) for row, number in zip(law, u, strict=True)])
    missed = valid & (back != tokens)
    assert float(missed.double().mean()) <= 0.02, "one of 64: a number within 3e-7 of an edge"


def test_edges_of_the_first_and_the_last_id():
    logits, _ = rows_of(1.0, torch.float32, size=40, rows=2)
    low, high, total = token_edges(logits, torch.tensor([0, 39]), torch.ones(2))
    assert float(low[0]) == 0
    torch.testing.assert_close(high[1], total[1])


@pytest.mark.parametrize("scale", [1.0, 4.0, 30.0])
def test_draws_are_those_of_the_law(scale):
    logits, tokens = rows_of(scale, torch.float32)
    law = torch.softmax(logits, -1)
    left, right = intervals(law, tokens)
    u = left + 0.5 * (right - left)  # numbers far from edges, then some at both ends
    u = torch.cat([u, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)])
    logits, law = torch.cat([logits, logits[:2]]), torch.cat([law, law[:2]])
    wanted, score = draw_scored(law, u)
    found, *edges = draw_rows(logits, u)
    assert float((found == wanted).double().mean()) > 0.95
    torch.testing.assert_close(safety(*edges, u), score, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["hard", "soft", "kl"])
@pytest.mark.parametrize("temperature", [None, 0.6])
def test_losses_and_gradients_are_those_of_the_definition(kind, temperature):
    logits, tokens = rows_of(4.0, torch.float32)
    taught, _ = rows_of(3.0, torch.float32)
    heat = None if temperature is None else torch.full((64,), temperature)
    logits.requires_grad_()
    p = torch.softmax(taught / (temperature or 1.0), -1)
    wanted = row_losses(kind, logits, p, tokens)
    (slope,) = torch.autograd.grad(wanted.sum(), logits)
    chances = torch.softmax(logits.detach(), -1).max(-1)
    gradient = logits.detach().clone()
    if kind == "hard":
        loss, best, top = hard_rows(gradient, tokens)
    else:
        loss, best, top = soft_rows(gradient, taught, divergence=kind == "kl", temperature=heat)
    torch.testing.assert_close(loss, wanted.detach(), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(gradient, slope, atol=1e-6, rtol=1e-4)
    assert torch.equal(best, chances.indices)
    torch.testing.assert_close(top, chances.values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("size", "covered"), [(4500, 0.6), (37, 1.0)])
def test_a_race_is_the_definitions_with_the_noise_its_gradient_tells(size, covered):
    """Where a token of the vocabulary wins, softmax(logits + noise) is the gradient, one more at the winner."""
    taught, _ = rows_of(1.0, torch.float32, size=size, rows=40)
    logits = taught + 0.5 * torch.randn(40, size, generator=torch.Generator().manual_seed(9))
    norms = taught.logsumexp(-1) - math.log(covered)
    gradient = logits.clone()
    loss, best, top = race_rows(gradient, taught, norms, seed=5)
    chances = torch.softmax(logits, -1).max(-1)
    assert torch.equal(best, chances.indices)
    torch.testing.assert_close(top, chances.values, atol=1e-6, rtol=1e-5)
    alive = loss > 0
    assert abs(float(alive.double().mean()) - covered) < 0.2
    assert bool((gradient[~alive] == 0).all())
    assert not loss[~alive].any()
    winner = gradient.argmin(-1)
    race = gradient.scatter_add(1, winner[:, None], torch.ones(len(winner), 1))
    torch.testing.assert_close(race[alive].sum(-1), torch.ones(int(alive.sum())), atol=1e-4, rtol=0)
    torch.testing.assert_close(loss[alive], -race[alive, winner[alive]].log(), atol=1e-3, rtol=1e-3)
    noise = race.double().clamp_min(1e-300).log() - logits  # but for a constant of each row
    told = race > 1e-25
    raced = torch.where(told, taught + noise, -math.inf)[alive]
    ahead = raced.gather(1, winner[alive, None])[:, 0]
    assert bool((ahead >= raced.amax(-1) - 1e-2).all()), "the target's race with the same noise has the same winner"
    pairs = torch.where(told[:, ::2][:, : size // 2] & told[:, 1::2], noise[:, ::2][:, : size // 2] - noise[:, 1::2], 0)
    spread = pairs[alive][told[alive][:, ::2][:, : size // 2] & told[alive][:, 1::2]].std()
    assert abs(float(spread) - math.pi / math.sqrt(3)) < 0.1, "differences of Gumbel numbers are logistic"


def test_other_seeds_and_other_rows_have_other_noise():
    logits = torch.zeros(2, 64)
    found = []
    for seed in (1, 2):
        gradient = logits.clone()
        race_rows(gradient, logits, logits.logsumexp(-1) + 0, seed=seed)
        found += list(gradient)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize(
    ("mode", "loss", "options"),
    [
        ("one_hot", "hard", {"temperature": 0.8}),
        ("categorical", "soft", {"any_temperature": True}),
        ("categorical", "hard", {"inverse": True}),
        ("categorical", "kl", {"top_k": 38}),
        ("mask", "reverse_kl", {}),
        ("mask", "kl", {}),
    ],
)
def test_a_step_in_kernels_is_a_step_written_out(mode, loss, options):
    """float32, everything in kernels against nothing: losses, hits, gradients, and what was counted."""
    assert mode in MODES
    target = Target(make_model(dtype=torch.float32).requires_grad_(False))
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(2, 40, (14,), generator=generator).tolist() for _ in range(4)]
    documents = [
        Document([*p, *t], len(p), request=i, temperature=0.8)
        for i, (p, t) in enumerate(zip(PROMPTS[:4], texts, strict=True))
    ]
    batch = assemble([documents[:2], documents[2:]], 58, target)
    drafter = Ptp(**{"slots": 5, "rank": 4, "mode": mode, **options})
    drafter.initialise(target, seed=0)
    drafter.recipe = drafter.recipe.replace(loss=loss)
    for parameter in drafter.module.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    found = []
    for drafter.attention in ("dense", "fused"):
        torch.manual_seed(0)
        drafter.module.zero_grad()
        losses = drafter.objective(batch)
        losses.total.backward()
        gradient = torch.cat([p.grad.flatten() for p in drafter.module.parameters() if p.grad is not None])
        found.append((losses.total.detach(), losses.sums, losses.counts, losses.hits, gradient))
    (a, sums, counts, hits, gradient), (b, *rest) = found
    torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rest[0], sums, atol=1e-4, rtol=1e-4)
    assert torch.equal(rest[1], counts)
    assert float(counts.sum()) > 20
    torch.testing.assert_close(rest[2], hits, atol=1, rtol=0)
    assert float((rest[3] - gradient).norm() / gradient.norm()) < 1e-3
