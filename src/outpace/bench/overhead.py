"""What keeping the books costs: the driving loop around an engine that does nothing."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch

from outpace.bench.methods import Clock, drive
from outpace.bench.trials import Job
from outpace.engine import Chunk, Output, Progress, Round, Stats, Timing
from outpace.laws import Settings

if TYPE_CHECKING:
    from outpace.engine import Engine

_STEPS = 2000


@dataclass
class _Target:
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    captured: None = None


@dataclass
class _Nothing:
    """An engine that emits a token a round at no cost."""

    timing: Timing = field(default_factory=Timing)
    target: _Target = field(default_factory=_Target)
    left: int = 0

    def submit(self, prompt: Any, settings: Settings) -> int:
        self.left = settings.max_new_tokens
        return 0

    def step(self) -> list[Progress]:
        self.left -= 1
        output = None if self.left else _OUTPUT
        return [Progress(0, Chunk("", _ROUND, output))]

    def cancel(self, uid: int) -> None:
        self.left = 0


_ROUND = Round((0,), 0, 0, 0)
_OUTPUT = Output("", (0,) * _STEPS, (0,), "length", (_ROUND,) * _STEPS, Stats(), "path")


def bookkeeping_us_per_round(clock: Clock = time.perf_counter) -> float:
    """Microseconds the driving loop spends on a round of one request, the engine's own work apart; best of three."""
    job = Job((0,), (), Settings(max_new_tokens=_STEPS))
    trials = [drive(cast("Engine", _Nothing()), [job], clock) for _ in range(3)]
    return min(1e3 * trial.total_ms / _STEPS for trial in trials)
