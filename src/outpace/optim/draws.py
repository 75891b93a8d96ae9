"""Draws keyed by (seed, parameter, step, element): the same on every device, shard and chunk size.

A slot is the place of an element in its whole parameter, rows padded to groups of 32. Neighbouring slots share one
32-bit hash and take different bits of it: exactly as many as can matter to the rounding they decide. Slots 2^33 apart
in one parameter share their draw, which nothing compares.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
SCALES: Final = 0x2545F491  # sets the stream for scales apart from that for residuals
MIX1: Final = 0x7FEB352D
MIX2: Final = 0x846CA68B - (1 << 32)  # the same 32 bits as a signed integer


def parameter_key(seed: int, parameter: int) -> int:
    """A signed 32-bit key for one parameter. Source: the finaliser of SplitMix64, applied once per word."""
    return _split_mix(seed, parameter)


def step_key(step: int) -> int:
    """A signed 32-bit key for one step."""
    return _split_mix(step)


def draw_key(parameter: int, step: int) -> int:
    """The key of one parameter (`parameter_key`) in one step (`step_key`), as the kernel forms it from the two."""
    x = (parameter ^ step) & _MASK32
    x = ((x ^ (x >> 16)) * MIX1) & _MASK32
    return _signed(((x ^ (x >> 15)) * MIX2) & _MASK32)


def _split_mix(*words: int) -> int:
    state = 0
    for word in words:
        state = (state + (word & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return _signed(state >> 32)


def _signed(key: int) -> int:
    return key - (1 << 32) if key >> 31 else key


def scale_draws(first: int, count: int, key: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Two draws in 0..65535 for each of `count` groups from `first` on, for its two scales; int32 [count]."""
    x = _hashes(first, first + count, key ^ SCALES, device)
    return x & 0xFFFF, (x >> 16) & 0xFFFF


def uniforms(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """One draw in [0, 1) for each of `count` slots from `first` on, a multiple of 2^-16, as float32 [count].

    Sixteen bits are all that can matter to a position inside half a unit: an fp32 weight lies on a grid of 2^-15 or
    2^-16 of half a bf16 step.
    """
    return _shared(first, count, key, device, 2).to(torch.float32).mul_(2.0**-16)


def byte_draws(first: int, count: int, key: int, device: torch.device | str = "cpu") -> Tensor:
    """One draw in 0..255 for each of `count` slots from `first` on, int32 [count].

    Eight bits are all that can matter where the last eight bits of a float32 pattern are rounded away.
    """
    return _shared(first, count, key, device, 4)


def _shared(first: int, count: int, key: int, device: torch.device | str, shares: int) -> Tensor:
    """32 / shares bits for every slot, cut from hashes that `shares` neighbours have in common."""
    x = _hashes(first // shares, (first + count + shares - 1) // shares, key, device)
    width = 32 // shares
    parts = (x[:, None] >> torch.arange(0, 32, width, dtype=torch.int32, device=device)) & ((1 << width) - 1)
    return parts.view(-1)[first % shares : first % shares + count]


def _hashes(start: int, stop: int, key: int, device: torch.device | str) -> Tensor:
    """A bijection of 32 bits without visible order; int32 arithmetic wraps, as the kernel's does."""
    x = torch.arange(start, stop, device=device).to(torch.int32) + key
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX1
    return (x ^ ((x >> 15) & 0x1FFFF)) * MIX2
