"""Questions to measure on: the built-in `mini` suite, Spec-Bench's file, any JSONL; and stratified orders of them.

Knows no models and no templates. One JSON object per line: "turns" (a list of user turns) or "prompt" (one turn), and
optionally "id" and "task" (Spec-Bench calls them "question_id" and "category").
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from outpace.errors import ConfigError, suggestion

SPEC_BENCH_SHA256: Final = "4b6d33e79484f9841c487ee87d1cf6aa8c6066f61d5d482ff09e5a007fafdf04"
SPEC_BENCH_SOURCE: Final = "https://github.com/hemingkx/Spec-Bench, data/spec_bench/question.jsonl"
_MT_BENCH: Final = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@dataclass(frozen=True, slots=True)
class Question:
    """User turns that belong together, and the kind of work they stand for.

    Attributes:
        number: place in the suite's file; the request of its noise. id: name in the file.
        task: what tables group by. category: the file's own word for it.
    """

    number: int
    id: str
    task: str
    turns: tuple[str, ...]
    category: str


@dataclass(frozen=True, slots=True)
class Suite:
    """Questions under a name.

    Attributes:
        note: where they come from, and whether that is known to be unmodified. sha256: of the file.
    """

    name: str
    questions: tuple[Question, ...]
    note: str
    sha256: str

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in order of appearance."""
        return tuple(dict.fromkeys(question.task for question in self.questions))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for result files, questions left out."""
        counts = {task: sum(q.task == task for q in self.questions) for task in self.tasks}
        return {"name": self.name, "note": self.note, "sha256": self.sha256, "tasks": counts}


def load_suite(name: str) -> Suite:
    """A suite by name: "mini", "spec-bench:PATH", or the path of a JSONL file.

    Raises:
        ConfigError: if there is no such suite, no question in it, or a line is malformed (with its number).
    """
    kind, _, path = name.partition(":")
    if name == "mini":
        text = resources.files("outpace.bench").joinpath("data", "mini.jsonl").read_text(encoding="utf-8")
        return _parse("mini", text, "written for outpace")
    if kind == "spec-bench":
        return _spec_bench(path)
    if not Path(name).is_file():
        raise ConfigError(
            f"no suite {name!r}: neither a file nor a known name; {suggestion(name, ('mini', 'spec-bench:PATH'))}, or "
            'pass a JSONL file with lines like {"task": "chat", "turns": ["Why is the sky blue?"]}'
        )
    return _parse(Path(name).stem, _read(Path(name)), f"file {Path(name).name}")


def _spec_bench(path: str) -> Suite:
    if not path or not Path(path).is_file():
        found = f"no file {path!r}" if path else "no path given"
        raise ConfigError(
            f"{found}: outpace does not carry the Spec-Bench questions; get them from {SPEC_BENCH_SOURCE}, then pass "
            "--suite spec-bench:question.jsonl"
        )
    suite = _parse("spec-bench", _read(Path(path)), "")
    state = "unmodified" if suite.sha256 == SPEC_BENCH_SHA256 else "MODIFIED"
    renamed = tuple(
        Question(q.number, q.id, "multi_turn" if q.category in _MT_BENCH else q.task, q.turns, q.category)
        for q in suite.questions
    )
    return Suite("spec-bench", renamed, f"Spec-Bench (Xia et al. 2024), {state}", suite.sha256)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the suite {str(path)!r}: {error}") from error


def _parse(name: str, text: str, note: str) -> Suite:
    questions: list[Question] = []
    for line_number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            questions.append(_question(name, line_number, line, len(questions)))
    if not questions:
        raise ConfigError(f"suite {name!r} has no questions; it needs at least one line with turns")
    seen: dict[str, int] = {}
    for question in questions:
        if question.id in seen:
            raise ConfigError(f"suite {name!r} has two questions with id {question.id!r}; ids must differ")
        seen[question.id] = question.number
    return Suite(name, tuple(questions), note, hashlib.sha256(text.encode()).hexdigest())


def _question(suite: str, line_number: int, line: str, number: int) -> Question:
    def refuse(what: str) -> ConfigError:
        return ConfigError(
            f"line {line_number} of suite {suite!r} {what}; expected something like "
            '{"task": "chat", "turns": ["Why is the sky blue?"]}'
        )

    try:
        found = json.loads(line)
    except ValueError as error:
        raise refuse(f"is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise refuse("is not an object")
    turns = found.get("turns", [found["prompt"]] if "prompt" in found else None)
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t.strip() for t in turns):
        raise refuse('needs "turns", a list of non-empty strings, or "prompt"')
    task = str(found.get("task", found.get("category", "all")))
    return Question(number, str(found.get("id", found.get("question_id", number))), task, tuple(turns), task)


def select(
    suite: Suite, *, tasks: Sequence[str] = (), per_task: int | None = None, share: float = 1.0, seed: int = 0
) -> Suite:
    """A stratified subsample: the same share (or number) of every task, drawn by seed; order of the file kept.

    Raises:
        ConfigError: on a task the suite does not have.
    """
    for task in tasks:
        if task not in suite.tasks:
            raise ConfigError(f"suite {suite.name!r} has no task {task!r}; {suggestion(task, suite.tasks)}")
    kept: set[int] = set()
    for task in tasks or suite.tasks:
        mine = _shuffled(suite, task, seed)
        count = max(1, math.ceil(share * len(mine)))
        kept |= {q.number for q in mine[: min(count, per_task or count)]}
    questions = tuple(q for q in suite.questions if q.number in kept)
    note = suite.note
    if len(questions) < len(suite.questions):
        note += f"; {len(questions)} of {len(suite.questions)} questions, drawn per task with seed {seed}"
    return Suite(suite.name, questions, note.lstrip("; "), suite.sha256)


def stratified_units(suite: Suite, batch: int, seed: int) -> list[tuple[Question, ...]]:
    """Questions in groups to be answered together, each of one task and one number of turns.

    So ordered that any prefix holds the tasks in proportion: a run cut short stays a fair sample. Questions that do not
    fill a group are left out.

    Raises:
        ConfigError: if no group can be filled.
    """
    placed: list[tuple[float, int, tuple[Question, ...]]] = []
    largest = 0
    for index, task in enumerate(suite.tasks):
        groups: list[tuple[Question, ...]] = []
        mine = _shuffled(suite, task, seed)
        for turns in sorted({len(q.turns) for q in mine}):
            alike = [q for q in mine if len(q.turns) == turns]
            largest = max(largest, len(alike))
            groups += [tuple(alike[i : i + batch]) for i in range(0, len(alike) - batch + 1, batch)]
        if len(groups) > 1:
            random.Random(f"{seed}/{task}/groups").shuffle(groups)  # noqa: S311
        placed += [((i + 0.5) / len(groups), index, group) for i, group in enumerate(groups)]
    if not placed:
        raise ConfigError(
            f"a batch of {batch} needs as many questions of one task and number of turns; {suite.name!r} has at most "
            f"{largest}. Pass smaller --batch-sizes, or a larger suite"
        )
    return [group for *_, group in sorted(placed, key=lambda p: p[:2])]


def _shuffled(suite: Suite, task: str, seed: int) -> list[Question]:
    mine = [q for q in suite.questions if q.task == task]
    random.Random(f"{seed}/{task}").shuffle(mine)  # noqa: S311  # a draw that can be repeated
    return mine
