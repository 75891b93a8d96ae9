"""How far to trust a guess: counts of what was right, kept with the weights, and the two curves read from them.

Knows scores and outcomes only. Counts are exponentially forgotten, so that they follow training, and decoding where
asked to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from outpace.laws import Settings, warp

if TYPE_CHECKING:
    from torch import Tensor

BINS: Final = 32
GREEDY_NUMBER: Final = 0.5  # any token likelier than one half has it in its interval
_PRIOR: Final = 4.0  # guesses that the initial belief is worth


class Calibration(nn.Module):
    """Counts of right guesses by score, and by depth; buffers, so that they are saved with the weights.

    Args:
        depths: longest draft.

    Buffers:
        guessed, right: [BINS], by score. reached, passed: [depths]: drafts that were right up to a depth, and of those
        the ones right there too.
    """

    guessed: Tensor
    right: Tensor
    reached: Tensor
    passed: Tensor

    def __init__(self, depths: int) -> None:
        super().__init__()
        for name, size in (("guessed", BINS), ("right", BINS), ("reached", depths), ("passed", depths)):
            self.register_buffer(name, torch.zeros(size))

    @torch.no_grad()
    def count(self, scores: Tensor | None, right: Tensor, tried: Tensor, *, keep: float = 0.98) -> None:
        """Add windows of guesses: each [n, depths]; a window ends where it was not tried. Does not wait for the device.

        scores: float in [0, 1], or None where guesses have none: then only how far they reach is counted. right, tried:
        bool. keep: what is left of the older counts.
        """
        alive = torch.cumprod((right & tried).to(torch.float32), 1)
        before = torch.cat([torch.ones_like(alive[:, :1]), alive[:, :-1]], 1) * tried
        if scores is not None:
            index = (scores * BINS).long().clamp(0, BINS - 1).flatten()
            for buffer, weights in ((self.guessed, before), (self.right, alive)):
                buffer.mul_(keep).scatter_add_(0, index, weights.flatten().to(buffer.dtype))
        self.reached.mul_(keep).add_(before.sum(0))
        self.passed.mul_(keep).add_(alive.sum(0))

    def trust(self) -> list[float]:
        """Chance to be right in each bin of scores, given that all before was: never falling as the score rises.

        Without counts, the score itself. Isotonic regression by pooling adjacent violators.
        """
        guessed, right = self.guessed.tolist(), self.right.tolist()
        pools: list[tuple[float, float, int]] = []
        for i, (n, k) in enumerate(zip(guessed, right, strict=True)):
            hits, total, count = k + _PRIOR * (i + 0.5) / BINS, n + _PRIOR, 1
            while pools and pools[-1][0] / pools[-1][1] > hits / total:
                more, size, length = pools.pop()
                hits, total, count = hits + more, total + size, count + length
            pools.append((hits, total, count))
        return [hits / total for hits, total, count in pools for _ in range(count)]

    def survival(self) -> list[float]:
        """Chance that drafts 0 .. d are all right, for each depth d."""
        chance, result = 1.0, []
        for n, k in zip(self.reached.tolist(), self.passed.tolist(), strict=True):
            chance *= (k + _PRIOR / 2) / (n + _PRIOR)
            result.append(chance)
        return result


TEMPERATURES: Final = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0, 1.2, 1.5)


class Agreement(nn.Module):
    """How often one number decides the same token under the preset and at another temperature; buffers, as above.

    That share bounds what a drafter trained under one preset can get right, per token, under another one.
    """

    same: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("same", torch.zeros(len(TEMPERATURES)))
        self.register_buffer("seen", torch.zeros(()))

    @torch.no_grad()
    def count(self, logits: Tensor, preset: Settings) -> None:
        """Add the target's logits [n, V] at some tokens (a few hundred say enough). Does not wait for the device."""
        mine = _edges(warp(logits, preset, wait=False))
        self.seen.add_(logits.shape[0])
        for i, temperature in enumerate(TEMPERATURES):
            if temperature == 0:
                middle = mine.new_full((logits.shape[0], 1), GREEDY_NUMBER)
                drawn = torch.searchsorted(mine[:, 1:].contiguous(), middle, right=True)[:, 0]
                self.same[i] += (drawn == logits.argmax(-1)).sum()
                continue
            other = _edges(warp(logits, Settings(temperature=temperature), wait=False))
            common = torch.minimum(mine[:, 1:], other[:, 1:]) - torch.maximum(mine[:, :-1], other[:, :-1])
            self.same[i] += common.clamp_min(0).sum()

    def share(self, temperature: float) -> float | None:
        """The share at a temperature, interpolated; None if nothing was counted."""
        seen = float(self.seen)
        if not seen:
            return None
        shares: list[float] = [value / seen for value in self.same.tolist()]
        above = next((i for i, t in enumerate(TEMPERATURES) if t >= temperature), len(TEMPERATURES) - 1)
        below = max(0, above - 1)
        low, high = TEMPERATURES[below], TEMPERATURES[above]
        weight = 0.0 if low == high else min(1.0, (temperature - low) / (high - low))
        return shares[below] * (1 - weight) + shares[above] * weight


def _edges(law: Tensor) -> Tensor:
    edges = torch.cumsum(law, -1, dtype=torch.float64)
    return torch.nn.functional.pad(edges / edges[:, -1:], (1, 0))
