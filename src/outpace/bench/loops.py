"""Does a text go round in circles? A speedup on a loop is a speedup on nothing anybody wants to read.

Two signs, either of which counts: the answer ends in at least three repetitions of the same stretch of tokens, that
end being at least 24 tokens long; or half of the answer's 8-grams had occurred in the answer before.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

REPEATS: Final = 3
SHORTEST: Final = 24  # tokens
GRAM: Final = 8
SHARE: Final = 0.5
LEAST_FOR_SHARE: Final = 64  # tokens below which the share says little


def loops(tokens: Sequence[Hashable]) -> str | None:
    """What repeats, in words, or None."""
    end = _periodic_end(tokens)
    if end is not None:
        return f"the last {end[1]} tokens repeat a stretch of {end[0]}"
    share = _repeated_share(tokens)
    if len(tokens) >= LEAST_FOR_SHARE and share >= SHARE:
        return f"{share:.0%} of its {GRAM}-grams occurred in it before"
    return None


def _periodic_end(tokens: Sequence[Hashable]) -> tuple[int, int] | None:
    """(period, length) of an end that repeats a stretch often enough, the shortest such stretch; None without one.

    The Z function of the reversed text: z[p] counts how far the end agrees with itself p tokens earlier (linear time).
    """
    text = tokens[::-1]
    n = len(text)
    z = [0] * n
    left = right = 0
    for i in range(1, n):
        if i < right:
            z[i] = min(right - i, z[i - left])
        while i + z[i] < n and text[z[i]] == text[i + z[i]]:
            z[i] += 1
        if i + z[i] > right:
            left, right = i, i + z[i]
        length = z[i] + i
        if length >= max(SHORTEST, REPEATS * i):
            return i, length
    return None


def _repeated_share(tokens: Sequence[Hashable]) -> float:
    grams = [tuple(tokens[i : i + GRAM]) for i in range(len(tokens) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
