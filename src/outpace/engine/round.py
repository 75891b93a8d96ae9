"""One round, to be read beside the papers: guess a tree, run it in one pass, walk through it, keep what was passed.

    draft = drafter.propose(context)
    block = root + draft + scouts
    read  = target.run(block)
    walk  = rule(draft, read.logits, sampler)      -> emitted tokens
    stop  = stopping(walk)                         -> what of them stands
    cache.commit(walk); drafter.observe(walk, read); context advances

Knows no method and no text. The fast path must agree with this function token for token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from outpace.engine.output import Round
from outpace.errors import DraftError
from outpace.laws import Draft, Rule, Stopping, Tree, Verdict, Walk
from outpace.target import Block

if TYPE_CHECKING:
    from outpace.drafters import Context, Drafter, RequestContext
    from outpace.target import BlockCache


@dataclass(slots=True)
class Timing:
    """Where the time of rounds went, in milliseconds, added up."""

    rounds: int = 0
    draft_ms: float = 0.0
    pass_ms: float = 0.0
    walk_ms: float = 0.0
    other_ms: float = 0.0
    prefill_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """All of the rounds, prefill apart."""
        return self.draft_ms + self.pass_ms + self.walk_ms + self.other_ms

    @property
    def share_outside_pass(self) -> float:
        """Share of a round that is not the target's pass."""
        return 1 - self.pass_ms / self.total_ms if self.total_ms else 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a round brought one request.

    Attributes:
        tokens: emitted ids that stand, those of accepted nodes first.
        drafted: nodes of the draft. depth: of the deepest. reached: depths at which a draft token was put to the test.
    """

    tokens: tuple[int, ...]
    drafted: int
    depth: int
    reached: int

    @classmethod
    def of(cls, tree: Tree, walk: Walk) -> Outcome:
        """That of a walk through a tree."""
        return cls(walk.tokens, len(tree), max(tree.depths(), default=0), _reached(tree, walk))


@dataclass(frozen=True, slots=True)
class Played:
    """A round's outcome per request, in the context's order."""

    rounds: list[Round]
    verdicts: list[Verdict]
    reached: list[int]
    ms: float


def play_round(
    context: Context,
    drafter: Drafter | None,
    rule: Rule,
    stoppings: Sequence[Stopping],
    timing: Timing,
    *,
    strict_rows: int = 0,
) -> Played:
    """Play one round for every request of the context.

    strict_rows: run every pass at exactly this many rows (0: as many as the drafts need).

    Raises:
        DraftError: if the drafter proposed something that is not a draft; nothing has been written then.
    """
    requests, target, cache = context.requests, context.target, context.cache
    started = perf_counter()

    trees = drafted_trees(context, drafter, strict_rows)
    lengths = cache.lengths[: len(requests)]
    width = strict_rows or (2 if target.pairs_rows else 1)
    block = Block.of([r.root for r in requests], trees, lengths, target.device, width=width)
    if drafter is not None and drafter.needs.scouts:
        block = dataclasses.replace(block, scouts=drafter.scouts(context, Draft.of(trees, width=block.rows - 1)))
    drafted = perf_counter()

    read = target.run(block, cache, taps=drafter.needs.taps if drafter else ())
    logits = read.logits
    assert logits is not None  # asked for
    if logits.is_cuda:
        logits.new_zeros(1).item()  # wait, so that the pass is timed and not the first reader of its result
    passed = perf_counter()

    walks, verdicts = [], []
    for b, (request, tree, stopping) in enumerate(zip(requests, trees, stoppings, strict=True)):
        walk = rule(tree, logits[b], request.sampler, request.tokens, request.round_index)
        verdict = stopping.feed(walk.tokens)
        walks.append(Walk(walk.nodes[: verdict.kept - 1], walk.tokens[: verdict.kept]))
        verdicts.append(verdict)
    walked = perf_counter()

    cache.commit([[0, *(node + 1 for node in walk.nodes)] for walk in walks])
    if drafter is not None:
        drafter.observe(context, walks, read)
    outcomes = [Outcome.of(tree, walk) for tree, walk in zip(trees, walks, strict=True)]
    rounds = record(requests, outcomes, stoppings)
    ended = perf_counter()

    timing.rounds += 1
    timing.draft_ms += 1e3 * (drafted - started)
    timing.pass_ms += 1e3 * (passed - drafted)
    timing.walk_ms += 1e3 * (walked - passed)
    timing.other_ms += 1e3 * (ended - walked)
    return Played(rounds, verdicts, [outcome.reached for outcome in outcomes], 1e3 * (ended - started))


def record(
    requests: Sequence[RequestContext], outcomes: Sequence[Outcome], stoppings: Sequence[Stopping]
) -> list[Round]:
    """Let requests advance by what was emitted; returns the round of each."""
    rounds = []
    for request, outcome, stopping in zip(requests, outcomes, stoppings, strict=True):
        request.tokens.extend(outcome.tokens)
        request.remaining = stopping.remaining
        request.round_index += 1
        rounds.append(Round(outcome.tokens, len(outcome.tokens) - 1, outcome.drafted, outcome.depth))
    return rounds


def drafted_trees(context: Context, drafter: Drafter | None, strict_rows: int) -> list[Tree]:
    """One checked tree per request, no deeper than can still be emitted."""
    requests = context.requests
    if drafter is None or not any(r.speculate and r.depth_limit for r in requests):
        return [Tree() for _ in requests]
    draft = drafter.propose(context)
    if len(draft) != len(requests):
        raise DraftError(f"drafter {drafter.name!r} proposed {len(draft)} trees for {len(requests)} requests")
    trees = []
    for slot, (request, tree) in enumerate(zip(requests, draft.trees(), strict=True)):
        tree.check(context.target.vocabulary, f"drafter {drafter.name!r}")
        depth, nodes = request.depth_limit, strict_rows - 1 if strict_rows else len(tree)
        request.scout_limit = None
        if context.target.pairs_rows and len(requests) == 1 and not strict_rows:
            room = _same_kernels(context.cache, slot)
            depth, nodes = min(depth, room - 2), min(nodes, room - 1)
            request.scout_limit = room - max(2, 1 + min(len(tree), nodes))
        trees.append(tree.limited(depth).first(nodes))
    return trees


def _same_kernels(cache: BlockCache, slot: int) -> int:
    """Rows a pass may have so that attention reads as many entries as it would in plain decoding's two-row pass.

    A draft that reached beyond would verify its tokens with logits that differ in the last bits from plain decoding's.
    """
    length = cache.lengths[slot]
    return cache.attended(length + 2) - length


def _reached(tree: Tree, walk: Walk) -> int:
    """Depths at which a draft token was put to the test: those passed, and the next one if the draft went on."""
    last = walk.nodes[-1] if walk.nodes else -1
    return len(walk.nodes) + (last in tree.parents)
