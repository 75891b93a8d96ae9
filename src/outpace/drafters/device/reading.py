"""Rows of verified features read many at once: `growth.extend` with products by cuBLAS and kernels between them.

rows        [a norm for each tap], [fuse], enter, [join, norm]
each block  product, rotation and cache write, attention (two), product, norm, product, activation, product
at the end  the last row of each request is kept (`growth.keep_last`)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.nn import functional as F

from outpace.drafters.device import kernels
from outpace.drafters.growth import keep_last
from outpace.target.fast.rows import activate_rows, norm_rows, place_heads
from outpace.target.fast.tree_attention import Workspace, splits_for, tree_attention

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.fused import FusedDraft
    from outpace.drafters.device.plan import RowPlan


def read_rows(draft: FusedDraft, features: Tensor, tokens: Tensor, counts: Tensor, slots: Tensor, reach: int) -> None:
    """`growth.extend` of a draft's own cache.

    features: [B, R, taps * H], zeros in padding; tokens: [B, R], counts, slots: [B] int64; reach: entries of the cache
    that attention may read, the rows' own included.
    """
    plan, cache, shape = draft.plan, draft.drafter.cache, draft.drafter.module.shape
    batch, count = tokens.shape
    rows = batch * count
    at = cache.at[slots]
    state = _fused(plan, features.view(rows, -1))
    both = state.new_empty(rows, 2 * shape.hidden)
    residual = None if plan.residual == "joined" else state.new_empty(rows, shape.hidden)
    positions = torch.empty(rows, dtype=torch.int64, device=state.device)
    kernels.enter_rows_kernel[(rows,)](
        draft.table, state, both, residual, plan.norm_embedding, plan.norm_state, plan.norm, tokens, at, positions,
        count, plan.eps, **kernel_halves(plan, shape.hidden), PDL=False,
    )  # fmt: skip
    source = both
    if plan.join is not None:
        joined = F.linear(both, plan.join.weight, plan.join.bias)
        source = _normed(joined, plan.blocks[0].norm_attention, plan.eps)
        residual = joined if residual is None else residual
    assert residual is not None  # the state, or what the join made
    workspace = Workspace(rows, shape.heads, shape.head_size, splits_for(reach), state.device)
    for layer, block in enumerate(plan.blocks):
        if layer:
            source = _normed(residual, block.norm_attention, plan.eps)
        query = state.new_empty(rows, shape.heads, shape.head_size)
        keys, values = cache.keys[layer], cache.values[layer]
        place_heads(
            F.linear(source, block.qkv.weight), query, keys, values, draft.rotary, positions, at, slots, norms=None,
            eps=plan.eps, shift=0.0,
        )  # fmt: skip
        attended = tree_attention(
            query, keys, values, lengths=at, slots=slots, positions=positions, bits=None,
            scaling=shape.head_size**-0.5, window=None, workspace=workspace,
        )  # fmt: skip
        hidden = torch.addmm(residual, attended.view(rows, -1), block.out.weight.T)
        inner = F.linear(_normed(hidden, block.norm_mlp, plan.eps), block.gate_up.weight)
        inner = activate_rows(inner, inner.new_empty(rows, shape.intermediate), gelu=False)
        residual = torch.addmm(hidden, inner, block.down.weight.T)
    keep_last(cache, residual.view(batch, count, -1), at, counts, slots)


def _fused(plan: RowPlan, features: Tensor) -> Tensor:
    """What enters the block of rows [M, taps * H]: normed taps, fused."""
    if plan.tap_norms:
        normed = torch.empty_like(features)
        parts = zip(features.chunk(len(plan.tap_norms), 1), normed.chunk(len(plan.tap_norms), 1), strict=True)
        for (tap, out), gamma in zip(parts, plan.tap_norms, strict=True):
            norm_rows(tap, gamma, out, eps=plan.eps, shift=0.0)
        features = normed
    features = _normed(features, plan.fuse_norm, plan.eps)
    return features if plan.fuse is None else F.linear(features, plan.fuse.weight, plan.fuse.bias)


def _normed(x: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """RMS norm of every row; gamma None: none."""
    if gamma is None:
        return x
    out = torch.empty_like(x)
    norm_rows(x, gamma, out, eps=eps, shift=0.0)
    return out


def kernel_halves(plan: RowPlan, size: int) -> dict[str, Any]:
    """What kernels that lay the block's input are told."""
    return {
        "SIZE": size,
        "BLOCK": triton.next_power_of_2(size),
        "EMBED_NORMED": plan.norm_embedding is not None,
        "STATE_NORMED": plan.norm_state is not None,
        "EMBED_FIRST": plan.embedding_first,
        "KEEP": {"joined": 0, "state": 1, "normed_state": 2}[plan.residual],
        "num_warps": 4 if size <= 4096 else 8,
    }
