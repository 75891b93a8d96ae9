"""How far a run is, by steps or by the clock, and the learning rate that follows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from outpace.drafters.learning import Recipe


def rate(recipe: Recipe, progress: float) -> float:
    """Learning rate at a share of the run: linear warm-up, then cosine, linear or constant.

    progress: 0..1, of the step about to be made.
    """
    if progress < recipe.warmup:
        return recipe.lr * progress / recipe.warmup
    done = min(1.0, (progress - recipe.warmup) / max(1e-9, 1 - recipe.warmup))
    low = recipe.final_lr
    shape = {
        "cosine": low + (1 - low) * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": low + (1 - low) * (1 - done),
        "constant": 1.0,
    }
    return recipe.lr * shape[recipe.schedule]


@dataclass(slots=True)
class Progress:
    """Share of a run that is done.

    By steps it is exact. By the clock the steps that are left are planned from the measured pace, now and then
    (`plan`), and each step covers an equal part of what is left: the schedule ends when the time does.

    Attributes:
        steps: of the run, 0 where the clock decides. seconds: of the run, 0 where steps decide.
        share: done, 0..1. left: steps planned for the rest.
    """

    steps: int = 0
    seconds: float = 0.0
    share: float = 0.0
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.left or (self.steps if not self.seconds else 1000)

    @property
    def over(self) -> bool:
        """Whether the run has ended."""
        return self.left <= 0

    def advance(self) -> None:
        """A step was made."""
        self.share += (1 - self.share) / max(self.left, 1)
        self.left -= 1

    def plan(self, elapsed: float, pace: float) -> None:
        """By the clock: `elapsed` seconds of the run are gone, and a step takes `pace` seconds."""
        if self.seconds:
            self.left = max(0, round((self.seconds - elapsed) / max(pace, 1e-9)))
