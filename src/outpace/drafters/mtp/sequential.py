"""The sequential module: state and next token's embedding, normed and joined, through one block of the target's shape.

    g^k_t = M [enorm(Emb(x_{t+k})); hnorm(h^{k-1}_t)]      h^k = Block(g^k)      P^k_t = head(norm(h^k_t)) -> x_{t+k+1}

One module is shared over depths and trained at the depth it will draft, with the attention it will have there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from outpace.drafters.follower import FollowingDrafter, GuessMode
from outpace.drafters.heads import DraftHead, HeadKind, choose_ids, special_ids
from outpace.drafters.layers import Block, RMSNorm, Rotary, Shape, copy_norm, initialise
from outpace.drafters.learning import Recipe
from outpace.drafters.mtp.shipped import check_module, shipped_module
from outpace.drafters.rows import RowNet
from outpace.errors import ConfigError
from outpace.target.families import part
from outpace.target.skinny import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.plan import RowPlan
    from outpace.drafters.layers import Attend
    from outpace.target import Target

Order = Literal["embed_hidden", "hidden_embed"]
ChainNorm = Literal["shared", "none"]


class MTPNet(RowNet):
    """DeepSeek-V3's module for a target that has none.

    Starts as the target's last layer applied once more to the state it is given: the block is a copy of that layer,
    the projection passes the state through and mutes the embedding, all norms are one (spec, section 5.3).

    Args:
        target: of these sizes. tap: "post_norm" or "pre_norm", the state h^0.
        order: which half of the projection's input comes first.
        chain_norm: "shared": the next depth reads norm(h^k), the state the head reads; "none": h^k.
        head, vocabulary, ids: see `DraftHead`.
    """

    def __init__(
        self,
        target: Target,
        *,
        tap: str,
        order: Order,
        chain_norm: ChainNorm,
        head: HeadKind,
        vocabulary: int,
        ids: Tensor | None,
    ) -> None:
        super().__init__()
        shape = self.shape = Shape.of(target)
        self.layers = 1
        self.taps = (tap,)
        self.order, self.chain_norm = order, chain_norm
        self.enorm = RMSNorm(shape.hidden, shape.eps)
        self.hnorm = RMSNorm(shape.hidden, shape.eps)
        self.eh_proj = Linear(2 * shape.hidden, shape.hidden, bias=False)
        self.block = Block(shape)
        self.norm = RMSNorm(shape.hidden, shape.eps)
        self.rotary = Rotary(target, shape.head_size)
        self.head = DraftHead(target, vocabulary, head, ids)
        initialise(self)
        copy_norm(target, self.norm)
        copy_last_layer(target, self.block)
        with torch.no_grad():
            halves = self.eh_proj.weight.chunk(2, 1)
            embed, hidden = halves if order == "embed_hidden" else reversed(halves)
            hidden.copy_(torch.eye(shape.hidden))
            embed.mul_(0.1)

    def fuse(self, features: Tensor) -> Tensor:
        """The state itself."""
        return features

    def forward(self, embedded: Tensor, feature: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """See `RowNet`."""
        hidden = self.hnorm(feature)
        embed = self.enorm(embedded).to(hidden.dtype)
        parts = [embed, hidden] if self.order == "embed_hidden" else [hidden, embed]
        out: Tensor = self.block(self.eh_proj(torch.cat(parts, -1)), cos, sin, 0, attend)
        return out

    def readout(self, y: Tensor) -> Tensor:
        """Through the norm in front of the head."""
        out: Tensor = self.norm(y)
        return out

    def feedback(self, y: Tensor) -> Tensor:
        """What the next depth reads."""
        return self.norm(y) if self.chain_norm == "shared" else y

    def fused_plan(self) -> RowPlan:
        """See `RowNet`."""
        from outpace.drafters.device.plan import RowPlan, plan_block
        from outpace.target.fast.plan import Projection

        assert self.block.input_layernorm is not None
        return RowPlan(
            tap_norms=(),
            fuse_norm=None,
            fuse=None,
            norm_embedding=self.enorm.weight.detach(),
            norm_state=self.hnorm.weight.detach(),
            embedding_first=self.order == "embed_hidden",
            join=Projection(self.eh_proj.weight.detach()),
            residual="joined",
            blocks=(plan_block(self.block, self.block.input_layernorm.weight.detach()),),
            norm=self.norm.weight.detach(),
            feeds_normed=self.chain_norm == "shared",
            head=Projection(self.head.weight.detach()),
            offsets=self.head.offsets,
            eps=self.shape.eps,
        )


class MTP(FollowingDrafter):
    """One module, applied once per token ahead; its own cache holds true states and true tokens only.

    Args:
        draft_len, branches, nodes, draw, coupling: see `FollowingDrafter`.
        tap, order, chain_norm, head: see `MTPNet`.
        vocabulary: tokens of the draft vocabulary, the most frequent of the corpus; 0: all.
    """

    name: ClassVar[str] = "mtp"
    decoding: ClassVar[frozenset[str]] = frozenset({"draft_len", "branches", "nodes", "draw", "coupling"})
    default_recipe: ClassVar[Recipe] = Recipe(lr=1e-3, depths=5, decay=0.7)
    cpu_chain: ClassVar[int] = 2

    def __init__(
        self,
        *,
        draft_len: int = 5,
        branches: int = 6,
        nodes: int = 24,
        draw: GuessMode = "path",
        coupling: float = 0.6,
        tap: str = "post_norm",
        order: Order = "embed_hidden",
        chain_norm: ChainNorm = "shared",
        head: HeadKind = "target",
        vocabulary: int = 32_768,
    ) -> None:
        super().__init__(draft_len=draft_len, branches=branches, nodes=nodes, draw=draw, coupling=coupling)
        if tap not in ("post_norm", "pre_norm"):
            raise ConfigError(f"tap must be post_norm or pre_norm, got {tap!r}")
        if order not in ("embed_hidden", "hidden_embed") or chain_norm not in ("shared", "none"):
            raise ConfigError(
                f"order is embed_hidden or hidden_embed and chain_norm is shared or none, got {order!r}, {chain_norm!r}"
            )
        self.tap, self.head, self.vocabulary = tap, head, vocabulary
        self.order: Order = order
        self.chain_norm: ChainNorm = chain_norm
        self._ids: Tensor | None = None

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Choose the draft vocabulary."""
        if 0 < self.vocabulary < target.vocabulary:
            self._ids = choose_ids(counts, self.vocabulary, special_ids(target))

    def own_weights(self, target: Target) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The module a model comes with; see `mtp.shipped`."""
        found = shipped_module(target)
        if found is None:
            return None
        options, tensors = found
        check_module(target, tensors, type(self)(**options).build(target).state_dict())
        return options, tensors

    def build(self, target: Target) -> MTPNet:
        """The module for a target."""
        return MTPNet(
            target,
            tap=self.tap,
            order=self.order,
            chain_norm=self.chain_norm,
            head=self.head,
            vocabulary=self.vocabulary,
            ids=self._ids,
        ).to(target.device)


@torch.no_grad()
def copy_last_layer(target: Target, block: Block) -> None:
    """Give a block the weights of the target's last layer, wherever name and shape agree."""
    if target.family is None:
        return
    layers: Any = part(target.model, target.family.layers)
    theirs = layers[len(layers) - 1].state_dict()
    for name, parameter in block.named_parameters():
        if name in theirs and theirs[name].shape == parameter.shape:
            parameter.copy_(theirs[name])
