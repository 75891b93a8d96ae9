"""What a generation gives back: text, tokens, how they came about, and what is promised of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from outpace.laws import Guarantee, StopReason


@dataclass(frozen=True, slots=True)
class Round:
    """One pass of one request.

    Attributes:
        tokens: emitted ids, in order: accepted draft tokens, then the target's own (cut at a stop).
        accepted: how many of them were draft tokens.
        drafted: nodes of the draft.
        depth: length of its longest path.
    """

    tokens: tuple[int, ...]
    accepted: int
    drafted: int
    depth: int


@dataclass(slots=True)
class Stats:
    """Counts of one request, each with its denominator.

    Attributes:
        rounds: passes that verified something (prefill apart).
        emitted: tokens emitted. drafted: draft nodes verified. accepted: draft tokens emitted.
        reached: reached[i] counts rounds in which i draft tokens were accepted and the draft went on.
        accepted_at: accepted_at[i] counts those in which one more was accepted.
        prefill_ms: reading the prompt. decode_ms: all rounds, wall clock.
    """

    rounds: int = 0
    emitted: int = 0
    drafted: int = 0
    accepted: int = 0
    reached: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)
    prefill_ms: float = 0.0
    decode_ms: float = 0.0

    def count(self, one: Round, reached: int) -> None:
        """Add a round; `reached` is the number of depths at which a draft token was put to the test."""
        self.rounds += 1
        self.emitted += len(one.tokens)
        self.drafted += one.drafted
        self.accepted += one.accepted
        while len(self.reached) < reached:
            self.reached.append(0)
            self.accepted_at.append(0)
        for depth in range(reached):
            self.reached[depth] += 1
            self.accepted_at[depth] += depth < one.accepted

    @property
    def emitted_per_round(self) -> float:
        """Tokens per target pass; 1.0 is plain decoding."""
        return self.emitted / self.rounds if self.rounds else 0.0

    @property
    def accepted_per_drafted(self) -> float:
        """Share of draft nodes that were emitted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def accept_given_reached(self) -> list[float]:
        """Acceptance at each depth, given that the depth was reached and drafted."""
        return [a / r if r else 0.0 for a, r in zip(self.accepted_at, self.reached, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over decoding time, prefill apart."""
        return 1e3 * self.emitted / self.decode_ms if self.decode_ms else 0.0

    def as_dict(self) -> dict[str, Any]:
        """The shape serving engines report."""
        return {
            "num_rounds": self.rounds,
            "num_emitted_tokens": self.emitted,
            "num_draft_tokens": self.drafted,
            "num_accepted_tokens": self.accepted,
            "num_accepted_tokens_per_position": list(self.accepted_at),
            "num_reached_per_position": list(self.reached),
            "emitted_per_round": self.emitted_per_round,
            "accepted_per_drafted": self.accepted_per_drafted,
            "accept_given_reached": self.accept_given_reached,
            "prefill_ms": self.prefill_ms,
            "decode_ms": self.decode_ms,
            "tokens_per_second": self.tokens_per_second,
        }


@dataclass(frozen=True, slots=True)
class Output:
    """One finished (or interrupted) request.

    Attributes:
        text: what the model said, special tokens and stop string left out.
        tokens: emitted ids, prompt excluded, eos included.
        prompt_tokens: ids of the prompt as the model read it.
        finish_reason: "eos", "stop", "length", or "interrupted".
        rounds_detail: one entry per round.
        stats: counts and times.
        guarantee: "path" (same tokens as plain decoding under this seed), "law" (same distribution) or "lossy".
        notes: what the engine did on its own and why (standing down, for one).
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: tuple[int, ...]
    finish_reason: StopReason | str
    rounds_detail: tuple[Round, ...]
    stats: Stats
    guarantee: Guarantee
    notes: tuple[str, ...] = ()

    @property
    def rounds(self) -> int:
        """Target passes that verified something."""
        return self.stats.rounds

    @property
    def emitted_per_round(self) -> float:
        """Tokens per target pass; 1.0 is plain decoding."""
        return self.stats.emitted_per_round

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "text": self.text,
            "tokens": list(self.tokens),
            "finish_reason": self.finish_reason,
            "guarantee": self.guarantee,
            "notes": list(self.notes),
            "stats": self.stats.as_dict(),
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a streamed answer: what one round added.

    Attributes:
        text: text that is certain now. round: the round it came from. output: set on the last chunk.
    """

    text: str
    round: Round | None
    output: Output | None = None


def total(stats: Sequence[Stats]) -> Stats:
    """Counts of several requests together (never an average of their ratios)."""
    result = Stats()
    for one in stats:
        result.rounds += one.rounds
        result.emitted += one.emitted
        result.drafted += one.drafted
        result.accepted += one.accepted
        result.prefill_ms += one.prefill_ms
        result.decode_ms += one.decode_ms
        for depth, (reached, accepted) in enumerate(zip(one.reached, one.accepted_at, strict=True)):
            if depth == len(result.reached):
                result.reached.append(0)
                result.accepted_at.append(0)
            result.reached[depth] += reached
            result.accepted_at[depth] += accepted
    return result
