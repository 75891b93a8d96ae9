"""How a random number enters a transformer: from u in [0, 1) to features, from features to the size of an embedding.

A raw scalar is a poor input (Draxler et al. 2025, table of encodings); digits, or a few anchors to interpolate, let the
first layer see where u lies. Features are computed in float64, wherever they are used afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from outpace.errors import ConfigError, suggestion

if TYPE_CHECKING:
    from torch import Tensor


def check_numbers(u: Tensor) -> None:
    """Refuse what is no random number of a path (looks at values, so it waits for a device).

    Raises:
        ConfigError: naming the first number outside [0, 1).
    """
    bad = ~((u >= 0) & (u < 1))
    if bool(bad.any()):
        raise ConfigError(
            f"a path's number must be in [0, 1), got {float(u[bad][0])}; take numbers from Noise.grid or "
            "infer_numbers, in float64 (float32 and bfloat16 round some of them up to 1)"
        )


def digits(u: Tensor, count: int) -> Tensor:
    """The first `count` binary digits of u as -1 and 1: [...] -> [..., count]; exact for count up to 53."""
    scaled = (u.double() * 2.0**count).long()  # a power of two: no rounding
    shifts = torch.arange(count - 1, -1, -1, device=u.device)
    return (((scaled[..., None] >> shifts) & 1) * 2 - 1).double()


def float_digits(u: Tensor, count: int) -> Tensor:
    """The bits of u's IEEE single-precision pattern, sign first, as 0 and 1 (the paper's own choice; count is 32)."""
    pattern = u.double().clamp(max=1 - 2.0**-24).float().view(torch.int32).long()
    shifts = torch.arange(count - 1, -1, -1, device=u.device)
    return ((pattern[..., None] >> shifts) & 1).double()


def anchors(u: Tensor, count: int) -> Tensor:
    """Weights of linear interpolation between `count` anchors at equal distances over [0, 1]."""
    at = u.double()[..., None] * (count - 1)
    return (1 - (at - torch.arange(count, device=u.device)).abs()).clamp_min(0)


def cosines(u: Tensor, count: int) -> Tensor:
    """cos(n pi u) for n = 1 .. count."""
    return torch.cos(math.pi * u.double()[..., None] * torch.arange(1, count + 1, device=u.device))


def sawtooth(u: Tensor, count: int) -> Tensor:
    """(n u mod 1) for n = 1 .. count, centred."""
    return (u.double()[..., None] * torch.arange(1, count + 1, device=u.device)) % 1 - 0.5


def bins(u: Tensor, count: int) -> Tensor:
    """Which of `count` equal bins u lies in, one-hot: numbers of one bin look alike."""
    return torch.nn.functional.one_hot((u.double() * count).long(), count).double()


@dataclass(frozen=True, slots=True)
class Encoding:
    """Features of a number, and how many of them by default."""

    features: Callable[[Tensor, int], Tensor]
    count: int
    spread: float  # standard deviation of one feature over uniform u: initial weights are divided by it


ENCODINGS: Final[dict[str, Encoding]] = {
    "digits": Encoding(digits, 16, 1.0),
    "anchors": Encoding(anchors, 17, 0.22),
    "float": Encoding(float_digits, 32, 0.4),
    "cosine": Encoding(cosines, 32, 0.7),
    "sawtooth": Encoding(sawtooth, 32, 0.3),
    "bins": Encoding(bins, 32, 0.2),
}


def find_encoding(name: str) -> Encoding:
    """The encoding of that name.

    Raises:
        ConfigError: on an unknown name.
    """
    if name not in ENCODINGS:
        raise ConfigError(f"unknown encoding {name!r} of random numbers; {suggestion(name, ENCODINGS)}")
    return ENCODINGS[name]


class NumberEmbedding(nn.Module):
    """e(u) = W features(u) + b, at the size and scale of token embeddings.

    Args:
        size: hidden size.
        encoding: name in `ENCODINGS`, or None for the constant embedding of a mask token.
        like: token embeddings [V, size], to start in their midst: mean plus directions of their spread. None: of unit
            variance.
    """

    def __init__(self, size: int, encoding: str | None, like: Tensor | None = None) -> None:
        super().__init__()
        self.encoding = None if encoding is None else find_encoding(encoding)
        mean, spread = torch.zeros(size), 1.0
        if like is not None:
            like = like.detach().float()
            mean, spread = like.mean(0).cpu(), float(like.std(0).mean())
        if self.encoding is None:
            self.bias = nn.Parameter(mean + spread * torch.randn(size))
            return
        count = self.encoding.count
        self.bias = nn.Parameter(mean)
        self.weight = nn.Parameter(torch.randn(size, count) * spread / self.encoding.spread / math.sqrt(count))

    def forward(self, u: Tensor) -> Tensor:
        """[...] float64 in [0, 1) -> [..., size], computed in float32 whatever the weights' dtype.

        Raises:
            ConfigError: on a number outside [0, 1) (on CPU, where looking costs nothing).
        """
        if u.device.type == "cpu":
            check_numbers(u)
        if self.encoding is None:
            return self.bias.float().expand(*u.shape, -1)
        features = self.encoding.features(u, self.encoding.count).float()
        return features @ self.weight.float().T + self.bias.float()
