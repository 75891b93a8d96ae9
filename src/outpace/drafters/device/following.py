"""Drafters with a cache of rows, on the device: rows owed wait in static tensors, `growth` does the rest.

This is `FollowingDrafter.propose` with its pieces captured: the same functions on the same cache. Prompts are read so
too, request by request: a reading of many rows is a graph per shape, whoever sits where.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.device.contract import DeviceDraft, DraftKey
from outpace.drafters.growth import Draws, Plan, born, extend, kept
from outpace.target.fast.graphs import bucket, padded_batch, padded_rows

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context, RequestContext
    from outpace.drafters.follower import FollowingDrafter, Rows
    from outpace.target.fast.graphs import Captured, FastPass
    from outpace.target.fast.linear import Scaled


class Ear(Protocol):
    """How outputs of the network hear something else before their children are chosen (`growth.Hear`)."""

    def __call__(self, y: Tensor, depth: int) -> Tensor:
        """Outputs [B, F, H] of a depth, the root's being 1."""

    def fused(self, y: Tensor, depth: int, gamma: Tensor | None) -> tuple[Tensor, Scaled | None]:
        """The same for rows [B * F, H], by kernels; and scaled for the norm `gamma` in front of the head."""


_AT_ONCE = 1024  # tokens to come that the cache is made for when a request joins


@dataclass(frozen=True, slots=True)
class Owed:
    """Rows that were accepted and have not been read: features [B, W, taps * H], tokens [B, W], counts [B]."""

    features: Tensor
    tokens: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class Sheet:
    """Rows of a captured reading: features [B, R, taps * H]; words: one int64 tensor, of which the others are views.

    tokens: [B, R]; counts, slots: [B], how many rows of each request are real, and where it sits.
    """

    features: Tensor
    words: Tensor
    tokens: Tensor
    counts: Tensor
    slots: Tensor

    @classmethod
    def empty(cls, batch: int, rows: int, like: Tensor, size: int) -> Sheet:
        """A sheet of a shape, for features of `size` numbers, in the dtype and on the device of `like`."""
        with torch.inference_mode(False):
            features = torch.zeros(batch, rows, size, dtype=like.dtype, device=like.device)
            words = torch.zeros(batch * (rows + 2), dtype=torch.int64, device=like.device)
            tokens, counts, slots = torch.split(words, [batch * rows, batch, batch])
        return cls(features, words, tokens.view(batch, rows), counts, slots)


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
        self._first = next(drafter.module.parameters()).data_ptr()
        self._owed: dict[int, Owed] = {}
        self._sheets: dict[tuple[int, int], Sheet] = {}
        self._readings: WeakKeyDictionary[FastPass, dict[Any, Captured]] = WeakKeyDictionary()
        self._batch = 0
        self._requests: list[RequestContext] = []
        self._unread: list[list[int]] | None = None

    def holds(self) -> bool:
        """Whether the weights are where captured work reads them (they are not after `module.to(...)`)."""
        return next(self.drafter.module.parameters()).data_ptr() == self._first

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

    def make_room(self, requests: Sequence[RequestContext]) -> None:
        """Make the cache for these requests and their tokens to come: growing it later means capturing anew."""
        longest = max(len(r.tokens) + min(r.remaining, _AT_ONCE) for r in requests)
        room = bucket(longest + 2 * self.rows + self.drafter.shape.scratch)
        self.drafter.cache.reserve(slots=padded_batch(len(requests)), capacity=room)

    def read(self, fast: FastPass, rows: Mapping[int, Rows]) -> None:
        """Extend the cache by rows of verified features, by seat, in one captured reading; the host waits for nothing.

        Raises:
            OutOfMemoryError: if there is no room to capture a reading of this shape.
        """
        cache, device = self.drafter.cache, self.drafter.cache.top.device
        batch = padded_batch(len(rows))
        count = padded_rows(max(self.rows, *(len(tokens) for _, tokens in rows.values())))
        cache.reserve(slots=batch)
        spare = [slot for slot in range(len(cache.lengths)) if slot not in rows][: batch - len(rows)]
        slots = [*rows, *spare]
        reach = bucket(max(cache.lengths[slot] for slot in slots) + count)
        cache.reserve(capacity=reach)
        sheet = self._sheet(batch, count)
        words: list[int] = []
        for _, tokens in rows.values():
            words += [*tokens, *([0] * (count - len(tokens)))]
        words += [0] * (count * len(spare))
        words += [*(len(tokens) for _, tokens in rows.values()), *([0] * len(spare)), *slots]
        sheet.words.copy_(torch.tensor(words), non_blocking=True)
        for b, (features, tokens) in enumerate(rows.values()):
            sheet.features[b, : len(tokens)] = features
        graphs = self._readings.setdefault(fast, {})
        key = (cache.generation, reach, batch, count)
        if key not in graphs:
            for old in [k for k in graphs if k[0] != cache.generation]:
                del graphs[old]  # their cache tensors are gone

            def work(*, warm: bool) -> None:
                counts = torch.zeros_like(sheet.counts) if warm else sheet.counts
                padding = torch.arange(count, device=device) >= counts[:, None]  # holds what another request left
                self.extend(sheet.features.masked_fill(padding[..., None], 0), sheet.tokens, counts, sheet.slots, reach)

            graphs[key] = fast.capture_work(
                lambda: work(warm=False),
                f"a drafter's reading of {batch} x {count} rows behind up to {reach} entries",
                lambda: work(warm=True),
            )
        graphs[key]()
        for slot, (_, tokens) in rows.items():
            cache.lengths[slot] += len(tokens)

    def extend(self, features: Tensor, tokens: Tensor, counts: Tensor, slots: Tensor, reach: int) -> None:
        """`growth.extend` of the drafter's own cache, on whatever the device does it with."""
        drafter = self.drafter
        extend(drafter.module, drafter.target.embed, drafter.cache, features, tokens, counts, reach, slots)

    def _sheet(self, batch: int, rows: int) -> Sheet:
        if (batch, rows) not in self._sheets:
            size = len(self.drafter.module.taps) * self.drafter.target.hidden_size
            self._sheets[batch, rows] = Sheet.empty(batch, rows, self.drafter.cache.top, size)
        return self._sheets[batch, rows]

    def join(self, context: Context, batch: int) -> None:
        """See `DeviceDraft`; what one round left is for the first draft to read, what is more is read here."""
        drafter, cache = self.drafter, self.drafter.cache
        drafter.seats.update(context)
        self._line_up(context)
        self.make_room(context.requests)
        drafter.read_owed(context, beyond=self.rows)
        cache.at.copy_(torch.tensor(cache.lengths), non_blocking=True)
        self._batch, self._requests = batch, list(context.requests)
        left = {b: drafter.take_owed(r) for b, r in enumerate(self._requests) if drafter.owes(r)}
        self._hold(left, batch)
        self._unread = [left[b][1] if b in left else [] for b in range(len(self._requests))] if left else None

    def _hold(self, left: Mapping[int, Rows], batch: int) -> None:
        """Let rows, by request, stand where a round would have left them."""
        owed, names = self.owed(batch), self.drafter.module.taps
        if not left:
            owed.counts.zero_()
            return
        words = [[0] * (self.rows + 1) for _ in range(batch)]
        features = torch.zeros_like(owed.features)
        for b, (feature, tokens) in left.items():
            features[b, : len(tokens)] = feature
            words[b][: len(tokens)], words[b][-1] = tokens, len(tokens)
        said = torch.tensor(words).to(features.device, non_blocking=True)
        parts = features.chunk(len(names), -1)
        path = torch.arange(self.rows, device=features.device).repeat(batch, 1)
        taps = {name: part.contiguous() for name, part in zip(names, parts, strict=True)}
        self.collect(taps, path, said[:, :-1], said[:, -1].contiguous())

    def reserve(self, ahead: int) -> DraftKey:
        """See `DeviceDraft`."""
        cache = self.drafter.cache
        used = max(cache.lengths[: len(self._requests)]) + (ahead + 1) * self.rows + self.drafter.shape.scratch
        reach = bucket(used)
        cache.reserve(capacity=reach)
        return DraftKey(cache.generation, reach)

    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """See `DeviceDraft`."""
        drafter = self.drafter
        self.read_left(key, batch, warm=warm)
        tokens, parents = drafter.grow(batch, key.reach, draws)
        nothing = drafter.cache.at[:batch, None] == 0  # no row to draft behind
        return tokens.masked_fill(nothing, -1), parents

    def draft_hearing(
        self, key: DraftKey, batch: int, draws: Draws | None, ear: Ear, *, warm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`draft` of a tree found while drafting, whose outputs hear something; and its values [batch, nodes]."""
        drafter, plan = self.drafter, self.drafter.shape
        assert isinstance(plan, Plan)
        self.read_left(key, batch, warm=warm)
        grown = born(drafter.module, drafter.target.embed, drafter.cache, plan, batch, key.reach, draws, ear)
        tokens, parents, values = kept(*grown, plan.width)
        return tokens.masked_fill(drafter.cache.at[:batch, None] == 0, -1), parents, values

    def read_left(self, key: DraftKey, batch: int, *, warm: bool) -> None:
        """Read what the last round left; in a warm-up, nothing of it."""
        drafter, owed = self.drafter, self.owed(batch)
        counts = torch.zeros_like(owed.counts) if warm else owed.counts
        extend(drafter.module, drafter.target.embed, drafter.cache, owed.features, owed.tokens, counts, key.reach)

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
