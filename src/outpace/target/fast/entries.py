"""Moving cache entries on the device: the rows of an accepted path are laid behind what was committed, in all layers.

One launch for all layers, keys and values; a path that already lies contiguous (a chain) moves nothing.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _keep_kernel(
    TABLE, LIKE, PATH, COUNTS, LENGTHS, SLOTS, R, capacity,
    KEY_HEADS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(1)
    enter_kernel(PDL)
    at = tl.arange(0, ROWS)
    count = tl.load(COUNTS + request)
    inside = at < count
    source = tl.load(PATH + request * R + at, mask=inside, other=0)
    if tl.max(tl.where(inside, source - at, 0), 0) > 0:
        base = tl.load(TABLE + tl.program_id(0)).to(tl.pointer_type(LIKE.dtype.element_ty))
        start = tl.load(LENGTHS + request)
        slot = tl.load(SLOTS + request)
        ds = tl.arange(0, PADDED)
        keep = inside[:, None] & (ds < SIZE)[None, :]
        corner = base + ((slot * KEY_HEADS + tl.program_id(2)) * capacity + start) * SIZE + ds[None, :]
        held = tl.load(corner + source[:, None] * SIZE, mask=keep, other=0.0)
        tl.debug_barrier()  # everything is read before anything is overwritten
        tl.store(corner + at[:, None] * SIZE, held, mask=keep)


def pointer_table(tensors: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Addresses of all keys and values, [2 * layers] int64, on their device."""
    flat = [tensor.data_ptr() for pair in tensors for tensor in pair]
    return torch.tensor(flat, dtype=torch.int64, device=tensors[0][0].device)


def keep_entries(
    table: Tensor, like: Tensor, path: Tensor, counts: Tensor, lengths: Tensor, slots: Tensor, *, pdl: bool = False
) -> None:
    """For each request, lay block rows path[b, :counts[b]] (rising) at entries lengths[b], lengths[b] + 1, ...

    table: addresses of the cache tensors; like: one of them, [slots, key heads, capacity, size]; path: [B, R] int64,
    R at most a block; counts, lengths, slots: [B] int64.
    """
    batch, rows = path.shape
    _keep_kernel[(table.shape[0], batch, like.shape[1])](
        table, like, path, counts, lengths, slots, rows, like.shape[2], KEY_HEADS=like.shape[1], SIZE=like.shape[3],
        PADDED=max(16, triton.next_power_of_2(like.shape[3])), ROWS=triton.next_power_of_2(rows), PDL=pdl,
        num_warps=4, **launch_options(pdl),
    )  # fmt: skip
