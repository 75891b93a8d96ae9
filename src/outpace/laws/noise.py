"""Counter-based noise: one number for each (seed, request, position), whoever asks, whenever, in whatever batch.

Knows no tensors of a model and keeps no state: a number is a pure function of its key. The generator is
Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), written once so that it runs
on Python integers (a single number costs microseconds), on uint64 arrays of numpy and on int64 tensors of any device (a
whole grid at once), with the same values.
"""

from __future__ import annotations

import ctypes
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import torch

from outpace import compiler
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_M0: Final = 0xD2511F53
_M1: Final = 0xCD9E8D57
_W0: Final = 0x9E3779B9
_W1: Final = 0xBB67AE85
_MASK: Final = 0xFFFFFFFF

_SOURCE: Final = Path(__file__).with_name("noise.c")
MAX_INDEX: Final = 1 << 8
MAX_ROUND: Final = 1 << 20
MAX_VOCABULARY: Final = 1 << 28

Word = TypeVar("Word", int, "Tensor", "np.ndarray[Any, np.dtype[np.uint64]]")


class Stream(IntEnum):
    """What a number is for. Under the rejection rules every purpose has numbers of its own.

    `PATH` is the one stream a drafter may read: it decides the token of a position, and a draft cannot change it.
    """

    PATH = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    GUMBEL = 4


def _multiply(constant: int, word: Word) -> tuple[Word, Word]:
    """High and low 32 bits of a 32 x 32 bit product; by halves for tensors, so that int64 never overflows."""
    if not isinstance(word, torch.Tensor):
        product = constant * word
        return product >> 32, product & _MASK  # type: ignore[return-value]  # numpy keeps uint64
    low = constant * (word & 0xFFFF)
    high = constant * (word >> 16)
    carry = high + (low >> 16)
    return (carry >> 16) & _MASK, ((carry << 16) | (low & 0xFFFF)) & _MASK


def philox(counter: tuple[Word, Word, Word, Word], key: tuple[Any, Any]) -> tuple[Word, Word, Word, Word]:
    """Philox-4x32 with ten rounds: four 32-bit words in, four out.

    Words are integers, or int64 tensors or uint64 arrays whose shapes broadcast; the key's are integers, or tensors
    where the counter's are.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


class Noise:
    """The random numbers of a run.

    Args:
        seed: any integer in [0, 2^64).

    Raises:
        ConfigError: if the seed is outside that range.
    """

    def __init__(self, seed: int) -> None:
        if not 0 <= seed < 1 << 64:
            raise ConfigError(f"seed must be an integer from 0 to 2^64 - 1, got {seed}; pass e.g. seed=7")
        self.seed = seed
        self._key = (seed & _MASK, seed >> 32)

    def __repr__(self) -> str:
        return f"Noise(seed={self.seed})"

    def uniform(
        self, request: int, position: int, stream: Stream = Stream.PATH, *, round_index: int = 0, index: int = 0
    ) -> float:
        """One number in [0, 1) with 53 random bits.

        Args:
            request: identity of the request, 0 <= request < 2^64.
            position: absolute position of the token the number is for (prompt included), 0 <= position < 2^32.
            stream: what the number is for.
            round_index: round of the request, for the streams that are drawn anew each round.
            index: distinguishes several numbers of one purpose at one position (sibling number), below 256.
        """
        if not 0 <= index < MAX_INDEX:
            raise ConfigError(f"index must be in [0, {MAX_INDEX}), got {index}: a node may have at most 256 children")
        tail = (stream << 28) | (index << 20) | (round_index % MAX_ROUND)
        x0, x1, _, _ = philox((position, request & _MASK, request >> 32, tail), self._key)
        return ((x0 >> 5) * 67108864 + (x1 >> 6)) / 9007199254740992.0

    def grid(self, request: Tensor, position: Tensor) -> Tensor:
        """The path numbers of many (request, position) pairs at once: float64, on the tensors' own device.

        request, position: int64, broadcastable shapes. Equal to `uniform(request, position)` entry by entry.
        """
        pair = torch.broadcast_tensors(position.long(), request.long())  # type: ignore[no-untyped-call]
        position, request = pair
        high = (request >> 32) & _MASK
        x0, x1, _, _ = philox((position & _MASK, request & _MASK, high, torch.zeros_like(high)), self._key)
        return ((x0 >> 5) * 67108864 + (x1 >> 6)).double() / 9007199254740992.0

    def gumbel(self, request: int, position: int, vocabulary: int, device: torch.device | None = None) -> Tensor:
        """Standard Gumbel noise for every token id of one position: [vocabulary] float32, from 32 bits each.

        Four ids share a Philox evaluation: id i takes word i % 4 of the counter (position, request, i // 4). A shorter
        vocabulary has the first of the same values.
        """
        if vocabulary > MAX_VOCABULARY:
            raise ConfigError(f"gumbel noise addresses at most {MAX_VOCABULARY} token ids, got {vocabulary}")
        count, tail = -(-vocabulary // 4), Stream.GUMBEL << 28
        if device is None or device.type == "cpu":
            fixed = (position, request & _MASK, request >> 32)
            return gumbel_of(_words(fixed, tail, self._key, count)[:vocabulary])
        seed, identity, at = torch.tensor([signed(self.seed), signed(request), position], device=device)[:, None]
        return gumbel_grid(seed, identity, at, vocabulary)[0]


def _words(fixed: tuple[int, int, int], tail: int, key: tuple[int, int], count: int) -> Tensor:
    """Philox words of counters (*fixed, tail | i), i < count: [4 * count] float32, compiled or by numpy."""
    if compiler.why_not(_SOURCE) is None:
        out = torch.empty(4 * count)
        word = ctypes.c_uint32
        function = compiler.load(_SOURCE).outpace_words
        function(*map(word, (*fixed, tail, *key)), ctypes.c_void_p(out.data_ptr()), ctypes.c_int64(count))
        return out
    counters = np.arange(count, dtype=np.uint64) | np.uint64(tail)
    position, low, high = (np.full_like(counters, one) for one in fixed)
    words = philox((position, low, high, counters), key)
    return torch.from_numpy(np.stack(words, -1).ravel().astype(np.float32))


def gumbel_grid(seeds: Tensor, requests: Tensor, positions: Tensor, vocabulary: int) -> Tensor:
    """`Noise.gumbel` of n positions at once, on the tensors' device: [n, vocabulary] float32.

    seeds, requests: [n] int64, bit patterns of the 64-bit numbers; positions: [n] int64. A device that is slow to start
    a kernel takes about as long for many positions as for one.
    """
    counters = torch.arange(-(-vocabulary // 4), device=positions.device) | Stream.GUMBEL << 28
    at, low, high = positions[:, None], requests[:, None] & _MASK, (requests[:, None] >> 32) & _MASK
    key = (seeds[:, None] & _MASK, (seeds[:, None] >> 32) & _MASK)
    words = torch.stack(philox((at, low, high, counters[None]), key), -1)
    return gumbel_of(words.flatten(1)[:, :vocabulary].float())


def signed(word: int) -> int:
    """The same 64 bits as int64 has them."""
    return word - (1 << 64) if word >= 1 << 63 else word


def gumbel_of(words: Tensor) -> Tensor:
    """Standard Gumbel noise from 32-bit words as float32: -log(-log(1 - w)), w = (word + 1/2) / 2^32.

    Small words give the large values, which decide, and float32 keeps those apart.
    """
    w = ((words + 0.5) * 2.0**-32).clamp_max(1 - 2.0**-24)
    return -torch.log(-torch.log1p(-w))
