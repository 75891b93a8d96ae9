"""Parallel heads: one layer of the target's shape per token ahead, all reading the trunk's output, one shared head.

    head k of slot t:   P(x_{t+1+k} | x_{<=t}) = head(norm(layer_k(z_t))),   k = 1 .. K      z: the trunk's output

The published heads are numbered from i = k + 1, the first being the model itself. They do not see one another's tokens:
all children of a depth come from one list, and the tree is a set of rank tuples, as Medusa's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from outpace.drafters.follower import FollowingDrafter, GuessMode
from outpace.drafters.growth import DEFAULT_PATHS, Draws, FixedTree, Ranks, grow_ranked
from outpace.drafters.heads import DraftHead, choose_ids, special_ids
from outpace.drafters.layers import Block, RMSNorm, Rotary, Shape, copy_norm, initialise
from outpace.drafters.learning import Batch, Losses, Recipe
from outpace.drafters.losses import Teacher, head_loss
from outpace.drafters.mtp.sequential import copy_last_layer
from outpace.drafters.rows import RowNet
from outpace.drafters.unroll import Unrolled

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.layers import Attend
    from outpace.target import Target


class HeadLayers(RowNet):
    """K layers side by side, each with keys and values of its own; outputs stand one behind the other, [B, R, K * H].

    The token behind a slot is not read. Every layer starts as a copy of the target's last one.
    """

    def __init__(self, target: Target, *, heads: int, vocabulary: int, ids: Tensor | None) -> None:
        super().__init__()
        shape = self.shape = Shape.of(target)
        self.layers = heads
        self.taps = ("pre_norm",)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(heads))
        self.norms = nn.ModuleList(RMSNorm(shape.hidden, shape.eps) for _ in range(heads))
        self.rotary = Rotary(target, shape.head_size)
        self.head = DraftHead(target, vocabulary, "target", ids)
        initialise(self)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            assert isinstance(block, Block)
            assert isinstance(norm, RMSNorm)
            copy_last_layer(target, block)
            copy_norm(target, norm)

    @property
    def top_size(self) -> int:
        """Width of what is kept of the last row."""
        return self.layers * self.shape.hidden

    def fuse(self, features: Tensor) -> Tensor:
        """The trunk's output."""
        return features

    def one(self, number: int, z: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """Head `number` over [B, R, H]: [B, R, H], in front of its norm."""
        out: Tensor = self.blocks[number](z, cos, sin, number, attend)
        return out

    def forward(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See `RowNet`; embedded is not read."""
        return torch.cat([self.one(k, feature, cos, sin, attend) for k in range(self.layers)], -1)

    def readout(self, y: Tensor) -> Tensor:
        """[..., K * H] -> [..., K, H], each through its norm."""
        parts = y.chunk(self.layers, -1)
        return torch.stack([norm(x) for norm, x in zip(self.norms, parts, strict=True)], -2)

    def feedback(self, y: Tensor) -> Tensor:
        """Nothing is fed back."""
        raise NotImplementedError("parallel heads look ahead from true states only")


class MTPHeads(FollowingDrafter):
    """Independent heads with a layer each.

    Args:
        heads: how many, the deepest drafted token.
        nodes: most nodes of the draft. paths: rank tuples of the tree; () for one that fits typical heads.
        draw, coupling: see `FollowingDrafter`.
        vocabulary: tokens of the draft vocabulary, the most frequent of the corpus; 0: all.
    """

    name: ClassVar[str] = "mtp_heads"
    decoding: ClassVar[frozenset[str]] = frozenset({"nodes", "paths", "draw", "coupling"})
    default_recipe: ClassVar[Recipe] = Recipe(lr=1e-3, depths=3, decay=1.0)
    module: HeadLayers

    def __init__(
        self,
        *,
        heads: int = 3,
        nodes: int = 24,
        paths: Sequence[Ranks] = (),
        draw: GuessMode = "path",
        coupling: float = 0.6,
        vocabulary: int = 32_768,
    ) -> None:
        chosen = tuple(path for path in paths or DEFAULT_PATHS if len(path) <= heads)[:nodes]
        super().__init__(draft_len=heads, branches=1, nodes=nodes, paths=chosen, draw=draw, coupling=coupling)
        self.heads, self.vocabulary = heads, vocabulary
        self.recipe = self.recipe.replace(depths=heads)
        self._ids: Tensor | None = None

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Choose the draft vocabulary."""
        if 0 < self.vocabulary < target.vocabulary:
            self._ids = choose_ids(counts, self.vocabulary, special_ids(target))

    def build(self, target: Target) -> HeadLayers:
        """The layers for a target."""
        return HeadLayers(target, heads=self.heads, vocabulary=self.vocabulary, ids=self._ids).to(target.device)

    def objective(self, batch: Batch) -> Losses:
        """Every head from the same states, one after the other; a head's logits are gone before the next begins."""
        net, recipe = self.module, self.recipe
        tokens, states = batch.tokens.flatten(), batch.taps["post_norm"].flatten(0, 1)
        z = net.fuse(batch.taps["pre_norm"])
        cos, sin = net.rotary(batch.positions)
        unrolled = Unrolled(batch)
        sums, slots, hits = [], [], []
        for depth in range(recipe.depths):
            where = batch.slots_before(depth + 2)
            y = net.one(depth, z, cos, sin, unrolled.attend).flatten(0, 1).index_select(0, where)
            label = tokens[where + depth + 2]
            loss, hit = head_loss(recipe.loss, net.norms[depth](y), net.head, label, Teacher(states, where + depth + 1))
            sums.append(loss)
            slots.append(where)
            hits.append(hit)
        return Losses.of(batch, sums, slots, hits, recipe.weights)

    def grow(self, batch: int, width: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """All depths from the last row at once."""
        assert isinstance(self.shape, FixedTree)
        logits = self.module.head(self.module.readout(self.cache.top[:batch]))
        return grow_ranked(logits, self.module.head, self.shape, draws)
