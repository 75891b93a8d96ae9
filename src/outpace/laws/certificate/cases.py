"""The cases the certificate runs, and the comparison itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import torch

from outpace.laws.certificate.broken import BROKEN_CHAINS, BROKEN_TREES
from outpace.laws.certificate.explore import Explorer, explore
from outpace.laws.certificate.models import TableModel
from outpace.laws.dice import Key
from outpace.laws.noise import Stream
from outpace.laws.rules import Rule, find_rule
from outpace.laws.settings import Settings
from outpace.laws.tree import DraftKind, Tree
from outpace.laws.warp import Sampler

if TYPE_CHECKING:
    from torch import Tensor

DraftMode = Literal["sampled", "top-k", "own number"]

TOLERANCE: Final = 1e-12
POWER: Final = 1e-3  # a broken rule must miss the law by at least this much, else the certificate has no power


@dataclass(frozen=True)
class Case:
    """One thing to prove: this rule, on drafts of this shape, leaves the law of the text alone.

    Attributes:
        name: what a report calls it.
        rule: name of the rule.
        depth: draft depth; branching: children per node.
        mode: "sampled" (from q, kind says how), "top-k" (deterministic), "own number" (q drawn with the path's u).
        kind: how sampled siblings are drawn.
        settings: warping of target and drafter.
        zeros: some tokens impossible under p and q, so that supports differ.
        vocabulary: number of tokens.
        rounds: rounds to enumerate before the rest is completed by plain decoding.
    """

    name: str
    rule: str
    depth: int
    branching: int = 1
    mode: DraftMode = "sampled"
    kind: DraftKind = "iid"
    settings: Settings = field(default_factory=lambda: Settings(temperature=1.0))
    zeros: bool = False
    vocabulary: int = 3
    rounds: int = 1


@dataclass(frozen=True)
class Finding:
    """What enumeration found: total variation distance to the target's law, and whether that is as it must be."""

    name: str
    distance: float
    holds: bool
    outcomes: int


def propose(
    drafter: TableModel,
    dice: Explorer,
    context: Sequence[int],
    case: Case,
    round_index: int,
) -> Tree:
    """A full tree of the case's shape, drawn or chosen from the drafter's laws."""
    sampler = Sampler(case.settings, dice)
    tokens: list[int] = []
    parents: list[int] = []

    def law_at(prefix: tuple[int, ...]) -> Tensor:
        return sampler.draft_law(drafter.logits(prefix), prefix)

    frontier: list[tuple[int, tuple[int, ...]]] = [(-1, tuple(context))]
    laws: dict[int, Tensor] = {}
    for _ in range(case.depth):
        grown: list[tuple[int, tuple[int, ...]]] = []
        for node, prefix in frontier:
            q = law_at(prefix)
            laws[node] = q
            for token in _siblings(q, dice, prefix, case, round_index, node):
                tokens.append(token)
                parents.append(node)
                grown.append((len(tokens) - 1, (*prefix, token)))
        frontier = grown
    if case.mode != "sampled":
        return Tree(tokens, parents)
    empty = torch.zeros(drafter.vocabulary, dtype=torch.float64)
    rows = [laws.get(node, empty) for node in range(-1, len(tokens))]
    return Tree(tokens, parents, case.kind, torch.stack(rows))


def _siblings(q: Tensor, dice: Explorer, prefix: tuple[int, ...], case: Case, round_index: int, node: int) -> list[int]:
    if case.mode == "own number":
        return [dice.draw(q, Key(Stream.PATH, len(prefix)))]
    if case.mode == "top-k":
        order = sorted(range(q.shape[0]), key=lambda token: (-float(q[token]), token))
        return order[: case.branching]
    drawn: list[int] = []
    left = q
    for order_index in range(case.branching):
        if float(left.sum()) <= 0:
            break
        index = (node + 1) * case.branching + order_index
        token = dice.draw(left, Key(Stream.DRAFT, len(prefix), index, round_index))
        drawn.append(token)
        if case.kind == "without_replacement":
            left = left.clone()
            left[token] = 0
    return drawn


def emitted_law(
    target: TableModel, drafter: TableModel, rule: Rule, case: Case, length: int
) -> tuple[Tensor, float, int]:
    """Exact law of the first `length` emitted tokens, the mean number emitted in a round, and the outcomes counted."""
    settings = case.settings

    def program(dice: Explorer) -> tuple[tuple[int, ...], int]:
        sampler = Sampler(settings, dice)
        text: tuple[int, ...] = ()
        first = 0
        for round_index in range(case.rounds):
            tree = propose(drafter, dice, text, case, round_index)
            prefixes = _prefixes(tree, text)
            logits = torch.stack([target.logits(prefix) for prefix in prefixes])
            walk = rule(tree, logits, sampler, text, round_index)
            text = (*text, *walk.tokens)
            first = first or len(walk.tokens)
            if len(text) >= length:
                break
        return text, first

    warp = Sampler(settings, Explorer()).law
    law = torch.zeros((target.vocabulary,) * length, dtype=torch.float64)
    mean = 0.0
    outcomes = explore(program)
    merged: dict[tuple[int, ...], float] = {}
    for probability, (text, first) in outcomes:
        mean += probability * first
        merged[text[:length]] = merged.get(text[:length], 0.0) + probability
    for text, probability in merged.items():
        for tail in itertools.product(range(target.vocabulary), repeat=length - len(text)):
            mass, prefix = probability, text
            for token in tail:
                mass *= float(warp(target.logits(prefix), prefix)[token])
                prefix = (*prefix, token)
                if mass == 0:
                    break
            else:
                law[prefix] += mass
    return law, mean, len(outcomes)


def _prefixes(tree: Tree, text: tuple[int, ...]) -> list[tuple[int, ...]]:
    prefixes = [text]
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        prefixes.append((*prefixes[parent + 1], token))
    return prefixes


def expected_emitted(target: TableModel, drafter: TableModel, case: Case) -> float:
    """Exact mean of emitted tokens in one round."""
    return emitted_law(target, drafter, find_rule(case.rule), case, 1)[1]


def _distance(rule: Rule, case: Case, seed: int) -> tuple[float, int]:
    order = case.depth + 1
    target = TableModel.dirichlet(case.vocabulary, order, 2 * seed, zeros=case.zeros)
    drafter = TableModel.dirichlet(case.vocabulary, order, 2 * seed + 1, zeros=case.zeros)
    length = case.depth + 1
    law, _, outcomes = emitted_law(target, drafter, rule, case, length)
    warp = Sampler(case.settings, Explorer()).law
    exact = target.sequence_law(length, lambda logits: warp(logits, ()))
    return 0.5 * float((law - exact).abs().sum()), outcomes


def _chains() -> Iterator[Case]:
    for rule in ("path", "token", "block", "tree"):
        for depth in (1, 2, 3):
            yield Case(f"{rule}, sampled chain, depth {depth}", rule, depth)
        yield Case(f"{rule}, disjoint and partial supports", rule, 2, zeros=True)
        yield Case(f"{rule}, chains over two rounds", rule, 2, rounds=2)
        yield Case(f"{rule}, q missing (deterministic)", rule, 3, mode="top-k")
        yield Case(f"{rule}, greedy", rule, 2, settings=Settings(temperature=0))
        yield Case(f"{rule}, temperature 0.7, top-k 2", rule, 2, settings=Settings(temperature=0.7, top_k=2))
        yield Case(f"{rule}, top-p 0.8, min-p 0.1", rule, 2, settings=Settings(temperature=1.3, top_p=0.8, min_p=0.1))
        yield Case(f"{rule}, four tokens, depth 2", rule, 2, vocabulary=4)


def _trees() -> Iterator[Case]:
    for rule in ("path", "tree"):
        for kind in ("iid", "without_replacement"):
            for branching, depth in ((2, 1), (3, 1), (2, 2)):
                name = f"{rule}, {kind.replace('_', ' ')}, {branching} children, depth {depth}"
                yield Case(
                    name, rule, depth, branching, kind=kind, vocabulary=3 if branching == 3 else 2 + (depth == 1)
                )
            yield Case(f"{rule}, {kind.replace('_', ' ')}, zeros", rule, 1, 3, kind=kind, zeros=True)
            yield Case(f"{rule}, {kind.replace('_', ' ')}, two rounds", rule, 1, 2, kind=kind, rounds=2)
        yield Case(f"{rule}, top-k tree, depth 3", rule, 3, 2, mode="top-k")
    yield Case("path, drafter reads the path's number, depth 2", "path", 2, mode="own number")
    yield Case("path, drafter reads the path's number, two rounds", "path", 1, mode="own number", rounds=2)
    yield Case(
        "path, drafter reads it, top-p 0.8", "path", 2, mode="own number", settings=Settings(temperature=1, top_p=0.8)
    )


CASES: Final[tuple[Case, ...]] = (*_chains(), *_trees())


def certify(
    cases: Sequence[Case] = CASES, *, models: int = 3, report: Callable[[Finding], None] | None = None
) -> list[Finding]:
    """Enumerate every case on `models` random pairs of target and drafter; the worst distance counts.

    A finding holds if the distance to the target's law is below 1e-12.
    """
    findings = []
    for case in cases:
        worst, outcomes = 0.0, 0
        for seed in range(models):
            distance, count = _distance(find_rule(case.rule), case, seed)
            worst, outcomes = max(worst, distance), outcomes + count
        findings.append(Finding(case.name, worst, worst < TOLERANCE, outcomes))
        if report is not None:
            report(findings[-1])
    return findings


def certify_broken(*, models: int = 3, report: Callable[[Finding], None] | None = None) -> list[Finding]:
    """Run the rules with a mistake in them; a finding holds if the certificate catches the mistake."""
    findings = []
    chain = Case("", "token", 2)
    tree = Case("", "tree", 1, 2, kind="without_replacement")
    for rules, case in ((BROKEN_CHAINS, chain), (BROKEN_TREES, tree)):
        for name, rule in rules.items():
            pairs = [_distance(rule, case, seed) for seed in range(models)]
            worst = max(distance for distance, _ in pairs)
            findings.append(Finding(name, worst, worst > POWER, sum(count for _, count in pairs)))
            if report is not None:
                report(findings[-1])
    return findings
