"""Passes on a CPU: the model's own arithmetic in fewer and larger steps.

Query, key and value come from one product, gate and up from another; rotation turns queries and keys together; masks,
angles and the room for keys are made once per pass. Each step rounds where the model's modules round, so the two agree
to the last bits a product of another width may differ in. On two cores a pass of a small model is bound by reading
weights and by the number of products, so four a layer instead of seven pay.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from outpace.errors import UnsupportedError
from outpace.target.attention import grouped_attention, tile
from outpace.target.block import Block, Readout
from outpace.target.fast.plan import LayerPlan, Plan, Projection, joined_names, make_plan
from outpace.target.masks import additive_mask, block_visibility

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.cache import BlockCache
    from outpace.target.fast.plan import Joined
    from outpace.target.model import Target

_NO_MODULE = torch.nn.Module()  # transformers' signature of attention wants one


class CpuPass:
    """Passes of one model through its joined weights.

    Args:
        target: the model; `view`s of it share this object and say which layers they run.

    Raises:
        UnsupportedError: if the model cannot take this path, with the reason.
    """

    captured = False

    def __init__(self, target: Target) -> None:
        if target.device.type != "cpu":
            raise UnsupportedError(f"this path is for CPUs; the model is on {target.device}")
        self.plan: Plan = make_plan(target)
        self.names = joined_names(target)
        self._embed = target.model.get_input_embeddings()
        self._limit = next(iter(self.plan.rotary.values()))[0].shape[0]

    def fits(self, block: Block, cache: BlockCache) -> bool:
        """Whether a block can take this path; others go through the model's modules."""
        if block.scouts is not None and block.scouts.enter > 0:
            return False
        rows = block.rows + (block.scouts.count if block.scouts else 0)
        return max(cache.lengths[block.first : block.first + block.tokens.shape[0]]) + rows <= self._limit

    def run(
        self, block: Block, cache: BlockCache, *, layer_ids: tuple[int, ...], taps: Collection[str], logits: bool
    ) -> Readout:
        """See `Target.run`."""
        plan, scouts = self.plan, block.scouts
        batch, main = block.tokens.shape
        hidden = self._embed(block.tokens)
        if scouts is not None:
            new = scouts.embeds if scouts.embeds is not None else self._embed(scouts.tokens)
            hidden = torch.cat([hidden, new.to(hidden.dtype)], 1)
        rows = hidden.shape[1]
        cache.open(block.first, batch, rows)
        lengths = cache.lengths[block.first : block.first + batch]
        sees, positions = block_visibility(block)
        width = cache.attended(max(lengths) + rows)
        masks, angles = {}, {}
        for kind in {plan.layers[layer].kind for layer in layer_ids}:
            window = plan.window if kind == "sliding_attention" else None
            masks[kind] = tile(additive_mask(sees, positions, lengths, width, hidden.dtype, window), plan.groups)
            cos, sin = plan.rotary[kind]
            angles[kind] = (cos[positions][:, :, None], sin[positions][:, :, None])
        adapter = scouts.adapter if scouts is not None else None
        found = {"embed": hidden} if "embed" in taps else {}
        for layer in layer_ids:
            if f"in:{layer}" in taps:
                found[f"in:{layer}"] = hidden
            kind = plan.layers[layer].kind
            hidden = self._layer(layer, hidden, cache, masks[kind], angles[kind], adapter, main)
            if f"out:{layer}" in taps:
                found[f"out:{layer}"] = hidden
        if "pre_norm" in taps:
            found["pre_norm"] = hidden
        wants_scouts = scouts is not None and scouts.logits
        if not logits and not wants_scouts and "post_norm" not in taps:
            return Readout(None, None, found)
        normed = self._norm(hidden, plan.norm)
        if "post_norm" in taps:
            found["post_norm"] = normed
        if logits and wants_scouts:  # one product reads the head once; sliced, each would also take a slower kernel
            both = _linear(normed, plan.head)
            return Readout(both[:, :main], both[:, main:], found)
        return Readout(
            _linear(normed[:, :main], plan.head) if logits else None,
            _linear(normed[:, main:], plan.head) if wants_scouts else None,
            found,
        )

    def _layer(
        self,
        index: int,
        hidden: Tensor,
        cache: BlockCache,
        mask: Tensor,
        angles: tuple[Tensor, Tensor],
        adapter: GatedLoRA | None,
        main: int,
    ) -> Tensor:
        plan = self.plan
        layer, names = plan.layers[index], self.names[index]
        batch, rows, _ = hidden.shape
        normed = hidden if layer.norm_attention is None else self._norm(hidden, layer.norm_attention)
        joined = _adapted(normed, layer.qkv, names["qkv"], adapter, main)
        heads, key_heads, size = plan.heads, plan.key_heads, plan.head_size
        joined = self._head_norms(joined, layer).view(batch, rows, heads + 2 * key_heads, size)
        turned = _rotate(joined[:, :, : heads + key_heads], *angles).transpose(1, 2)
        keys, values = cache.update(turned[:, heads:], joined[:, :, heads + key_heads :].transpose(1, 2), index)
        attended, _ = grouped_attention(_NO_MODULE, turned[:, :heads], keys, values, mask, scaling=plan.scaling)
        added = _adapted(attended.reshape(batch, rows, -1), layer.out, names["out"], adapter, main)
        if layer.norm_attention_out is not None:
            added = self._norm(added, layer.norm_attention_out)
        hidden = hidden + added
        normed = hidden if layer.norm_mlp is None else self._norm(hidden, layer.norm_mlp)
        gate, up = _adapted(normed, layer.gate_up, names["gate_up"], adapter, main).chunk(2, -1)
        inner = F.silu(gate) if plan.activation == "silu" else F.gelu(gate, approximate="tanh")
        added = _adapted(inner * up, layer.down, names["down"], adapter, main)
        if layer.norm_mlp_out is not None:
            added = self._norm(added, layer.norm_mlp_out)
        return hidden + added

    def _norm(self, x: Tensor, gamma: Tensor) -> Tensor:
        """RMS norm of the last dimension, in float32 as the models do it."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.plan.eps)
        if self.plan.norm_shift:
            return (scaled * (gamma.to(wide.dtype) + self.plan.norm_shift)).to(x.dtype)
        return scaled.to(x.dtype) * gamma

    def _head_norms(self, joined: Tensor, layer: LayerPlan) -> Tensor:
        plan = self.plan
        if layer.norm_query is None or layer.norm_key is None:
            return joined
        at = plan.heads * plan.head_size
        end = at + plan.key_heads * plan.head_size
        query, key = joined[..., :at], joined[..., at:end]
        if plan.query_key_norm == "head":
            query, key = (x.reshape(*x.shape[:-1], -1, plan.head_size) for x in (query, key))
        query, key = self._norm(query, layer.norm_query), self._norm(key, layer.norm_key)
        return torch.cat(
            [query.reshape(*joined.shape[:-1], -1), key.reshape(*joined.shape[:-1], -1), joined[..., end:]], -1
        )


def _linear(x: Tensor, projection: Projection) -> Tensor:
    return F.linear(x, projection.weight, projection.bias)


def _adapted(x: Tensor, projection: Projection, names: Joined, adapter: GatedLoRA | None, main: int) -> Tensor:
    """X @ weight.T + bias, with the adapter's tails on the rows behind the main ones."""
    out = _linear(x, projection)
    if adapter is not None:
        at = 0
        for name, width in names:
            if name in adapter.names:
                adapter.add(name, x, out[..., at : at + width], main)
            at += width
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, R, heads, size] by angles [B, R, 1, size / 2]."""
    one, two = x.chunk(2, -1)
    out = torch.empty(x.shape, dtype=x.dtype)
    first, second = out.chunk(2, -1)
    torch.sub(one * cos, two * sin, out=first)
    torch.add(two * cos, one * sin, out=second)
    return out
