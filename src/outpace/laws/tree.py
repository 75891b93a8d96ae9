"""Drafts: trees of guessed tokens. A chain is a thin tree, an empty tree is plain decoding.

Knows nothing of who guessed. `Tree` is one request's draft on the host; `Draft` is a batch of them as padded tensors,
the shape in which drafters hand them over (specs: parents before children, -1 is the root).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from outpace.errors import DraftError

if TYPE_CHECKING:
    from torch import Tensor

DraftKind = Literal["deterministic", "iid", "without_replacement"]
"""How siblings came to be: chosen, drawn independently from one law, or drawn without replacement from one law.

A drafter that takes an arg-max or a top-k, retrieves, merges or prunes is deterministic, whatever softmax it computed.
"""


@dataclass(frozen=True, slots=True)
class Tree:
    """One request's draft.

    Attributes:
        tokens: n token ids, parents before children; siblings drawn from a law stand in draw order.
        parents: n indices of parent nodes, -1 for the root (the last committed token).
        kind: how siblings were produced.
        laws: for sampled drafts [n + 1, V]: row 0 is the law from which the root's children were really drawn, row
            j + 1 that of node j's children (rows of nodes without children are ignored). None for deterministic ones.
    """

    tokens: Sequence[int] = ()
    parents: Sequence[int] = ()
    kind: DraftKind = "deterministic"
    laws: Tensor | None = field(default=None, compare=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int], *, kind: DraftKind = "deterministic", laws: Tensor | None = None) -> Tree:
        """A draft in which each token follows the one before."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), kind, laws)

    @classmethod
    def merge(cls, paths: Iterable[Sequence[int]], budget: int) -> Tree:
        """The deterministic tree whose root-to-node paths are the prefixes of `paths`, at most `budget` nodes.

        Earlier paths have precedence when the budget runs out; shared prefixes become shared nodes.
        """
        tokens: list[int] = []
        parents: list[int] = []
        index: dict[tuple[int, int], int] = {}
        for path in paths:
            node = -1
            for token in path:
                child = index.get((node, token))
                if child is None:
                    if len(tokens) >= budget:
                        return cls(tokens, parents)
                    child = len(tokens)
                    tokens.append(token)
                    parents.append(node)
                    index[node, token] = child
                node = child
        return cls(tokens, parents)

    def children(self) -> list[list[int]]:
        """Child nodes of the root (entry 0) and of each node j (entry j + 1), in node order."""
        result: list[list[int]] = [[] for _ in range(len(self.tokens) + 1)]
        for node, parent in enumerate(self.parents):
            result[parent + 1].append(node)
        return result

    def depths(self) -> list[int]:
        """Distance of each node from the root, 1 for the root's children."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def paths(self) -> list[list[int]]:
        """Token sequences of all root-to-leaf paths."""
        inner = set(self.parents)
        result = []
        for leaf in (node for node in range(len(self.tokens)) if node not in inner):
            path, node = [], leaf
            while node >= 0:
                path.append(self.tokens[node])
                node = self.parents[node]
            result.append(path[::-1])
        return result

    def is_chain(self) -> bool:
        """Whether every node is the only child of the one before."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def depth_first(self) -> Tree:
        """The same deterministic tree, each node followed by its first child: the first path stands in one piece.

        Rows of that path then lie in the cache as they would without the other branches.
        """
        children = self.children()
        order: list[int] = []
        stack = list(reversed(children[0]))
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(children[node + 1]))
        new = {-1: -1} | {node: i for i, node in enumerate(order)}
        return Tree([self.tokens[n] for n in order], [new[self.parents[n]] for n in order])

    def limited(self, depth: int) -> Tree:
        """The draft without the nodes deeper than `depth`; their order is kept."""
        depths = self.depths()
        if not depths or max(depths) <= depth:
            return self
        kept = [node for node in range(len(self.tokens)) if depths[node] <= depth]
        new = {-1: -1} | {node: i for i, node in enumerate(kept)}
        laws = None if self.laws is None else self.laws[[0, *(node + 1 for node in kept)]]
        return Tree([self.tokens[n] for n in kept], [new[self.parents[n]] for n in kept], self.kind, laws)

    def first(self, count: int) -> Tree:
        """The first `count` nodes (parents come before children, so this is a tree)."""
        if len(self.tokens) <= count:
            return self
        laws = None if self.laws is None else self.laws[: count + 1]
        return Tree(self.tokens[:count], self.parents[:count], self.kind, laws)

    def check(self, vocabulary: int, origin: str) -> None:
        """Refuse what is not a draft; ids and parents that come from drafters are untrusted.

        Raises:
            DraftError: naming `origin` (the drafter), the node and what is wrong with it.
        """
        if len(self.tokens) != len(self.parents):
            raise DraftError(f"{origin} proposed {len(self.tokens)} tokens with {len(self.parents)} parents")
        for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
            if not 0 <= token < vocabulary:
                raise DraftError(
                    f"{origin} proposed token id {token} at node {node}, but the target's vocabulary has ids 0 to "
                    f"{vocabulary - 1}; was it made for another tokenizer?"
                )
            if not -1 <= parent < node:
                raise DraftError(
                    f"{origin} gave node {node} the parent {parent}; a parent is -1 (the root) or an earlier node"
                )
        if self.kind != "deterministic":
            if self.laws is None:
                raise DraftError(f"{origin} proposed a sampled draft ({self.kind}) without the laws it drew from")
            if self.laws.shape[0] != len(self.tokens) + 1:
                raise DraftError(
                    f"{origin} gave {self.laws.shape[0]} law rows for {len(self.tokens)} nodes; need n + 1"
                )
            for node, (token, parent) in enumerate(zip(self.tokens, self.parents, strict=True)):
                if not float(self.laws[parent + 1, token]) > 0:
                    raise DraftError(
                        f"{origin} says node {node} (token {token}) was drawn from a law that gives it no mass; "
                        "hand over the law that was really sampled, after temperature and truncation"
                    )


@dataclass(frozen=True, slots=True)
class Draft:
    """A batch of drafts as padded tensors.

    Attributes:
        tokens: [B, n] int64.
        parents: [B, n] int64, -1 for the root, parents before children.
        valid: [B, n] bool; padding nodes are False and come last.
        kinds: one per request.
        laws: per request, the rows the draft was drawn from (see `Tree.laws`), or None.
    """

    tokens: Tensor
    parents: Tensor
    valid: Tensor
    kinds: tuple[DraftKind, ...]
    laws: tuple[Tensor | None, ...]

    def __len__(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def width(self) -> int:
        """Nodes per request, padding included."""
        return int(self.tokens.shape[1])

    @classmethod
    def of(cls, trees: Sequence[Tree], device: torch.device | str = "cpu", *, width: int = 0) -> Draft:
        """Pack one tree per request, padded to the widest or to `width` nodes."""
        width = max(width, *(len(tree) for tree in trees)) if trees else width
        tokens = [[*tree.tokens, *([0] * (width - len(tree)))] for tree in trees]
        parents = [[*tree.parents, *([-1] * (width - len(tree)))] for tree in trees]
        valid = [[True] * len(tree) + [False] * (width - len(tree)) for tree in trees]
        shape = (len(trees), width)
        return cls(
            torch.tensor(tokens, dtype=torch.int64, device=device).reshape(shape),
            torch.tensor(parents, dtype=torch.int64, device=device).reshape(shape),
            torch.tensor(valid, dtype=torch.bool, device=device).reshape(shape),
            tuple(tree.kind for tree in trees),
            tuple(tree.laws for tree in trees),
        )

    def trees(self) -> list[Tree]:
        """Unpack to the host: one tree per request, padding dropped (one device-to-host copy)."""
        tokens, parents = self.tokens.tolist(), self.parents.tolist()
        sizes = self.valid.sum(1).tolist()
        return [
            Tree(tokens[b][: sizes[b]], parents[b][: sizes[b]], self.kinds[b], self.laws[b]) for b in range(len(sizes))
        ]
