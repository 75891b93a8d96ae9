"""Rules with one mistake each, all seen in real code. A certificate that passes one of them proves nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from outpace.laws.dice import Key
from outpace.laws.noise import Stream
from outpace.laws.rules import Rule, Walk, walk_token, walk_tree
from outpace.laws.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws.warp import Sampler


def _key(stream: Stream, history: Sequence[int], round_index: int, order: int = 0) -> Key:
    return Key(stream, len(history), order, round_index)


def _rows(tree: Tree) -> Tensor:
    if tree.laws is None:
        raise ValueError("broken rules are run on sampled drafts only")
    return tree.laws


def _chain(residual: str) -> Rule:
    """Token-wise verification with another residual."""

    def walk(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
        history = list(prefix)
        for node, token in enumerate(tree.tokens):
            p, q = sampler.law(logits[node], history), _rows(tree)[node]
            if not sampler.dice.accept(float(p[token]), float(q[token]), _key(Stream.ACCEPT, history, round_index)):
                rest = p.clone()
                if residual == "p without the token":
                    rest[token] = 0
                last = sampler.dice.draw(
                    rest if float(rest.sum()) > 0 else p, _key(Stream.RESIDUAL, history, round_index)
                )
                return Walk(tuple(range(node)), (*history[len(prefix) :], last))
            history.append(token)
        p = sampler.law(logits[len(tree)], history)
        last = sampler.dice.draw(p, _key(Stream.RESIDUAL, history, round_index))
        return Walk(tuple(range(len(tree))), (*history[len(prefix) :], last))

    return walk


def _wrong_bonus(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """The bonus comes from the row before the last: right tokens, wrong context."""
    shifted = torch.cat([logits[:-1], logits[-2:-1]])
    return walk_token(tree, shifted, sampler, prefix, round_index)


def _early_exit(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Block verification that stops at the first failed test."""
    q = _rows(tree)
    n = len(tree)
    prefixes = [[*prefix, *tree.tokens[:i]] for i in range(n + 1)]
    p = [sampler.law(logits[i], prefixes[i]) for i in range(n + 1)]
    a, kept, a_kept = 1.0, 0, 1.0
    for i in range(1, n + 1):
        token = tree.tokens[i - 1]
        a = min(1.0, a * float(p[i - 1][token]) / float(q[i - 1][token]))
        gain = a if i == n else float(torch.clamp(a * p[i] - q[i], min=0).sum())
        out_of = 1.0 if i == n else gain + 1 - a
        if out_of == 0:
            gain = out_of = 1.0
        if not sampler.dice.accept(gain, out_of, _key(Stream.ACCEPT, prefixes[i - 1], round_index)):
            break
        kept, a_kept = i, a
    rest = p[n] if kept == n else torch.clamp(a_kept * p[kept] - q[kept], min=0)
    rest = rest if float(rest.sum()) > 0 else p[kept]
    last = sampler.dice.draw(rest, _key(Stream.RESIDUAL, prefixes[kept], round_index))
    return Walk(tuple(range(kept)), (*tree.tokens[:kept], last))


def _argmax_with_softmax(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """A draft taken by arg-max, verified as if it had been drawn: the most common error in public code."""
    laws = _rows(tree)
    tokens = [int(laws[i].argmax()) for i in range(len(tree))]
    return walk_token(Tree.chain(tokens, kind="iid", laws=laws), logits, sampler, prefix, round_index)


def _other_temperature(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Declares a q at temperature 2 for tokens drawn at temperature 1."""
    flat = _rows(tree).sqrt()
    laws = flat / flat.sum(-1, keepdim=True)
    return walk_token(Tree(tree.tokens, tree.parents, tree.kind, laws), logits, sampler, prefix, round_index)


def _q_kept(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Siblings drawn without replacement, verified as if q stayed the same."""
    return walk_tree(Tree(tree.tokens, tree.parents, "iid", tree.laws), logits, sampler, prefix, round_index)


def _sorted_children(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Tries the likeliest sibling first instead of the first drawn."""
    laws = _rows(tree)
    order = sorted(range(len(tree)), key=lambda n: (tree.parents[n], -float(laws[tree.parents[n] + 1, tree.tokens[n]])))
    new = {-1: -1} | {node: i for i, node in enumerate(order)}
    swapped = Tree(
        [tree.tokens[n] for n in order],
        [new[tree.parents[n]] for n in order],
        tree.kind,
        laws[[0, *(n + 1 for n in order)]],
    )
    rows = logits[[0, *(n + 1 for n in order)]]
    return walk_tree(swapped, rows, sampler, prefix, round_index)


def _shared_numbers(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Accepts with the very number the draft token was drawn with."""
    history = list(prefix)
    for node, token in enumerate(tree.tokens):
        p, q = sampler.law(logits[node], history), _rows(tree)[node]
        if not sampler.dice.accept(float(p[token]), float(q[token]), _key(Stream.DRAFT, history, round_index)):
            rest = torch.clamp(p - q, min=0)
            rest = rest if float(rest.sum()) > 0 else p
            last = sampler.dice.draw(rest, _key(Stream.RESIDUAL, history, round_index))
            return Walk(tuple(range(node)), (*history[len(prefix) :], last))
        history.append(token)
    last = sampler.dice.draw(sampler.law(logits[len(tree)], history), _key(Stream.RESIDUAL, history, round_index))
    return Walk(tuple(range(len(tree))), (*history[len(prefix) :], last))


BROKEN_CHAINS: Final[dict[str, Rule]] = {
    "residual replaced by p": _chain("p"),
    "residual is p without the refused token": _chain("p without the token"),
    "bonus from the wrong row": _wrong_bonus,
    "arg-max draft verified with p/q": _argmax_with_softmax,
    "q at another temperature": _other_temperature,
    "block verification with early exit": _early_exit,
    "acceptance shares the draft's number": _shared_numbers,
}
BROKEN_TREES: Final[dict[str, Rule]] = {
    "q not renormalised without replacement": _q_kept,
    "children sorted before verification": _sorted_children,
}
