"""A network that follows the row rule, as fused kernels see it: which tensors, in which order, and the few options."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from outpace.target.fast.plan import Projection, join_parameters
from outpace.target.skinny import allows_eight, in_eight_bits

if TYPE_CHECKING:
    from torch import Tensor

Residual = Literal["joined", "state", "normed_state"]
_LEAST: Final = 16 << 20  # numbers of a weight worth rounding: of smaller ones, launches are what costs


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


def rounded(plan: RowPlan) -> RowPlan:
    """The same network with its large weights in eight bits; what the plan was made of keeps its bits."""
    return replace(
        plan,
        fuse=None if plan.fuse is None else rounded_product(plan.fuse),
        join=None if plan.join is None else rounded_product(plan.join),
        head=rounded_product(plan.head),
        blocks=tuple(
            replace(
                block,
                qkv=rounded_product(block.qkv),
                out=rounded_product(block.out),
                gate_up=rounded_product(block.gate_up),
                down=rounded_product(block.down),
            )
            for block in plan.blocks
        ),
    )


def rounded_product(projection: Projection) -> Projection:
    """A product in eight bits, a scale per output, if its weight is large, bfloat16, and `OUTPACE_INT8` is not off."""
    weight = projection.weight
    if weight.dtype != torch.bfloat16 or weight.numel() < _LEAST or not allows_eight():
        return projection
    numbers, scales = in_eight_bits(weight)
    return Projection(numbers, projection.bias, scales)
