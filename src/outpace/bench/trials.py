"""What one trial gives: answers with every count, and where the time went. Plain data, one JSON line each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from outpace.bench.config import Mode
from outpace.laws import Settings

Status = Literal["ok", "crashed", "cut", "stuck", "skipped"]
FAILURES: Final[tuple[Status, ...]] = ("crashed", "cut", "stuck")


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One combination of batch size, temperature and mode: a table of its own."""

    batch: int
    temperature: float
    mode: Mode

    def __str__(self) -> str:
        return f"batch {self.batch}, temperature {self.temperature:g}, {self.mode} length"


Key = tuple[Cell, int, tuple[str, ...], int, str]
"""Cell, repetition, unit, turn, method: what makes a trial one of its kind."""


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt to answer.

    Attributes:
        ids: token ids, empty for an endpoint. messages: the conversation, for an endpoint.
        settings: sampling and stopping, with the request that keys the noise.
    """

    ids: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...]
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One request of a trial.

    Attributes:
        tokens: emitted ids, eos included (empty for an endpoint). emitted: how many tokens were counted.
        prompt_tokens: length of the prompt. text: special tokens left out.
        finish_reason: "eos" or "length" ("stop" for an endpoint that says so).
        ttft_ms: until the first token was at hand. total_ms: until the last.
        rounds: [emitted, accepted, drafted, depth] of every round; for stock decoding only their number is known.
        passes: target passes that emitted something.
        reached, accepted_at: see `outpace.engine.Stats`.
        guarantee: class of the run; None where the method promises nothing about tokens.
        notes: what the engine did on its own.
    """

    tokens: tuple[int, ...]
    emitted: int
    prompt_tokens: int
    text: str
    finish_reason: str
    ttft_ms: float | None
    total_ms: float
    rounds: tuple[tuple[int, int, int, int], ...] = ()
    passes: int | None = None
    reached: tuple[int, ...] = ()
    accepted_at: tuple[int, ...] = ()
    guarantee: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One method answering one batch once.

    Attributes:
        answers: one per request. total_ms: wall clock of the whole batch, prefill included, tokenisation excluded.
        split_ms: "prefill", "draft", "pass", "walk", "other" as the engine adds them up; empty where unknown.
        rounds: rounds of the batch (a round serves all its requests).
        peak_bytes: most memory allocated on the device during the trial, weights included; None on CPU.
        captures: CUDA graphs captured inside its time. retakes: takes before it that were thrown away for capturing.
    """

    answers: tuple[Answer, ...]
    total_ms: float
    split_ms: Mapping[str, float] = field(default_factory=dict)
    rounds: int | None = None
    peak_bytes: int | None = None
    captures: int = 0
    retakes: int = 0

    @property
    def emitted(self) -> int:
        """Tokens of all answers."""
        return sum(answer.emitted for answer in self.answers)

    @property
    def ms_per_token(self) -> float:
        """Wall clock over emitted tokens."""
        return self.total_ms / self.emitted if self.emitted else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data, times rounded to a microsecond."""
        return _rounded(dataclasses.asdict(self))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trial:
        """The trial of a ledger line."""
        answers = tuple(
            Answer(
                **{
                    **one,
                    "tokens": tuple(one["tokens"]),
                    "rounds": tuple((r[0], r[1], r[2], r[3]) for r in one["rounds"]),
                    "reached": tuple(one["reached"]),
                    "accepted_at": tuple(one["accepted_at"]),
                    "notes": tuple(one["notes"]),
                }
            )
            for one in values["answers"]
        )
        return cls(**{**values, "answers": answers})


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A trial and its place in the run; `trial` is None where it failed.

    Attributes:
        cell, repetition, unit, turn, method: which trial. unit: ids of the questions answered together.
        task: of the unit. reason: why it failed or was left out. at_s: seconds of measuring before its end.
    """

    cell: Cell
    repetition: int
    unit: tuple[str, ...]
    task: str
    turn: int
    method: str
    status: Status
    reason: str | None
    at_s: float
    trial: Trial | None

    @property
    def key(self) -> Key:
        """What makes it one of its kind."""
        return self.cell, self.repetition, self.unit, self.turn, self.method

    @property
    def prompt(self) -> str:
        """Name of the unit and turn, the statistical unit of a comparison."""
        return f"{'+'.join(self.unit)}/{self.turn}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, one ledger line."""
        return {
            "kind": "trial",
            **dataclasses.asdict(self.cell),
            "repetition": self.repetition,
            "unit": list(self.unit),
            "task": self.task,
            "turn": self.turn,
            "method": self.method,
            "status": self.status,
            "reason": self.reason,
            "at_s": round(self.at_s, 3),
            "trial": None if self.trial is None else self.trial.as_dict(),
        }

    @classmethod
    def from_dict(cls, line: Mapping[str, Any]) -> Record:
        """The record of a ledger line."""
        return cls(
            cell=Cell(line["batch"], line["temperature"], line["mode"]),
            repetition=line["repetition"],
            unit=tuple(line["unit"]),
            task=line["task"],
            turn=line["turn"],
            method=line["method"],
            status=line["status"],
            reason=line["reason"],
            at_s=line["at_s"],
            trial=None if line["trial"] is None else Trial.from_dict(line["trial"]),
        )


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value
