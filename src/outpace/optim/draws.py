"""Uniform draws keyed by (seed, parameter, step, element): the same on every device, shard and chunk size."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MASK64: Final = (1 << 64) - 1
SCALES: Final = 0x2545F491  # sets the stream for scales apart from that for residuals
MIX1: Final = 0x7FEB352D
MIX2: Final = 0x846CA68B - (1 << 32)  # the same 32 bits as a signed integer


def draw_key(seed: int, parameter: int, step: int) -> int:
    """A signed 32-bit key for one parameter in one step.

    Source: the finaliser of SplitMix64, applied once per word.
    """
    state = 0
    for word in (seed, parameter, step):
        state = (state + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    key = state >> 32
    return key - (1 << 32) if key >> 31 else key


def scale_draws(first: int, count: int, key: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two draws in 0..65535 for each of `count` groups from `first` on, for its two scales; int32 [count]."""
    x = _mixed(torch.arange(first, first + count, device=device).to(torch.int32) + (key ^ SCALES))
    return x & 0xFFFF, (x >> 16) & 0xFFFF


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits without visible order; int32 arithmetic wraps, as the kernel's does."""
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX1
    return (x ^ ((x >> 15) & 0x1FFFF)) * MIX2


def uniforms(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """One draw in [0, 1) for each of `count` slots from `first` on, a multiple of 2^-16, as float32 [count].

    A slot is the place of an element in its whole parameter, rows padded to groups of 32.
    Sixteen bits are all that can matter: an fp32 weight lies on a grid of 2^-15 or 2^-16 of half a bf16 step, so
    rounding up happens with exactly the wanted probability. Two neighbours therefore share one 32-bit hash.
    Slots 2^33 apart in one parameter share their draw, which nothing compares.
    """
    start, stop = first // 2, (first + count + 1) // 2
    x = _mixed(torch.arange(start, stop, device=device).to(torch.int32) + key)
    halves = torch.stack((x & 0xFFFF, (x >> 16) & 0xFFFF), dim=-1).view(-1)
    return halves[first % 2 : first % 2 + count].to(torch.float32).mul_(2.0**-16)
