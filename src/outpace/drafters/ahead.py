"""Pieces shared by drafters that decode ahead one token after the other: picking a token, packing the chain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch

from outpace.drafters.growth import Draws
from outpace.errors import ConfigError
from outpace.laws import DraftKind, Key, NoiseDice, NoiseKind, Sampler, Stream, Tree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from outpace.drafters.base import RequestContext
    from outpace.drafters.heads import DraftHead

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


def deciding_dice(sampler: Sampler, kind: NoiseKind) -> NoiseDice | None:
    """A request's dice where noise of this kind decides its tokens, or None."""
    dice = sampler.dice
    return dice if not sampler.greedy and isinstance(dice, NoiseDice) and dice.kind == kind else None


def numbers_ahead(request: RequestContext, count: int) -> list[float] | None:
    """The path's numbers of the next `count` positions, or None where they decide nothing (greedy, Gumbel noise)."""
    dice = deciding_dice(request.sampler, "uniform")
    if dice is None:
        return None
    start = len(request.tokens)
    return [dice.uniform(Key(Stream.PATH, start + ahead)) for ahead in range(count)]


def race_ahead(request: RequestContext, count: int, head: DraftHead) -> Tensor | None:
    """The Gumbel noise of the next `count` positions, [count, Vd] float32, or None where none decides."""
    dice = deciding_dice(request.sampler, "gumbel")
    if dice is None:
        return None
    start, ids = len(request.tokens), head.ids if head.reduced else None
    return race_at(dice, range(start, start + count), head.vocabulary, ids, head.weight.device)


def foresee_races(
    requests: Sequence[RequestContext], positions: Sequence[Sequence[int]], vocabulary: int, device: torch.device
) -> None:
    """Make the noise that `race_at` will be asked for, of all requests together, where that is quicker."""
    if device.type == "cpu":
        return
    dice = [deciding_dice(request.sampler, "gumbel") for request in requests]
    raced = [(one, places) for one, places in zip(dice, positions, strict=True) if one is not None]
    NoiseDice.foresee([one for one, _ in raced], [places for _, places in raced], vocabulary, device)


def race_at(
    dice: NoiseDice, positions: Sequence[int], vocabulary: int, ids: Tensor | None, device: torch.device
) -> Tensor:
    """Gumbel noise at positions, [n, Vd] float32; ids: [Vd] the ids it is for, None for the whole vocabulary."""
    noise = (dice.gumbel(position, vocabulary, device) for position in positions)
    return torch.stack([one if ids is None else one.index_select(0, ids) for one in noise])


def draws_ahead(requests: Sequence[RequestContext], count: int, head: DraftHead, coupling: float) -> Draws | None:
    """What decides the next `count` positions of each request, or None where all are greedy."""
    numbers = [numbers_ahead(request, count) for request in requests]
    ahead = [range(len(request.tokens), len(request.tokens) + count) for request in requests]
    foresee_races(requests, ahead, head.vocabulary, head.weight.device)
    races = [race_ahead(request, count, head) for request in requests]
    if not any(numbers) and all(race is None for race in races):
        return None
    device = head.weight.device
    heats = [request.sampler.settings.temperature for request in requests]
    nothing = next((torch.zeros_like(race) for race in races if race is not None), None)
    u = torch.tensor([n or [0.0] * count for n in numbers], device=device) if any(numbers) else None
    return Draws(
        torch.tensor(heats, device=device),
        None if nothing is None else torch.stack([nothing if race is None else race for race in races]),
        u,
        torch.tensor([heat if n else 0.0 for heat, n in zip(heats, numbers, strict=True)], device=device),
        coupling,
    )
