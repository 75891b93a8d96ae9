"""Draft vocabularies (T-VOCAB), and losses: chunks against the whole, kinds against their formulas."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.learned import fresh
from outpace.drafters.eagle import Eagle3
from outpace.drafters.heads import DraftHead, check_ids, choose_ids, special_ids
from outpace.drafters.losses import LOSSES, Teacher, check_loss, head_loss, log_norms, race_noise, row_losses
from outpace.errors import CheckpointError, ConfigError
from tiny import EOS, VOCABULARY, target

COUNTS = torch.zeros(VOCABULARY, dtype=torch.int64)
COUNTS[[3, 7, 8, 20, 39]] = torch.tensor([5, 9, 1, 4, 2])


def test_the_draft_vocabulary_is_the_most_frequent_tokens_and_always_the_special_ones():
    assert choose_ids(COUNTS, 4, (EOS,)).tolist() == [1, 3, 7, 20]
    assert choose_ids(COUNTS, 8).tolist() == [0, 1, 2, 3, 7, 8, 20, 39], "filled up with the smallest unused ids"
    with pytest.raises(ConfigError, match="3 are always in it"):
        choose_ids(COUNTS, 2, (1, 2, 3))
    with pytest.raises(ConfigError, match="impossible"):
        choose_ids(COUNTS, VOCABULARY + 1)
    assert special_ids(target()) == (EOS,)


@pytest.mark.parametrize("kind", ["target", "own"])
def test_offsets_rows_and_maps_agree(kind):
    ids = choose_ids(COUNTS, 6, (EOS,))
    head = DraftHead(target(), 6, kind, ids)
    assert torch.equal(head.ids, ids)
    assert torch.equal(head.d2t, ids - torch.arange(6)), "offsets, as the field stores them"
    assert torch.equal(head.to_target(torch.arange(6)), ids)
    assert torch.equal(head.to_draft(ids), torch.arange(6))
    outside = [i for i in range(VOCABULARY) if i not in ids.tolist()]
    assert head.to_draft(torch.tensor(outside)).eq(-1).all()
    full = target().model.get_output_embeddings().weight
    hidden = torch.randn(3, 32)
    torch.testing.assert_close(head(hidden), (hidden @ full.T)[:, ids])
    assert (sum(p.numel() for p in head.parameters()) > 0) == (kind == "own")
    assert set(head.state_dict()) == ({"d2t", "weight"} if kind == "own" else {"d2t"})


def test_absolute_ids_in_place_of_offsets_are_refused(tmp_path):
    drafter = fresh(Eagle3(vocabulary=30))
    drafter.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["head.d2t"] = torch.arange(30) + 10
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="must hold offsets"):
        Eagle3.from_pretrained(tmp_path).fit(target())
    with pytest.raises(CheckpointError, match="rising token ids"):
        check_ids(torch.tensor([3, 3, 5]), 10)


def test_a_loaded_vocabulary_brings_its_rows(tmp_path):
    drafter = Eagle3(vocabulary=12)
    drafter.prepare(COUNTS, target())
    fresh(drafter)
    drafter.save_pretrained(tmp_path, dtype=torch.float32)
    again = Eagle3.from_pretrained(tmp_path)
    again.fit(target())
    assert torch.equal(again.module.head.ids, drafter.module.head.ids)
    hidden = torch.randn(2, 32)
    torch.testing.assert_close(again.module.head(hidden), drafter.module.head(hidden))
    assert EOS in again.module.head.ids.tolist()


def laws(rows=7, size=9):
    torch.manual_seed(1)
    logits = torch.randn(rows, size, dtype=torch.float64, requires_grad=True)
    p = torch.softmax(2 * torch.randn(rows, size, dtype=torch.float64), -1)
    return logits, p, torch.randint(0, size, (rows,))


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_its_formula(kind):
    logits, p, label = laws()
    q = torch.softmax(logits, -1)
    overlap = torch.minimum(p, q).sum(-1)
    kl = (p * (p / q).log()).sum(-1)
    part = torch.exp(-3 * overlap)
    noise = race_noise(*p.shape, p.device)
    winner = (p.log() + noise[:, :-1]).argmax(-1)  # nothing lies outside
    want = {
        "soft": -(p * q.log()).sum(-1),
        "hard": -q.gather(1, label[:, None])[:, 0].log(),
        "kl": kl,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
        "overlap": -overlap.log(),
        "hybrid": part * kl + (1 - part) * (1 - overlap),
        "race": (logits + noise[:, :-1]).logsumexp(-1) - (logits + noise[:, :-1]).gather(1, winner[:, None])[:, 0],
    }[kind]
    torch.testing.assert_close(row_losses(kind, logits, p, label, noise).double(), want, atol=1e-5, rtol=1e-5)


def race(q, p, rows):
    """Mean loss of races between law q [Vd] and the target's p [Vd] (what is left of one lies outside)."""
    torch.manual_seed(0)
    noise = race_noise(rows, len(p), p.device)
    found = row_losses("race", q.log().expand(rows, -1), p.expand(rows, -1), torch.zeros(rows), noise)
    return found, noise


def test_a_race_between_two_tokens_costs_what_an_integral_says():
    """Noise of two ids enters by its difference, a logistic number x; the first wins where x > log(p2 / p1)."""
    p, q = torch.tensor([0.7, 0.3]), torch.tensor([0.4, 0.6])
    x = torch.linspace(-40, 40, 400_001, dtype=torch.float64)
    density = torch.sigmoid(x) * torch.sigmoid(-x)
    ahead = (q[0] / q[1]).log() + x
    cost = torch.where(
        x > (p[1] / p[0]).log(), torch.nn.functional.softplus(-ahead), torch.nn.functional.softplus(ahead)
    )
    want = torch.trapezoid(density * cost, x)
    found, _ = race(q, p, 200_000)
    torch.testing.assert_close(found.mean().double(), want, atol=5e-3, rtol=0)


def test_races_prefer_the_targets_law_to_one_with_mass_elsewhere():
    p = torch.softmax(torch.randn(8, generator=torch.Generator().manual_seed(3)), -1)
    right = float(race(p, p, 50_000)[0].mean())
    for moved in (p.roll(1), 0.5 * p + 0.5 * p.flip(0), 0.7 * p + 0.3 / 8):
        assert float(race(moved, p, 50_000)[0].mean()) > right + 0.02


def test_where_a_token_outside_wins_a_race_nothing_is_learned():
    p = torch.tensor([0.3, 0.2, 0.1])
    logits = torch.zeros(40_000, 3, requires_grad=True)
    torch.manual_seed(0)
    noise = race_noise(40_000, 3, p.device)
    loss = row_losses("race", logits, p.expand(40_000, -1), torch.zeros(40_000), noise)
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    outside = (torch.tensor([0.3, 0.2, 0.1, 0.4]).log() + noise).argmax(-1) == 3
    assert abs(float(outside.double().mean()) - 0.4) < 0.01
    assert bool((loss[outside] == 0).all())
    assert bool((slope[outside] == 0).all())
    assert bool((loss[~outside] > 0).all())


@pytest.mark.parametrize("kind", ["overlap", "race"])
@pytest.mark.parametrize("size", [0, 20])
def test_norms_kept_for_several_depths_are_those_made_when_asked_for(kind, size):
    torch.manual_seed(0)
    head = DraftHead(target(), size, "target")
    states, rows = torch.randn(30, 32), torch.tensor([3, 4, 8, 9, 20])
    kept = log_norms(kind, states, head, rows)
    assert (kept is None) == (kind == "overlap" and size == 0)
    assert log_norms("soft", states, head, rows) is None
    if kept is not None:
        part = slice(1, 4)
        made = Teacher(states, rows).log_norm(head, part)
        torch.testing.assert_close(Teacher(states, rows, kept).log_norm(head, part), made)


def test_soft_and_kl_have_the_same_gradient_and_a_label_outside_costs_nothing():
    logits, p, label = laws()
    grads = [torch.autograd.grad(row_losses(kind, logits, p, label).sum(), logits)[0] for kind in ("soft", "kl")]
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-6)
    label[2] = -1
    assert row_losses("hard", logits, None, label)[2] == 0


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("head_kind", ["target", "own"])
@pytest.mark.parametrize("size", [0, 20])
def test_chunks_equal_the_whole_with_gradients(kind, head_kind, size):
    torch.manual_seed(0)
    head = DraftHead(target(), size, head_kind)
    states = torch.randn(30, 32) / 20
    hidden = (torch.randn(23, 32) / 20).requires_grad_()
    rows, label = torch.randint(0, 30, (23,)), torch.randint(0, VOCABULARY, (23,))
    torch.manual_seed(1)
    noise = torch.cat([race_noise(len(part), head.size, label.device) for part in rows.split(5)])
    torch.manual_seed(1)
    total, hits = head_loss(kind, hidden, head, label, Teacher(states, rows), chunk=5)
    leaves = [hidden, *head.parameters()]
    ours = torch.autograd.grad(2 * total, leaves)
    full = target().model.get_output_embeddings().weight.detach()
    p = torch.softmax(states[rows] @ full.T, -1)[:, head.ids]
    if kind in ("soft", "kl", "reverse_kl"):
        p = p / p.sum(-1, keepdim=True)
    logits = head(hidden)
    want = row_losses(kind, logits, p, head.to_draft(label), noise).sum()
    torch.testing.assert_close(total, want, atol=1e-4, rtol=1e-5)
    for a, b in zip(ours, torch.autograd.grad(2 * want, leaves), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert torch.equal(hits, logits.argmax(-1) == head.to_draft(label))


def test_logits_of_all_rows_are_never_held_at_once():
    """The largest tensor of forward and backward is a chunk of logits, whatever the number of rows."""
    head = DraftHead(target(), 0, "target")
    hidden = torch.randn(4000, 32, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dim() == 2 and out.shape[1] == VOCABULARY:
                largest = max(largest, out.shape[0])
            return out

    with Watch():
        total, _ = head_loss(
            "soft", hidden, head, torch.zeros(4000, dtype=torch.int64), Teacher(hidden.detach(), torch.arange(4000)),
            chunk=128,
        )  # fmt: skip
        total.backward()
    assert largest == 128


def test_unknown_losses_are_refused():
    with pytest.raises(ConfigError, match="did you mean 'soft'"):
        check_loss("softy")
