"""The two questions a rule may put to chance: draw a token, accept a token.

Rules never see a random number. They ask a `Dice`; in production it answers from counter-based noise, in the
certificate it answers with every possible outcome in turn (`laws.certificate`), so that the code which is proved
is the code which runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Protocol, get_args

import torch

from outpace.errors import LawError
from outpace.laws.noise import Noise, Stream, gumbel_grid, signed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NoiseKind = Literal["gumbel", "uniform"]
NOISES: Final[tuple[NoiseKind, ...]] = get_args(NoiseKind)
KEPT_RACES: Final = 16  # positions whose Gumbel noise a request keeps at hand
_FORESEEN: Final = 1 << 24  # numbers made at once: half a gigabyte of words on their way


class Key(NamedTuple):
    """Names one random number of a request: same key, same number."""

    stream: Stream
    position: int
    order: int = 0
    round_index: int = 0


class Dice(Protocol):
    """Answers a rule's questions."""

    def draw(self, weights: Tensor, key: Key) -> int:
        """A token id drawn in proportion to `weights` [V] (non-negative, not all zero)."""

    def accept(self, p: float, q: float, key: Key) -> bool:
        """True with probability min(1, p / q)."""


def draw(weights: Tensor, u: float) -> int:
    """Inverse CDF over token ids: the first id whose cumulated weight exceeds u times the total.

    weights: [V], non-negative, any float dtype; they need not sum to one. The sum runs in float64, so a law over
    200k ids loses nothing. Never returns an id of zero weight, for any u in [0, 1).

    Raises:
        LawError: if the weights have no mass or are not finite.
    """
    cumulated = torch.cumsum(weights, 0, dtype=torch.float64)
    total = float(cumulated[-1])
    if not 0.0 < total < float("inf"):
        raise LawError(
            f"cannot draw a token: the weights of {weights.shape[0]} ids sum to {total}; "
            "a logits processor may have forbidden every token, or the model produced NaN"
        )
    index = int(torch.searchsorted(cumulated, u * total, right=True))
    if index >= weights.shape[0]:
        index = int(torch.nonzero(weights)[-1])
    return index


def race(weights: Tensor, noise: Tensor) -> int:
    """Gumbel-max: the id with the largest log weight + noise, the lowest one on ties; drawn in proportion to weights.

    weights: [V], as for `draw`; noise: [V] float32, standard Gumbel. Never returns an id of zero weight.

    Raises:
        LawError: if the weights have no mass or are not finite.
    """
    scores = torch.log(weights.float()) + noise
    best = int(torch.argmax(scores))
    if not float("-inf") < float(scores[best]) < float("inf"):
        raise LawError(
            f"cannot draw a token: the weights of {weights.shape[0]} ids are not finite, or all zero; "
            "a logits processor may have forbidden every token, or the model produced NaN"
        )
    return best


class NoiseDice:
    """Dice of one request, answering from `Noise`."""

    def __init__(self, noise: Noise, request: int, kind: NoiseKind = "gumbel") -> None:
        self.noise = noise
        self.request = request
        self.kind = kind
        self._races: dict[int, Tensor] = {}

    def uniform(self, key: Key) -> float:
        """The number behind a key, in [0, 1)."""
        return self.noise.uniform(self.request, key.position, key.stream, round_index=key.round_index, index=key.order)

    def gumbel(self, position: int, vocabulary: int, device: torch.device) -> Tensor:
        """`Noise.gumbel` of this request: [vocabulary] float32. Drafter and rule ask for the same; a few are kept."""
        found = self._races.get(position)
        if found is None or found.shape[0] < vocabulary or found.device != device:
            found = self.noise.gumbel(self.request, position, vocabulary, device)
            self._keep(position, found)
        return found[:vocabulary]

    @staticmethod
    def foresee(
        dice: Sequence[NoiseDice], positions: Sequence[Sequence[int]], vocabulary: int, device: torch.device
    ) -> None:
        """Make the Gumbel noise of several requests' positions at once, each to be asked for by `gumbel`.

        Worth it on a device that is slow to start a kernel; a CPU is quicker one by one. Of a request, no more
        positions than it keeps.
        """
        places = [sorted(set(some))[:KEPT_RACES] for some in positions]
        wanted = [(one, at) for one, some in zip(dice, places, strict=True) for at in some if at not in one._races]
        size = max(1, _FORESEEN // vocabulary)
        for start in range(0, len(wanted), size):
            piece = wanted[start : start + size]
            numbers = [[signed(one.noise.seed), signed(one.request), at] for one, at in piece]
            seeds, requests, places_of = torch.tensor(numbers, device=device).T
            noise = gumbel_grid(seeds, requests, places_of, vocabulary)
            for (one, at), row in zip(piece, noise, strict=True):
                one._keep(at, row.clone())  # or a row would keep those of all

    def _keep(self, position: int, noise: Tensor) -> None:
        self._races[position] = noise
        while len(self._races) > KEPT_RACES:
            del self._races[min(self._races)]

    def draw(self, weights: Tensor, key: Key) -> int:
        """Inverse CDF at the key's number; with Gumbel noise (path stream only) the arg-max of log p + g."""
        if self.kind == "gumbel" and key.stream is Stream.PATH:
            return race(weights, self.gumbel(key.position, weights.shape[0], weights.device))
        return draw(weights, self.uniform(key))

    def accept(self, p: float, q: float, key: Key) -> bool:
        """U * q < p: always when p >= q, never when p is zero (no division, no u <= 0 case)."""
        return self.uniform(key) * q < p
