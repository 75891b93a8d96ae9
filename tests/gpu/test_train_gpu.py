"""Training on a GPU: kernels against their definitions, no wait inside a step, runs that end on time."""

import copy
import itertools
import time

import pytest
import torch

from drafters.learned import DIALOGUES
from outpace import Engine
from outpace.drafters.eagle import Eagle3
from outpace.drafters.heads import DraftHead
from outpace.drafters.layers import compile_halves
from outpace.drafters.losses import Teacher, head_loss, race_noise, row_losses
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP, MTPHeads
from outpace.drafters.unroll import dense_attention, unrolled_attention
from outpace.target import GatedLoRA, Target, run_packed
from outpace.train import Corpus, CorpusSettings, Trainer, TrainSettings, write_corpus
from outpace.train.evaluate import simulate
from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble
from outpace.train.prompts import PromptLine, PromptReport
from tiny import PROMPTS, make_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BOUNDS = [0, 10, 30, 37, 74, 200]


@pytest.mark.parametrize("steps", [1, 2, 6])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (4, 4, 128), (4, 1, 32)])
def test_the_unrolled_kernel_equals_the_definition_with_gradients(steps, heads, key_heads, size):
    """bfloat16 through the kernel against float32 through the mask: within the noise of bfloat16."""
    torch.manual_seed(steps)
    rows = BOUNDS[-1]
    make = lambda n: torch.randn(rows, n, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)  # noqa: E731
    q, keys, values = make(heads), [make(key_heads) for _ in range(steps)], [make(key_heads) for _ in range(steps)]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device="cuda")
    ours = unrolled_attention(q, keys, values, bounds=bounds, longest=126)
    documents = torch.zeros(1, rows, dtype=torch.int64, device="cuda")
    for number, (a, b) in enumerate(itertools.pairwise(BOUNDS), start=1):
        documents[0, a:b] = number
    wide = [x.detach().float().requires_grad_() for x in (q, *keys, *values)]
    want = dense_attention(wide[0][None], [k[None] for k in wide[1 : 1 + steps]], [v[None] for v in wide[1 + steps :]],
                           documents)[0]  # fmt: skip
    torch.testing.assert_close(ours.float(), want, atol=2e-2, rtol=2e-2)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(ours, [q, *keys, *values], grad.bfloat16()), torch.autograd.grad(want, wide, grad),
        strict=True,
    ):  # fmt: skip
        scale = float(b.abs().max())
        torch.testing.assert_close(a.float() / scale, b / scale, atol=2e-2, rtol=3e-2)


@pytest.fixture(scope="module")
def target():
    return Target(make_model(dtype=torch.bfloat16, head_dim=16, vocab_size=5000).cuda())


@pytest.mark.parametrize("kind", ["soft", "kl"])
@pytest.mark.parametrize("size", [0, 3000])
@pytest.mark.parametrize("head_kind", ["target", "own"])
def test_the_fused_loss_equals_the_definition(kind, size, head_kind, target):
    torch.manual_seed(0)
    head = DraftHead(target, size, head_kind).cuda()
    states = torch.randn(300, 32, device="cuda", dtype=torch.bfloat16) / 8
    hidden = (torch.randn(203, 32, device="cuda", dtype=torch.bfloat16) / 8).requires_grad_()
    rows = torch.randint(0, 300, (203,), device="cuda")
    label = torch.randint(0, 5000, (203,), device="cuda")
    total, hits = head_loss(kind, hidden, head, label, Teacher(states, rows), chunk=64)
    leaves = [hidden, *head.parameters()]
    ours = torch.autograd.grad(total, leaves)
    logits = head(hidden)
    p = torch.softmax(torch.nn.functional.linear(states[rows], head.teacher).float(), -1)
    want = row_losses(kind, logits, p, head.to_draft(label)).sum()
    torch.testing.assert_close(total, want, atol=1e-2, rtol=1e-3)
    for a, b in zip(ours, torch.autograd.grad(want, leaves), strict=True):
        scale = float(b.abs().max())
        torch.testing.assert_close(a.float() / scale, b.float() / scale, atol=2e-2, rtol=5e-2)
    assert torch.equal(hits, logits.argmax(-1) == head.to_draft(label))


@pytest.mark.parametrize("size", [0, 3000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_race_equals_the_definition_in_the_mean(size, dtype, target):
    """Both draw noise of their own: 40 000 races of the same two laws, losses and gradients."""
    torch.manual_seed(0)
    head = DraftHead(target, size, "target").cuda()
    states = (torch.randn(1, 32, device="cuda") / 2).to(torch.bfloat16)
    hidden = (states + torch.randn(1, 32, device="cuda") / 8).to(dtype).expand(40_000, -1).requires_grad_()
    rows = torch.zeros(40_000, dtype=torch.int64, device="cuda")
    total, _ = head_loss("race", hidden, head, rows, Teacher(states, rows))
    (ours,) = torch.autograd.grad(total, hidden)
    teacher = Teacher(states, rows)
    logits, p = head(hidden.detach()[:4000]).float().requires_grad_(), teacher.law("race", head, slice(0, 4000))
    losses = torch.cat([
        row_losses("race", logits, p, rows[:4000], race_noise(4000, head.size, rows.device)) for _ in range(10)
    ])  # fmt: skip
    (slope,) = torch.autograd.grad(losses.sum(), logits)
    want = slope.sum(0) / 40_000 @ head.weight.float()
    spread = float(losses.detach().std()) / 200
    assert abs(float(total.detach()) / 40_000 - float(losses.detach().mean())) < 6 * spread
    scale = float(ours.float().std(0).max()) / 200
    assert float((ours.float().mean(0) - want).abs().max()) < 6 * scale


def test_taps_of_packed_documents_are_those_of_each_alone(target):
    batch = assemble([DIALOGUES[:2], DIALOGUES[2:]], 30, target)
    found = read_taps(batch, ("in:2", "post_norm"))
    for (row, start), document in zip(((0, 0), (0, 16), (1, 0)), DIALOGUES, strict=True):
        size = len(document.tokens)
        alone = read_taps(assemble([[document]], size, target), ("in:2", "post_norm"))
        for tap in found:
            ours, want = found[tap][row, start : start + size].float(), alone[tap][0].float()
            scale = float(want.abs().max())
            torch.testing.assert_close(ours / scale, want / scale, atol=2e-2, rtol=0)


@pytest.fixture(scope="module")
def documents(target, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    lines = [PromptLine(f"p{i}", "", p) for i, p in enumerate(PROMPTS)]
    write_corpus(target, PromptReport(prompts=lines), folder,
                 CorpusSettings(temperatures=(0.0, 0.8), max_new_tokens=60, max_batch=16))  # fmt: skip
    return Corpus.load(folder)


MAKERS = {
    "eagle3": lambda: Eagle3(draft_len=4, branches=1, nodes=4, vocabulary=3000),
    "mtp": lambda: MTP(draft_len=4, branches=3, nodes=9, vocabulary=0),
    "mtp_heads": lambda: MTPHeads(heads=3, vocabulary=3000),
    "medusa": lambda: Medusa(heads=3, projection="low_rank", rank=8, vocabulary=0),
}


@pytest.mark.parametrize("optimizer", ["flash", "adamw"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_drafter_trains_and_then_decodes_the_same_text(name, optimizer, target, documents, tmp_path):
    drafter = MAKERS[name]()
    drafter.recipe = drafter.recipe.replace(tokens_per_step=1024, row_length=256, rows=4, lr=3e-3)
    settings = TrainSettings(steps=60, optimizer=optimizer, eval_every=0, save_every=0)
    run = Trainer(target, drafter, documents, tmp_path, settings)
    trained = run.run()
    losses = [point["loss"] for point in run.curves if "loss" in point]
    assert losses[-1] < losses[0]
    engine = Engine(target, trained, stand_down=False)
    outputs = engine.generate(PROMPTS, max_new_tokens=40, seed=3)
    assert sum(o.stats.drafted for o in outputs) > 0
    if name == "eagle3":
        reached = sum(o.stats.emitted for o in outputs) / sum(o.stats.rounds for o in outputs)
        assert simulate(trained, outputs, depth=4) == pytest.approx(reached, rel=0.1)


def test_a_run_by_the_clock_ends_on_time(target, documents, tmp_path):
    drafter = MAKERS["eagle3"]()
    drafter.recipe = drafter.recipe.replace(tokens_per_step=1024, row_length=256, rows=4)
    run = Trainer(target, drafter, documents, tmp_path, TrainSettings(minutes=0.25, eval_every=0, save_every=0))
    started = time.perf_counter()
    run.run()
    assert 12 < time.perf_counter() - started < 20
    assert run.progress.share == pytest.approx(1.0)


def test_a_step_does_not_wait_for_the_device(target, documents, tmp_path):
    """Features, objective, backward, clip and optimiser of a warm step, with waits forbidden."""
    drafter = MAKERS["eagle3"]()
    drafter.recipe = drafter.recipe.replace(tokens_per_step=1024, row_length=256, rows=4)
    run = Trainer(target, drafter, documents, tmp_path, TrainSettings(steps=9, eval_every=0, save_every=0))
    from outpace.train.loop import Clocked, Figures

    pieces = [next(run._batches(step)) for step in range(4)]
    figures, clock = Figures.none(drafter.recipe.depths, target.device), Clocked(target.device)
    for number, piece in enumerate(pieces):
        torch.cuda.set_sync_debug_mode("error" if number >= 2 else "default")
        try:
            run._step(iter([piece]), figures, clock)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_documents_longer_than_a_kernels_block(target):
    """A document of 700 tokens: packed features and the unrolled objective stay finite and agree with short ones."""
    long = Document([5 + i % 200 for i in range(700)], 20)
    drafter = MAKERS["eagle3"]()
    drafter.initialise(target)
    batch = assemble([[long, DIALOGUES[0]]], 768, target, shifts=drafter.shifts)
    batch.taps = read_taps(batch, drafter.training_taps)
    with torch.autocast("cuda", torch.bfloat16):
        losses = drafter.objective(batch)
    losses.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in drafter.module.parameters())


def large_batch(target, shifts=()):
    """8192 rows: what is large enough to be compiled."""
    rows = [[Document([5 + (7 * i + 13 * b) % 4000 for i in range(400)], 100) for _ in range(5)] for b in range(4)]
    return assemble(rows, 2048, target, shifts=shifts)


def close(ours, wanted, share):
    scale = float(wanted.abs().max())
    torch.testing.assert_close(ours.float() / scale, wanted.float() / scale, atol=share, rtol=0)


def test_compiled_features_are_the_modules(target):
    taps = ("in:1", "pre_norm", "post_norm")
    ours = read_taps(large_batch(target), taps)
    wanted = read_taps(large_batch(target.through("readable")), taps)
    for tap in taps:
        close(ours[tap], wanted[tap], 3e-2)


def test_compiled_blocks_have_the_gradients_of_eager_ones(target):
    found = []
    for compiled in (False, True):
        drafter = MAKERS["eagle3"]()
        drafter.initialise(target)
        if compiled:
            compile_halves(drafter.module)
        batch = large_batch(target, drafter.shifts)
        batch.taps = read_taps(batch, drafter.training_taps)
        with torch.autocast("cuda", torch.bfloat16):
            total = drafter.objective(batch).total
        total.backward()
        found.append([total.detach(), *(p.grad for p in drafter.module.parameters())])
    for ours, wanted in zip(*found, strict=True):
        close(ours, wanted, 5e-2)


def test_an_adapter_learns_through_packed_rows_as_it_does_in_float32(target):
    """Flash attention's gradients in bfloat16 against the model's own modules in float32, the same weights."""
    exact = Target(copy.deepcopy(target.model).float())
    gradients = []
    for one in (target, exact):
        one.model.requires_grad_(False)
        adapter = GatedLoRA.for_all_layers(one.model, 4).cuda()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        batch = assemble([DIALOGUES[:2], DIALOGUES[2:]], 32, one)
        state = run_packed(one, batch, ("post_norm",), adapter)["post_norm"].float()
        weight = torch.randn(state.shape, generator=generator).cuda()
        (state * weight).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in adapter.parameters()]))
    ours, want = gradients
    assert float(torch.nn.functional.cosine_similarity(ours, want, dim=0)) > 0.98


def test_medusa_trains_its_target_along(target, tmp_path):
    prompts = [PromptLine(f"p{i}", "", prompt) for i, prompt in enumerate(PROMPTS)]
    write_corpus(target, PromptReport(prompts=prompts), tmp_path / "c", CorpusSettings(max_new_tokens=24))
    drafter = Medusa(heads=3, nodes=8, vocabulary=0, tune_rank=4)
    drafter.recipe = drafter.recipe.replace(tokens_per_step=512, row_length=128, rows=4)
    settings = TrainSettings(steps=5, eval_every=0)
    made = Trainer(target, drafter, Corpus.load(tmp_path / "c"), tmp_path / "o", settings).run()
    ours = Engine(made.target, made, stand_down=False).generate(PROMPTS[:3], max_new_tokens=16)
    assert all(len(o.tokens) for o in ours)
