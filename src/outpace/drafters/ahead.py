"""Pieces shared by drafters that decode ahead one token after the other: picking a token, packing the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from outpace.errors import ConfigError
from outpace.laws import DraftKind, Key, NoiseDice, Stream, Tree

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.base import RequestContext

DrawMode = Literal["path", "greedy", "own"]


def check_draw(draw: str) -> None:
    """Refuse unknown modes.

    Raises:
        ConfigError: naming the known ones.
    """
    if draw not in get_args(DrawMode):
        raise ConfigError(f"draw must be one of {', '.join(get_args(DrawMode))}, got {draw!r}")


def kind_of(draw: DrawMode) -> DraftKind:
    """Only a token drawn with a number of its own is a sample of the drafter's law."""
    return "iid" if draw == "own" else "deterministic"


def pick(mode: DrawMode, logits: Tensor, request: RequestContext, history: list[int]) -> tuple[int, Tensor | None]:
    """One draft token from a drafter's logits [V]: (token, the law it was drawn from, where it was drawn).

    "path": its law at the path's own number. "greedy": its most likely token. "own": its law at a number of its own.
    """
    if mode == "greedy" or request.sampler.greedy:
        return int(torch.argmax(request.sampler.scores(logits, history, custom=False))), None
    q = request.sampler.draft_law(logits, history)
    if mode == "path":
        return request.sampler.dice.draw(q, Key(Stream.PATH, len(history))), None
    return request.sampler.dice.draw(q, Key(Stream.DRAFT, len(history), 0, request.round_index)), q


def chain_of(tokens: list[int], laws: list[Tensor]) -> Tree:
    """The chain of picked tokens, with the laws they were drawn from if they were drawn."""
    if not laws:
        return Tree.chain(tokens)
    return Tree.chain(tokens, kind="iid", laws=torch.stack([*laws, torch.zeros_like(laws[0])]))


def numbers_ahead(request: RequestContext, count: int) -> list[float] | None:
    """The path's numbers of the next `count` positions, or None where they decide nothing (greedy, Gumbel noise)."""
    dice = request.sampler.dice
    if request.sampler.greedy or not isinstance(dice, NoiseDice) or dice.kind != "uniform":
        return None
    start = len(request.tokens)
    return [dice.uniform(Key(Stream.PATH, start + ahead)) for ahead in range(count)]
