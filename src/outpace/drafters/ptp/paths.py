"""Drafts as paths: {tokens from the root to a node: chance that the last is accepted once the others are}.

Parents come before children. Siblings exclude each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from outpace.laws import Tree

Paths = dict[tuple[int, ...], float]


def tree_paths(tree: Tree) -> list[tuple[int, ...]]:
    """Tokens from the root to each node."""
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


def prune(paths: Mapping[tuple[int, ...], float], depth: int, least: float, most: int) -> Tree:
    """The draft of the paths that are likely enough to be walked; likelier ones first where there are too many."""
    chances: Paths = {}
    for path, trusted in paths.items():  # parents come before children
        chances[path] = chances.get(path[:-1], 1.0 if len(path) == 1 else 0.0) * trusted
    chosen = sorted((p for p, c in chances.items() if c > least and len(p) <= depth), key=lambda p: -chances[p])[:most]
    chosen.sort(key=len)
    return Tree.merge(chosen, most).depth_first() if chosen else Tree()


def spread(tokens: list[list[int]], trusted: list[list[float]], most: int, *, leaves: bool = False) -> Paths:
    """Paths through the candidates of each depth, likeliest first, at most `most`; parents before children.

    leaves: only the first candidate of a depth is gone on from.
    """
    first = tuple(row[0] for row in tokens)
    paths: Paths = {}
    front: list[tuple[float, tuple[int, ...]]] = [(1.0, ())]
    while front and len(paths) < most:
        best = max(range(len(front)), key=lambda i: front[i][0])
        chance, path = front.pop(best)
        if path:
            paths[path] = _last(trusted, tokens, path)
        if len(path) < len(tokens) and not (leaves and path != first[: len(path)]):
            left = 1.0
            for token, trust in zip(tokens[len(path)], trusted[len(path)], strict=True):
                front.append((chance * min(trust, left), (*path, token)))
                left = max(0.0, left - trust)
    return paths


def _last(trusted: list[list[float]], tokens: list[list[int]], path: tuple[int, ...]) -> float:
    depth = len(path) - 1
    rank = tokens[depth].index(path[-1])
    return min(trusted[depth][rank], max(0.0, 1.0 - sum(trusted[depth][:rank])))
