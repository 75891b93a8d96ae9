"""Keys and values of a drafter's own rows: static tensors, one slot per request, lengths on the device.

Rows of verified features are written behind one another and kept; rows of a growing draft are written behind them and
overwritten by whatever comes next, because nothing but `advance` moves a length. Keeping keys made from the drafter's
own guesses is the classic silent bug of this family: acceptance then falls the more is drafted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outpace.target.attention import grouped_attention, tile

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.layers import Attend

ALIGN = 128  # attention reads multiples of this many entries


@dataclass(eq=False)
class RowCache:
    """Entry t of a slot belongs to row t: the feature at position t, the token at t + 1.

    Attributes:
        keys, values: [layers, slots, key heads, capacity, head size].
        top: [slots, H]: the network's output at each slot's last row.
        at: [slots] int64 on the device: rows kept. lengths: the same on the host.
        generation: counts how often the tensors have moved (growing moves them); captured graphs hold for one.
    """

    keys: Tensor
    values: Tensor
    top: Tensor
    at: Tensor
    lengths: list[int]
    generation: int = 0

    @classmethod
    def empty(
        cls, layers: int, key_heads: int, head_size: int, hidden: int, *, device: torch.device, dtype: torch.dtype
    ) -> RowCache:
        """A cache without slots; it grows on demand."""
        keys = torch.zeros(layers, 0, key_heads, ALIGN, head_size, device=device, dtype=dtype)
        at = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(keys, keys.clone(), torch.zeros(0, hidden, device=device, dtype=dtype), at, [])

    @property
    def capacity(self) -> int:
        """Entries per slot."""
        return int(self.keys.shape[3])

    def reserve(self, *, slots: int = 0, capacity: int = 0) -> None:
        """Grow to at least that many slots and entries; what is stored stays."""
        slots, capacity = max(slots, len(self.lengths)), max(capacity, self.capacity)
        if slots == len(self.lengths) and capacity == self.capacity:
            return
        capacity = capacity if capacity == self.capacity else max(bucket(capacity), 2 * self.capacity)
        layers, old, heads, entries, size = self.keys.shape
        for name in ("keys", "values"):
            kept = getattr(self, name)
            grown = kept.new_zeros(layers, slots, heads, capacity, size)
            grown[:, :old, :, :entries] = kept
            setattr(self, name, grown)
        new = slots - len(self.lengths)
        self.top = torch.cat([self.top, self.top.new_zeros(new, self.top.shape[1])])
        self.at = torch.cat([self.at, self.at.new_zeros(new)])
        self.lengths.extend([0] * new)
        self.generation += 1

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""
        if source == target:
            return
        length = self.lengths[source]
        for tensor in (self.keys, self.values):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
        self.top[target] = self.top[source]
        self.at[target] = self.at[source]
        self.lengths[target] = length

    def swap(self, one: int, other: int) -> None:
        """Let two slots hold what the other one holds."""
        for tensor in (self.keys, self.values):
            tensor[:, [one, other]] = tensor[:, [other, one]]
        for tensor in (self.top, self.at):
            tensor[[one, other]] = tensor[[other, one]]
        self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` rows of a slot."""
        self.lengths[slot] = length
        self.at[slot].fill_(length)  # an assignment would copy from the host, and wait

    def advance(self, counts: list[int]) -> None:
        """Keep the rows just written, on the host's side (`extend` has moved `at`)."""
        for slot, count in enumerate(counts):
            self.lengths[slot] += count


def bucket(entries: int) -> int:
    """Entries rounded up to what attention reads."""
    return -(-entries // ALIGN) * ALIGN


def visible(at: Tensor, sees: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, R, width]: rows see every kept entry, and of the entries behind those what `sees` says.

    at: [B] int64 kept entries; sees: [B, R, S] bool, for the S entries that follow.
    """
    entries = torch.arange(width, device=at.device)
    kept = (entries < at[:, None])[:, None].expand(-1, sees.shape[1], -1)
    where = (at[:, None] + torch.arange(sees.shape[2], device=at.device))[:, None].expand_as(sees)
    seen = kept.scatter(2, where, sees)
    return torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill(~seen, float("-inf"))[:, None]


def behind(cache: RowCache, at: Tensor, offset: int, mask: Tensor, width: int, slots: Tensor | None = None) -> Attend:
    """Attention that writes its rows at entries at + offset.. of B slots and reads `width` entries.

    mask: [B, 1, R, width] additive; slots: [B] int64, which they are; None: the first B, which are read in place.
    """
    batch, rows = at.shape[0], mask.shape[2]
    slot = (torch.arange(batch, device=at.device) if slots is None else slots)[:, None]
    entry = at[:, None] + offset + torch.arange(rows, device=at.device)

    def read(whole: Tensor) -> Tensor:
        return whole[:batch, :, :width] if slots is None else whole[:, :, :width].index_select(0, slots)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = cache.keys[layer], cache.values[layer]
        keys[slot, :, entry] = k
        values[slot, :, entry] = v
        tiled = tile(mask, q.shape[2] // k.shape[2])
        out, _ = grouped_attention(
            _NO_MODULE, q.transpose(1, 2), read(keys), read(values), tiled, scaling=q.shape[-1] ** -0.5
        )
        return out

    return attend


_NO_MODULE = torch.nn.Module()  # transformers' signature wants one
