"""Passes on a CPU: one compiled call where a C compiler is there (`target.native`), else fewer and larger steps.

The latter is here, in PyTorch's operations: query, key and value come from one product, gate and up from another;
rotation turns queries and keys together; masks, angles and the room for keys are made once per pass. Each step rounds
where the model's modules round, so the two agree to the last bits a product of another width may differ in. Four
products a layer instead of seven pay on two cores. Tests compare compiled passes with it, and it has gradients.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch

from outpace.errors import UnsupportedError
from outpace.target.attention import grouped_attention, tile
from outpace.target.block import Block, Readout
from outpace.target.fast.layer import heads, norm, rest
from outpace.target.fast.plan import Plan, Projection, joined_names, make_plan
from outpace.target.masks import additive_mask, block_visibility
from outpace.target.native.passes import NativePass
from outpace.target.skinny import linear, same_product

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
        self.native: NativePass | None = None
        self.native_reason: str | None = None  # why passes are not compiled
        try:
            self.native = NativePass(self.plan, self.names)
        except UnsupportedError as error:
            self.native_reason = str(error)

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
        if self.native is not None and self.native.fits(block):
            return self.native.run(hidden, block, cache, layer_ids=layer_ids, taps=taps, logits=logits)
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
        normed = norm(hidden, plan.norm, plan.eps, plan.norm_shift)
        if "post_norm" in taps:
            found["post_norm"] = normed
        if logits and wants_scouts:
            both = _linear(normed, plan.head, main)
            return Readout(both[:, :main], both[:, main:], found)
        return Readout(
            linear(normed[:, :main], plan.head.weight, plan.head.bias) if logits else None,
            linear(normed[:, main:], plan.head.weight, plan.head.bias) if wants_scouts else None,
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
        plan, layer, names = self.plan, self.plan.layers[index], self.names[index]

        def project(part: str, x: Tensor) -> Tensor:
            return _adapted(x, getattr(layer, part), names[part], adapter, main)

        query, key, value = (x.transpose(1, 2) for x in heads(plan, layer, hidden, *angles, project))
        keys, values = cache.update(key, value, index)
        attended, _ = grouped_attention(_NO_MODULE, query, keys, values, mask, scaling=plan.scaling)
        return rest(plan, layer, hidden, attended.flatten(2), project)


def _linear(x: Tensor, projection: Projection, main: int) -> Tensor:
    """X @ weight.T + bias. In float32 the rows behind the main ones take a product of their own.

    Kernels for few rows then give main rows the same bits whatever stands behind them; in bfloat16 they do anyway. Rows
    that only fill up what the main ones are padded to ride along, for that product is of the same shape.
    """
    weight, bias = projection.weight, projection.bias
    if main == x.shape[1] or x.dtype != torch.float32 or same_product(x.shape[0] * main, x.shape[0] * x.shape[1]):
        return linear(x, weight, bias)
    return torch.cat([linear(x[:, :main], weight, bias), linear(x[:, main:], weight, bias)], 1)


def _adapted(x: Tensor, projection: Projection, names: Joined, adapter: GatedLoRA | None, main: int) -> Tensor:
    """X @ weight.T + bias, with the adapter's tails on the rows behind the main ones."""
    out = _linear(x, projection, main)
    if adapter is not None:
        at = 0
        for name, width in names:
            if name in adapter.names:
                adapter.add(name, x, out[..., at : at + width], main)
            at += width
    return out
