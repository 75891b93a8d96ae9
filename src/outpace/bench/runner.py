"""The run: blocks of trials, one prompt with every method in random order, until all is done or time is up.

Repetitions are outermost, prompts come in a stratified order and cells take turns, so whatever part of a run was
measured is a fair sample of the whole. Knows no method and no statistics; everything goes into the ledger at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from outpace.bench.dialogue import messages, prompt_ids
from outpace.bench.methods import Clock, Method
from outpace.bench.parity import prompt_name, settings_of
from outpace.bench.suites import stratified_units
from outpace.bench.trials import Answer, Cell, Job, Record, Status, Trial
from outpace.bench.watchdog import GRACE_S, LastResort, Overdue, deadline
from outpace.errors import ConfigError, ResultError

if TYPE_CHECKING:
    from outpace.bench.config import BenchConfig
    from outpace.bench.ledger import Ledger
    from outpace.bench.suites import Question, Suite
    from outpace.target import Target

Stop = Literal["done", "budget", "interrupted", "no baseline"]

WARM_UP_TOKENS = 32
WARM_UP_TOKENS_CPU = 8  # nothing is compiled there
SETTLED = 0.02  # spread of three warm-up runs in a row
RETAKES = 3  # of a trial in which graphs were captured
FIRST_LIMIT_S = 600.0
LEAST_LIMIT_S = 20.0
LIMIT_FACTOR = 10.0


@dataclass(frozen=True, slots=True)
class Block:
    """One unit of prompts in one cell, once: every method answers it."""

    cell: Cell
    repetition: int
    unit: tuple[Question, ...]


def _part(units: Sequence[tuple[Question, ...]], part: int, parts: int) -> list[tuple[Question, ...]]:
    """Those of one part, in order: units are dealt out task by task, so that parts differ by one unit at most."""
    tasks = list(dict.fromkeys(unit[0].task for unit in units))
    dealt = sorted(range(len(units)), key=lambda i: tasks.index(units[i][0].task))
    return [units[i] for i in sorted(dealt[part - 1 :: parts])]


@dataclass(slots=True)
class Watch:
    """Who wants to know how it goes: called between trials, never inside."""

    tell: Callable[[str], None] = lambda message: None
    block: Callable[[int, int, Ledger], None] = lambda done, of, ledger: None


def plan(config: BenchConfig, suite: Suite) -> list[Block]:
    """All blocks of the config's part, in order.

    Raises:
        ConfigError: if a batch size cannot be filled.
    """
    placed: list[tuple[int, float, int, Block]] = []
    cells = [
        Cell(batch, temperature, mode)
        for batch in config.batch_sizes
        for temperature in config.temperatures
        for mode in config.modes
    ]
    for index, cell in enumerate(cells):
        units = _part(stratified_units(suite, cell.batch, config.seed), *config.part)
        for repetition in range(config.repetitions):
            placed += [
                (repetition, (i + 0.5) / len(units), index, Block(cell, repetition, unit))
                for i, unit in enumerate(units)
            ]
    return [block for *_, block in sorted(placed, key=lambda p: p[:3])]


@dataclass(slots=True)
class Runner:
    """Plays a plan against methods.

    Attributes:
        target: whose tokenizer and context make prompts; None where all methods are endpoints.
        methods: the first is the baseline.
        ledger: where records go.
        clock: of trials and of the budget.
        last_resort: see `outpace.bench.watchdog`; None never ends the process.
        grace_s: between a trial's limit and the last resort.
    """

    target: Target | None
    methods: Sequence[Method]
    config: BenchConfig
    suite: Suite
    ledger: Ledger
    watch: Watch = field(default_factory=Watch)
    clock: Clock = time.perf_counter
    last_resort: LastResort | None = None
    grace_s: float = GRACE_S
    _fresh: set[str] = field(default_factory=set)
    _slowest_plain_s: float | None = None

    def run(self) -> Stop:
        """Measure what the ledger does not hold yet.

        Raises:
            ResultError: if the ledger cannot be written. What is in it stays.
        """
        blocks = plan(self.config, self.suite)
        self._blame_what_was_stuck()
        started = self.clock() - self.ledger.seconds
        spent: dict[Cell, list[float]] = {}
        earlier = self.ledger.notes.get("stop", {}).get("block_seconds", 0.0)
        stop: Stop = "done"
        try:
            missing = [block for block in blocks if not self._finished(block)]
            if missing:
                self._warm_up(missing)
            for index, block in enumerate(blocks):
                if self._finished(block):
                    continue
                if self.struck(self.methods[0].name):
                    stop = "no baseline"
                    break
                before = self.clock() - started
                if self._out_of_time(before, spent.get(block.cell, [])):
                    stop = "budget"
                    break
                self._play(block, started)
                spent.setdefault(block.cell, []).append(self.clock() - started - before)
                self.watch.block(index + 1, len(blocks), self.ledger)
        except KeyboardInterrupt:
            stop = "interrupted"
        finally:
            for method in self.methods:
                method.close()
        if self.last_resort is not None:
            self.last_resort.close()
        inside = earlier + sum(map(sum, spent.values()))
        seconds = self.clock() - started
        self.ledger.note("stop", {"reason": stop, "blocks": len(blocks), "seconds": seconds, "block_seconds": inside})
        return stop

    def struck(self, name: str) -> str | None:
        """Why a method is left out, or None."""
        failures = self.ledger.failures(name)
        stuck = any(record.status == "stuck" for record in failures)
        if stuck or len(failures) >= self.config.max_failures:
            times = "once" if len(failures) == 1 else f"{len(failures)} times"
            return f"left out after failing {times}: {failures[-1].reason}"
        return None

    def _out_of_time(self, elapsed: float, blocks: Sequence[float]) -> bool:
        budget = self.config.budget_s
        if budget is None or not self.ledger.records:
            return False
        return elapsed + (sum(blocks) / len(blocks) if blocks else 0.0) > budget

    def _finished(self, block: Block) -> bool:
        """Whether the ledger holds the whole block: every method that is still in, every turn."""
        for turn in range(len(block.unit[0].turns)):
            for method in self.methods:
                if self._takes_part(method, block.cell) and self._found(block, turn, method) is None:
                    return False
            base = self._found(block, turn, self.methods[0])
            if base is None or base.status != "ok":
                return True  # later turns have nothing to follow
        return True

    def _takes_part(self, method: Method, cell: Cell) -> bool:
        return not (method.alone and cell.batch > 1) and self.struck(method.name) is None

    def _found(self, block: Block, turn: int, method: Method) -> Record | None:
        return self.ledger.find((block.cell, block.repetition, _ids(block), turn, method.name))

    def _play(self, block: Block, started: float) -> None:
        """All turns of a block, all methods of a turn in random order."""
        for turn in range(len(block.unit[0].turns)):
            for method in self._order(block, turn):
                if self._found(block, turn, method) is not None or not self._takes_part(method, block.cell):
                    continue
                status: Status = "skipped"
                reason: str | None = "its earlier turn failed"
                trial = None
                try:
                    jobs = self._jobs(block, turn, method)
                except ConfigError as error:
                    jobs, reason = None, str(error)
                if jobs is not None:
                    self._tell_followers(block, turn, method, jobs)
                    status, reason, trial = self._try(method, block, turn, jobs)
                self._record(block, turn, method, status, reason, trial, started)
            base = self._found(block, turn, self.methods[0])
            if base is None or base.status != "ok":
                return

    def _order(self, block: Block, turn: int) -> list[Method]:
        """Random by seed; methods that must hear plain decoding first come last."""
        methods = list(self.methods)
        name = f"{self.config.seed}/{block.cell}/{block.repetition}/{block.unit[0].id}/{turn}"
        random.Random(name).shuffle(methods)  # noqa: S311
        return sorted(methods, key=lambda method: method.follows)

    def _jobs(self, block: Block, turn: int, method: Method) -> list[Job] | None:
        """The prompts of a turn; None if the answer they build on does not exist."""
        whose = self.methods[0].name if self.config.turns == "plain" else method.name
        earlier: list[list[str]] = [[] for _ in block.unit]
        for past in range(turn):
            answers = self._answers(block, past, whose)
            if answers is None:
                return None
            for place, answer in enumerate(answers):
                text = answer.text.strip() if self.config.template == "vicuna" else answer.text
                earlier[place].append(text)
        jobs = []
        for question, answered in zip(block.unit, earlier, strict=True):
            ids: list[int] = []
            if self.target is not None:
                name = prompt_name(block.cell, f"{question.id}/{turn}", whose)
                known = self.ledger.prompts.get(name)
                ids = known or prompt_ids(self.target, question.turns, answered, self.config.template)
                self.ledger.add_prompt(name, ids)
            settings = settings_of(block.cell, self.config, question.number)
            jobs.append(Job(tuple(ids), tuple(messages(question.turns, answered)), settings))
        return jobs

    def _answers(self, block: Block, turn: int, method: str) -> tuple[Answer, ...] | None:
        """A method's answers to an earlier turn: plain decoding's first, so that all repetitions ask the same."""
        for record in self.ledger.repetitions(block.cell, _ids(block), turn, method):
            if record.trial is not None and (self.config.turns == "plain" or record.repetition == block.repetition):
                return record.trial.answers
        return None

    def _tell_followers(self, block: Block, turn: int, method: Method, jobs: Sequence[Job]) -> None:
        if method.follows:
            answers = self._answers(block, turn, self.methods[0].name)
            for job, answer in zip(jobs, answers or (), strict=False):
                method.hear(job.ids, answer.tokens)

    def _try(
        self, method: Method, block: Block, turn: int, jobs: Sequence[Job]
    ) -> tuple[Status, str | None, Trial | None]:
        """One trial, whatever happens in it."""
        limit = self._limit_s()
        name = f"{method.name} on {'+'.join(q.id for q in block.unit)}, turn {turn + 1}, {block.cell}"
        try:
            with deadline(limit, last_resort=self._mark(name), grace_s=self.grace_s):
                if method.name not in self._fresh:
                    self._first_steps(method, jobs)
                trial = self._steady(method, jobs)
        except (KeyboardInterrupt, SystemExit, ResultError):
            raise
        except BaseException as error:  # Overdue is one, and a drafter may raise anything
            status, reason = _why(error, limit)
            self._fresh.discard(method.name)
            method.close()
            self.watch.tell(f"{name}: {reason}")
            return status, reason, None
        if method is self.methods[0]:
            self._slowest_plain_s = max(self._slowest_plain_s or 0.0, trial.total_ms / 1e3)
        return "ok", None, trial

    def _steady(self, method: Method, jobs: Sequence[Job]) -> Trial:
        """A trial, taken anew while graphs are captured in it: what a shape costs once is no part of its speed."""
        retakes = 0
        while True:
            if self.config.state == "cold":
                method.forget()
            trial = method.answer(jobs, self.clock)
            if not trial.captures or retakes == RETAKES:
                return replace(trial, retakes=retakes)
            retakes += 1

    def _mark(self, name: str) -> Any:
        return None if self.last_resort is None else self.last_resort.mark(name)

    def _limit_s(self) -> float:
        if self.config.limit_s is not None:
            return self.config.limit_s
        if self._slowest_plain_s is None:
            return FIRST_LIMIT_S
        return max(LEAST_LIMIT_S, LIMIT_FACTOR * self._slowest_plain_s)

    def _record(
        self,
        block: Block,
        turn: int,
        method: Method,
        status: Status,
        reason: str | None,
        trial: Trial | None,
        started: float,
    ) -> None:
        record = Record(
            cell=block.cell,
            repetition=block.repetition,
            unit=_ids(block),
            task=block.unit[0].task,
            turn=turn,
            method=method.name,
            status=status,
            reason=reason,
            at_s=self.clock() - started,
            trial=trial,
        )
        self.ledger.add(record)

    def _first_steps(self, method: Method, jobs: Sequence[Job]) -> None:
        """Open a method again after a failure, and let it decode a few tokens before it is timed."""
        method.open()
        self._fresh.add(method.name)
        method.answer([self._short(job) for job in jobs], self.clock)

    def _warm_up(self, blocks: Sequence[Block]) -> None:
        """Every method on a short, a middling and a long prompt, until three runs in a row agree or patience ends."""
        runs = self.config.warm_up_runs
        if runs is None:
            runs = 1 if self.target is None or self.target.device.type == "cpu" else 5
        found: dict[str, Any] = {}
        started = self.clock()
        samples = self._samples(blocks) if runs else []
        for method in self.methods:
            if self.struck(method.name):
                continue
            self.watch.tell(f"warming up {method.name}")
            before = self.clock()
            settled = True
            try:
                with deadline(FIRST_LIMIT_S, last_resort=self._mark(f"{method.name} while warming up")):
                    method.open()
                    for jobs in samples if not method.alone else [s[:1] for s in samples]:
                        settled &= self._settle(method, jobs, runs)
                self._fresh.add(method.name)
            except (KeyboardInterrupt, SystemExit, ResultError):
                raise
            except BaseException as error:
                method.close()
                self.watch.tell(f"{method.name} failed while warming up: {_why(error, FIRST_LIMIT_S)[1]}")
                settled = False
            found[method.name] = {"seconds": self.clock() - before, "settled": settled}
        self.ledger.note("warm_up", {"seconds": self.clock() - started, "most_runs": runs, "methods": found})

    def _samples(self, blocks: Sequence[Block]) -> list[list[Job]]:
        """Units with the shortest, the middle and the longest first prompt, of the largest batch among the blocks."""
        largest = max(block.cell.batch for block in blocks)
        jobs = []
        for block in {block.unit: block for block in blocks if block.cell.batch == largest}.values():
            try:
                made = self._jobs(block, 0, self.methods[0])
            except ConfigError:
                continue  # too long for the model; said when its turn comes
            if made is not None:
                jobs.append(made)
        jobs.sort(key=lambda made: max(len(job.ids) or len(job.messages[0]["content"]) for job in made))
        places = sorted({0, len(jobs) // 2, len(jobs) - 1}) if jobs else []
        if self.target is not None and self.target.device.type == "cpu":
            places = places[:1]  # nothing is compiled there: one length is enough
        return [jobs[place] for place in places]

    def _settle(self, method: Method, jobs: Sequence[Job], runs: int) -> bool:
        """Answer until three runs agree; whether they did. One run on request is taken as settled."""
        short = [self._short(job) for job in jobs]
        times: list[float] = []
        for _ in range(runs):
            if method.follows:
                break  # it knows no text yet
            trial = method.answer(short, self.clock)
            times.append(trial.total_ms)
            if method is self.methods[0]:
                share = max(1.0, self.config.max_new_tokens / max(1, trial.emitted / len(jobs)))
                self._slowest_plain_s = max(self._slowest_plain_s or 0.0, share * trial.total_ms / 1e3)
            last = times[-3:]
            if len(last) == 3 and max(last) <= (1 + SETTLED) * min(last):
                return True
        return runs < 3

    def _short(self, job: Job) -> Job:
        """The job with a few tokens only."""
        on_cpu = self.target is not None and self.target.device.type == "cpu"
        few = min(WARM_UP_TOKENS_CPU if on_cpu else WARM_UP_TOKENS, job.settings.max_new_tokens)
        return Job(job.ids, job.messages, job.settings.replace(max_new_tokens=few))

    def _blame_what_was_stuck(self) -> None:
        """A trial that an earlier session could not end: its method is left out from here on."""
        if self.last_resort is None or self.last_resort.found is None:
            return
        name, trace = self.last_resort.found
        method = next((m.name for m in self.methods if name.startswith(f"{m.name} ")), None)
        if method is None:
            return
        last = [line.strip() for line in trace.splitlines() if line.strip().startswith("File")]
        reason = f"never came back from native code, the process had to be ended; it was in {last[0] if last else '?'}"
        block = plan(self.config, self.suite)[0]
        self.ledger.add(
            Record(
                cell=block.cell, repetition=-1, unit=(name,), task="", turn=0, method=method, status="stuck",
                reason=reason, at_s=self.ledger.seconds, trial=None,
            )
        )  # fmt: skip
        self.watch.tell(f"{method}: {reason}")


def _ids(block: Block) -> tuple[str, ...]:
    return tuple(question.id for question in block.unit)


def _why(error: BaseException, limit: float) -> tuple[Status, str]:
    if isinstance(error, Overdue):
        return "cut", f"cut after {limit:.0f} s, the limit of a trial"
    text = str(error).strip().splitlines()
    return "crashed", f"{type(error).__name__}: {text[0] if text else 'no message'}"
