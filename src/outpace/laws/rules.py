"""How a draft becomes tokens. Every rule walks the tree from the root and emits what it accepts, plus one.

| rule  | class | drafts                | source                                                     |
| ----- | ----- | --------------------- | ---------------------------------------------------------- |
| path  | path  | any                   | sample-and-match with one number per position              |
| token | law   | sampled chains        | Leviathan et al. 2023, Algorithm 1; Chen et al. 2023       |
| block | law   | sampled chains        | Sun et al. 2024, block verification                        |
| tree  | law   | sampled trees, chains | SpecInfer (iid), recursive rejection (without replacement) |

A rule sees laws, never models, and puts every question of chance to the sampler's dice, so the certificate can answer
them all ways. Deterministic drafts have a one-hot law, for which sample-and-match is the best any exact rule can do;
every rule therefore hands them, and greedy settings, to the path rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from outpace.errors import ConfigError, DraftError, suggestion
from outpace.laws.dice import Key
from outpace.laws.noise import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws.tree import Tree
    from outpace.laws.warp import Sampler

Guarantee = Literal["path", "law", "lossy"]
RuleName = Literal["path", "token", "block", "tree"]


@dataclass(frozen=True, slots=True)
class Walk:
    """What a rule decided for one request.

    Attributes:
        nodes: accepted draft nodes, from the root down.
        tokens: emitted ids: those of the accepted nodes, then the target's own. len(tokens) == len(nodes) + 1.
    """

    nodes: tuple[int, ...]
    tokens: tuple[int, ...]


Rule = Callable[["Tree", "Tensor", "Sampler", Sequence[int], int], Walk]
"""(tree, logits [n + 1, V], sampler, prefix, round_index) -> Walk.

Row 0 of the logits is the root's, row j + 1 node j's; prefix holds every committed token, the root last.
"""


def walk_path(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Draw the target's own token at each node and follow the draft as long as it holds that token.

    Exact for any draft, even one that looked at the path's numbers: what is emitted at a position is a function of
    the target's law and of that position's number alone.
    """
    del round_index  # the path does not know of rounds
    children = tree.children()
    history = list(prefix)
    nodes: list[int] = []
    node = -1
    while True:
        token = sampler.choose(logits[node + 1], history)
        history.append(token)
        node = next((child for child in children[node + 1] if tree.tokens[child] == token), -1)
        if node < 0:
            return Walk(tuple(nodes), tuple(history[len(prefix) :]))
        nodes.append(node)


def walk_token(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Accept each token of a sampled chain with probability min(1, p/q); at the first refusal draw the residual."""
    if sampler.greedy or tree.kind == "deterministic":
        return walk_path(tree, logits, sampler, prefix, round_index)
    laws = _laws_of_chain(tree, "token")
    history = list(prefix)
    start = len(prefix)
    for node, token in enumerate(tree.tokens):
        p, q = sampler.law(logits[node], history), laws[node]
        if not sampler.dice.accept(float(p[token]), float(q[token]), _key(Stream.ACCEPT, history, round_index)):
            history.append(_draw_residual(p, q, 1.0, sampler, history, round_index))
            return Walk(tuple(range(node)), tuple(history[start:]))
        history.append(token)
    return _with_bonus(tree, logits, sampler, history, start, round_index)


def walk_block(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Verify a sampled chain jointly: a later token may rescue an earlier one, so no test ends the loop.

    Keeps the last success. The running product is clipped at one at every step, and the residual of a stop after tau
    tokens is max(0, a_tau * p - q).
    """
    if sampler.greedy or tree.kind == "deterministic":
        return walk_path(tree, logits, sampler, prefix, round_index)
    q = _laws_of_chain(tree, "block").double()
    n = len(tree)
    prefixes = [[*prefix, *tree.tokens[:i]] for i in range(n + 1)]
    p = [sampler.law(logits[i], prefixes[i]).double() for i in range(n + 1)]
    a, kept, a_kept = 1.0, 0, 1.0
    for i in range(1, n + 1):
        token = tree.tokens[i - 1]
        a = min(1.0, a * float(p[i - 1][token]) / float(q[i - 1][token]))
        if i == n:
            passes, out_of = a, 1.0
        else:
            passes = float(torch.clamp(a * p[i] - q[i], min=0).sum())
            out_of = passes + 1 - a
            if out_of == 0:
                passes = out_of = 1.0
        if sampler.dice.accept(passes, out_of, _key(Stream.ACCEPT, prefixes[i - 1], round_index)):
            kept, a_kept = i, a
    history = prefixes[kept]
    if kept == n:
        return _with_bonus(tree, logits, sampler, history, len(prefix), round_index)
    token = _draw_residual(p[kept], q[kept], a_kept, sampler, history, round_index)
    return Walk(tuple(range(kept)), (*tree.tokens[:kept], token))


def walk_tree(tree: Tree, logits: Tensor, sampler: Sampler, prefix: Sequence[int], round_index: int) -> Walk:
    """Recursive rejection down a sampled tree: try the children in draw order, each refusal leaves a residual.

    Without replacement, a refused token also leaves q (renormalised); drawn independently, q stays.
    """
    if sampler.greedy or tree.kind == "deterministic":
        return walk_path(tree, logits, sampler, prefix, round_index)
    laws = _laws(tree)
    children = tree.children()
    history = list(prefix)
    nodes: list[int] = []
    node = -1
    while True:
        p, q = sampler.law(logits[node + 1], history), laws[node + 1]
        for order, child in enumerate(children[node + 1]):
            token = tree.tokens[child]
            key = _key(Stream.ACCEPT, history, round_index, order)
            if sampler.dice.accept(float(p[token]), float(q[token]), key):
                history.append(token)
                nodes.append(child)
                node = child
                break
            p = _residual(p, q, 1.0)
            p = p / p.sum()
            if tree.kind == "without_replacement":
                q = q.clone()
                q[token] = 0
                q = q / q.sum() if float(q.sum()) > 0 else q
        else:
            history.append(sampler.dice.draw(p, _key(Stream.RESIDUAL, history, round_index)))
            return Walk(tuple(nodes), tuple(history[len(prefix) :]))


RULES: Final[dict[RuleName, Rule]] = {"path": walk_path, "token": walk_token, "block": walk_block, "tree": walk_tree}
GUARANTEES: Final[dict[RuleName, Guarantee]] = {"path": "path", "token": "law", "block": "law", "tree": "law"}


def find_rule(name: str) -> Rule:
    """The rule of that name.

    Raises:
        ConfigError: naming the known rules.
    """
    for known, rule in RULES.items():
        if known == name:
            return rule
    raise ConfigError(f"unknown rule {name!r}; {suggestion(name, RULES)}")


def _key(stream: Stream, history: Sequence[int], round_index: int, order: int = 0) -> Key:
    """The key of a question about the token at the end of `history`.

    The round is part of it: under block verification the decision to stop depends on tokens drafted further down, so
    numbers used there must not be met again when the same positions are drafted anew.
    """
    return Key(stream, len(history), order, round_index)


def _laws(tree: Tree) -> Tensor:
    if tree.laws is None:
        raise DraftError(f"a sampled draft ({tree.kind}) came without the laws it was drawn from")
    return tree.laws


def _laws_of_chain(tree: Tree, rule: str) -> Tensor:
    if not tree.is_chain():
        raise DraftError(f"rule={rule!r} verifies chains, but the draft branches; use rule='tree' or rule='path'")
    return _laws(tree)


def _residual(p: Tensor, q: Tensor, scale: float) -> Tensor:
    """max(0, scale * p - q), or p where rounding left nothing of it."""
    rest = torch.clamp(scale * p - q, min=0)
    return rest if float(rest.sum()) > 0 else p


def _draw_residual(
    p: Tensor, q: Tensor, scale: float, sampler: Sampler, history: Sequence[int], round_index: int
) -> int:
    return sampler.dice.draw(_residual(p, q, scale), _key(Stream.RESIDUAL, history, round_index))


def _with_bonus(
    tree: Tree, logits: Tensor, sampler: Sampler, history: Sequence[int], start: int, round_index: int
) -> Walk:
    """Everything was accepted: one more token, from the last row's own law."""
    p = sampler.law(logits[len(tree)], history)
    token = sampler.dice.draw(p, _key(Stream.RESIDUAL, history, round_index))
    return Walk(tuple(range(len(tree))), (*history[start:], token))
