"""Medusa in rounds that stay on the device: one state per request is all that passes from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from outpace.drafters.device import DeviceDraft, DraftKey

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context, RequestContext
    from outpace.drafters.growth import Draws
    from outpace.drafters.medusa.drafter import Medusa


class _States(NamedTuple):
    """Of a batch: the states [B, H] that the last round left, those the last draft has read, and whether there is one.

    Two, because a round thrown away has overwritten the first.
    """

    left: Tensor
    read: Tensor
    there: Tensor


class MedusaDraft(DeviceDraft):
    """Drafts of `Medusa`; it keeps the weights and, for the host, the states."""

    def __init__(self, drafter: Medusa) -> None:
        self.drafter = drafter
        self.depth, self.nodes = drafter.tree.depth, drafter.tree.width
        self.coupling, self.head = drafter.coupling if drafter.draw == "path" else None, drafter.module.head
        self._states: dict[int, _States] = {}
        self._batch = 0
        self._requests: list[RequestContext] = []
        self._there: list[bool] = []
        self._consumed = False

    def states(self, batch: int) -> _States:
        """The static tensors of a batch."""
        if batch not in self._states:
            target = self.drafter.target
            with torch.inference_mode(False):
                left = torch.zeros(batch, target.hidden_size, dtype=target.dtype, device=target.device)
                there = torch.zeros(batch, 1, dtype=torch.bool, device=target.device)
                self._states[batch] = _States(left, left.clone(), there)
        return self._states[batch]

    def join(self, context: Context, batch: int) -> None:
        """See `DeviceDraft`."""
        held = self.states(batch)
        found = self.drafter.states(context.requests)
        for b, state in enumerate(found):
            if state is not None:
                held.left[b] = state
        self._there = [state is not None for state in found]
        held.there.copy_(torch.tensor([*self._there, *([False] * (batch - len(found)))])[:, None], non_blocking=True)
        self._batch, self._requests, self._consumed = batch, list(context.requests), False

    def reserve(self, ahead: int) -> DraftKey:
        """Nothing grows."""
        del ahead
        return DraftKey(0, 0)

    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """See `DeviceDraft`."""
        del key
        held = self.states(batch)
        if not warm:
            held.read.copy_(held.left)
        tokens, parents = self.drafter.grow(held.read, draws)
        return tokens.masked_fill(~held.there, -1), parents

    def collect(
        self, taps: Mapping[str, Tensor], path: Tensor, emitted: Tensor, counts: Tensor, *, warm: bool = False
    ) -> None:
        """Keep the state of the last accepted row."""
        del emitted
        tap = taps["post_norm"]
        held = self.states(path.shape[0])
        if warm:
            held = _States(*(tensor.clone() for tensor in held))
        last = path.gather(1, (counts - 1).clamp_min(0)[:, None])[:, :, None]
        held.left.copy_(tap.gather(1, last.expand(-1, -1, tap.shape[2]))[:, 0])
        held.there.fill_(True)

    def launched(self, ahead: int) -> None:
        """See `DeviceDraft`."""
        del ahead
        self._consumed = True

    def settle(self, emitted: Sequence[Sequence[int]], ahead: int) -> None:
        """See `DeviceDraft`."""
        self._there = [True] * len(emitted)
        self._consumed = ahead > 0

    def leave(self) -> None:
        """See `DeviceDraft`."""
        if self._requests:
            held = self.states(self._batch)
            states = (held.read if self._consumed else held.left).clone()
            for request, state, there in zip(self._requests, states, self._there, strict=False):
                if there:
                    self.drafter.keep(request, state)
        self._requests = []
