"""Rows behind a frozen context, with gradients: the pass that training of scouts runs.

The frozen model reads packed documents once, without gradient, and every layer's keys and values are kept (`read`).
Other rows then run through the same layers behind them, with an adapter, and see what a predicate lets them see
(`run_behind`). Many windows per document share one reading.

Knows no loss and no method. Attention is dense under a mask (the reference), or PyTorch's flex attention, which skips
the blocks nobody sees; on a GPU that is most of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch
from torch.nn import functional as F

from outpace.errors import UnsupportedError
from outpace.target import attention
from outpace.target.adapters import check_adapter
from outpace.target.families import angles, cache_keyword, part
from outpace.target.fast.wide import wide_pass

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.model import Target

Sees = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(batch index, row, key) -> bool, element by element on int64 tensors that broadcast."""
Kernel = Literal["dense", "flex"]

FLEX: Final = "outpace_flex"
_BLOCK: Final = 128
_NO_MODULE: Final = torch.nn.Module()  # transformers' signature of attention wants one


@dataclass(frozen=True, slots=True)
class Reading:
    """What rows behind can attend to.

    Attributes:
        keys, values: per layer [B, key heads, T, head size], without gradient.
        positions: [B, T] int64.
        hidden: [B, T, H], what the head reads.
    """

    keys: list[Tensor]
    values: list[Tensor]
    positions: Tensor
    hidden: Tensor

    def extended(self, other: Reading) -> Reading:
        """This one with the entries of another behind it."""

        def join(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [torch.cat([a, b], 2) for a, b in zip(mine, theirs, strict=True)]

        return Reading(
            join(self.keys, other.keys),
            join(self.values, other.values),
            torch.cat([self.positions, other.positions], 1),
            torch.cat([self.hidden, other.hidden], 1),
        )


class _Ledger:
    """What the model's attention modules call a cache: appends to a reading, or starts one, and keeps what it got."""

    def __init__(self, context: Reading | None) -> None:
        self.context = context
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.append(keys.detach())
        self.values.append(values.detach())
        if self.context is None:
            return keys, values
        return torch.cat([self.context.keys[layer], keys], 2), torch.cat([self.context.values[layer], values], 2)


def read(target: Target, tokens: Tensor, documents: Tensor, positions: Tensor, kernel: Kernel | None = None) -> Reading:
    """Read packed documents with the bare model, without gradient.

    tokens, documents, positions: [B, T] int64; documents: equal within one, 0 is padding; positions from 0 in each.

    Raises:
        UnsupportedError: for a model outside the family table.
    """

    def sees(b: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return (key <= row) & (documents[b, key] == documents[b, row])  # padding sees padding: no row sees nothing

    with torch.no_grad():
        return _run(target, None, target.embed(tokens), positions, sees, None, kernel)


def run_behind(
    target: Target,
    context: Reading,
    embeds: Tensor,
    positions: Tensor,
    sees: Sees,
    adapter: GatedLoRA | None,
    kernel: Kernel | None = None,
) -> Reading:
    """Run rows behind a reading.

    embeds: [B, R, H], input embeddings; positions: [B, R]. `sees` gets key indices over the T entries of the context,
    then the R rows themselves, and must let every row see something (itself). The model's weights should not require
    gradients; `hidden` of the result carries them to embeds and adapter.

    Raises:
        UnsupportedError: for a model outside the family table.
        CheckpointError: if the adapter does not fit the model.
    """
    return _run(target, context, embeds.to(target.dtype), positions, sees, adapter, kernel)


def _run(
    target: Target,
    context: Reading | None,
    hidden: Tensor,
    positions: Tensor,
    sees: Sees,
    adapter: GatedLoRA | None,
    kernel: Kernel | None,
) -> Reading:
    family, config = target.family, target.config
    if family is None:
        raise UnsupportedError(
            f"{config.model_type} is outside the family table, so scouts cannot be trained for it; see "
            "outpace.target.families to add a row"
        )
    kernel = kernel or ("flex" if hidden.is_cuda else "dense")
    keys_at = positions if context is None else torch.cat([context.positions, positions], 1)
    masks: dict[str, Any] = {}
    for kind in sorted(set(target.layer_types)):
        window = target.window if kind == "sliding_attention" else None
        seen = sees if window is None else _within(sees, positions, keys_at, window)
        masks[kind] = _mask(seen, positions, keys_at, kernel, _groups(config))
    ledger = _Ledger(context)
    wide = wide_pass(target, keys_at.shape[1])
    if wide is not None:
        if adapter is not None:
            check_adapter(target.model, adapter)
        run = flex_attention if kernel == "flex" else attention.grouped_attention

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = ledger.update(key.transpose(1, 2), value.transpose(1, 2), layer)
            mask = masks[target.layer_types[layer]]
            return run(_NO_MODULE, query.transpose(1, 2), keys, values, mask, scaling=wide.plan.scaling)[0]

        hidden = wide.run(hidden, positions, attend, adapter=adapter)
    else:
        hidden = _through_modules(target, hidden, positions, masks, ledger, adapter, kernel)
    return Reading(ledger.keys, ledger.values, positions, part(target.model, family.norm)(hidden))


def _through_modules(
    target: Target,
    hidden: Tensor,
    positions: Tensor,
    masks: dict[str, Any],
    ledger: _Ledger,
    adapter: GatedLoRA | None,
    kernel: Kernel,
) -> Tensor:
    """All layers, as the model's own modules."""
    family, config = target.family, target.config
    assert family is not None  # refused before
    turned = angles(target.model, family, hidden, positions, masks)
    name = FLEX if kernel == "flex" else attention.NAME
    with ExitStack() as stack:
        if adapter is not None:
            stack.enter_context(target.adapted(adapter))
        stack.enter_context(target._gate.open(adapter, 0))
        stack.enter_context(attention.use_attention(config, name))
        for layer, kind in zip(part(target.model, family.layers), target.layer_types, strict=True):
            hidden = layer(
                hidden,
                attention_mask=masks[kind],
                position_embeddings=turned[kind],
                position_ids=positions,
                **{cache_keyword(layer): ledger},
                use_cache=True,
            )
    return hidden


def _groups(config: Any) -> int:
    return int(config.num_attention_heads) // int(getattr(config, "num_key_value_heads", 0) or 1)


def _within(sees: Sees, rows_at: Tensor, keys_at: Tensor, window: int) -> Sees:
    return lambda b, row, key: sees(b, row, key) & (rows_at[b, row] - keys_at[b, key] < window)


def _mask(sees: Sees, rows_at: Tensor, keys_at: Tensor, kernel: Kernel, groups: int) -> Any:
    """What the attention function of that kernel takes."""
    sizes = rows_at.shape[0], rows_at.shape[1], keys_at.shape[1]
    index = [torch.arange(size, device=rows_at.device) for size in sizes]
    seen = sees(index[0][:, None, None], index[1][None, :, None], index[2][None, None, :])
    return _blocks(seen, sees) if kernel == "flex" else attention.tile(seen[:, None], groups)


def _blocks(seen: Tensor, sees: Sees) -> Any:
    """The block mask of seen [B, R, L]; `sees` decides inside blocks that are seen in part.

    `create_block_mask` would evaluate the predicate on int64 grids of B * R * L, gigabytes; broadcast, it costs bytes.
    """
    from torch.nn.attention.flex_attention import BlockMask

    batch, rows, keys = seen.shape
    padded = F.pad(seen, (0, -keys % _BLOCK, 0, -rows % _BLOCK))
    tiles = padded.view(batch, padded.shape[1] // _BLOCK, _BLOCK, padded.shape[2] // _BLOCK, _BLOCK).sum((2, 4))
    whole = tiles == _BLOCK * _BLOCK
    part_of = (tiles > 0) & ~whole

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
        return chosen.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]

    return BlockMask.from_kv_blocks(
        *listed(part_of),
        *listed(whole),
        BLOCK_SIZE=_BLOCK,
        mask_mod=lambda b, h, q, kv: sees(b, q, kv),
        seq_lengths=(rows, keys),
    )


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention under a block mask: query [B, heads, R, D], key and value [B, key heads, L, D] -> [B, R, heads, D].

    Compiled on CUDA; on other devices it runs as written, which materialises the scores (tests).

    Raises:
        UnsupportedError: if the model soft-caps attention scores.
    """
    if softcap is not None:
        raise UnsupportedError("this model soft-caps its attention scores, which training of scouts does not do yet")
    if query.is_cuda:
        run = _compiled()
    else:
        from torch.nn.attention.flex_attention import flex_attention as run
    out = run(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2), None
