"""How a run stands while it lasts: cheap figures, no intervals, no verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outpace.bench.parity import references, same
from outpace.bench.statistics import geometric_mean, paired_ratios
from outpace.bench.trials import FAILURES, Cell

if TYPE_CHECKING:
    from outpace.bench.ledger import Ledger


@dataclass(frozen=True, slots=True)
class Standing:
    """One method so far.

    Attributes:
        speed: geometric mean of paired ratios to the baseline; None before there is a pair.
        differing: answers that are not, token for token, the baseline's; the audit comes later.
    """

    method: str
    trials: int
    failures: int
    speed: float | None
    tokens_per_s: float | None
    emitted_per_round: float | None
    differing: int


def standings(ledger: Ledger, cell: Cell) -> list[Standing]:
    """All methods in one cell, in the run's order."""
    records = [record for record in ledger.records if record.cell == cell and record.repetition >= 0]
    base = ledger.header["methods"][0]["name"]
    plain = references(records, base)
    times: dict[str, dict[tuple[str, int], float]] = {}
    for record in records:
        if record.trial is not None:
            times.setdefault(record.method, {})[record.prompt, record.repetition] = record.trial.ms_per_token
    found = []
    for method in ledger.header["methods"]:
        name = method["name"]
        mine = [record for record in records if record.method == name]
        trials = [record.trial for record in mine if record.trial is not None]
        ratios = list(paired_ratios(times.get(base, {}), times.get(name, {})).values())
        ms, emitted = sum(t.total_ms for t in trials), sum(t.emitted for t in trials)
        passes = sum(a.passes or 0 for t in trials for a in t.answers)
        differing = 0
        for record in mine:
            reference = plain.get((cell, record.prompt))
            if record.trial is not None and reference is not None and reference.trial is not None:
                pairs = zip(reference.trial.answers, record.trial.answers, strict=True)
                differing += sum(not same(one, other) for one, other in pairs)
        found.append(
            Standing(
                method=name,
                trials=len(trials),
                failures=sum(record.status in FAILURES for record in mine),
                speed=geometric_mean(ratios) if ratios else None,
                tokens_per_s=1e3 * emitted / ms if ms else None,
                emitted_per_round=emitted / passes if passes else None,
                differing=differing,
            )
        )
    return found
