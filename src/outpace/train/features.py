"""What drafters read of the target, computed in the same process: one pass of the frozen target over packed rows.

Documents of a row do not see one another. No key is cached and no logit computed; a state is kept only if asked for.
Nothing is written to disk unless a `Ring` of bounded size is given.
"""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Collection
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from outpace.errors import ConfigError, UnsupportedError
from outpace.target.families import angles, part
from outpace.target.fast.wide import WidePass, wide_pass
from outpace.target.taps import check_taps

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from outpace.drafters.learning import Batch

NAME: Final = "outpace_packed"


@torch.no_grad()
def read_taps(batch: Batch, taps: Collection[str]) -> dict[str, Tensor]:
    """The target's states over a batch, [B, T, H] each, without gradient.

    taps: "embed", "in:k", "out:k", "pre_norm", "post_norm".

    Raises:
        UnsupportedError: if the model cannot give one. ConfigError: on an unknown tap.
    """
    target = batch.target
    wanted = check_taps(taps, target.layers_total)
    if not wanted:
        return {}
    if target.family is None:
        return _by_forward(batch, wanted)
    hidden = target.embed(batch.tokens)
    found = {"embed": hidden} if "embed" in wanted else {}
    wide = wide_pass(target, batch.shape[1])
    if wide is not None:
        hidden = _through_wide(wide, batch, hidden, wanted, found)
    else:
        hidden = _through_modules(batch, hidden, wanted, found)
    if "pre_norm" in wanted:
        found["pre_norm"] = hidden
    if "post_norm" in wanted:
        found["post_norm"] = part(target.model, target.family.norm)(hidden)
    return found


def _through_wide(
    wide: WidePass, batch: Batch, hidden: Tensor, wanted: Collection[str], found: dict[str, Tensor]
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
        return _attended(q, k, v, batch, plan.scaling, window).view(query.shape)

    hidden = wide.run(hidden, batch.positions, attend, visit=visit)
    visit(len(plan.layers), hidden)
    return hidden


def _through_modules(batch: Batch, hidden: Tensor, wanted: Collection[str], found: dict[str, Tensor]) -> Tensor:
    """All layers, as the model's own modules."""
    target, positions = batch.target, batch.positions
    model, family = target.model, target.family
    assert family is not None  # handled before
    spans = _Spans(batch)
    turned = angles(model, family, hidden, positions, set(target.layer_types))
    with _attending(target.config):
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
    """Stands where transformers puts a mask: the documents of the batch, and the window of the layer in hand."""

    batch: Batch
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
    batch, window = attention_mask.batch, attention_mask.window
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, heads, D]
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = _attended(q, k, v, batch, scale, window)
    return out.view(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def _attended(q: Tensor, k: Tensor, v: Tensor, batch: Batch, scale: float, window: int | None) -> Tensor:
    """Causal attention inside documents over flattened rows: [N, heads, D]."""
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        left = {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}
        out: Tensor = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), batch.bounds, batch.bounds, batch.longest, batch.longest,
            0.0, True, False, scale=scale, **left,
        )[0]  # fmt: skip
        return out
    return torch.cat([_one(q[a:b], k[a:b], v[a:b], scale, window) for a, b in _spans(batch)])


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


def _spans(batch: Batch) -> list[tuple[int, int]]:
    cuts = batch.bounds.tolist()
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]


def _by_forward(batch: Batch, wanted: Collection[str]) -> dict[str, Tensor]:
    """Models outside the family table: their own forward, with a mask of documents; gives the top state only."""
    target = batch.target
    if set(wanted) - {"post_norm"}:
        raise UnsupportedError(
            f"{target.config.model_type} is outside the family table, so only the tap 'post_norm' can be read; asked "
            f"for {', '.join(sorted(wanted))}; see outpace.target.families to add a row"
        )
    same = batch.documents[:, :, None] == batch.documents[:, None, :]
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
        target.model(
            input_ids=batch.tokens,
            attention_mask=next(iter(masks.values())) if len(masks) == 1 else masks,
            position_ids=batch.positions,
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


class Ring:
    """States of whole batches on disk, the oldest forgotten first: for several epochs where the target is expensive.

    Args:
        folder: where. limit: most bytes kept.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        if limit < 1 << 20:
            raise ConfigError(f"a ring of features needs at least 1 MiB, got {limit} bytes; leave it away for none")
        self.folder = Path(folder)
        self.limit = limit
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        self._sizes: OrderedDict[str, int] = OrderedDict((file.name, file.stat().st_size) for file in files)

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())

    def get(self, key: str, device: torch.device) -> dict[str, Tensor] | None:
        """The states kept under a key, or None."""
        name = f"{key}.safetensors"
        if name not in self._sizes:
            return None
        try:
            found: dict[str, Tensor] = load_file(self.folder / name, device=str(device))
        except (OSError, SafetensorError):
            self._sizes.pop(name)
            return None
        return found

    def put(self, key: str, taps: dict[str, Tensor]) -> None:
        """Keep states, forgetting the oldest ones beyond the limit."""
        name = f"{key}.safetensors"
        size = sum(tap.numel() * tap.element_size() for tap in taps.values())
        if size > self.limit:
            return
        while self._sizes and self.bytes + size > self.limit:
            oldest, _ = self._sizes.popitem(last=False)
            (self.folder / oldest).unlink(missing_ok=True)
        temporary = self.folder / f".{name}.tmp"
        save_file({tap: value.cpu().contiguous() for tap, value in taps.items()}, temporary)
        temporary.replace(self.folder / name)
        self._sizes[name] = size
