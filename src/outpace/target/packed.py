"""Packed documents through a model: the states of every row, frozen, or with gradients under an adapter.

Documents stand one behind the other in rows and do not see one another. No key is cached and no logit computed; a state
is kept only if asked for. Knows no loss and no method: features of frozen targets are read here, and objectives that
tune the target run it here.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch.nn import functional as F

from outpace.errors import UnsupportedError
from outpace.target.families import angles, part
from outpace.target.fast.wide import WidePass, wide_pass
from outpace.target.taps import check_taps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.model import Target

NAME: Final = "outpace_packed"


class Rows(Protocol):
    """Packed rows, on the target's device; a training batch is such."""

    @property
    def tokens(self) -> Tensor:
        """[B, T] int64: ids."""
        ...

    @property
    def documents(self) -> Tensor:
        """[B, T] int64: number of the document within its row, 0 for padding."""
        ...

    @property
    def positions(self) -> Tensor:
        """[B, T] int64: places in the document."""
        ...

    @property
    def bounds(self) -> Tensor:
        """[D + 1] int32: where documents start in the flattened rows, padding counted as such; ends in B * T."""
        ...

    @property
    def longest(self) -> int:
        """Length of the longest of them."""
        ...


def run_packed(
    target: Target, rows: Rows, taps: Collection[str], adapter: GatedLoRA | None = None
) -> dict[str, Tensor]:
    """The target's states over packed rows, [B, T, H] each, in its dtype.

    taps: "embed", "in:k", "out:k", "pre_norm", "post_norm". adapter: applies to every row; states carry gradients to
    it, unless they are turned off. The model's own weights should not require any.

    Raises:
        UnsupportedError: if the model cannot give one. ConfigError: on an unknown tap.
        CheckpointError: if the adapter does not fit the model.
    """
    wanted = check_taps(taps, target.layers_total)
    if not wanted:
        return {}
    if target.family is None:
        return _by_forward(target, rows, wanted, adapter)
    hidden = target.embed(rows.tokens)
    found = {"embed": hidden} if "embed" in wanted else {}
    wide = wide_pass(target, rows.tokens.shape[1])
    if wide is not None:
        hidden = _through_wide(wide, rows, hidden, wanted, found, adapter)
    else:
        hidden = _through_modules(target, rows, hidden, wanted, found, adapter)
    if "pre_norm" in wanted:
        found["pre_norm"] = hidden
    if "post_norm" in wanted:
        found["post_norm"] = part(target.model, target.family.norm)(hidden)
    return found


def _through_wide(
    wide: WidePass,
    rows: Rows,
    hidden: Tensor,
    wanted: Collection[str],
    found: dict[str, Tensor],
    adapter: GatedLoRA | None,
) -> Tensor:
    """All layers through joined weights, compiled where rows are many."""
    plan = wide.plan

    def visit(layer: int, state: Tensor) -> None:
        for name in (f"in:{layer}", f"out:{layer - 1}"):
            if name in wanted:
                found[name] = state

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        window = plan.window if plan.layers[layer].kind == "sliding_attention" else None
        q, k, v = (x.flatten(0, 1) for x in (query, key, value))
        return _attended(q, k, v, rows, plan.scaling, window).view(query.shape)

    hidden = wide.run(hidden, rows.positions, attend, adapter=adapter, visit=visit)
    visit(len(plan.layers), hidden)
    return hidden


def _through_modules(
    target: Target,
    rows: Rows,
    hidden: Tensor,
    wanted: Collection[str],
    found: dict[str, Tensor],
    adapter: GatedLoRA | None,
) -> Tensor:
    """All layers, as the model's own modules."""
    positions = rows.positions
    model, family = target.model, target.family
    assert family is not None  # handled before
    spans = _Spans(rows)
    turned = angles(model, family, hidden, positions, set(target.layer_types))
    with _attending(target.config), _adapted(target, adapter):
        for number, layer in enumerate(part(model, family.layers)):
            if f"in:{number}" in wanted:
                found[f"in:{number}"] = hidden
            kind = target.layer_types[number]
            spans.window = target.window if kind == "sliding_attention" else None
            hidden = layer(
                hidden,
                attention_mask=spans,
                position_embeddings=turned[kind],
                position_ids=positions,
                use_cache=False,
            )
            if f"out:{number}" in wanted:
                found[f"out:{number}"] = hidden
    return hidden


@dataclass
class _Spans:
    """Stands where transformers puts a mask: the documents of the rows, and the window of the layer in hand."""

    rows: Rows
    window: int | None = None


def packed_attention(
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
    """Causal attention inside documents: query [B, heads, T, D], key and value [B, key heads, T, D].

    Raises:
        UnsupportedError: if the model soft-caps attention scores.
    """
    if softcap is not None:
        raise UnsupportedError("this model soft-caps its attention scores, which packed rows do not do yet")
    rows, window = attention_mask.rows, attention_mask.window
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, heads, D]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = _attended(q, k, v, rows, scale, window)
    return out.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _attended(q: Tensor, k: Tensor, v: Tensor, rows: Rows, scale: float, window: int | None) -> Tensor:
    """Causal attention inside documents over flattened rows: [N, heads, D]."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), rows.bounds, rows.bounds, rows.longest, rows.longest,
            0.0, True, False, scale=scale, **left,
        )[0]  # fmt: skip
        return out
    return torch.cat([_one(q[a:b], k[a:b], v[a:b], scale, window) for a, b in _spans(rows)])


def _one(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of one document: [n, heads, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = None
    if window is not None and q.shape[2] > window:
        order = torch.arange(q.shape[2], device=q.device)
        gap = order[:, None] - order
        mask = (gap >= 0) & (gap < window)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


def _spans(rows: Rows) -> list[tuple[int, int]]:
    cuts = rows.bounds.tolist()
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def _by_forward(target: Target, rows: Rows, wanted: Collection[str], adapter: GatedLoRA | None) -> dict[str, Tensor]:
    """Models outside the family table: their own forward, with a mask of documents; gives the top state only."""
    if set(wanted) - {"post_norm"}:
        raise UnsupportedError(
            f"{target.config.model_type} is outside the family table, so only the tap 'post_norm' can be read; asked "
            f"for {', '.join(sorted(wanted))}; see outpace.target.families to add a row"
        )
    same = rows.documents[:, :, None] == rows.documents[:, None, :]
    lowest = torch.finfo(target.dtype).min
    masks = {}
    for kind in set(target.layer_types):
        seen = same.tril()
        if kind == "sliding_attention" and target.window is not None:
            seen = seen & same.triu(1 - target.window)
        mask = torch.zeros(seen.shape, dtype=target.dtype, device=seen.device).masked_fill_(~seen, lowest)[:, None]
        masks[kind] = mask
    captured: list[Tensor] = []

    def catch(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0])
        return (args[0][:, :1],)  # one row of logits is enough

    handle = target.model.get_output_embeddings().register_forward_pre_hook(catch)
    try:
        with _adapted(target, adapter):
            target.model(
                input_ids=rows.tokens,
                attention_mask=next(iter(masks.values())) if len(masks) == 1 else masks,
                position_ids=rows.positions,
                use_cache=False,
            )
    finally:
        handle.remove()
    return {"post_norm": captured[0]}


@contextmanager
def _attending(config: Any) -> Iterator[None]:
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    before = config._attn_implementation_internal
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


@contextmanager
def _adapted(target: Target, adapter: GatedLoRA | None) -> Iterator[None]:
    """An adapter on every row of the modules."""
    with target.adapted(adapter) if adapter is not None else nullcontext(), target._gate.open(adapter, 0):
        yield
