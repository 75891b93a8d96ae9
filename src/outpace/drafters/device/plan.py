"""A network that follows the row rule, as fused kernels see it: which tensors, in which order, and the few options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from outpace.target.fast.plan import Projection, join_parameters

if TYPE_CHECKING:
    from torch import Tensor

Residual = Literal["joined", "state", "normed_state"]


@dataclass(frozen=True, slots=True)
class BlockPlan:
    """One decoder block; norm_attention is None where its input has been normed, or has no norm."""

    norm_attention: Tensor | None
    qkv: Projection
    out: Projection
    norm_mlp: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class RowPlan:
    """(feature_t, x_{t+1}) -> y_t, from the taps to the head.

    Attributes:
        tap_norms: a norm for each tap, or (). fuse_norm: one norm over all taps side by side. fuse: the product behind
            them, or None where the one tap is the feature.
        norm_embedding, norm_state: norms of the two halves the block reads, or None. embedding_first: their order.
        join: product that makes one of the halves, in front of the first block; None: the block reads both.
        residual: what the first block adds to: the joined halves, the state, or the normed state.
        blocks: at least one. norm: in front of the head, or None. feeds_normed: the next step reads norm(y), not y.
        head: product behind `norm`. offsets: draft id -> target id less draft id, or None: the same ids.
        eps: of every norm.
    """

    tap_norms: tuple[Tensor, ...]
    fuse_norm: Tensor | None
    fuse: Projection | None
    norm_embedding: Tensor | None
    norm_state: Tensor | None
    embedding_first: bool
    join: Projection | None
    residual: Residual
    blocks: tuple[BlockPlan, ...]
    norm: Tensor | None
    feeds_normed: bool
    head: Projection
    offsets: Tensor | None
    eps: float


def plan_block(block: Any, norm_attention: Tensor | None) -> BlockPlan:
    """The weights of a `layers.Block`, or of one with its parts, fewer and larger; they become views of these."""
    attention, mlp = block.self_attn, block.mlp
    return BlockPlan(
        norm_attention=norm_attention,
        qkv=Projection(join_parameters([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])),
        out=Projection(attention.o_proj.weight.detach()),
        norm_mlp=block.post_attention_layernorm.weight.detach(),
        gate_up=Projection(join_parameters([mlp.gate_proj.weight, mlp.up_proj.weight])),
        down=Projection(mlp.down_proj.weight.detach()),
    )
