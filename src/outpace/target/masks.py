"""Which cache entries and block rows each row sees, as additive masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.block import Block


def block_visibility(block: Block) -> tuple[Tensor | None, Tensor]:
    """Visibility among all rows of a block and their positions.

    Returns sees [B, N, N] bool with N = main rows + scouts (None: a causal chain without scouts), positions [B, N].
    """
    scouts = block.scouts
    if scouts is None:
        return block.sees, block.positions
    rows, count = block.rows, scouts.count
    main = block.sees
    if main is None:
        ones = torch.ones(rows, rows, dtype=torch.bool, device=block.tokens.device)
        main = ones.tril().expand(block.tokens.shape[0], -1, -1)
    hidden = main.new_zeros(main.shape[0], rows, count)
    sees = torch.cat([torch.cat([main, hidden], 2), scouts.sees.to(main.device)], 1)
    return sees, torch.cat([block.positions, scouts.positions], 1)


def additive_mask(
    sees: Tensor | None,
    positions: Tensor,
    lengths: Sequence[int],
    width: int,
    dtype: torch.dtype,
    window: int | None,
) -> Tensor:
    """[B, 1, N, width]: 0 where a row may look, -inf elsewhere.

    sees: [B, N, N] bool or None (causal chain); positions: [B, N]; lengths: cached tokens per request; width: entries
    attention reads; window: a row sees keys at most window - 1 positions back (None: all).
    """
    batch, rows = positions.shape
    longest, shortest = max(lengths), min(lengths)
    device = positions.device
    if sees is None:
        sees = torch.ones(rows, rows, dtype=torch.bool, device=device).tril().expand(batch, -1, -1)
    if window is not None:
        sees = sees & (positions[:, :, None] - positions[:, None, :] < window)
    if longest == shortest:
        mask = torch.full((batch, 1, rows, width), float("-inf"), dtype=dtype, device=device)
        mask[:, :, :, :longest] = 0
        mask[:, 0, :, longest : longest + rows].masked_fill_(sees, 0)
        if window is not None:
            entries = torch.arange(longest, device=device)
            mask[:, 0, :, :longest].masked_fill_(entries <= positions[:, :, None] - window, float("-inf"))
        return mask
    entries = torch.arange(width, device=device)
    start = torch.tensor(lengths, device=device)
    seen = (entries < start[:, None])[:, None].expand(-1, rows, -1)
    if window is not None:
        seen = seen & (entries > positions[:, :, None] - window)
    at = (start[:, None] + torch.arange(rows, device=device))[:, None].expand(-1, rows, -1)
    visible = seen.scatter(2, at, sees)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))[:, None]
