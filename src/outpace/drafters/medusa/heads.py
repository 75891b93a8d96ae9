"""The heads: head k maps the state that predicts x_{t+1} to logits of x_{t+1+k}.

    logits_k = U_k r_L( .. r_1(h_t)),   r(x) = x + silu(W x + b)

W and b start at zero and U_k at the target's head, so that every head starts as the target's own (the public code
leaves b random, and it does not). By default U_k is the target's head for all: only the residual blocks are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional as F

from outpace.drafters.heads import DraftHead
from outpace.target.skinny import Linear, linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

Projection = Literal["target", "low_rank", "own"]


class ResBlock(nn.Module):
    """x + silu(W x + b), nothing at the start."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out: Tensor = x + F.silu(self.linear(x))
        return out


class MedusaHeads(nn.Module):
    """K heads over one draft vocabulary.

    Args:
        target: whose head they share or start from.
        heads: how many. layers: residual blocks of each, every one with weights of its own.
        projection: "target": the target's head, frozen; "low_rank": plus a product of rank `rank` per head; "own": a
            trained copy per head.
        vocabulary, ids: see `DraftHead`.
    """

    def __init__(
        self,
        target: Target,
        *,
        heads: int,
        layers: int,
        projection: Projection,
        rank: int,
        vocabulary: int,
        ids: Tensor | None,
    ) -> None:
        super().__init__()
        size = target.hidden_size
        self.projection = projection
        self.blocks = nn.ModuleList(nn.Sequential(*(ResBlock(size) for _ in range(layers))) for _ in range(heads))
        self.head = DraftHead(target, vocabulary, "target", ids)
        rows = self.head.size
        device = self.head.weight.device
        if projection == "own":
            self.own = nn.ParameterList(self.head.weight.float().clone() for _ in range(heads))
        if projection == "low_rank":
            self.down = nn.ParameterList(torch.randn(rank, size, device=device) / size**0.5 for _ in range(heads))
            self.up = nn.ParameterList(torch.zeros(rows, rank, device=device) for _ in range(heads))

    def __len__(self) -> int:
        return len(self.blocks)

    def states(self, number: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(states, weight) of one head, whose product is its logits: hidden [..., H] -> ([..., H'], [Vd, H'])."""
        x = self.blocks[number](hidden)
        if self.projection == "own":
            return x, self.own[number]
        if self.projection == "low_rank":
            down, up = self.down[number], self.up[number]
            low = F.linear(x, down.to(x.dtype))
            return torch.cat([x, low], -1), torch.cat([self.head.weight.to(up.dtype), up], 1)
        return x, self.head.weight

    def forward(self, hidden: Tensor, count: int = 0) -> Tensor:
        """[..., H] -> logits [..., K, Vd] of the first `count` heads (0: of all)."""
        heads = range(count or len(self))
        xs = [self.blocks[number](hidden) for number in heads]
        if self.projection == "own":
            return torch.stack([linear(x, self.own[n].to(x.dtype)) for n, x in zip(heads, xs, strict=True)], -2)
        logits: Tensor = self.head(torch.stack(xs, -2))  # the shared weight is read once
        if self.projection == "low_rank":
            tails = [
                linear(linear(x, self.down[n].to(x.dtype)), self.up[n].to(x.dtype))
                for n, x in zip(heads, xs, strict=True)
            ]
            logits = logits + torch.stack(tails, -2)
        return logits
