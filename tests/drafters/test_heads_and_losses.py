"""Draft vocabularies (T-VOCAB), and losses: chunks against the whole, kinds against their formulas."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafters.learned import fresh
from outpace.drafters.eagle import Eagle3
from outpace.drafters.heads import DraftHead, check_ids, choose_ids, special_ids
from outpace.drafters.losses import LOSSES, Teacher, check_loss, head_loss, row_losses
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
    want = {
        "soft": -(p * q.log()).sum(-1),
        "hard": -q.gather(1, label[:, None])[:, 0].log(),
        "kl": kl,
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "total_variation": 0.5 * (p - q).abs().sum(-1),
        "overlap": -overlap.log(),
        "hybrid": part * kl + (1 - part) * (1 - overlap),
    }[kind]
    torch.testing.assert_close(row_losses(kind, logits, p, label).double(), want, atol=1e-5, rtol=1e-5)


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
    total, hits = head_loss(kind, hidden, head, label, Teacher(states, rows), chunk=5)
    leaves = [hidden, *head.parameters()]
    ours = torch.autograd.grad(2 * total, leaves)
    full = target().model.get_output_embeddings().weight.detach()
    p = torch.softmax(states[rows] @ full.T, -1)[:, head.ids]
    if kind in ("soft", "kl", "reverse_kl"):
        p = p / p.sum(-1, keepdim=True)
    logits = head(hidden)
    want = row_losses(kind, logits, p, head.to_draft(label)).sum()
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
