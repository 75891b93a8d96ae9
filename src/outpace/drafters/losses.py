"""What is compared with the target's law, and how it is added up without holding logits of all rows at once.

`row_losses` is the definition, in plain float32 torch. `head_loss` applies it chunk by chunk: logits of a chunk live
until its gradient with respect to the hidden states is known, so memory is chunk x vocabulary whatever the number of
rows and depths (Gloeckle et al. 2024, section 2, in another form). On CUDA the soft losses and the race take kernels
instead (`losses_fused`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from outpace.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.heads import DraftHead
    from outpace.drafters.learning import LossKind

CHUNK: Final = 4096  # rows whose logits are held at once
LOSSES: Final = ("soft", "hard", "kl", "reverse_kl", "total_variation", "overlap", "hybrid", "race")
_RENORMALISED: Final = ("soft", "kl", "reverse_kl")  # losses whose teacher is a law of the draft vocabulary alone
_ETA: Final = 3.0  # hybrid: the weight of KL is exp(-eta * overlap), so it fades as the laws come to agree


def check_loss(kind: str) -> None:
    """Refuse unknown losses.

    Raises:
        ConfigError: naming the known ones.
    """
    if kind not in LOSSES:
        raise ConfigError(f"unknown loss {kind!r}; {suggestion(kind, LOSSES)}")


def row_losses(kind: LossKind, logits: Tensor, p: Tensor | None, label: Tensor, noise: Tensor | None = None) -> Tensor:
    """Loss of each row, [n] float32.

    logits: [n, Vd] of the drafter. p: [n, Vd] float32, the target's probability of each draft token: for the overlap
    losses and the race the target's own (rows sum to what the draft vocabulary covers, the rest can never be accepted),
    for the others renormalised to one. None for "hard". label: [n] draft id of the corpus's token, -1 where it has
    none. noise: [n, Vd + 1] float32, Gumbel noise of draft ids and of everything outside (`race_noise`); for the race.

    soft: -sum p log q. kl: sum p log(p / q), the same gradient. reverse_kl: sum q log(q / p). hard: -log q[label], 0
    where the label cannot be drafted. With the overlap a = sum min(p, q), the chance that the draft is accepted when
    both are sampled: total_variation: 1 - a; overlap: -log a (LK loss); hybrid: lambda * kl + (1 - lambda) * (1 - a)
    with lambda = exp(-3 a), a held fixed in lambda.

    race: what drafting does under Gumbel noise. The target's token w is the arg-max of log p + noise, over draft ids
    and what lies outside; the softmax of logits + noise is how likely drafts take an id to be it (`growth.children`).
    -log of that for w; 0 where what lies outside wins.
    """
    if kind == "race":
        assert p is not None
        assert noise is not None
        return _race(logits, p, noise)
    logq: Tensor = F.log_softmax(logits.float(), -1)
    if kind == "hard":
        picked: Tensor = F.nll_loss(logq, label.clamp_min(0), reduction="none") * (label >= 0)
        return picked
    assert p is not None  # every other loss has a teacher
    if kind == "soft":
        return -(p * logq).sum(-1)
    if kind == "kl":
        return _divergence(p, logq)
    q = logq.exp()
    if kind == "reverse_kl":
        return (q * (logq - p.clamp_min(1e-9).log())).sum(-1)
    overlap = torch.minimum(p, q).sum(-1)
    if kind == "total_variation":
        return 1 - overlap
    if kind == "overlap":
        return -overlap.clamp_min(1e-9).log()
    share = torch.exp(-_ETA * overlap.detach())
    return share * _divergence(p / p.sum(-1, keepdim=True), logq) + (1 - share) * (1 - overlap)


def _race(logits: Tensor, p: Tensor, noise: Tensor) -> Tensor:
    """The race of `row_losses`."""
    outside = (1 - p.sum(-1, keepdim=True)).clamp_min(0)
    winner = (torch.cat([p, outside], -1).log() + noise).argmax(-1)
    size = logits.shape[-1]
    scores = F.log_softmax(logits.float() + noise[:, :size], -1)
    picked: Tensor = F.nll_loss(scores, winner.clamp_max(size - 1), reduction="none") * (winner < size)
    return picked


def race_noise(rows: int, size: int, device: torch.device) -> Tensor:
    """[rows, size + 1] float32 standard Gumbel noise, from torch's generator."""
    return -torch.empty(rows, size + 1, device=device).exponential_().clamp_min_(1e-30).log()


def _divergence(p: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    found: Tensor = (torch.special.xlogy(p, p) - p * logq).sum(-1)
    return found


@dataclass(frozen=True, slots=True)
class Teacher:
    """Where the target's law of each row comes from.

    Attributes:
        states: [N, H] post-norm states of the target, all slots.
        rows: [n] int64: the slot whose law is the row's teacher.
        norms: [N] float32: `log_norms` of the slots, where they are kept for several depths; None: made when asked for.
    """

    states: Tensor
    rows: Tensor
    norms: Tensor | None = None

    def law(self, kind: LossKind, head: DraftHead, chunk: slice) -> Tensor | None:
        """P of `row_losses` for some rows."""
        if kind == "hard":
            return None
        kept = self.logits(head, chunk).float()
        if kind in _RENORMALISED or not head.reduced:
            return torch.softmax(kept, -1)
        return torch.exp(kept - self.log_norm(head, chunk)[:, None])

    def log_norm(self, head: DraftHead, chunk: slice) -> Tensor:
        """Log of the sum of exp of the target's logits, of its whole vocabulary, for some rows: [c] float32."""
        rows = self.rows[chunk]
        if self.norms is not None:
            return self.norms[rows]
        return torch.logsumexp(F.linear(self.states.index_select(0, rows), head.teacher_full).float(), -1)

    def logits(self, head: DraftHead, chunk: slice) -> Tensor:
        """The target's logits of the draft vocabulary for some rows: [c, Vd]."""
        return F.linear(self.states.index_select(0, self.rows[chunk]), head.teacher)


@torch.no_grad()
def log_norms(kind: LossKind, states: Tensor, head: DraftHead, rows: Tensor) -> Tensor | None:
    """What a loss asks of the same slots at every depth: `Teacher.norms` at slots `rows` [n], zeros elsewhere.

    None where the loss asks for none of it.
    """
    if kind in _RENORMALISED or kind == "hard" or not (head.reduced or kind == "race"):
        return None
    teacher, found = Teacher(states, rows), states.new_zeros(states.shape[0], dtype=torch.float32)
    for start in range(0, rows.shape[0], CHUNK):
        part = slice(start, start + CHUNK)
        found[rows[part]] = teacher.log_norm(head, part)
    return found


def head_loss(
    kind: LossKind,
    hidden: Tensor,
    head: DraftHead,
    label: Tensor,
    teacher: Teacher,
    *,
    weight: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """(summed loss with gradient, hits [n] bool) of hidden states [n, H] through a head.

    label: [n] target ids of the corpus's tokens. weight: [Vd, H] instead of the head's own, for heads that add to it.
    A hit is a row whose most likely token is the corpus's.
    """
    label = head.to_draft(label)
    weight = head.weight if weight is None else weight
    total, hits = _Chunked.apply(hidden, weight, kind, head, label, teacher, chunk)  # type: ignore[no-untyped-call]
    return total, hits


def _fused(
    kind: LossKind, hidden: Tensor, head: DraftHead, teacher: Teacher
) -> Callable[[Tensor, slice], tuple[Tensor, Tensor, Tensor]] | None:
    """The kernel, where there is one for this loss and device: logits of a chunk become their gradient."""
    if kind not in ("soft", "kl", "race") or not hidden.is_cuda:
        return None
    try:
        from outpace.drafters.losses_fused import race_rows, soft_rows
    except ImportError:  # torch for CUDA comes with Triton; other builds do without
        return None

    def rows(logits: Tensor, part: slice) -> tuple[Tensor, Tensor, Tensor]:
        taught = teacher.logits(head, part).to(logits.dtype)
        if kind == "race":
            return race_rows(logits, taught, teacher.log_norm(head, part), seed=int(torch.randint(1 << 31, ())))
        return soft_rows(logits, taught, divergence=kind == "kl")

    return rows


class _Chunked(torch.autograd.Function):
    """Sum of row losses; gradients are made in the forward pass, one chunk's logits at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        kind: LossKind,
        head: DraftHead,
        label: Tensor,
        teacher: Teacher,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        wants = [hidden.requires_grad, weight.requires_grad]
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        into_hidden = torch.zeros_like(hidden) if wants[0] else None
        into_weight = torch.zeros_like(weight) if wants[1] else None
        hits = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        fused = _fused(kind, hidden, head, teacher)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            if fused is not None:
                rows, own = hidden[part].detach(), weight.detach()
                logits = F.linear(rows, own.to(rows.dtype)).contiguous()
                loss, best, _ = fused(logits, part)
                if into_hidden is not None:
                    into_hidden[part] = logits @ own.to(logits.dtype)
                if into_weight is not None:
                    into_weight += (logits.T @ rows.to(logits.dtype)).to(into_weight.dtype)
                hits[part] = best == label[part]
                total += loss.sum()
                continue
            p = teacher.law(kind, head, part)
            noise = None if kind != "race" or p is None else race_noise(len(p), head.size, p.device)
            with torch.enable_grad():
                rows = hidden[part].detach().requires_grad_(wants[0])
                own = weight.detach().requires_grad_(wants[1])
                logits = F.linear(rows, own.to(rows.dtype))
                loss = row_losses(kind, logits, p, label[part], noise).sum()
                asked = [x for x, want in zip((rows, own), wants, strict=True) if want]
                found = list(torch.autograd.grad(loss, asked)) if asked else []
            if into_hidden is not None:
                into_hidden[part] = found.pop(0)
            if into_weight is not None:
                into_weight += found.pop(0)
            hits[part] = logits.detach().argmax(-1) == label[part]
            total += loss.detach()
        ctx.save_for_backward(into_hidden, into_weight)
        ctx.mark_non_differentiable(hits)
        return total, hits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        into_hidden, into_weight = ctx.saved_tensors
        scale = gradients[0]
        return (
            None if into_hidden is None else into_hidden * scale.to(into_hidden.dtype),
            None if into_weight is None else into_weight * scale.to(into_weight.dtype),
            None,
            None,
            None,
            None,
            None,
        )
