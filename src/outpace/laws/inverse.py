"""The inverse of a draw: which random numbers give this token?

`draw` maps a law and a number to a token; every token owns an interval of numbers, as long as it is likely. A drafter
that learns from the numbers that decide tokens needs the way back: for a given text, numbers that would have produced
it. Source: Draxler et al. 2025, "Parallel Token Prediction for Language Models", section 3.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from outpace.errors import LawError

if TYPE_CHECKING:
    from torch import Tensor


def intervals(weights: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers for which `draw(weights, u)` is the token: left <= u < right, up to rounding of the edges.

    weights: [..., V], non-negative, any float dtype, rows need not sum to one; tokens: [...] int64.
    Returns (left, right), [...] float64 in [0, 1]; equal for a token without mass. Over all ids they tile [0, 1).
    """
    cumulated = torch.cumsum(weights, -1, dtype=torch.float64)
    total = cumulated[..., -1]
    return _below(cumulated, tokens) / total, _upto(cumulated, tokens) / total


def infer_numbers(weights: Tensor, tokens: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers that give these tokens: the point at `within` of each token's interval.

    With tokens drawn from the laws and `within` uniform, the numbers are uniform and independent of the past, as if the
    text had been drawn with them.

    weights, tokens: as in `intervals`; within: [...] float64 in [0, 1).
    Returns (u, valid): [...] float64 in [0, 1) and bool. Where `valid`, `draw(weights, u)` is the token: the very
    comparison `draw` makes has been made. It is False for tokens without mass, and for the rare one whose interval is
    too short to hold a number that survives rounding; u is 0.5 there.

    Raises:
        LawError: if `within` leaves [0, 1) (checked on CPU, where looking costs nothing).
    """
    if within.device.type == "cpu" and not bool(((within >= 0) & (within < 1)).all()):
        raise LawError(
            "a place within an interval must be in [0, 1); draw it with torch.rand(..., dtype=torch.float64)"
        )
    cumulated = torch.cumsum(weights, -1, dtype=torch.float64)
    return place_numbers(_below(cumulated, tokens), _upto(cumulated, tokens), cumulated[..., -1], within)


def place_numbers(low: Tensor, high: Tensor, total: Tensor, within: Tensor) -> tuple[Tensor, Tensor]:
    """The points at `within` of intervals low / total <= u < high / total: (u, valid), as in `infer_numbers`.

    low, high, total: [...] float64, mass below a token, up to and with it, and of all.
    """
    left, right = low / total, high / total
    u = (left + within.double() * (right - left)).clamp(max=1 - 2.0**-53)

    def gives_token(number: Tensor) -> Tensor:
        return (number * total >= low) & (number * total < high)

    middle = (left + right) / 2  # a point that rounding pushed over an edge is replaced by the farthest from both
    u = torch.where(gives_token(u), u, middle)
    valid = gives_token(u) & (u < 1)
    return torch.where(valid, u, torch.full_like(u, 0.5)), valid


def _upto(cumulated: Tensor, tokens: Tensor) -> Tensor:
    return cumulated.gather(-1, tokens[..., None])[..., 0]


def _below(cumulated: Tensor, tokens: Tensor) -> Tensor:
    before = cumulated.gather(-1, (tokens - 1).clamp_min(0)[..., None])[..., 0]
    return torch.where(tokens > 0, before, torch.zeros_like(before))
