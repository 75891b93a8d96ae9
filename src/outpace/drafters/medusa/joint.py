"""Medusa-2: heads and target are trained together, and the target is held to what it said before.

    L = KL(p || p') + lambda * L_heads(h'),   lambda = head_weight * rise(share of the run)

p is the law of the target as it was, p' and h' its law and states under an adapter (LoRA). There is one model: p comes
of the states that every objective is given, a pass with the adapter switched off. Both losses are means over the answer
tokens. The heads' teacher is p', for that is what will accept their drafts; no gradient goes through it, or the target
could learn to say what is easy to guess.

Source: Cai et al. 2024 (arXiv 2401.10774), sections 2.2.2 and 2.3.2 (self-distillation).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal, get_args

import torch

from outpace.drafters.heads import DraftHead
from outpace.drafters.losses import Teacher, head_loss
from outpace.errors import ConfigError, suggestion
from outpace.target import run_packed

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.learning import Batch, Losses
    from outpace.target import GatedLoRA

Rise = Literal["constant", "linear", "sine"]
HEAD_WEIGHT: Final = 0.2
TUNE_LR: Final = 0.25  # heads learn four times as fast


def risen(rise: Rise, share: float) -> float:
    """What the heads' weight is multiplied by at a share 0..1 of the run: 1, the share, or sin(pi / 2 * share)."""
    return {"constant": 1.0, "linear": share, "sine": math.sin(math.pi / 2 * share)}[rise]


def joint_losses(
    batch: Batch, before: Tensor, adapter: GatedLoRA, heads: Callable[[Batch, Tensor], Losses], weight: float
) -> Losses:
    """The joint loss of a batch; figures per depth are the heads', `extra` holds the mean KL ("kl", nats a token).

    before: [B * T, H], states of the target as it was. heads: losses of the heads on a batch and such states.
    weight: lambda.
    """
    target = batch.target
    with torch.autocast(batch.tokens.device.type, enabled=False):  # as the pass without the adapter ran
        now = run_packed(target, batch, ("post_norm",), adapter)["post_norm"].flatten(0, 1)
    found = heads(batch, now)
    where = batch.slots_before(1)
    label = batch.tokens.flatten()[where + 1]
    law = DraftHead(target, 0, "target")  # the target's own, whole; nothing is copied
    divergence, _ = head_loss("kl", now.index_select(0, where), law, label, Teacher(before, where))
    return replace(
        found,
        total=divergence / batch.answers + weight * found.total,
        extra={**found.extra, "kl": divergence.detach() / max(where.shape[0], 1)},
    )


def check_tuning(rank: int, head_weight: float, rise: str, lr: float) -> None:
    """Refuse options that cannot be, or have no effect.

    Raises:
        ConfigError: saying which.
    """
    if rise not in get_args(Rise):
        raise ConfigError(f"unknown rise {rise!r}; {suggestion(rise, get_args(Rise))}")
    if rank < 0:
        raise ConfigError(f"tune_rank must be 0 (the target stays frozen) or a rank such as 32, got {rank}")
    if not rank and (head_weight, rise, lr) != (HEAD_WEIGHT, "constant", TUNE_LR):
        raise ConfigError(
            "head_weight, rise and tune_lr say how a target is trained along with its heads, and it stays frozen here; "
            "add tune_rank=32, or leave them away"
        )
    if not head_weight > 0 or not lr > 0:
        raise ConfigError(
            f"head_weight and tune_lr must be positive, got {head_weight:g} and {lr:g}; a target that stays frozen is "
            "tune_rank=0"
        )
