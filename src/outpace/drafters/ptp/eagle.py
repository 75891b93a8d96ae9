"""EAGLE-3's network as the sampler: it reads verified text and the token just drawn, and slots tell it what they see.

The chain of `ptp.sampler` knows one state and one token. EAGLE-3's network (`eagle.nets.FusedNet`) attends to all
verified features besides, and is trained at every place of a text. What it cannot do is run all layers of the target
over tokens that are not there yet, and that is what slots have done by the time it is asked:

    y_k = net(token i + k, y_(k-1), its own cache),   y_k <- y_k + f(slot_k, y_k),   law_k = head(y_k)

y_k gives the law of token i + k + 1, and so does slot k (`Mode.lead` is 1). f is zero at the start, so that a network
taken from a trained EAGLE-3 drafts as that one does; where a walk ends behind a row without slots, nothing is added.
Numbers decide what is drawn from these laws, and trees grow by what they make likely (`growth`).

Sources: Li et al. 2025, "EAGLE-3" (the network, training-time test); Samragh et al. 2025, "Your LLM Knows the Future"
(a sampler behind mask tokens); that the two go together is ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from outpace.drafters.eagle import Eagle3
from outpace.drafters.growth import Plan, born, kept
from outpace.drafters.layers import RMSNorm
from outpace.drafters.ptp.paths import Paths, tree_paths
from outpace.drafters.ptp.sampler import Gated
from outpace.laws import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import Context, RequestContext
    from outpace.drafters.eagle import FusedNet
    from outpace.drafters.growth import Hear
    from outpace.drafters.ptp.windows import Windows
    from outpace.laws import Walk
    from outpace.target import Readout, Target


class SlotJoin(Gated):
    """What a slot adds to the network's output of the same depth.

    Args:
        hidden: H. inner: units of the gated layer between. eps: of the norms.
    """

    def __init__(self, hidden: int, inner: int, eps: float) -> None:
        super().__init__(2 * hidden, inner, hidden)
        self.slot_norm, self.row_norm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def forward(self, slot: Tensor, row: Tensor) -> Tensor:
        """slot, row: [..., H], of the same token -> [..., H], in the row's dtype, products too."""
        return row + self.gated(torch.cat([self.slot_norm(slot.to(row.dtype)), self.row_norm(row)], -1))


def hear_windows(join: SlotJoin, windows: Windows, hidden: Tensor) -> Hear:
    """What rows of a batch become at step k of the unrolled network, where windows of slots begin behind them.

    hidden: [B, W * N, H], of slots. The row in front of a window's first token reads that token, and looks ahead from
    there: its step k and slot k predict the same one.
    """
    slots = hidden.view(*windows.starts.shape, windows.slots, -1)

    def hear(y: Tensor, step: int) -> Tensor:
        flat, row = y.flatten(0, 1), windows.fronts(y.shape[1]).flatten()
        here = flat.index_select(0, row)
        joined = torch.where(windows.real.flatten()[:, None], join(slots[:, :, step].flatten(0, 1), here), here)
        return flat.index_copy(0, row, joined.to(flat.dtype)).view_as(y)

    return hear


class EagleSampler:
    """Decoding: an EAGLE-3 drafter around the network, which hears slots where there are some.

    Args:
        net, join: the weights. target: what they belong to. plan: of its trees. greedy: take likeliest tokens at every
            temperature.
    """

    def __init__(self, net: FusedNet, join: SlotJoin, target: Target, plan: Plan, *, greedy: bool) -> None:
        self.net, self.join, self.target, self.plan = net, join, target, plan
        self.follower = Eagle3(
            draft_len=plan.depth, branches=plan.branches, nodes=plan.nodes, draw="greedy" if greedy else "path"
        )
        self.follower.module = net
        self.follower.ready(target)
        self.follower.target = target

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Read the prompt."""
        self.follower.start(context, request, taps)

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Owe each request the rows of its accepted path."""
        self.follower.observe(context, walks, read)

    def paths(self, context: Context, heard: Mapping[RequestContext, Tensor | None]) -> dict[RequestContext, Paths]:
        """Next drafts: {tokens of a root-to-node path: chance that its last is accepted once the others are}.

        heard: [n, H], states of the slots behind a request's last walk, as many as there were, in order.
        """
        follower, plan = self.follower, self.plan
        width = follower.catch_up(context)
        seated, cache = follower.seats.requests, follower.cache
        hear = self._hear([heard.get(request) for request in seated])
        grown = born(self.net, self.target.embed, cache, plan, len(seated), width, follower.draws(seated), hear)
        tokens, parents, values = (part.tolist() for part in kept(*grown, plan.width))
        return {
            request: _paths(tokens[seat], parents[seat], values[seat]) if cache.lengths[seat] else {}
            for seat, request in enumerate(seated)
        }

    def _hear(self, states: Sequence[Tensor | None]) -> Hear | None:
        """Slots of the seats, where one has any."""
        found = [state for state in states if state is not None and len(state)]
        if not found:
            return None
        deepest = max(len(state) for state in found)
        slots = found[0].new_zeros(len(states), deepest, found[0].shape[-1])
        there = torch.zeros(len(states), deepest, dtype=torch.bool)
        for seat, state in enumerate(states):
            if state is not None:
                slots[seat, : len(state)] = state
                there[seat, : len(state)] = True
        there = there.to(slots.device)

        def hear(y: Tensor, depth: int) -> Tensor:
            if depth > deepest:
                return y
            joined = self.join(slots[:, depth - 1, None].expand(-1, y.shape[1], -1), y)
            return torch.where(there[:, depth - 1, None, None], joined, y)

        return hear


def _paths(tokens: list[int], parents: list[int], values: list[float]) -> Paths:
    """Nodes as paths; values: sums of log probabilities along them."""
    above = [values[parent] if parent >= 0 else 0.0 for parent in parents]
    paths = tree_paths(Tree(tokens, parents))
    return {path: math.exp(min(0.0, value - up)) for path, value, up in zip(paths, values, above, strict=True)}
