"""A counted trie of the suffixes of growing texts: how often did these tokens follow those?

Knows token ids only. Depth and the number of stored tokens are bounded; what is oldest leaves first.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Hashable, Sequence
from itertools import islice


class Node:
    """Occurrences of one token sequence, and what followed it."""

    __slots__ = ("children", "count")

    def __init__(self) -> None:
        self.count = 0
        self.children: dict[int, Node] = {}


class _Text:
    """One sequence: its stored tokens and the trie nodes of its open suffixes (longest first)."""

    __slots__ = ("tails", "tokens")

    def __init__(self) -> None:
        self.tokens: deque[int] = deque()
        self.tails: deque[Node] = deque()


class SuffixTrie:
    """Counts of all token sequences up to `depth` in the texts added so far.

    Args:
        depth: longest sequence counted (context and continuation together).
        max_tokens: most tokens kept over all sequences. Beyond it the oldest sequences are forgotten, and of the last
            one left its oldest tokens. A token costs up to `depth` nodes of about 250 bytes.
    """

    def __init__(self, depth: int, max_tokens: int) -> None:
        self.depth = depth
        self.max_tokens = max_tokens
        self.root = Node()
        self.tokens = 0
        self._texts: dict[Hashable, _Text] = {}

    def extend(self, sequence: Hashable, tokens: Sequence[int]) -> None:
        """Append tokens to a sequence (created on first use): at most `depth` nodes touched per token."""
        text = self._texts.setdefault(sequence, _Text())
        for token in tokens:
            text.tokens.append(token)
            text.tails.append(self.root)
            grown: deque[Node] = deque()
            for node in text.tails:
                child = node.children.get(token)
                if child is None:
                    child = node.children[token] = Node()
                child.count += 1
                grown.append(child)
            if len(grown) >= self.depth:
                grown.popleft()
            text.tails = grown
        self.tokens += len(tokens)
        while self.tokens > self.max_tokens and len(self._texts) > 1:
            self.remove(next(key for key in self._texts if key != sequence))
        while self.tokens > self.max_tokens and len(text.tokens) > self.depth:
            self._forget_first(text)

    def remove(self, sequence: Hashable) -> None:
        """Forget a sequence: the trie is as if it had never been added."""
        text = self._texts.pop(sequence, None)
        while text is not None and text.tokens:
            self._forget_first(text)

    def clear(self) -> None:
        """Forget everything."""
        self.root = Node()
        self.tokens = 0
        self._texts.clear()

    def _forget_first(self, text: _Text) -> None:
        """Take the suffix that starts at the oldest token out of the counts."""
        node = self.root
        for token in islice(text.tokens, self.depth):
            child = node.children[token]
            child.count -= 1
            if child.count == 0:
                del node.children[token]
                break
            node = child
        text.tokens.popleft()
        self.tokens -= 1

    def find(self, tokens: Sequence[int]) -> Node | None:
        """The node of a token sequence, or None if it never occurred."""
        node: Node | None = self.root
        for token in tokens:
            node = node.children.get(token) if node is not None else None
        return node

    def expand(self, node: Node, budget: int, min_probability: float) -> tuple[float, list[tuple[int, int]]]:
        """The likeliest continuations of a node: (expected accepted tokens, [(token, index of parent or -1), ...]).

        Best first by the product of count(child) / count(parent); parents come before children. Continuations below
        `min_probability`, and what lies beyond `budget` nodes, are left out.
        """
        heap: list[tuple[float, int, int, int, Node]] = []
        order = 0

        def offer(parent: Node, parent_index: int, probability: float) -> None:
            nonlocal order
            for token, child in parent.children.items():
                likely = probability * child.count / parent.count
                if likely >= min_probability:
                    heapq.heappush(heap, (-likely, order, token, parent_index, child))
                    order += 1

        offer(node, -1, 1.0)
        score = 0.0
        taken: list[tuple[int, int]] = []
        while heap and len(taken) < budget:
            negative, _, token, parent_index, child = heapq.heappop(heap)
            score -= negative
            taken.append((token, parent_index))
            offer(child, len(taken) - 1, -negative)
        return score, taken
