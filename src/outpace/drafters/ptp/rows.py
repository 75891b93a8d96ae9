"""Partial quadratic decoding as functions of tensors: which slots to add to a pass, where they stand, what they say.

A round verifies a draft and prepares the next one in one pass. Where the walk will end is not known yet, so the slots
come in groups, one behind each node at which it may end ("branch"; 0 is the root, v + 1 node v). There is a budget of
rows, spent where it is expected to bring most.

Everything here is a function from tensors to tensors whose shapes do not depend on values, without a loop over
requests and without waiting for the device, so that it can be captured. Source: Draxler et al. 2025; here H(b) is the
expected number of right drafts among b slots, E[min(C, b)], which makes greedy allocation exact.

B requests, n draft nodes, R = n + 1 main rows, S slots, M slots of the longest group, V token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.ptp.modes import Mode

WIDTH: Final = 0.02  # half the neighbourhood of a number in which a drafter's law may misplace an edge


def worth(survival: Sequence[float], silent: int) -> list[float]:
    """What each further slot of a group brings, in expected right drafts, made non-increasing: M numbers.

    survival[d]: chance that drafts 0 .. d are all right. The first `silent` slots of a group bring nothing by
    themselves and are needed for the others; runs of slots that pay only together are given their mean (the concave
    envelope of H), so that taking the best first never opens a group for less than it is worth.
    """
    runs: list[tuple[float, int]] = []
    for value in [*([0.0] * silent), *survival]:
        total, count = value, 1
        while runs and runs[-1][0] / runs[-1][1] < total / count:
            before, length = runs.pop()
            total, count = total + before, count + length
        runs.append((total, count))
    return [total / count for total, count in runs for _ in range(count)]


def lineage(parents: Tensor) -> Tensor:
    """[B, R, R] bool: for each main row, itself and its ancestors. parents: [B, n], -1 for the root."""
    batch, nodes = parents.shape
    step = torch.eye(nodes + 1, device=parents.device).repeat(batch, 1, 1)
    step[:, 1:].scatter_(2, (parents + 1)[..., None], 1.0)
    reach, length = step, 1
    while length < nodes:  # a path of n steps is found by squaring: log n small products
        reach, length = ((reach @ reach) > 0).to(step.dtype), 2 * length
    return reach > 0


def walk_ends(confidence: Tensor, parents: Tensor, ancestors: Tensor) -> Tensor:
    """[B, R] chance that the walk ends at each main row.

    confidence: [B, n], chance that a node is accepted once its parent has been; siblings exclude each other. 0 for
    padding.
    """
    log = torch.nn.functional.pad(confidence.clamp(1e-6, 1).log(), (1, 0))
    reached = torch.exp((ancestors.to(log.dtype) @ log[..., None])[..., 0])
    reached[:, 1:] *= confidence > 0
    passed = torch.zeros_like(reached).scatter_add_(1, parents + 1, reached[:, 1:])
    return (reached - passed).clamp_min(0)


def allocate(ends: Tensor, worths: Tensor, budget: int) -> tuple[Tensor, Tensor, Tensor]:
    """Spend a budget of slots where they bring most: (branch, slot, gain), each [B, S], S = min(budget, R * M).

    ends: [B, R]; worths: [M], non-increasing. Slots of a group are taken in order; gain is their expected number of
    right drafts, best first.
    """
    gains = (ends[..., None] * worths).flatten(1)
    gain, index = torch.sort(gains, descending=True, stable=True)
    count = worths.shape[0]
    taken = index[:, :budget]
    return taken // count, taken % count, gain[:, :budget]


def scout_rows(
    position: Tensor, ancestors: Tensor, branch: Tensor, slot: Tensor, used: Tensor, mode: Mode
) -> tuple[Tensor, Tensor, Tensor]:
    """Where slots stand: (positions [B, S], index of the number each carries [B, S], sees [B, S, R + S]).

    position: [B], the root's; branch, slot, used: [B, S]. A slot sees the main rows up to its branch and its group up
    to itself; one that is not used sees itself.
    """
    start = position[:, None] + ancestors.sum(-1).gather(1, branch)  # of the window: one behind the branch
    sees_main = ancestors.gather(1, branch[..., None].expand(-1, -1, ancestors.shape[2])) & used[..., None]
    same = (branch[:, :, None] == branch[:, None, :]) & (slot[:, None, :] <= slot[:, :, None])
    itself = torch.eye(slot.shape[1], dtype=torch.bool, device=slot.device)
    sees_scouts = (same & used[:, :, None] & used[:, None, :]) | itself
    return start + slot + mode.lead - 1, start + slot, torch.cat([sees_main, sees_scouts], 2)


def group_rows(branch: Tensor, slot: Tensor, used: Tensor, end: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The rows of the group behind the row where the walk ended: (rows [B, M], present [B, M] bool).

    end: [B], index of that main row.
    """
    wanted = torch.arange(longest, device=slot.device)
    found = (slot[:, None] == wanted[:, None]) & ((branch == end[:, None]) & used)[:, None]
    return found.to(torch.int8).argmax(-1), found.any(-1)


def draw_scored(law: Tensor, u: Tensor, width: float = WIDTH) -> tuple[Tensor, Tensor]:
    """The draw from each law [..., V] with u [...] float64, and how safe it is: (tokens [...], scores [...] float64).

    Scores are `safety`'s.
    """
    edges = torch.cumsum(law, -1, dtype=torch.float64)
    edges = edges / edges[..., -1:]
    drawn = torch.searchsorted(edges, u[..., None], right=True).clamp_max_(law.shape[-1] - 1)
    right = edges.gather(-1, drawn)
    left = torch.where(drawn > 0, edges.gather(-1, (drawn - 1).clamp_min(0)), 0.0)
    return drawn[..., 0], safety(left[..., 0], right[..., 0], u, width)


def safety(left: Tensor, right: Tensor, u: Tensor, width: float = WIDTH) -> Tensor:
    """Share of the neighbourhood u - width .. u + width of a number that lies in its token's interval, [...] float64.

    The law is not exact, and a number near an edge may fall on the other side of it.
    """
    low, high = (u - width).clamp_min(0), (u + width).clamp_max(1)
    return (right.minimum(high) - left.maximum(low)).clamp_min(0) / (high - low)


def read_out(logits: Tensor, u: Tensor | None, count: int = 1, width: float = WIDTH) -> tuple[Tensor, Tensor]:
    """Guesses of slots, best first: (tokens [..., count], scores [..., count] in [0, 1]).

    logits: [..., V], with the positions' Gumbel noise added where that decides; u: None to take the likeliest tokens,
    their probability being the score, or [...] float64, the numbers of the predicted positions, to draw
    (`draw_scored`): the drawn token first, then its neighbours by score.
    """
    law = torch.softmax(logits.float(), -1)
    if u is None:
        scores, tokens = law.topk(count, -1)
        return tokens, scores
    drawn, score = draw_scored(law, u, width)
    if count == 1:
        return drawn[..., None], score[..., None].float()
    edges = torch.cumsum(law, -1, dtype=torch.float64)
    edges = edges / edges[..., -1:]
    low, high = (u - width).clamp_min(0)[..., None], (u + width).clamp_max(1)[..., None]
    shares = torch.diff(edges.clamp(low, high), dim=-1, prepend=low) / (high - low)
    scores, tokens = shares.scatter(-1, drawn[..., None], 2.0).topk(count, -1)
    return tokens, torch.cat([score[..., None], scores[..., 1:]], -1).float()
