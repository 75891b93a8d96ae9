"""The draft-model drafter: one more target, decoded ahead."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.ahead import DrawMode, chain_of, check_draw, kind_of, pick
from outpace.drafters.base import Context, Drafter, Needs, RequestContext
from outpace.drafters.draft_model.vocabulary import VocabularyMap
from outpace.drafters.seats import Seats
from outpace.errors import ConfigError
from outpace.laws import Draft
from outpace.target import Block, Target

if TYPE_CHECKING:
    from torch import Tensor


class DraftModel(Drafter):
    """Draft a chain with a second model.

    Args:
        model: a loaded `Target`, or the name or path of one.
        draft_len: tokens per draft.
        draw: "path" proposes the token the drafter's own law gives at the path's number (a better guess than its most
            likely one at temperature > 0, the same at 0); "greedy" its most likely token; "own" a draw with a number
            of its own, which is what the rejection rules verify.
        stop_below: end the draft after a token the drafter gives less than this probability (the token itself stays).

    The cache holds what the drafter has read. Before each draft it is cut to the longest prefix that is still true and
    fed the rest, so nothing has to be undone after a rejection, and a fully accepted draft leaves no hole.
    """

    name: ClassVar[str] = "draft_model"

    def __init__(
        self,
        *,
        model: Target | str | os.PathLike[str],
        draft_len: int = 5,
        draw: DrawMode = "path",
        stop_below: float = 0.0,
    ) -> None:
        if draft_len < 1:
            raise ConfigError(f"draft_len must be at least 1, got {draft_len}")
        check_draw(draw)
        self.draft_len = draft_len
        self.draw: DrawMode = draw
        self.stop_below = stop_below
        self.kind = kind_of(draw)
        self.needs = Needs(noise=draw == "path")
        self._source = model
        self._read: WeakKeyDictionary[RequestContext, list[int]] = WeakKeyDictionary()

    def fit(self, target: Target) -> None:
        """Load the model, if it was named, and match vocabularies."""
        if isinstance(self._source, Target):
            self.model = self._source
        else:
            self.model = Target.from_pretrained(self._source, dtype=target.dtype, device=target.device)
        self.vocabulary = VocabularyMap(target, self.model)
        self.cache = self.model.new_cache()
        self._seats = Seats(self.cache)

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Read the prompt alone, so that a long one does not pad a whole batch."""
        self._seats.update(context)
        prompt = self.vocabulary.to_drafter(request.tokens[:-1])
        self.model.prefill(prompt, self.cache, slot=self._seats.requests.index(request))
        self._read[request] = prompt

    def propose(self, context: Context) -> Draft:
        """Read what is new, then decode ahead."""
        self._seats.update(context)
        requests = self._seats.requests
        depths = [min(self.draft_len, r.depth_limit) if r.speculate else 0 for r in requests]
        chains: list[list[int]] = [[] for _ in requests]
        laws: list[list[Tensor]] = [[] for _ in requests]
        live = [depth > 0 for depth in depths]
        logits = self._catch_up() if any(live) else None
        while logits is not None:
            for b, request in enumerate(requests):
                if not live[b]:
                    continue
                row = self.vocabulary.law_for_target(logits[b], context.target.vocabulary)
                token, q = pick(self.draw, row, request, [*request.tokens, *chains[b]])
                chains[b].append(token)
                if q is not None:
                    laws[b].append(q)
                sure = self.stop_below <= 0 or float(torch.softmax(row.float(), 0)[token]) >= self.stop_below
                live[b] = sure and len(chains[b]) < depths[b]
            logits = self._step(chains) if any(live) else None
        trees = [chain_of(chain, law) for chain, law in zip(chains, laws, strict=True)]
        return Draft.of([trees[seat] for seat in self._seats.order(context)])

    def _catch_up(self) -> Tensor:
        """Cut each cache to what is still true, read the rest, return the logits behind each root: [B, V']."""
        feeds: list[list[int]] = []
        for seat, request in enumerate(self._seats.requests):
            wanted = self.vocabulary.to_drafter(request.tokens)
            same = _common_prefix(self._read[request], wanted[:-1])
            self.cache.truncate(seat, same)
            feeds.append(wanted[same:])
            self._read[request] = wanted
        return self._read_in(feeds)

    def _step(self, chains: list[list[int]]) -> Tensor:
        """Read the last token of every draft; one that has ended reads it again, and `_catch_up` will cut it off."""
        feeds = []
        for request, chain in zip(self._seats.requests, chains, strict=True):
            feeds.append(self.vocabulary.to_drafter([request.root, *chain])[-1:])
            self._read[request] = [*self._read[request], *feeds[-1]]
        return self._read_in(feeds)

    def _read_in(self, feeds: list[list[int]]) -> Tensor:
        block = Block.chain(feeds, self.cache.lengths[: len(feeds)], self.model.device)
        logits = self.model.run(block, self.cache).logits
        assert logits is not None  # asked for
        self.cache.commit([range(len(feed)) for feed in feeds])
        last = torch.tensor([len(feed) - 1 for feed in feeds], device=logits.device)
        return logits[torch.arange(len(feeds), device=logits.device), last]


def _common_prefix(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size
    return next(i for i in range(size) if one[i] != other[i])
