"""Slots in rounds that stay on the device: the tree of EAGLE-3's network hears those of the last pass.

    draft    the network's own device draft, whose outputs hear what `collect` kept
    place    slots of the pass to come, behind the nodes at which the walk may end
    collect  besides the network's rows, the states of the group behind the walk's end

The definition is `Ptp.propose`, `scouts` and `observe` on the host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from outpace.drafters.device import DeviceDraft, DraftKey
from outpace.drafters.device.fused import FusedDraft
from outpace.drafters.device.plan import rounded_product
from outpace.drafters.ptp.calibration import GREEDY_NUMBER
from outpace.drafters.ptp.placing import Placed, hear_group, normed_halves, place_slots
from outpace.target.fast.linear import Follow, Scaled, choose_tile, gated_linear, linear
from outpace.target.fast.plan import Projection, join_parameters
from outpace.target.fast.rows import norm_rows

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context, RequestContext
    from outpace.drafters.device.following import FollowingDraft
    from outpace.drafters.growth import Draws
    from outpace.drafters.ptp.drafter import Ptp
    from outpace.drafters.ptp.eagle import SlotJoin
    from outpace.target.fast.forward import Inputs

_LARGEST = 1 - 2.0**-24  # below one in float32


class _Heard(NamedTuple):
    """States of slots [B, M, H], and whether there is one [B, M] int32."""

    states: Tensor
    there: Tensor


@dataclass(frozen=True, slots=True)
class _Kept:
    """The static tensors of a batch: what the last round left, what the last draft heard, and slots in flight.

    Two of `_Heard`, because a round thrown away has overwritten the first. says: [B] int32, see `place_slots`.
    """

    left: _Heard
    read: _Heard
    placed: Placed
    says: Tensor


class _Ear:
    """How outputs of the network hear slots (`following.Ear`)."""

    def __init__(self, layer: SlotJoin, heard: _Heard, fused: _FusedJoin | None) -> None:
        self.layer, self.heard, self._fused = layer, heard, fused

    def __call__(self, y: Tensor, depth: int) -> Tensor:
        if depth > self.heard.there.shape[1]:
            return y
        slot, there = self.heard.states[:, depth - 1, None], self.heard.there[:, depth - 1, None, None]
        return torch.where(there != 0, self.layer(slot.expand(-1, y.shape[1], -1), y), y)

    def fused(self, y: Tensor, depth: int, gamma: Tensor | None) -> tuple[Tensor, Scaled | None]:
        """See `following.Ear`."""
        assert self._fused is not None  # there is one where the network is fused
        return self._fused(self.heard, y, depth, gamma)


class _FusedJoin:
    """`SlotJoin` by kernels: two products, their input normed in front of them."""

    def __init__(self, join: SlotJoin, *, pdl: bool) -> None:
        self.join, self.eps, self.pdl = join, join.row_norm.eps, pdl
        layer: Any = join  # whose layers have parameters
        self.gate_up = rounded_product(Projection(join_parameters([layer.gate_proj.weight, layer.up_proj.weight])))
        self.down = rounded_product(Projection(layer.down_proj.weight.detach()))

    def __call__(self, heard: _Heard, y: Tensor, depth: int, gamma: Tensor | None) -> tuple[Tensor, Scaled | None]:
        follow = None if gamma is None else Follow(gamma, 0.0)
        if depth > heard.there.shape[1]:
            if gamma is None:
                return y, None
            return y, norm_rows(y, None, torch.empty_like(y), eps=self.eps, shift=0.0, follow=gamma)
        join, pdl = self.join, self.pdl
        both = normed_halves(
            *heard, y, join.slot_norm.weight, join.row_norm.weight, depth, self.eps, pdl=pdl
        )  # fmt: skip
        tiles = (choose_tile(self.gate_up.weight, 2, rows=y.shape[0]), choose_tile(self.down.weight, rows=y.shape[0]))
        inner = gated_linear(both, self.gate_up, tile=tiles[0], gelu=False, pdl=pdl)
        return linear(inner, self.down, tile=tiles[1], residual=y, follow=follow, eps=self.eps, pdl=pdl)


class SlotDraft(DeviceDraft):
    """Drafts of `Ptp` behind EAGLE-3's network.

    Args:
        drafter: fitted. inner: how its network drafts. join: how it hears. budget: slots of a pass.
    """

    def __init__(self, drafter: Ptp, inner: FollowingDraft, join: SlotJoin, budget: int) -> None:
        self.drafter, self.inner, self.layer = drafter, inner, join
        self.depth, self.nodes, self.coupling, self.head = inner.depth, inner.nodes, inner.coupling, inner.head
        self.adapter = drafter.module.adapter
        self.worths = drafter.worths.to(drafter.target.device, torch.float32)
        longest = self.worths.shape[0]
        self.scouts = min(budget, longest * (self.nodes + 1))
        self.reads = self.depth + longest + 1 if drafter.shape.reads else 0
        self._fused = _FusedJoin(join, pdl=inner.pdl) if isinstance(inner, FusedDraft) else None
        self._kept: dict[int, _Kept] = {}
        self._values: tuple[Tensor, Tensor] | None = None
        self._batch = 0
        self._requests: list[RequestContext] = []
        self._consumed = False

    def holds(self) -> bool:
        """Whether the weights are where captured work reads them."""
        return self.inner.holds()

    def kept(self, batch: int) -> _Kept:
        """The static tensors of a batch."""
        if batch not in self._kept:
            target, longest = self.drafter.target, self.worths.shape[0]
            with torch.inference_mode(False):
                left, read = (
                    _Heard(
                        torch.zeros(batch, longest, target.hidden_size, dtype=target.dtype, device=target.device),
                        torch.zeros(batch, longest, dtype=torch.int32, device=target.device),
                    )
                    for _ in range(2)
                )
                words = torch.zeros(3, batch, self.scouts, dtype=torch.int32, device=target.device)
                says = torch.zeros(batch, dtype=torch.int32, device=target.device)
                self._kept[batch] = _Kept(left, read, Placed(*words.unbind()), says)
        return self._kept[batch]

    def join(self, context: Context, batch: int) -> None:
        """See `DeviceDraft`."""
        self.inner.join(context, batch)
        kept, requests = self.kept(batch), list(context.requests)
        there = torch.zeros(batch, kept.left.there.shape[1], dtype=torch.int32)
        says = torch.zeros(batch, dtype=torch.int32)
        for b, request in enumerate(requests):
            says[b] = self.drafter.slots_say_something(request.sampler)
            state = self.drafter.take_heard(request)
            if state is not None:
                kept.left.states[b, : len(state)] = state
                there[b, : len(state)] = 1
        kept.left.there.copy_(there, non_blocking=True)
        kept.says.copy_(says, non_blocking=True)
        self._batch, self._requests, self._consumed = batch, requests, False

    def reserve(self, ahead: int) -> DraftKey:
        """See `DeviceDraft`."""
        return self.inner.reserve(ahead)

    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """See `DeviceDraft`."""
        kept = self.kept(batch)
        if not warm:
            for ours, theirs in zip(kept.read, kept.left, strict=True):
                ours.copy_(theirs)
        ear = _Ear(self.layer, kept.read, self._fused)
        tokens, parents, values = self.inner.draft_hearing(key, batch, draws, ear, warm=warm)
        self._values = parents, values
        if self.drafter.least > 0:
            tokens = tokens.masked_fill(values.exp() <= self.drafter.least, -1)
        return tokens, parents

    def place(self, inputs: Inputs, rows: Tensor, heat: Tensor, numbers: Tensor | None) -> None:
        """See `DeviceDraft`."""
        kept, mode = self.kept(inputs.batch), self.drafter.shape
        assert self._values is not None  # of the draft just made
        assert inputs.embeds is not None  # there are scouts
        carried = place_slots(
            *self._values, rows, kept.says, self.worths, inputs, kept.placed, lead=mode.lead, least=self.drafter.least
        )
        u = torch.full(carried.shape, GREEDY_NUMBER, dtype=torch.float64, device=carried.device)
        if numbers is not None:
            found = numbers.clamp_max(_LARGEST).double().gather(1, carried.clamp(0, self.reads - 1))
            u = torch.where(heat[:, None] > 0, found, u)
        inputs.embeds.copy_(self.drafter.module.embed(u, heat))

    def collect(
        self, taps: Mapping[str, Tensor], path: Tensor, emitted: Tensor, counts: Tensor, *, warm: bool = False
    ) -> None:
        """See `DeviceDraft`."""
        self.inner.collect(taps, path, emitted, counts, warm=warm)
        kept = self.kept(path.shape[0])
        left = _Heard(*(t.clone() for t in kept.left)) if warm else kept.left
        hear_group(taps["post_norm"], path, counts, kept.placed, *left)

    def launched(self, ahead: int) -> None:
        """See `DeviceDraft`."""
        self.inner.launched(ahead)
        self._consumed = True

    def settle(self, emitted: Sequence[Sequence[int]], ahead: int) -> None:
        """See `DeviceDraft`."""
        self.inner.settle(emitted, ahead)
        self._consumed = ahead > 0

    def leave(self) -> None:
        """See `DeviceDraft`."""
        self.inner.leave()
        if self._requests:
            kept = self.kept(self._batch)
            heard = kept.read if self._consumed else kept.left
            states, counts = heard.states.clone(), heard.there.sum(1).tolist()
            for request, state, count in zip(self._requests, states, counts, strict=False):
                self.drafter.keep_heard(request, state[:count])
        self._requests = []
