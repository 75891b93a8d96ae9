"""The lookahead drafter: scouts carry the window, the pool makes the draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.base import Context, Needs, RequestContext, TokenDrafter
from outpace.drafters.lookahead.window import NgramPool, Window
from outpace.errors import ConfigError
from outpace.laws import Draft, Tree, Walk
from outpace.target import Scouts

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Readout


class Lookahead(TokenDrafter):
    """Draft n-grams harvested from Jacobi iterates of the target itself.

    Args:
        window: columns worked on in parallel (W). ngram: length of n-grams, key included (N). guesses: n-grams kept
            per key and tried per round (G). A round costs about (W + G) (N - 1) rows.
        seed_text: also learn the n-grams of the prompt and of the emitted text.
    """

    name: ClassVar[str] = "lookahead"
    needs = Needs(scouts=True)

    def __init__(self, *, window: int = 5, ngram: int = 4, guesses: int = 5, seed_text: bool = True) -> None:
        if window < 2 or ngram < 2 or guesses < 1:
            raise ConfigError(f"need window >= 2, ngram >= 2, guesses >= 1; got {window}, {ngram}, {guesses}")
        self.window = window
        self.ngram = ngram
        self.guesses = guesses
        self.seed_text = seed_text
        self._windows: WeakKeyDictionary[RequestContext, Window] = WeakKeyDictionary()
        self._pools: WeakKeyDictionary[RequestContext, NgramPool] = WeakKeyDictionary()
        self._sent: list[int] = []

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """A window of prompt tokens and a pool of the prompt's n-grams."""
        prompt = request.tokens[: request.prompt_length]
        self._windows[request] = Window(
            request.root, self.window, self.ngram - 1, lambda number: prompt[number * 7919 % len(prompt)]
        )
        pool = self._pools[request] = NgramPool(self.guesses)
        if self.seed_text:
            pool.add_text(prompt, self.ngram)

    def guess(self, request: RequestContext) -> Tree:
        """The pool's n-grams behind the root, merged."""
        return Tree.merge(self._pools[request].get(request.root), self.guesses * (self.ngram - 1))

    def scouts(self, context: Context, draft: Draft) -> Scouts | None:
        """The window of every request that speculates."""
        windows = [self._windows[r] if r.speculate else None for r in context.requests]
        self._sent = [len(w.cells()) if w is not None else 0 for w in windows]
        size = max(self._sent)
        if size == 0 or any(r.scout_limit is not None and size > r.scout_limit for r in context.requests):
            self._sent = [0] * len(windows)
            return None
        main = draft.width + 1
        tokens = torch.zeros(len(windows), size, dtype=torch.int64)
        positions = torch.tensor([[r.position] * size for r in context.requests])
        sees = torch.zeros(len(windows), size, main + size, dtype=torch.bool)
        for b, window in enumerate(windows):
            sees[b, :, main:] = torch.eye(size, dtype=torch.bool)  # a padding row sees itself
            if window is None:
                continue
            cells = window.cells()
            tokens[b, : len(cells)] = torch.tensor([window.rows[r][c] for r, c in cells])
            positions[b, : len(cells)] += torch.tensor([r + c for r, c in cells])
            seen = window.visibility()
            sees[b, : len(cells), 0] = seen[:, 0]
            sees[b, : len(cells), main : main + len(cells)] = seen[:, 1:]
        device = context.target.device
        return Scouts(positions.to(device), sees.to(device), tokens=tokens.to(device))

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Harvest n-grams, move the windows."""
        for b, (request, walk) in enumerate(zip(context.requests, walks, strict=True)):
            window, pool = self._windows[request], self._pools[request]
            if read.scout_logits is not None and self._sent[b]:
                newest = self._newest(window, read, b, request)
                for key, gram in window.grams(newest):
                    pool.add(key, gram)
                window.advance(newest, walk.tokens)
            else:
                window.rows[0][0] = walk.tokens[-1]
            if self.seed_text:
                text = [*request.tokens[-(self.ngram - 1) :], *walk.tokens]
                pool.add_text(text, self.ngram)

    def _newest(self, window: Window, read: Readout, b: int, request: RequestContext) -> list[int]:
        """Most likely token after each cell of the window's last row; a run of eos would spoil it, so none enters."""
        assert read.scout_logits is not None  # checked by the caller
        assert read.logits is not None  # rounds always read them
        last = read.scout_logits[b, self._sent[b] - window.width + (len(window.rows) == 1) : self._sent[b]]
        tokens: list[int] = last.argmax(-1).tolist()
        if len(window.rows) == 1:
            tokens = [int(read.logits[b, 0].argmax()), *tokens]
        ends = set(request.sampler.eos)
        prompt = request.tokens[: request.prompt_length]
        return [prompt[(i + len(request.tokens)) % len(prompt)] if t in ends else t for i, t in enumerate(tokens)]
