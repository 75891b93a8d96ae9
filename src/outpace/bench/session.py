"""One call from a target and a config to a result: measure, audit, replay, derive."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outpace.bench.derive import derive
from outpace.bench.endpoint import endpoint_methods
from outpace.bench.ledger import Ledger
from outpace.bench.machine import describe_machine, describe_state, describe_target, measure_floor
from outpace.bench.methods import PLAIN, EngineMethod, Method, engine_methods
from outpace.bench.overhead import bookkeeping_us_per_round
from outpace.bench.parity import audit_differences, prompt_name, references, settings_of
from outpace.bench.published import PublishedAnswer, published_figures
from outpace.bench.replay import replay
from outpace.bench.runner import Runner, Stop, Watch
from outpace.bench.stock import StockMethod
from outpace.bench.suites import Suite, select
from outpace.bench.trials import Cell, Job, Record

if TYPE_CHECKING:
    from outpace.bench.config import BenchConfig
    from outpace.bench.watchdog import LastResort
    from outpace.target import Target
    from outpace.target.widen import Widening


@dataclass(frozen=True, slots=True)
class Widened:
    """Where a widened target came from: drafters that read features are fitted to `small` and widened with it."""

    small: Target
    widening: Widening


def bench(
    target: Target,
    config: BenchConfig,
    suite: Suite,
    ledger: Ledger | None = None,
    *,
    watch: Watch | None = None,
    last_resort: LastResort | None = None,
    widened: Widened | None = None,
) -> dict[str, Any]:
    """Measure drafters against plain decoding, and derive every table.

    Args:
        target: the model.
        config: what to measure.
        suite: on which questions; `config` may narrow it.
        ledger: where records go; None keeps them in memory. One that holds an interrupted run is gone on with.
        watch: is told how it goes.
        last_resort: see `outpace.bench.watchdog`.
        widened: where a widened target came from.

    Returns:
        The result document (see `outpace.bench.derive`). An interrupt ends the measuring, not the call.

    Raises:
        ConfigError: on bad settings, before anything is measured.
        ResultError: if the ledger belongs to another run or cannot be written; what is in it stays.
    """
    small, widening = (None, None) if widened is None else (widened.small, widened.widening)
    methods = engine_methods(target, config, small=small, widening=widening)
    methods += [StockMethod(target, spec) for spec in config.stock]
    run = _Run(target, methods, config, suite, ledger or Ledger(), watch or Watch(), last_resort)
    return run.result()


def bench_endpoints(
    endpoints: Sequence[str],
    config: BenchConfig,
    suite: Suite,
    ledger: Ledger | None = None,
    *,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """The same for servers that speak the OpenAI API: "NAME=URL" or "NAME=URL,MODEL"; the first is the baseline."""
    run = _Run(None, endpoint_methods(endpoints), config, suite, ledger or Ledger(), watch or Watch(), None)
    return run.result()


def _command() -> str:
    """What was typed, without the place of the program."""
    program = Path(sys.argv[0]).name
    return shlex.join(["outpace" if program in ("outpace", "__main__.py") else program, *sys.argv[1:]])


class _Run:
    """The steps of a run, in order."""

    def __init__(
        self,
        target: Target | None,
        methods: Sequence[Method],
        config: BenchConfig,
        suite: Suite,
        ledger: Ledger,
        watch: Watch,
        last_resort: LastResort | None,
    ) -> None:
        self.target = target
        self.methods = methods
        self.config = config
        self.suite = select(suite, tasks=config.tasks, per_task=config.per_task, share=config.share, seed=config.seed)
        self.ledger = ledger
        self.watch = watch
        self.runner = Runner(target, methods, config, self.suite, ledger, watch=watch, last_resort=last_resort)

    def result(self) -> dict[str, Any]:
        """Everything."""
        self._begin()
        stop = self.runner.run()
        if self.target is not None:
            self._after(self.target, stop)
        return derive(self.ledger)

    def _begin(self) -> None:
        import torch

        device = self.target.device if self.target is not None else torch.device("cpu")
        header = {
            "identity": {**self.config.identity(), "methods": [method.name for method in self.methods]},
            "config": self.config.as_dict(),
            "suite": self.suite.as_dict(),
            "target": describe_target(self.target) if self.target is not None else {"name": self.methods[0].name},
            "machine": describe_machine(device),
            "methods": [self._describe(method) for method in self.methods],
            "command": _command(),
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        if self.target is not None and not self.ledger.header:
            self.watch.tell("measuring the floor")
            header["floor"] = measure_floor(self.target).as_dict()
        self.ledger.begin(header)
        if "bookkeeping_us_per_round" not in self.ledger.notes:
            self.ledger.note("bookkeeping_us_per_round", bookkeeping_us_per_round())
        self.ledger.note("state", {**self.ledger.notes.get("state", {}), "before": describe_state(device)})

    def _describe(self, method: Method) -> dict[str, Any]:
        return {
            "name": method.name,
            "kind": method.kind,
            "drafts": method.alone if method.kind == "stock" else method is not self.methods[0],
            "comparable_at": [t for t in self.config.temperatures if method.comparable(t)],
        }

    def _after(self, target: Target, stop: Stop) -> None:
        """What needs the model and no clock."""
        self.ledger.note("state", {**self.ledger.notes["state"], "after": describe_state(target.device)})
        decoding = {method.name: method.decoding for method in self.methods if method.decoding is not None}
        self.ledger.note("decoding", decoding)
        numbers = {question.id: question.number for question in self.suite.questions}
        by_name = {method.name: method for method in self.methods}
        audit_differences(
            target,
            self.config,
            self.ledger,
            numbers,
            lambda name, temperature: by_name[name].comparable(temperature),
            self.watch.tell,
        )
        if self.config.compat == "spec-bench":
            self.ledger.note("published", self._published(target))
        if self.config.replays and stop != "no baseline":
            self.ledger.note("replays", self._replays(target))

    def _replays(self, target: Target) -> list[dict[str, Any]]:
        """Answers of different tasks, decoded once more by every drafter that is still in."""
        chosen = self._worth_showing()
        drafting = [
            method
            for method in self.methods
            if isinstance(method, EngineMethod)
            and method.kind == "engine"
            and method.name != PLAIN
            and self.runner.struck(method.name) is None
        ]
        found = []
        for record in chosen:
            question = next(q for q in self.suite.questions if q.id == record.unit[0])
            ids = self.ledger.prompts[prompt_name(record.cell, f"{question.id}/0")]
            job = Job(tuple(ids), (), settings_of(record.cell, self.config, question.number))
            self.watch.tell(f"replaying {question.id}")
            found.append(
                {
                    "question": question.id,
                    "task": question.task,
                    "prompt": question.turns[0],
                    "temperature": record.cell.temperature,
                    "answers": [replay(method, target, job) for method in drafting],
                }
            )
        return found

    def _worth_showing(self) -> list[Record]:
        """Prompts of different tasks on whose answers drafts were accepted most, by any method."""
        accepted: dict[tuple[Cell, str], int] = {}
        for record in self.ledger.records:
            if record.trial is not None:
                count = sum(one[1] for one in record.trial.answers[0].rounds)
                place = (record.cell, record.prompt)
                accepted[place] = max(accepted.get(place, 0), count)
        plain = references(self.ledger.records)
        first = [
            record
            for (cell, _), record in plain.items()
            if cell.batch == min(self.config.batch_sizes) and record.turn == 0
        ]
        first.sort(key=lambda record: -accepted[record.cell, record.prompt])
        chosen: list[Record] = []
        for record in first:
            if all(record.task != other.task for other in chosen):
                chosen.append(record)
        return chosen[: self.config.replays]

    def _published(self, target: Target) -> dict[str, Any]:
        """Spec-Bench's own counting of every method, against stock decoding where that was measured."""
        tokenizer = target.tokenizer
        if tokenizer is None:
            return {}
        answers = {method.name: self._as_published(method.name) for method in self.methods}
        base = "transformers" if answers.get("transformers") else PLAIN
        tasks = {question.id: question.task for question in self.suite.questions}

        def encode(text: str) -> list[int]:
            start = [] if tokenizer.encode("", add_special_tokens=True) else [0]  # its "- 1" is for a BOS
            return start + tokenizer.encode(text, add_special_tokens=True)

        figures = {
            name: {
                task: one.as_dict()
                for task, one in published_figures(
                    mine, answers[base], encode, lambda answer: tasks[answer.question_id]
                ).items()
            }
            for name, mine in answers.items()
            if mine and name != base
        }
        return {"baseline": base, "methods": figures}

    def _as_published(self, method: str) -> list[PublishedAnswer]:
        """The first repetition of one method at batch 1, as answer files hold it."""
        cell = Cell(1, min(self.config.temperatures), "natural")
        turns: dict[str, list[Record]] = {}
        for record in self.ledger.records:
            if (record.cell, record.repetition, record.method) == (cell, 0, method) and record.trial is not None:
                turns.setdefault(record.unit[0], []).append(record)
        found = []
        for question in self.suite.questions:
            trials = [r.trial for r in sorted(turns.get(question.id, ()), key=lambda r: r.turn) if r.trial is not None]
            if len(trials) == len(question.turns):
                answers = [trial.answers[0] for trial in trials]
                found.append(
                    PublishedAnswer(
                        question_id=question.id,
                        category=question.category,
                        turns=tuple(answer.text.strip() for answer in answers),
                        new_tokens=tuple(answer.emitted for answer in answers),
                        wall_time=tuple(trial.total_ms / 1e3 for trial in trials),
                        accept_lengths=tuple(one[0] for answer in answers for one in answer.rounds),
                    )
                )
        return found
