"""Attention over the used length of a block cache, with a mask per row: the reference, on every device.

Grouped-query heads are handled by letting the query heads of a group stand as extra rows of their key head, so keys
and values are read once and never repeated. Runs inside the model's own attention modules, through transformers'
attention interface; the model is switched to it for the duration of a pass and left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from outpace.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

NAME: Final = "outpace_grouped"

# PyTorch's CPU kernel works in blocks of 32 query rows, and takes another product for a last block of one to three:
# padded to four, a row's result does not depend on how many rows stand beside it.
_QUERY_BLOCK: Final = 32
_FEWEST: Final = 4


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention of a block.

    query: [B, heads, R, D]; key, value: [B, key heads, L, D]; attention_mask: additive [B, 1, groups * R, L] in the
    model's dtype (rows repeated per group by `tile`).
    Returns ([B, R, heads, D], None).

    Raises:
        UnsupportedError: if the model soft-caps attention scores.
    """
    if softcap is not None:
        raise UnsupportedError("this model soft-caps its attention scores, which the block runner does not do yet")
    batch, heads, rows, size = query.shape
    key_heads = key.shape[1]
    packed = query.reshape(batch, key_heads, heads // key_heads * rows, size)
    count = packed.shape[2]
    alone = count % _QUERY_BLOCK
    if packed.device.type == "cpu" and 0 < alone < _FEWEST:
        packed = F.pad(packed, (0, 0, 0, _FEWEST - alone))
        attention_mask = F.pad(attention_mask, (0, 0, 0, _FEWEST - alone))
    out = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)[:, :, :count]
    return out.reshape(batch, heads, rows, value.shape[-1]).transpose(1, 2), None


def tile(mask: Tensor, groups: int) -> Tensor:
    """Repeat the rows of an additive mask [B, 1, R, L] for each query head of a group."""
    return mask if groups == 1 else mask.repeat(1, 1, groups, 1)


@contextmanager
def use_attention(config: Any, name: str = NAME) -> Iterator[None]:
    """Let the model whose config this is attend through one of our functions inside the block."""
    before = config._attn_implementation_internal
    config._attn_implementation_internal = name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def register() -> None:
    """Make our functions known to transformers (idempotent)."""
    from transformers import AttentionInterface

    from outpace.target import behind

    AttentionInterface.register(NAME, grouped_attention)
    AttentionInterface.register(behind.FUSED, behind.fused_attention)
