"""Drafters whose acceptance is known beforehand: the two ceilings of a report, and the closed forms of tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from outpace.drafters import RequestContext, TokenDrafter
from outpace.laws import Tree


class Scripted(TokenDrafter):
    """Draft the text plain decoding is known to say, wrong from a chosen place on.

    Args:
        right: for the k-th draft of a request, how many of its leading tokens are right: right[k % len(right)].
        draft_len: tokens of a draft.

    Nothing is drafted for a prompt whose text `learn` was not told.
    """

    name: ClassVar[str] = "scripted"

    def __init__(self, right: Sequence[int], draft_len: int) -> None:
        self.right = tuple(right)
        self.draft_len = draft_len
        self._texts: dict[tuple[int, ...], tuple[int, ...]] = {}

    def learn(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """The text plain decoding emits behind a prompt."""
        self._texts[tuple(prompt)] = tuple(text)

    def guess(self, request: RequestContext) -> Tree:
        """The next tokens of the text."""
        text = self._texts.get(tuple(request.tokens[: request.prompt_length]), ())
        at = len(request.tokens) - request.prompt_length
        coming = list(text[at : at + self.draft_len])
        right = min(self.right[request.round_index % len(self.right)], len(coming))
        wrong = [token - 1 if token else 1 for token in coming[right:]]
        return Tree.chain(coming[:right] + wrong)
