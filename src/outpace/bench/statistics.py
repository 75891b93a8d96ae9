"""Paired ratios, geometric means, bootstrap intervals. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Claim = Literal["faster", "slower", "no difference shown"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A ratio with its 95 % interval over prompts.

    Attributes:
        ratio: geometric mean over prompts. low, high: None with fewer than three prompts.
        prompts: how many.
    """

    ratio: float
    low: float | None
    high: float | None
    prompts: int

    @property
    def claim(self) -> Claim:
        """A difference is claimed only where the interval excludes 1."""
        if self.low is not None and self.low > 1:
            return "faster"
        if self.high is not None and self.high < 1:
            return "slower"
        return "no difference shown"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {**asdict(self), "claim": self.claim}


def geometric_mean(values: Sequence[float]) -> float:
    """The exponential of the mean of logs; all values above 0."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def estimate(ratios: Sequence[float], *, seed: int, resamples: int) -> Estimate | None:
    """Geometric mean of one ratio per prompt, with the percentile bootstrap over prompts; None without any.

    Source: Efron and Tibshirani 1993, chapter 13, on logs.
    """
    if not ratios:
        return None
    mean = geometric_mean(ratios)
    if len(ratios) < 3:
        return Estimate(mean, None, None, len(ratios))
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    generator = np.random.default_rng(seed)
    means = logs[generator.integers(0, len(logs), (resamples, len(logs)))].mean(1)
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return Estimate(mean, float(low), float(high), len(ratios))


def paired_ratios(base: Mapping[tuple[str, int], float], other: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """One ratio base / other per prompt: the median over the repetitions both sides have.

    Keys are (prompt, repetition), values milliseconds per token.
    """
    by_prompt: dict[str, list[float]] = {}
    for key, value in other.items():
        if key in base and value > 0 and base[key] > 0:
            by_prompt.setdefault(key[0], []).append(base[key] / value)
    return {prompt: median(values) for prompt, values in by_prompt.items()}


def median(values: Sequence[float]) -> float:
    """The middle value; of two middle ones, their geometric mean where both are positive (ratios)."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    low, high = ordered[middle - 1], ordered[middle]
    return math.sqrt(low * high) if low > 0 else (low + high) / 2


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median and 95th percentile, or None without values."""
    if not values:
        return None
    p50, p95 = np.percentile(np.asarray(values, dtype=np.float64), [50, 95])
    return {"p50": float(p50), "p95": float(p95)}
