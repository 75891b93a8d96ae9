"""Run a random program once for every outcome of its dice.

The explorer is a `Dice`. Each number of chance is an interval [0, 1) that questions cut into pieces; a piece is
followed with probability equal to its share. A number asked about twice (a drafter that reads the path's number, and
the target's draw with the same one) stays consistent, because the second question only cuts what the first left.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from outpace.laws.dice import Key

if TYPE_CHECKING:
    from torch import Tensor

Outcome = TypeVar("Outcome")


class Explorer:
    """Dice that follow a script, then take the first open branch; the scripts of all others are queued."""

    def __init__(self) -> None:
        self._script: list[int] = []
        self._taken: list[int] = []
        self._open: list[list[int]] = []
        self._intervals: dict[Key, tuple[float, float]] = {}
        self.probability = 1.0

    def draw(self, weights: Tensor, key: Key) -> int:
        """Every token of positive mass, in turn."""
        cumulated = torch.cumsum(weights.double(), 0)
        bounds = [0.0, *(cumulated / cumulated[-1]).tolist()]
        bounds[-1] = 1.0
        return self._branch(key, bounds)

    def accept(self, p: float, q: float, key: Key) -> bool:
        """Both answers, where both are possible."""
        share = 1.0 if p >= q else p / q
        return self._branch(key, [0.0, share, 1.0]) == 0

    def _branch(self, key: Key, bounds: list[float]) -> int:
        low, high = self._intervals.get(key, (0.0, 1.0))
        pieces = []
        for option in range(len(bounds) - 1):
            start, end = max(low, bounds[option]), min(high, bounds[option + 1])
            if end > start:
                pieces.append((option, start, end))
        step = len(self._taken)
        if step < len(self._script):
            pick = self._script[step]
        else:
            pick = 0
            self._open.extend([*self._taken, other] for other in range(1, len(pieces)))
        self._taken.append(pick)
        option, start, end = pieces[pick]
        self.probability *= (end - start) / (high - low)
        self._intervals[key] = (start, end)
        return option

    def restart(self) -> bool:
        """Begin the next unexplored run; False when there is none left."""
        if not self._open:
            return False
        self._script = self._open.pop()
        self._taken = []
        self._intervals = {}
        self.probability = 1.0
        return True


def explore(program: Callable[[Explorer], Outcome]) -> list[tuple[float, Outcome]]:
    """All (probability, outcome) pairs of a program whose only randomness is the dice it is given."""
    dice = Explorer()
    results = [(0.0, program(dice))]
    results[0] = (dice.probability, results[0][1])
    while dice.restart():
        outcome = program(dice)
        results.append((dice.probability, outcome))
    return results
