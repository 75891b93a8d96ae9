"""Slots of a drafter's own cache, kept in step with a batch that requests join and leave.

The first len(seats) slots are always taken, without gaps, so that a pass reads one slice. The order is the drafter's
own; `order(context)` says where each request of a context sits.
"""

from __future__ import annotations

from typing import Protocol

from outpace.drafters.base import Context, RequestContext


class Slots(Protocol):
    """What a cache must do for its slots to be seats."""

    def move(self, source: int, target: int) -> None:
        """Let slot `target` hold what slot `source` holds."""

    def truncate(self, slot: int, length: int) -> None:
        """Keep the first `length` entries of a slot."""

    def reserve(self, *, slots: int = 0) -> None:
        """Grow to at least that many slots."""


class Seats:
    """Who sits in which slot of a cache."""

    def __init__(self, cache: Slots) -> None:
        self.cache = cache
        self.requests: list[RequestContext] = []

    def update(self, context: Context) -> None:
        """Let requests that left stand up (the last one takes their seat), and seat new ones in empty slots."""
        for slot in reversed(range(len(self.requests))):
            if self.requests[slot] not in context.requests:
                last = len(self.requests) - 1
                self.cache.move(last, slot)
                self.requests[slot] = self.requests[last]
                self.requests.pop()
                self.cache.truncate(last, 0)
        for request in context.requests:
            if request not in self.requests:
                self.requests.append(request)
                self.cache.reserve(slots=len(self.requests))

    def order(self, context: Context) -> list[int]:
        """The seat of each request of the context."""
        seat = {id(request): slot for slot, request in enumerate(self.requests)}
        return [seat[id(request)] for request in context.requests]
