"""Spec-Bench's way of counting, reproduced so that its published figures can be compared, and labelled as such.

Its flaws are kept on purpose (Xia et al. 2024, repository state of April 2025): the baseline's tokens are counted by
encoding the cleaned answer again and taking off one per turn, a method's are the ids it generated; speeds are means of
per-question rates, and a speedup is a ratio of two such means.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outpace.errors import ResultError


@dataclass(frozen=True, slots=True)
class PublishedAnswer:
    """One question as Spec-Bench's answer files hold it; lists are over turns.

    Attributes:
        accept_lengths: tokens appended in each decoding step of all turns, the target's own included.
    """

    question_id: str
    category: str
    turns: tuple[str, ...]
    new_tokens: tuple[int, ...]
    wall_time: tuple[float, ...]
    accept_lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PublishedFigures:
    """What Spec-Bench prints for one method on one subtask ("overall": all questions together)."""

    tokens_per_second: float
    baseline_tokens_per_second: float
    speedup: float
    mean_accepted_tokens: float
    questions: int

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "tokens_per_second": self.tokens_per_second,
            "baseline_tokens_per_second": self.baseline_tokens_per_second,
            "speedup": self.speedup,
            "mean_accepted_tokens": self.mean_accepted_tokens,
            "questions": self.questions,
        }


def read_answers(path: str | Path) -> list[PublishedAnswer]:
    """An answer file of Spec-Bench's harness.

    Raises:
        ResultError: if a line is not of that form.
    """
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        for line in filter(str.strip, lines):
            one = json.loads(line)
            choice = one["choices"][0]
            found.append(
                PublishedAnswer(
                    question_id=str(one["question_id"]),
                    category=str(one["category"]),
                    turns=tuple(choice["turns"]),
                    new_tokens=tuple(choice["new_tokens"]),
                    wall_time=tuple(choice["wall_time"]),
                    accept_lengths=tuple(choice.get("accept_lengths", ())),
                )
            )
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ResultError(
            f"{str(path)!r} is not an answer file of Spec-Bench: {type(error).__name__} {error}"
        ) from error
    return found


def published_figures(
    method: Sequence[PublishedAnswer],
    baseline: Sequence[PublishedAnswer],
    encode: Callable[[str], Sequence[int]],
    subtask_of: Callable[[PublishedAnswer], str],
) -> dict[str, PublishedFigures]:
    """Figures per subtask and "overall", counted the published way.

    encode: the tokenizer with its beginning-of-sequence token, applied to the baseline's cleaned answers.
    """
    groups: dict[str, list[PublishedAnswer]] = {}
    for answer in method:
        groups.setdefault(subtask_of(answer), []).append(answer)
    groups["overall"] = list(method)
    bases: Mapping[str, PublishedAnswer] = {answer.question_id: answer for answer in baseline}
    figures = {}
    for name, answers in groups.items():
        paired = [(answer, bases[answer.question_id]) for answer in answers if answer.question_id in bases]
        if not paired:
            continue
        speed = _mean([sum(a.new_tokens) / sum(a.wall_time) for a, _ in paired])
        base = _mean([sum(len(encode(turn)) - 1 for turn in b.turns) / sum(b.wall_time) for _, b in paired])
        steps = [length for a, _ in paired for length in a.accept_lengths]
        figures[name] = PublishedFigures(speed, base, speed / base, _mean(steps), len(paired))
    return figures


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
