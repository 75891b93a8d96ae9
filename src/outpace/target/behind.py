"""Rows behind a frozen context, with gradients: the pass that training of scouts runs.

The frozen model reads packed documents once, without gradient, and every layer's keys and values are kept (`read`).
Windows of other rows then run through the same layers behind them, with an adapter (`run_behind`): each sees one range
of the reading, and itself (`Spans`). Many windows per document share one reading.

Knows no loss and no method. Attention is dense under a mask (the reference), or on a GPU a kernel that walks over the
ranges (`behind_fused`).
"""

from __future__ import annotations

import importlib.util
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from outpace.errors import UnsupportedError
from outpace.target import attention
from outpace.target.adapters import check_adapter
from outpace.target.families import angles, cache_keyword, part
from outpace.target.fast.wide import wide_pass

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.model import Target

Kernel = Literal["dense", "fused"]

FUSED: Final = "outpace_behind"
_NO_MODULE: Final = torch.nn.Module()  # transformers' signature of attention wants one
_NO_WINDOW: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Spans:
    """What windows of rows see: W in each batch row, all of the same number of rows, one window behind the other.

    A row sees the entries first <= i < start of the reading, the rows of its window before it, and itself. Positions
    rise by one within a range and within a window.

    Attributes:
        firsts, starts: [B, W] int64.
    """

    firsts: Tensor
    starts: Tensor

    @classmethod
    def of(cls, starts: Tensor, documents: Tensor) -> Spans:
        """Windows that see their document up to `starts` [B, W]; documents [B, T], equal within one."""
        place = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
        begins = documents != documents.roll(1, 1)
        begins[:, 0] = True
        firsts = torch.where(begins, place, 0).cummax(1).values
        return cls(firsts.gather(1, starts), starts)

    def mask(self, entries: int, rows: int, own: int) -> Tensor:
        """[B, rows, entries + own] bool over the reading, then the windows' own rows.

        rows: those that look, the last of each window's. own: all of the windows', 0 if they see the reading alone.
        """
        batch, windows = self.starts.shape
        each, count = rows // windows, own // windows
        at = torch.arange(entries, device=self.starts.device)
        before = (at >= self.firsts[..., None]) & (at < self.starts[..., None])
        before = before[:, :, None].expand(-1, -1, each, -1).flatten(1, 2)
        itself = torch.eye(windows, dtype=torch.bool, device=at.device)
        causal = torch.ones(each, count, dtype=torch.bool, device=at.device).tril(count - each)
        among = (itself[:, None, :, None] & causal[:, None]).reshape(rows, own)
        return torch.cat([before, among.expand(batch, -1, -1)], 2)


@dataclass(frozen=True, slots=True)
class Range:
    """`Spans` as the kernel takes them, for one kind of layer.

    Attributes:
        lows: [B, R] int32, first entry each row sees: later than the span's where the layer slides.
        starts: [B, W] int32.
        window: own rows that far behind are out of sight.
    """

    lows: Tensor
    starts: Tensor
    window: int


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

    def grown(self, other: Reading, windows: int) -> Reading:
        """Rows of windows, each with those of another reading of the same windows behind it."""

        def join(mine: list[Tensor], theirs: list[Tensor]) -> list[Tensor]:
            return [_joined(a, b, windows, 2) for a, b in zip(mine, theirs, strict=True)]

        return Reading(
            join(self.keys, other.keys),
            join(self.values, other.values),
            _joined(self.positions, other.positions, windows, 1),
            _joined(self.hidden, other.hidden, windows, 1),
        )


def _joined(a: Tensor, b: Tensor, windows: int, dim: int) -> Tensor:
    """Rows along `dim`, window by window: those of a, then those of b."""
    parts = [x.reshape(*x.shape[:dim], windows, -1, *x.shape[dim + 1 :]) for x in (a, b)]
    return torch.cat(parts, dim + 1).flatten(dim, dim + 1)


class _Ledger:
    """What the model's attention modules call a cache: keeps what it gets, and says what attention is over.

    Attributes:
        context: the reading; None while one is made. earlier: rows of the same windows that ran before.
        layer: the one that updated last.
    """

    def __init__(self, context: Reading | None, earlier: Reading | None, windows: int, kernel: Kernel) -> None:
        self.context, self.earlier = context, earlier
        self.windows = windows
        self.kernel = kernel
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.layer = 0

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of all entries; for the kernel, which finds the reading here, of the windows alone."""
        if self.context is None:  # kept for long: not as a view of something larger
            keys, values = keys.contiguous(), values.contiguous()
        self.keys.append(keys.detach())
        self.values.append(values.detach())
        self.layer = layer
        if self.context is None:
            return keys, values
        if self.earlier is not None:
            keys = _joined(self.earlier.keys[layer], keys, self.windows, 2)
            values = _joined(self.earlier.values[layer], values, self.windows, 2)
        if self.kernel == "fused":
            return keys, values
        return torch.cat([self.context.keys[layer], keys], 2), torch.cat([self.context.values[layer], values], 2)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What stands for a mask when the kernel attends."""

    ledger: _Ledger
    range: Range


def read(target: Target, tokens: Tensor, documents: Tensor, positions: Tensor, kernel: Kernel | None = None) -> Reading:
    """Read packed documents with the bare model, without gradient.

    tokens, documents, positions: [B, T] int64; documents: equal within one, 0 is padding; positions from 0 in each.

    Raises:
        UnsupportedError: for a model outside the family table.
    """
    behind = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    spans = Spans.of(behind, documents)  # padding sees padding: no row sees nothing
    with torch.no_grad():
        return _run(target, None, None, target.embed(tokens), positions, Spans(spans.firsts, behind + 1), None, kernel)


def run_behind(
    target: Target,
    context: Reading,
    embeds: Tensor,
    positions: Tensor,
    spans: Spans,
    adapter: GatedLoRA | None,
    kernel: Kernel | None = None,
    earlier: Reading | None = None,
) -> Reading:
    """Run windows of rows behind a reading.

    embeds: [B, R, H], input embeddings, window by window; positions: [B, R]. earlier: what ran of the same windows
    before these rows. The model's weights should not require gradients; `hidden` of the result carries them to embeds
    and adapter, through these rows alone.

    Raises:
        UnsupportedError: for a model outside the family table.
        CheckpointError: if the adapter does not fit the model.
    """
    return _run(target, context, earlier, embeds.to(target.dtype), positions, spans, adapter, kernel)


def choose_kernel(kernel: Kernel | None, hidden: Tensor) -> Kernel:
    """The one asked for, or what suits such states (torch for CUDA comes with Triton, on Linux)."""
    if kernel is not None:
        return kernel
    fits = hidden.is_cuda and hidden.dtype != torch.float64 and importlib.util.find_spec("triton") is not None
    return "fused" if fits else "dense"


def _run(
    target: Target,
    context: Reading | None,
    earlier: Reading | None,
    hidden: Tensor,
    positions: Tensor,
    spans: Spans,
    adapter: GatedLoRA | None,
    kernel: Kernel | None,
) -> Reading:
    family, config = target.family, target.config
    if family is None:
        raise UnsupportedError(
            f"{config.model_type} is outside the family table, so scouts cannot be trained for it; see "
            "outpace.target.families to add a row"
        )
    kernel = choose_kernel(kernel, hidden)
    windows = spans.starts.shape[1]
    ledger = _Ledger(context, earlier, windows, kernel)
    entries = positions if context is None else context.positions
    own = positions if earlier is None else _joined(earlier.positions, positions, windows, 1)
    masks: dict[str, Any] = {}
    for kind in sorted(set(target.layer_types)):
        window = target.window if kind == "sliding_attention" else None
        if kernel == "fused":
            masks[kind] = _Seen(ledger, _range(spans, positions, entries, window))
        else:
            keys_at = entries if context is None else torch.cat([entries, own], 1)
            seen = spans.mask(entries.shape[1], positions.shape[1], keys_at.shape[1] - entries.shape[1])
            if window is not None:
                seen &= positions[:, :, None] - keys_at[:, None] < window
            masks[kind] = attention.tile(seen[:, None], _groups(config))
    wide = wide_pass(target, entries.shape[1] + own.shape[1])
    if wide is not None:
        if adapter is not None:
            check_adapter(target.model, adapter)
        run = fused_attention if kernel == "fused" else attention.grouped_attention

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = ledger.update(key.transpose(1, 2), value.transpose(1, 2), layer)
            mask = masks[target.layer_types[layer]]
            return run(_NO_MODULE, query.transpose(1, 2), keys, values, mask, scaling=wide.plan.scaling)[0]

        hidden = wide.run(hidden, positions, attend, adapter=adapter)
    else:
        hidden = _through_modules(target, hidden, positions, masks, ledger, adapter)
    return Reading(ledger.keys, ledger.values, positions, part(target.model, family.norm)(hidden))


def _range(spans: Spans, positions: Tensor, entries: Tensor, window: int | None) -> Range:
    """positions: [B, R], of the rows; entries: [B, T], of the reading."""
    each = positions.shape[1] // spans.starts.shape[1]
    lows = spans.firsts[..., None].expand(-1, -1, each).flatten(1)
    if window is not None:
        lows = torch.maximum(lows, lows + positions - entries.gather(1, lows) - window + 1)
    return Range(lows.to(torch.int32), spans.starts.to(torch.int32).contiguous(), window or _NO_WINDOW)


def _through_modules(
    target: Target,
    hidden: Tensor,
    positions: Tensor,
    masks: dict[str, Any],
    ledger: _Ledger,
    adapter: GatedLoRA | None,
) -> Tensor:
    """All layers, as the model's own modules."""
    family, config = target.family, target.config
    assert family is not None  # refused before
    turned = angles(target.model, family, hidden, positions, masks)
    name = FUSED if ledger.kernel == "fused" else attention.NAME
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


def fused_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: _Seen,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention by the kernel: query [B, heads, R, D], key and value [B, key heads, M, D] -> [B, R, heads, D].

    key, value: of the windows; of the reading, if one is being made.

    Raises:
        UnsupportedError: if the model soft-caps attention scores.
    """
    if softcap is not None:
        raise UnsupportedError("this model soft-caps its attention scores, which training of scouts does not do yet")
    from outpace.target.behind_fused import attend

    ledger = attention_mask.ledger
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    if ledger.context is None:
        return attend(query, key, value, None, attention_mask.range, scale), None
    keys, values = (x[ledger.layer].transpose(1, 2) for x in (ledger.context.keys, ledger.context.values))
    return attend(query, keys, values, (key, value), attention_mask.range, scale), None
