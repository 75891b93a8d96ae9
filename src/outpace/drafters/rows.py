"""Networks that follow the row rule, and their training.

Row t consumes the feature at position t and the token at position t + 1, and predicts the token at t + 2; its teacher
is the target's law behind position t + 1. At step k of an unrolled row everything about tokens moves on by k, and the
feature is the row's own output of the step before:

    step k of row t:   token x_{t+1+k}   feature g_t or own output   teacher p_{t+1+k}   label x_{t+2+k}   position t+k

EAGLE in all versions and sequential multi-token prediction are such networks (one more token ahead per step).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import nn

from outpace.drafters.learning import Batch, Losses, Recipe
from outpace.drafters.losses import Teacher, head_loss, log_norms
from outpace.drafters.unroll import Unrolled

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.compiled import CompiledRows
    from outpace.drafters.device.plan import RowPlan
    from outpace.drafters.heads import DraftHead
    from outpace.drafters.layers import Attend, Rotary, Shape

Embed = Callable[["Tensor"], "Tensor"]


class RowNet(nn.Module):
    """(feature_t, x_{t+1}) -> output y_t.

    Attributes:
        shape: of its blocks. layers: how many. taps: the target's states a feature is made of, in order.
        head: from a readout to logits. rotary: angles of positions. regression: weight of a feature loss (0: none).
        compiled: what decodes instead of the modules, on a CPU that has it; None in training.
    """

    shape: Shape
    layers: int
    taps: tuple[str, ...]
    head: DraftHead
    rotary: Rotary
    regression: float = 0.0
    compiled: CompiledRows | None = None

    @property
    def top_size(self) -> int:
        """Width of an output row."""
        return self.shape.hidden

    @abstractmethod
    def fuse(self, features: Tensor) -> Tensor:
        """The target's taps side by side, [B, R, taps * H_target] -> the feature of step 0, [B, R, H]."""

    @abstractmethod
    def forward(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Embedded [B, R, H_target], feature [B, R, H], angles of `rotary` -> y [B, R, H]."""

    @abstractmethod
    def readout(self, y: Tensor) -> Tensor:
        """What the head reads: [..., H] -> [..., H_target]."""

    @abstractmethod
    def feedback(self, y: Tensor) -> Tensor:
        """The feature of the next step: [..., H] -> [..., H]."""

    def fused_plan(self) -> RowPlan | None:
        """These weights for fused kernels (joined in place), or None where this network does not fit them."""
        return None

    def quicken(self) -> bool:
        """See `skinny.round_weights`."""
        from outpace.drafters.compiled import CompiledRows

        self.compiled = CompiledRows.of(self)
        return self.compiled is not None


def unrolled_losses(
    net: RowNet,
    batch: Batch,
    recipe: Recipe,
    *,
    dense: bool | None = None,
    hear: Callable[[Tensor, int], Tensor] | None = None,
) -> Losses:
    """Training-time test: every row runs `recipe.depths` steps on its own outputs, with the corpus's tokens.

    Gradients flow through features and through keys and values of earlier steps; nothing is detached.

    hear: what outputs [B, T, H] of step 0, 1, ... become before they are read and fed back.
    """
    tokens = batch.tokens
    flat = tokens.flatten()
    states = batch.taps["post_norm"].flatten(0, 1)
    features = torch.cat([batch.taps[name] for name in net.taps], -1)
    if recipe.noise:
        features = features + recipe.noise * (2 * torch.rand_like(features) - 1)
    norms = log_norms(recipe.loss, states, net.head, batch.slots_before(1))
    z = net.fuse(features)
    unrolled = Unrolled(batch, dense=dense)
    sums, slots, hits = [], [], []
    for step in range(recipe.depths):
        with torch.no_grad():
            embedded = batch.target.embed(shifted(tokens, 1 + step))
        cos, sin = net.rotary(batch.positions + step)
        y = net(embedded, z, cos, sin, unrolled.attend)
        if hear is not None:
            y = hear(y, step)
        where = batch.slots_before(step + 2)
        rows = y.flatten(0, 1).index_select(0, where)
        loss, hit = head_loss(
            recipe.loss, net.readout(rows), net.head, flat[where + 2 + step], Teacher(states, where + 1 + step, norms)
        )
        if net.regression:
            wanted = states.index_select(0, where + 1 + step).to(rows.dtype)
            loss = loss + net.regression * nn.functional.smooth_l1_loss(rows, wanted, reduction="none").mean(-1).sum()
        sums.append(loss)
        slots.append(where)
        hits.append(hit)
        z = net.feedback(y)
    return Losses.of(batch, sums, slots, hits, recipe.weights)


def shifted(tokens: Tensor, by: int) -> Tensor:
    """[B, T] -> [B, T]: column t holds what stood at t + by, zeros behind the end."""
    return nn.functional.pad(tokens, (0, by))[:, by:]
