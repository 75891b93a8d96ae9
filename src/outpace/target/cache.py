"""The key-value cache of a ragged batch: written ahead by every pass, committed only for tokens that were emitted.

Static tensors per layer, [slots, heads, capacity, head size]; slot s, entry t holds the token at position t of the
request in slot s. A pass writes its rows behind the committed entries of each request (`open`, then `update` from
inside the model); `commit` keeps those of the accepted path, contiguous, and forgets the rest; `drop` forgets all.

Who may do what: the engine owns the cache, opens and closes every block and is the only one to commit. Drafters that
ride on the target's cache (a shallower view) write under `scratch()`, which restores the lengths.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from outpace.errors import OutpaceError

if TYPE_CHECKING:
    from torch import Tensor

ALIGN = 128  # attention reads multiples of this many entries, see `BlockCache.attended`
STRICT_ALIGN = 512  # the block of keys PyTorch's CPU attention works in; capacities are multiples of it


class CacheIntegrityError(OutpaceError, AssertionError):
    """An invariant of the cache does not hold: a bug in outpace, never the user's fault."""


class BlockCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """A cache that holds, per slot, the committed tokens of one request and the rows of the pass in flight.

    Args:
        layers: number of layers of the model.
        slots: requests it can hold; grows on demand.
        capacity: entries per slot, rounded up; grows on demand.
        align: attention reads multiples of this many entries.

    Attributes:
        lengths: committed entries per slot.
        generation: counts how often the tensors have moved (growing moves them); captured graphs hold for one.
    """

    def __init__(self, layers: int, *, slots: int = 1, capacity: int = STRICT_ALIGN, align: int = ALIGN) -> None:
        super().__init__(layers=[])
        self.align = align
        self.lengths: list[int] = [0] * slots
        self.capacity = _rounded(capacity)
        self._keys: list[Tensor | None] = [None] * layers
        self._values: list[Tensor | None] = [None] * layers
        self._whole: Tensor | None = None
        self._first = 0
        self._count = 0
        self._rows = 0
        self._index: tuple[Tensor, Tensor] | None = None
        self.generation = 0
        self._table: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self._keys)

    def __repr__(self) -> str:
        return f"BlockCache(layers={len(self._keys)}, lengths={self.lengths}, capacity={self.capacity})"

    @property
    def slots(self) -> int:
        """Requests it can hold."""
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values) if t is not None)

    def attended(self, entries: int) -> int:
        """Entries attention reads where `entries` are in use: rounded up, the rest is masked.

        Kernels sum over keys in an order that depends on how many there are. With the same rounded length, a key is
        summed in the same place whatever else is in the pass; on CPU in bfloat16 the logits of a row then do not
        depend, bit for bit, on the rows beside it (tests/target/test_row_invariance.py).
        """
        return -(-entries // self.align) * self.align

    def reserve(self, *, slots: int = 0, capacity: int = 0) -> None:
        """Grow to at least that many slots and entries per slot; what is stored stays."""
        slots = max(slots, self.slots)
        capacity = max(_rounded(capacity), self.capacity)
        if slots == self.slots and capacity == self.capacity:
            return
        if self._whole is not None:
            layers, old_slots, heads, entries, size = self._whole.shape
            grown = self._whole.new_zeros(layers, slots, heads, capacity, size)
            grown[:, :old_slots, :, :entries] = self._whole
            self._hold(grown)
        for tensors in () if self._whole is not None else (self._keys, self._values):
            for layer, old in enumerate(tensors):
                if old is not None:
                    new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
                    new[: old.shape[0], :, : old.shape[2]] = old
                    tensors[layer] = new
        self.generation += 1
        self.lengths.extend([0] * (slots - self.slots))
        self.capacity = capacity

    def prepare(self, key_heads: int, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate every layer now and in one piece, for passes that do not call `update`.

        Where passes have written to some layers already, the others are added one by one.
        """
        if all(keys is None for keys in self._keys):
            shape = (2 * len(self._keys), self.slots, key_heads, self.capacity, size)
            self._hold(torch.zeros(shape, dtype=dtype, device=device))
        for tensors in (self._keys, self._values):
            for layer, old in enumerate(tensors):
                if old is None:
                    tensors[layer] = torch.zeros(self.slots, key_heads, self.capacity, size, dtype=dtype, device=device)

    def _hold(self, whole: Tensor) -> None:
        """Let the layers' tensors be pieces of one."""
        self._whole = whole
        self._keys = list(whole[0::2].unbind())
        self._values = list(whole[1::2].unbind())

    def tensors(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, [slots, key heads, capacity, size], as `prepare` or the model made them."""
        return list(zip(self._keys, self._values, strict=True))  # type: ignore[arg-type]  # prepared

    def open(self, first: int, count: int, rows: int) -> None:
        """Begin a pass of `rows` rows for the requests in slots first .. first + count - 1."""
        if self._count:
            raise CacheIntegrityError("a block is already open; commit or drop it first")
        longest = max(self.lengths[first : first + count])
        if self.attended(longest + rows) > self.capacity:
            self.reserve(capacity=max(self.attended(longest + rows), 2 * self.capacity))
        self._first, self._count, self._rows, self._index = first, count, rows, None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the rows of one layer; return keys and values over the attended length, [count, heads, attended, size].

        Called by the model's attention. Rows of a layer may be fewer than the block's (scouts that enter later).
        """
        if not self._count:
            raise CacheIntegrityError("the model wrote to the cache outside a pass")
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        if keys is None or values is None:
            shape = (self.slots, key_states.shape[1], self.capacity)
            keys = self._keys[layer_idx] = key_states.new_zeros(*shape, key_states.shape[3])
            values = self._values[layer_idx] = value_states.new_zeros(*shape, value_states.shape[3])
        rows = key_states.shape[2]
        lengths = self.lengths[self._first : self._first + self._count]
        longest = max(lengths)
        keys = keys[self._first : self._first + self._count]
        values = values[self._first : self._first + self._count]
        if min(lengths) == longest:
            keys[:, :, longest : longest + rows] = key_states
            values[:, :, longest : longest + rows] = value_states
        else:
            request, entry = self._ragged_index(lengths, keys.device)
            keys[request, :, entry[:, :rows]] = key_states.transpose(1, 2)
            values[request, :, entry[:, :rows]] = value_states.transpose(1, 2)
        used = self.attended(longest + rows)
        return keys[:, :, :used], values[:, :, :used]

    def _ragged_index(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        if self._index is None:
            entry = torch.tensor(lengths, device=device)[:, None] + torch.arange(self._rows, device=device)
            self._index = (torch.arange(len(lengths), device=device)[:, None], entry)
        return self._index

    def commit(self, kept: Sequence[Sequence[int]]) -> None:
        """Keep these rows of the open block, per request in rising order, directly behind what was committed."""
        if len(kept) != self._count:
            raise CacheIntegrityError(f"{len(kept)} paths for a block of {self._count} requests")
        scattered = [offset for offset, rows in enumerate(kept) if list(rows) != list(range(len(rows)))]
        if scattered and self._keys[0] is not None and self._keys[0].is_cuda:
            self._gather_on_device(kept)
        else:
            for offset in scattered:
                self._gather(self._first + offset, kept[offset])
        for offset, rows in enumerate(kept):
            self.lengths[self._first + offset] += len(rows)
        self._count = 0

    def _gather(self, slot: int, rows: Sequence[int]) -> None:
        """Lay these rows of the open block directly behind what is committed."""
        start = self.lengths[slot]
        source = torch.tensor(rows) + start
        for tensors in (self._keys, self._values):
            for tensor in tensors:
                if tensor is not None:
                    tensor[slot, :, start : start + len(rows)] = tensor[slot][:, source.to(tensor.device)]

    def _gather_on_device(self, kept: Sequence[Sequence[int]]) -> None:
        """The same for the whole block, in one launch for all layers where Triton is there."""
        first = self._first
        if importlib.util.find_spec("triton") is None or any(keys is None for keys in self._keys):
            for offset, rows in enumerate(kept):
                self._gather(first + offset, rows)
            return
        from outpace.target.fast.entries import keep_entries

        width = max(len(rows) for rows in kept)
        packed = [
            [len(rows), self.lengths[first + b], first + b, *rows, *([0] * (width - len(rows)))]
            for b, rows in enumerate(kept)
        ]
        like = self.tensors()[0][0]
        staged = torch.tensor(packed, device=like.device)
        keep_entries(self.table(), like, staged[:, 3:].contiguous(), *(staged[:, i].contiguous() for i in range(3)))

    def table(self) -> Tensor:
        """Addresses of all keys and values on the device (see `fast.entries`)."""
        if self._table is None or self._table[0] != self.generation:
            from outpace.target.fast.entries import pointer_table

            self._table = (self.generation, pointer_table(self.tensors()))
        return self._table[1]

    def drop(self) -> None:
        """Forget the open block."""
        self._count = 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget everything of a slot behind its first `length` tokens."""
        if not 0 <= length <= self.lengths[slot]:
            raise CacheIntegrityError(f"slot {slot} holds {self.lengths[slot]} tokens; cannot cut to {length}")
        self.lengths[slot] = length

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds; `source` becomes empty."""
        if source != target:
            length = self.lengths[source]
            if self._whole is not None:
                self._whole[:, target, :, :length] = self._whole[:, source, :, :length]
            for tensors in () if self._whole is not None else (self._keys, self._values):
                for tensor in tensors:
                    if tensor is not None:
                        tensor[target, :, :length] = tensor[source, :, :length]
            self.lengths[target] = length
        self.lengths[source] = 0 if source != target else self.lengths[source]

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Whatever is committed inside is forgotten at the end: room for a drafter's own passes."""
        lengths = list(self.lengths)
        try:
            yield
        finally:
            self._count = 0
            self.lengths[:] = lengths

    def entries(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Committed keys and values of one layer and slot: [heads, length, head size]."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            raise CacheIntegrityError(f"layer {layer} has never been written")
        length = self.lengths[slot]
        return keys[slot, :, :length], values[slot, :, :length]

    def check_integrity(self, tokens: Sequence[int]) -> None:
        """Check the invariants between two rounds; `tokens` is the number of committed tokens per active slot.

        1. every request has exactly one token that is not cached yet (its root);
        2. the committed entries are the positions 0 .. length - 1, one each, and hold finite numbers;
        3. the next block therefore starts at position `length`, within the capacity;
        4. slots without a request are empty;
        5. no block is open.

        Raises:
            CacheIntegrityError: naming the invariant.
        """
        if self._count:
            raise CacheIntegrityError("invariant 5: a block is still open between two rounds")
        for slot, length in enumerate(self.lengths):
            if slot >= len(tokens):
                if length:
                    raise CacheIntegrityError(f"invariant 4: slot {slot} has no request but {length} entries")
                continue
            if length != tokens[slot] - 1:
                raise CacheIntegrityError(f"invariant 1: slot {slot} has {tokens[slot]} tokens and {length} entries")
            if length > self.capacity:
                raise CacheIntegrityError(f"invariant 3: slot {slot} holds {length} of {self.capacity} entries")
            for layer, keys in enumerate(self._keys):
                if keys is not None and length and not bool(torch.isfinite(keys[slot, :, :length]).all()):
                    raise CacheIntegrityError(
                        f"invariant 2: layer {layer}, slot {slot} holds numbers that are not finite"
                    )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Committed entries of the longest request (what transformers calls the length)."""
        return max(self.lengths)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Used length and offset; outpace always passes its own mask, so models only ask out of habit."""
        return self.attended(max(self.lengths) + query_length), 0


def _rounded(capacity: int) -> int:
    return max(1, -(-capacity // STRICT_ALIGN)) * STRICT_ALIGN
