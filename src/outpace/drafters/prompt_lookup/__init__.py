"""Prompt lookup: what followed these tokens last time will follow them again.

Source: prompt lookup decoding (A. Saxena, 2023). Ours indexes instead of scanning, prefers the most recent match, can
offer several continuations as a tree, adapts its length, and drafts nothing where nothing matches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from outpace.drafters.base import Context, RequestContext, TokenDrafter
from outpace.errors import ConfigError
from outpace.laws import Tree, Walk

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Readout


class NgramIndex:
    """End positions of every n-gram of a growing text, most recent last: O(lengths) work per token, none per draft."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes = tuple(sorted(sizes, reverse=True))
        self.text: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = defaultdict(list)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        for token in tokens:
            self.text.append(token)
            for size in self.sizes:
                if len(self.text) >= size:
                    self._ends[tuple(self.text[-size:])].append(len(self.text))

    def continuations(self, length: int, count: int) -> tuple[int, list[list[int]]]:
        """(n-gram size matched, up to `count` different continuations of at most `length` tokens, recent first).

        The longest n-gram that occurred before decides; (0, []) if none did.
        """
        for size in self.sizes:
            ends = self._ends.get(tuple(self.text[-size:])) if len(self.text) >= size else None
            if ends is None or len(ends) < 2:
                continue
            found: list[list[int]] = []
            for end in reversed(ends[:-1]):
                continuation = self.text[end : end + length]
                if continuation not in found:
                    found.append(continuation)
                if len(found) == count:
                    break
            return size, found
        return 0, []


class PromptLookup(TokenDrafter):
    """Draft what followed the most recent earlier occurrence of the last few tokens.

    Args:
        draft_len: most tokens along one path.
        max_ngram, min_ngram: sizes of n-grams to match, longest first.
        branches: different continuations merged into one tree.
        adapt: start short where the match is short, halve the length after a draft whose first token was refused,
            double it after one that was accepted whole.
    """

    name: ClassVar[str] = "prompt_lookup"

    def __init__(
        self, *, draft_len: int = 10, max_ngram: int = 4, min_ngram: int = 2, branches: int = 1, adapt: bool = True
    ) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ConfigError(f"need 1 <= min_ngram <= max_ngram, got {min_ngram} and {max_ngram}")
        if draft_len < 1 or branches < 1:
            raise ConfigError(f"draft_len and branches must be at least 1, got {draft_len} and {branches}")
        self.draft_len = draft_len
        self.branches = branches
        self.adapt = adapt
        self._sizes = range(min_ngram, max_ngram + 1)
        self._index: WeakKeyDictionary[RequestContext, NgramIndex] = WeakKeyDictionary()
        self._length: WeakKeyDictionary[RequestContext, int] = WeakKeyDictionary()
        self._offered: WeakKeyDictionary[RequestContext, int] = WeakKeyDictionary()

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Index the prompt."""
        self._index[request] = NgramIndex(self._sizes)
        self._length[request] = self.draft_len

    def guess(self, request: RequestContext) -> Tree:
        """The tree of recent continuations."""
        index = self._index[request]
        index.extend(request.tokens[len(index.text) :])
        length = min(self._length[request], request.depth_limit)
        size, paths = index.continuations(length, self.branches) if length else (0, [])
        if self.adapt and paths:
            trust = max(2, 3 * (size - 1))  # a two-token match is weak evidence, a four-token match is a copy
            paths = [path[:trust] for path in paths] if self._length[request] < self.draft_len else paths
        tree = Tree.merge(paths, self.draft_len * self.branches)
        self._offered[request] = max(tree.depths(), default=0)
        return tree

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Adapt the length."""
        if not self.adapt:
            return
        for request, walk in zip(context.requests, walks, strict=True):
            offered = self._offered.get(request, 0)
            if offered and not walk.nodes:
                self._length[request] = max(1, self._length[request] // 2)
            elif offered and len(walk.nodes) >= offered:
                self._length[request] = min(self.draft_len, self._length[request] * 2)
            self._offered[request] = 0
