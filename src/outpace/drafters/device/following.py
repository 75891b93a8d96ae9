"""Drafters with a cache of rows, on the device: rows owed wait in static tensors, `growth` does the rest.

This is `FollowingDrafter.propose` with its pieces captured: the same functions on the same cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from outpace.drafters.device.contract import DeviceDraft, DraftKey
from outpace.drafters.growth import Draws, extend
from outpace.target.fast.graphs import bucket

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context, RequestContext
    from outpace.drafters.follower import FollowingDrafter

_AT_ONCE = 1024  # tokens to come that the cache is made for when a request joins


@dataclass(frozen=True, slots=True)
class Owed:
    """Rows that were accepted and have not been read: features [B, W, taps * H], tokens [B, W], counts [B]."""

    features: Tensor
    tokens: Tensor
    counts: Tensor


class FollowingDraft(DeviceDraft):
    """Drafts of a `FollowingDrafter`, by the functions of `growth`.

    Args:
        drafter: fitted; it keeps the cache, and what the host owes its requests.
    """

    def __init__(self, drafter: FollowingDrafter) -> None:
        self.drafter = drafter
        self.depth, self.nodes = drafter.shape.depth, drafter.shape.width
        self.coupling, self.head = drafter.coupling if drafter.draw == "path" else None, drafter.module.head
        self.rows = min(self.depth, self.nodes) + 1  # most that a round can leave owed
        self._owed: dict[int, Owed] = {}
        self._batch = 0
        self._requests: list[RequestContext] = []
        self._unread: list[list[int]] | None = None

    def holds(self) -> bool:
        """Whether what was captured can still be replayed."""
        return True

    def owed(self, batch: int) -> Owed:
        """The static tensors of a batch."""
        if batch not in self._owed:
            top = self.drafter.cache.top
            size = len(self.drafter.module.taps) * self.drafter.target.hidden_size
            longs: dict[str, Any] = {"dtype": torch.int64, "device": top.device}
            with torch.inference_mode(False):
                self._owed[batch] = Owed(
                    torch.zeros(batch, self.rows, size, dtype=top.dtype, device=top.device),
                    torch.zeros(batch, self.rows, **longs),
                    torch.zeros(batch, **longs),
                )
        return self._owed[batch]

    def join(self, context: Context, batch: int) -> None:
        """See `DeviceDraft`; what the host owes is read here and now."""
        drafter, cache = self.drafter, self.drafter.cache
        drafter.seats.update(context)
        self._line_up(context)
        drafter.read_owed()
        longest = max(len(r.tokens) + min(r.remaining, _AT_ONCE) for r in context.requests)
        cache.reserve(slots=batch, capacity=bucket(longest + 2 * self.rows + drafter.shape.scratch))
        cache.at.copy_(torch.tensor(cache.lengths), non_blocking=True)
        self.owed(batch).counts.zero_()
        self._batch, self._requests, self._unread = batch, list(context.requests), None

    def reserve(self, ahead: int) -> DraftKey:
        """See `DeviceDraft`."""
        cache = self.drafter.cache
        used = max(cache.lengths[: len(self._requests)]) + (ahead + 1) * self.rows + self.drafter.shape.scratch
        reach = bucket(used)
        cache.reserve(capacity=reach)
        return DraftKey(cache.generation, reach)

    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """See `DeviceDraft`."""
        drafter, owed = self.drafter, self.owed(batch)
        counts = torch.zeros_like(owed.counts) if warm else owed.counts
        extend(drafter.module, drafter.target.embed, drafter.cache, owed.features, owed.tokens, counts, key.reach)
        tokens, parents = drafter.grow(batch, key.reach, draws)
        nothing = drafter.cache.at[:batch, None] == 0  # no row to draft behind
        return tokens.masked_fill(nothing, -1), parents

    def collect(
        self, taps: Mapping[str, Tensor], path: Tensor, emitted: Tensor, counts: Tensor, *, warm: bool = False
    ) -> None:
        """See `DeviceDraft`."""
        owed = self.owed(path.shape[0])
        if warm:
            owed = Owed(owed.features.clone(), owed.tokens.clone(), owed.counts.clone())
        rows = min(self.rows, path.shape[1])
        where = path[:, :rows, None]
        taken = [taps[name] for name in self.drafter.module.taps]
        owed.features[:, :rows] = torch.cat([t.gather(1, where.expand(-1, -1, t.shape[2])) for t in taken], -1)
        owed.tokens[:, :rows] = emitted[:, :rows].clamp_min(0)
        owed.counts.copy_(counts)

    def launched(self, ahead: int) -> None:
        """See `DeviceDraft`."""
        if ahead == 0 and self._unread is not None:
            self._advance(self._unread)
            self._unread = None

    def settle(self, emitted: Sequence[Sequence[int]], ahead: int) -> None:
        """See `DeviceDraft`."""
        if ahead:
            self._advance(emitted)
        else:
            self._unread = [list(tokens) for tokens in emitted]

    def leave(self) -> None:
        """See `DeviceDraft`."""
        for b, tokens in enumerate(self._unread or ()):
            features = self.owed(self._batch).features[b, : len(tokens)]
            self.drafter.owe(self._requests[b], features.clone(), tokens)
        self._requests, self._unread = [], None

    def _advance(self, emitted: Sequence[Sequence[int]]) -> None:
        self.drafter.cache.advance([len(tokens) for tokens in emitted])

    def _line_up(self, context: Context) -> None:
        """Seat the context's requests in its order."""
        seats = self.drafter.seats
        for slot, request in enumerate(context.requests):
            at = seats.requests.index(request)
            if at != slot:
                self.drafter.cache.swap(slot, at)
                seats.requests[slot], seats.requests[at] = seats.requests[at], seats.requests[slot]
