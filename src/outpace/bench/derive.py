"""From the ledger to the tables: every figure of a report, and the reasons why some are withheld.

Knows no models: a ledger read from disk years later gives the same document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from outpace.bench.loops import loops
from outpace.bench.parity import verdicts
from outpace.bench.statistics import Estimate, estimate, geometric_mean, paired_ratios, percentiles
from outpace.bench.trials import FAILURES, Answer, Cell, Record, Trial

if TYPE_CHECKING:
    from outpace.bench.ledger import Ledger

FORMAT: Final = 1


def derive(ledger: Ledger) -> dict[str, Any]:
    """The result of a run, ready for JSON: what was asked, on what, and one table per cell."""
    header = ledger.header
    methods = header["methods"]
    by_cell: dict[Cell, dict[str, list[Record]]] = {}
    for record in ledger.records:
        if record.repetition >= 0:
            by_cell.setdefault(record.cell, {}).setdefault(record.method, []).append(record)
    stuck = [record for record in ledger.records if record.repetition < 0]
    cells = [_Cell(ledger, cell, by_cell[cell], stuck).table(methods) for cell in sorted(by_cell)]
    return {
        "kind": "outpace-bench",
        "format": FORMAT,
        **{name: header[name] for name in ("target", "suite", "config", "machine", "methods", "command", "started")},
        "state": ledger.notes.get("state"),
        "floor": header.get("floor"),
        "coverage": _coverage(ledger),
        "decoding": ledger.notes.get("decoding", {}),
        "warm_up": ledger.notes.get("warm_up"),
        "harness": _harness(ledger),
        "cells": cells,
        "replays": ledger.notes.get("replays", []),
        "published": ledger.notes.get("published"),
    }


def _coverage(ledger: Ledger) -> dict[str, Any]:
    """How much of the plan was measured, in words a reader of the table needs."""
    stop = ledger.stop
    blocks = {(r.cell, r.repetition, r.unit) for r in ledger.records if r.repetition >= 0}
    questions = {question for r in ledger.records if r.repetition >= 0 and r.trial for question in r.unit}
    counts = ledger.header["suite"]["tasks"]
    words = {
        "done": "complete",
        "budget": f"stopped by the time budget after {len(blocks)} of {stop['blocks']} blocks; prompts come in a "
        "stratified order, so these are a stratified subsample",
        "interrupted": f"interrupted after {len(blocks)} of {stop['blocks'] or '?'} blocks",
        "no baseline": "stopped because plain decoding itself failed",
    }
    said, parts = words[stop["reason"]], ledger.parts
    complete = stop["reason"] == "done" and parts[0] == parts[1]
    if parts[1] > 1:
        whole = f"{parts[0]} of {parts[1]} parts, each a process of its own, which may have run side by side"
        said = f"{said if complete or stop['reason'] != 'done' else 'all of it measured'}; {whole}"
    return {
        "complete": complete,
        "words": said,
        "questions": len(questions),
        "questions_of_suite": sum(counts.values()),
        "blocks": len(blocks),
        "planned_blocks": stop["blocks"],
        "seconds": stop["seconds"],
    }


def _harness(ledger: Ledger) -> dict[str, Any] | None:
    """What measuring itself cost: inside the timed windows, and between them."""
    us = ledger.notes.get("bookkeeping_us_per_round")
    trials = [record.trial for record in ledger.records if record.trial is not None]
    timed = sum(trial.total_ms for trial in trials)
    if us is None or not timed:
        return None
    rounds = sum(trial.rounds or 0 for trial in trials if trial.split_ms)
    seconds = ledger.notes.get("stop", {}).get("block_seconds", 0.0)
    return {
        "bookkeeping_us_per_round": us,
        "share_of_timed": us * rounds / 1e3 / timed,
        "share_between_trials": max(0.0, 1 - timed / 1e3 / seconds) if seconds else None,
        "retakes": sum(trial.retakes for trial in trials),
        "capturing": sum(trial.captures > 0 for trial in trials),
    }


class _Cell:
    """One table being made."""

    def __init__(
        self, ledger: Ledger, cell: Cell, records: Mapping[str, list[Record]], stuck: Sequence[Record]
    ) -> None:
        config = ledger.header["config"]
        self.ledger = ledger
        self.cell = cell
        self.records = records
        self.stuck = stuck
        self.seed, self.resamples = int(config["seed"]), int(config["bootstrap"])
        self.floor_ms: float | None = (ledger.header.get("floor") or {}).get("ms")
        self.base = ledger.header["methods"][0]["name"]
        self.times = {name: _times(rs, lambda t: t.ms_per_token) for name, rs in records.items()}
        self.decode = {name: _times(rs, _decode_ms_per_token) for name, rs in records.items()}
        self.tasks = {r.prompt: r.task for rs in records.values() for r in rs}
        self.looping = {
            r.prompt: why
            for r in records.get(self.base, ())
            if r.trial is not None
            for why in (next(filter(None, (loops(a.tokens or a.text.split()) for a in r.trial.answers)), None),)
            if why is not None
        }

    def table(self, methods: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """All rows."""
        best = self._best_plain(methods)
        return {
            "batch": self.cell.batch,
            "temperature": self.cell.temperature,
            "mode": self.cell.mode,
            "prompts": len(self.times.get(self.base, {}) and {k[0] for k in self.times[self.base]}),
            "looping": len(self.looping),
            "looping_example": next(iter(self.looping.items()), None),
            "best_plain": best,
            "methods": [self._row(method, best) for method in methods if self._belongs(method)],
        }

    def _belongs(self, method: Mapping[str, Any]) -> bool:
        return method["name"] in self.records or any(r.method == method["name"] for r in self.stuck)

    def _best_plain(self, methods: Sequence[Mapping[str, Any]]) -> str:
        """The fastest way to decode without drafts that was measured here."""
        speeds: dict[str, float] = {}
        for method in methods:
            ratios = self._ratios(self.base, method["name"])
            if not method["drafts"] and ratios:
                speeds[method["name"]] = geometric_mean(list(ratios.values()))
        return max(speeds, key=lambda name: speeds[name], default=str(self.base))

    def _ratios(self, base: str, name: str, times: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Speed of `name` over `base`, per prompt whose text does not loop."""
        source = self.times if times is None else times
        ratios = paired_ratios(source.get(base, {}), source.get(name, {}))
        return {prompt: ratio for prompt, ratio in ratios.items() if prompt not in self.looping}

    def _estimate(self, ratios: Iterable[float]) -> Estimate | None:
        return estimate(list(ratios), seed=self.seed, resamples=self.resamples)

    def _row(self, method: Mapping[str, Any], best: str) -> dict[str, Any]:
        name = method["name"]
        records = self.records.get(name, [])
        trials = [record.trial for record in records if record.trial is not None]
        answers = [answer for trial in trials for answer in trial.answers]
        comparable = self.cell.temperature in method["comparable_at"]
        parity = verdicts(self.ledger, records, comparable)
        failures = _failures(records, [r for r in self.stuck if r.method == name])
        ratios = self._ratios(self.base, name)
        measured = self._estimate(ratios.values())
        refusal = self._refusal(answers, parity, failures, measured)
        shown = None if measured is None else measured.as_dict()
        return {
            "name": name,
            "kind": method["kind"],
            "drafts": method["drafts"],
            "headline": None if refusal else shown,
            "refusal": refusal,
            "measured": shown,
            "speedup_decode": _dict(self._estimate(self._ratios(self.base, name, self.decode).values())),
            "speedup_over_best_plain": _dict(self._estimate(self._ratios(best, name).values())),
            "speedup_of_totals": self._of_totals(name),
            "units": ratios,
            "parity": parity,
            "guarantee": _guarantee(answers, comparable),
            "failures": failures,
            "notes": _notes(answers),
            **_counts(trials, answers),
            **self._costs(name, trials, answers),
            "tasks": [self._task(task, name, records) for task in dict.fromkeys(r.task for r in records)],
        }

    def _refusal(
        self, answers: Sequence[Answer], parity: Mapping[str, Any], failures: Mapping[str, Any], found: Estimate | None
    ) -> str | None:
        """Why there is no headline, or None."""
        compared = sum(parity[v] for v in ("equal", "near tie", "differs", "not audited"))
        if not answers:
            return f"no trial ended: {failures['reason']}" if failures["count"] else "nothing was measured"
        if failures["count"]:
            return f"{failures['count']} of {failures['of']} trials failed: {failures['reason']}"
        if any(answer.guarantee == "lossy" for answer in answers):
            return "lossy by its own account"
        if parity["differs"]:
            return f"{parity['differs']} of {compared} answers differ from plain decoding beyond near ties"
        if parity["not audited"]:
            return f"{parity['not audited']} differences were not audited; run the same command again"
        if found is None:
            return "every text loops" if self.looping else "nothing to pair it with"
        return None

    def _of_totals(self, name: str) -> float | None:
        """Total tokens per total time over that of the baseline, on the trials both finished."""
        mine, base = ({r.key[:4]: r.trial for r in self.records.get(n, []) if r.trial} for n in (name, self.base))
        both = [key for key in mine if key in base]
        if not both:
            return None
        speeds = [
            sum(side[key].emitted for key in both) / sum(side[key].total_ms for key in both) for side in (mine, base)
        ]
        return speeds[0] / speeds[1] if speeds[1] else None

    def _costs(self, name: str, trials: Sequence[Trial], answers: Sequence[Answer]) -> dict[str, Any]:
        """Where a round's time goes, the floor, and the acceptance at which drafting breaks even."""
        rounds = sum(trial.rounds or 0 for trial in trials)
        split = {
            key: sum(trial.split_ms.get(key, 0.0) for trial in trials) / rounds
            for key in ("draft", "pass", "walk", "other")
            if rounds and any(trial.split_ms for trial in trials)
        }
        round_ms, plain_ms = _round_ms(trials), _round_ms([r.trial for r in self.records.get(self.base, []) if r.trial])
        per_pass = split.get("pass", round_ms)
        return {
            "round_ms": round_ms,
            "split_ms_per_round": split,
            "floor_share": self.floor_ms / per_pass if self.floor_ms and per_pass else None,
            "cost": round_ms / plain_ms if round_ms and plain_ms else None,
            "break_even": None if name == self.base else break_even(round_ms, plain_ms, answers),
        }

    def _task(self, task: str, name: str, records: Sequence[Record]) -> dict[str, Any]:
        mine = [r.trial for r in records if r.task == task and r.trial is not None]
        ratios = [v for prompt, v in self._ratios(self.base, name).items() if self.tasks[prompt] == task]
        answers = [answer for trial in mine for answer in trial.answers]
        counts = _counts(mine, answers)
        return {
            "task": task,
            "speedup": _dict(self._estimate(ratios)),
            "looping": sum(self.tasks[prompt] == task for prompt in self.looping),
            **{k: counts[k] for k in ("tokens_per_s", "emitted_per_round", "accept_given_reached", "reached")},
        }


def _times(records: Sequence[Record], value: Callable[[Trial], float]) -> dict[tuple[str, int], float]:
    return {(r.prompt, r.repetition): value(r.trial) for r in records if r.trial is not None and value(r.trial) > 0}


def _decode_ms_per_token(trial: Trial) -> float:
    """Time after the first token over the tokens after it."""
    later = [(a.total_ms - a.ttft_ms, a.emitted - 1) for a in trial.answers if a.ttft_ms is not None and a.emitted > 1]
    tokens = sum(count for _, count in later)
    return sum(ms for ms, _ in later) / tokens if tokens else 0.0


def _round_ms(trials: Sequence[Trial]) -> float | None:
    """Milliseconds of a round, prefill apart: as the engine adds it up, or what came before the first token."""
    rounds, time = 0, 0.0
    for trial in trials:
        if trial.rounds and trial.split_ms:
            rounds += trial.rounds
            time += trial.total_ms - trial.split_ms["prefill"]
        elif trial.rounds and trial.rounds > 1 and all(a.ttft_ms is not None for a in trial.answers):
            rounds += trial.rounds - 1  # the first pass of stock decoding reads the prompt
            time += trial.total_ms - max(a.ttft_ms or 0.0 for a in trial.answers)
    return time / rounds if rounds else None


def break_even(round_ms: float | None, plain_ms: float | None, answers: Sequence[Answer]) -> dict[str, Any] | None:
    """What drafting must bring to pay for itself, from measured costs.

    emitted_per_round: tokens a round must emit (its cost in plain rounds). acceptance: per-token acceptance a (the same
    at every depth) that gives it, from cost = 1 + s (a + a^2 + ... + a^K), with K the mean depth of the drafts and s
    the share of rounds that had one; None if even a = 1 would not.
    """
    rounds = [one for answer in answers for one in answer.rounds]
    drafted = [one for one in rounds if one[2]]
    if not round_ms or not plain_ms or not drafted:
        return None
    cost = round_ms / plain_ms
    share = len(drafted) / len(rounds)
    depth = sum(one[3] for one in drafted) / len(drafted)

    def emitted(acceptance: float) -> float:
        whole = int(depth)
        series = sum(acceptance**i for i in range(1, whole + 1)) + (depth - whole) * acceptance ** (whole + 1)
        return 1 + share * series

    found: float | None = None
    if emitted(1.0) >= cost:
        low, high = 0.0, 1.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if emitted(middle) < cost else (low, middle)
        found = high if cost > 1 else 0.0
    return {"emitted_per_round": cost, "acceptance": found, "mean_depth": depth, "share_of_rounds_drafted": share}


def _counts(trials: Sequence[Trial], answers: Sequence[Answer]) -> dict[str, Any]:
    """Counts with their denominators, and times of requests."""
    emitted, passes = sum(a.emitted for a in answers), [a.passes for a in answers]
    drafted = sum(r[2] for a in answers for r in a.rounds)
    depth = max((len(a.reached) for a in answers), default=0)
    reached = [sum(a.reached[i] for a in answers if len(a.reached) > i) for i in range(depth)]
    accepted = [sum(a.accepted_at[i] for a in answers if len(a.accepted_at) > i) for i in range(depth)]
    seconds = sum(trial.total_ms for trial in trials) / 1e3
    known = [p for p in passes if p is not None]
    peaks = [trial.peak_bytes for trial in trials if trial.peak_bytes is not None]
    return {
        "trials": len(trials),
        "emitted": emitted,
        "seconds": seconds,
        "tokens_per_s": emitted / seconds if seconds else None,
        "ttft_ms": percentiles([a.ttft_ms for a in answers if a.ttft_ms is not None]),
        "latency_ms": percentiles([a.total_ms for a in answers]),
        "ms_per_later_token": percentiles([v for v in (_decode_ms_per_token(t) for t in trials) if v > 0]),
        "emitted_per_round": emitted / sum(known) if known and len(known) == len(passes) and sum(known) else None,
        "accepted_per_drafted": sum(r[1] for a in answers for r in a.rounds) / drafted if drafted else None,
        "drafted_per_emitted": drafted / emitted if emitted else None,
        "accept_given_reached": [a / r if r else 0.0 for a, r in zip(accepted, reached, strict=True)],
        "reached": reached,
        "peak_bytes": max(peaks, default=None),
        "finish_reasons": {k: sum(a.finish_reason == k for a in answers) for k in {a.finish_reason for a in answers}},
    }


def _guarantee(answers: Sequence[Answer], comparable: bool) -> str:
    classes = {answer.guarantee for answer in answers if answer.guarantee}
    if classes:
        return "+".join(sorted(classes))
    return "tokens compared" if comparable else "same law by its own account"


def _failures(records: Sequence[Record], stuck: Sequence[Record]) -> dict[str, Any]:
    failed = [r for r in (*records, *stuck) if r.status in FAILURES]
    return {
        "count": len(failed),
        "of": sum(r.status != "skipped" for r in records) + len(stuck),
        "kinds": sorted({r.status for r in failed}),
        "reason": failed[-1].reason if failed else None,
        "skipped": sum(r.status == "skipped" for r in records),
    }


def _notes(answers: Sequence[Answer]) -> dict[str, Any]:
    """How many answers came with a word from the engine, and the first of these words."""
    noted = [answer for answer in answers if answer.notes]
    return {"answers": len(noted), "example": noted[0].notes[0] if noted else None}


def _dict(found: Estimate | None) -> dict[str, Any] | None:
    return None if found is None else found.as_dict()
