"""The suffix drafter: two tries, one score."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from outpace.drafters.base import Context, RequestContext, TokenDrafter
from outpace.drafters.suffix.trie import SuffixTrie
from outpace.errors import ConfigError
from outpace.laws import Tree

if TYPE_CHECKING:
    from torch import Tensor


class Suffix(TokenDrafter):
    """Draft the continuation with the best expected number of accepted tokens, over all matching suffixes.

    Args:
        draft_len: most nodes of a draft.
        max_depth: longest sequence counted, match and continuation together.
        factor, offset: a match of m tokens earns a draft of at most m * factor + offset tokens.
        min_probability: continuations less likely than this (product of counts) are not drafted.
        history: also learn from the outputs of earlier requests. Off by default: drafts then depend on what others
            asked, which shows in timings (never in text). `forget()` drops them.
        max_tokens: most tokens of a request kept, oldest forgotten first (about 4 kB each at depth 16).
        max_history: the same for the history, oldest requests forgotten first.
    """

    name: ClassVar[str] = "suffix"

    def __init__(
        self,
        *,
        draft_len: int = 16,
        max_depth: int = 16,
        factor: float = 2.0,
        offset: float = 0.0,
        min_probability: float = 0.3,
        history: bool = False,
        max_tokens: int = 16_384,
        max_history: int = 200_000,
    ) -> None:
        if draft_len < 1 or max_depth < 2:
            raise ConfigError(f"need draft_len >= 1 and max_depth >= 2, got {draft_len} and {max_depth}")
        if not 0 < min_probability <= 1:
            raise ConfigError(f"min_probability must be in (0, 1], got {min_probability}")
        self.draft_len = draft_len
        self.max_depth = max_depth
        self.factor = factor
        self.offset = offset
        self.min_probability = min_probability
        self.max_tokens = max_tokens
        self.history = SuffixTrie(max_depth, max_history) if history else None
        self._local: WeakKeyDictionary[RequestContext, SuffixTrie] = WeakKeyDictionary()
        self._seen: WeakKeyDictionary[RequestContext, int] = WeakKeyDictionary()
        self._serial: WeakKeyDictionary[RequestContext, int] = WeakKeyDictionary()
        self._next_serial = 0

    def forget(self) -> None:
        """Drop the outputs of all earlier requests."""
        if self.history is not None:
            self.history.clear()

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """A trie for the request."""
        self._local[request] = SuffixTrie(self.max_depth, self.max_tokens)
        self._seen[request] = 0
        self._serial[request] = self._next_serial
        self._next_serial += 1

    def guess(self, request: RequestContext) -> Tree:
        """The best-scored continuation over both tries and all match lengths."""
        local, seen = self._local[request], self._seen[request]
        fresh = request.tokens[seen:]
        local.extend(0, fresh)
        if self.history is not None:
            output = request.tokens[max(seen, request.prompt_length) :]
            if output:
                self.history.extend(self._serial[request], output)
        self._seen[request] = len(request.tokens)

        limit = min(self.draft_len, request.depth_limit)
        best: tuple[float, list[tuple[int, int]]] = (0.0, [])
        for trie in (local, self.history):
            if trie is None or limit < 1:
                continue
            for match in range(1, self.max_depth):
                node = trie.find(request.tokens[-match:]) if match <= len(request.tokens) else None
                if node is None or not node.children:
                    break
                budget = min(limit, int(match * self.factor + self.offset))
                found = trie.expand(node, budget, self.min_probability)
                if found[0] > best[0] or (found[0] == best[0] and trie is local):
                    best = found
        return Tree([token for token, _ in best[1]], [parent for _, parent in best[1]]).depth_first()
