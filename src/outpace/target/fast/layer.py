"""A decoder layer in two halves, with attention between them: `heads` before it, `rest` behind it.

The arithmetic and its roundings are those of the models' modules, in four products instead of seven. Who calls says how
a product is taken (`Project`), so that adapters are the caller's. Knows no cache and no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.plan import LayerPlan, Plan

Project = Callable[[str, "Tensor"], "Tensor"]
"""(joined product by its name in `LayerPlan`, [B, R, in]) -> [B, R, out]."""


def norm(x: Tensor, gamma: Tensor, eps: float, shift: float) -> Tensor:
    """RMS norm of the last dimension, in float32 as the models do it; gamma + shift multiplies."""
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if shift:
        return (scaled * (gamma.to(wide.dtype) + shift)).to(x.dtype)
    return scaled.to(x.dtype) * gamma


def heads(
    plan: Plan, layer: LayerPlan, hidden: Tensor, cos: Tensor, sin: Tensor, project: Project
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of hidden [B, R, H], rotated: [B, R, heads or key heads, head size] each.

    cos, sin: [B, R, 1, head size / 2].
    """
    batch, rows, _ = hidden.shape
    normed = hidden if layer.norm_attention is None else norm(hidden, layer.norm_attention, plan.eps, plan.norm_shift)
    joined = _head_norms(plan, layer, project("qkv", normed))
    joined = joined.view(batch, rows, plan.heads + 2 * plan.key_heads, plan.head_size)
    one, two = joined[:, :, : plan.heads + plan.key_heads].chunk(2, -1)
    turned = torch.cat([one * cos - two * sin, two * cos + one * sin], -1).to(joined.dtype)  # tables may be float32
    return turned[:, :, : plan.heads], turned[:, :, plan.heads :], joined[:, :, plan.heads + plan.key_heads :]


def rest(plan: Plan, layer: LayerPlan, hidden: Tensor, attended: Tensor, project: Project) -> Tensor:
    """The layer's output [B, R, H] from its input and attention's output [B, R, heads * head size]."""
    eps, shift = plan.eps, plan.norm_shift
    added = project("out", attended)
    if layer.norm_attention_out is not None:
        added = norm(added, layer.norm_attention_out, eps, shift)
    hidden = hidden + added
    normed = hidden if layer.norm_mlp is None else norm(hidden, layer.norm_mlp, eps, shift)
    gate, up = project("gate_up", normed).chunk(2, -1)
    inner = F.silu(gate) if plan.activation == "silu" else F.gelu(gate, approximate="tanh")
    added = project("down", inner * up)
    if layer.norm_mlp_out is not None:
        added = norm(added, layer.norm_mlp_out, eps, shift)
    return hidden + added


def _head_norms(plan: Plan, layer: LayerPlan, joined: Tensor) -> Tensor:
    if layer.norm_query is None or layer.norm_key is None:
        return joined
    at = plan.heads * plan.head_size
    end = at + plan.key_heads * plan.head_size
    query, key = joined[..., :at], joined[..., at:end]
    if plan.query_key_norm == "head":
        query, key = (x.reshape(*x.shape[:-1], -1, plan.head_size) for x in (query, key))
    query = norm(query, layer.norm_query, plan.eps, plan.norm_shift)
    key = norm(key, layer.norm_key, plan.eps, plan.norm_shift)
    return torch.cat(
        [query.reshape(*joined.shape[:-1], -1), key.reshape(*joined.shape[:-1], -1), joined[..., end:]], -1
    )
