"""Did the run that was timed say what plain decoding said? Every difference is audited, none is taken on trust."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from outpace.bench.methods import PLAIN
from outpace.bench.trials import Answer, Cell, Record
from outpace.engine import Auditor, Output, Stats
from outpace.laws import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from outpace.bench.config import BenchConfig
    from outpace.bench.ledger import Ledger
    from outpace.target import Target


def settings_of(cell: Cell, config: BenchConfig, request: int) -> Settings:
    """Sampling and stopping of one request of a cell; the same for every method."""
    return Settings(
        max_new_tokens=config.max_new_tokens,
        temperature=cell.temperature,
        ignore_eos=cell.mode == "fixed",
        seed=config.seed,
        noise=config.noise,
        request=request,
    )


def finding_name(cell: Cell, prompt: str, plain: Answer, other: Answer) -> str:
    """Name of a comparison: what both say up to the first difference, and how each goes on."""
    shortest = min(len(plain.tokens), len(other.tokens))
    at = next((i for i in range(shortest) if plain.tokens[i] != other.tokens[i]), shortest)
    ends = [(a.tokens[at : at + 1], a.finish_reason if at == len(a.tokens) else "") for a in (plain, other)]
    text = repr((cell.temperature, cell.mode, prompt, plain.tokens[:at], ends))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def same(plain: Answer, other: Answer) -> bool:
    """Same tokens, same ending."""
    return plain.tokens == other.tokens and plain.finish_reason == other.finish_reason


def references(records: Iterable[Record], base: str = PLAIN) -> dict[tuple[Cell, str], Record]:
    """The baseline's first finished trial of every prompt: what the others are compared with."""
    found: dict[tuple[Cell, str], Record] = {}
    for record in records:
        if record.method == base and record.trial is not None:
            found.setdefault((record.cell, record.prompt), record)
    return found


def audit_differences(
    target: Target,
    config: BenchConfig,
    ledger: Ledger,
    requests: dict[str, int],
    comparable: Callable[[str, float], bool],
    tell: Callable[[str], None],
) -> None:
    """Judge every difference the ledger holds no finding for, and append it.

    requests: {question id: request of its noise}. comparable: (method, temperature) -> whether tokens must agree.
    """
    plain = references(ledger.records)
    pending: dict[str, tuple[Cell, str, int, Answer, Answer]] = {}
    for record in ledger.records:
        base = plain.get((record.cell, record.prompt))
        if record.trial is None or base is None or base.trial is None:
            continue
        if not comparable(record.method, record.cell.temperature):
            continue
        for index, (one, other) in enumerate(zip(base.trial.answers, record.trial.answers, strict=True)):
            prompt = f"{record.unit[index]}/{record.turn}"
            name = finding_name(record.cell, prompt, one, other)
            if not same(one, other) and name not in ledger.findings and _asked_the_same(ledger, record, index):
                pending[name] = (record.cell, prompt, requests[record.unit[index]], one, other)
    if pending:
        tell(f"auditing {len(pending)} differences")
    auditors: dict[Cell, Auditor] = {}
    for name, (cell, prompt, request, one, other) in pending.items():
        if cell not in auditors:
            auditors[cell] = Auditor(target, settings_of(cell, config, 0))
        ids = ledger.prompts[prompt_name(cell, prompt)]
        finding = auditors[cell].judge(_output(one, ids), _output(other, ids), prompt=request, request=request)
        ledger.add_finding(name, {"prompt": prompt, **dataclasses.asdict(finding)})


def prompt_name(cell: Cell, prompt: str, method: str = PLAIN) -> str:
    """Where the ledger keeps the ids of a prompt; a method with answers of its own in it has a place of its own."""
    if prompt.endswith("/0"):
        return prompt
    return f"{prompt}@{cell.batch},{cell.temperature:g},{cell.mode}" + ("" if method == PLAIN else f",{method}")


def _asked_the_same(ledger: Ledger, record: Record, index: int) -> bool:
    """Whether a later turn was asked behind the same words (with answers of one's own it may not have been)."""
    prompt = f"{record.unit[index]}/{record.turn}"
    own = ledger.prompts.get(prompt_name(record.cell, prompt, record.method))
    return own is None or own == ledger.prompts.get(prompt_name(record.cell, prompt))


def _output(answer: Answer, prompt: Sequence[int]) -> Output:
    return Output(
        text=answer.text,
        tokens=answer.tokens,
        prompt_tokens=tuple(prompt),
        finish_reason=answer.finish_reason,
        rounds_detail=(),
        stats=Stats(),
        guarantee="path",
    )


def verdicts(ledger: Ledger, records: Sequence[Record], comparable: bool) -> dict[str, Any]:
    """Counts over the answers of one method in one cell, by verdict, and the worst examples.

    "same text" and "other text" are for answers without token ids: a word on them, and no verdict.
    """
    names = ("equal", "near tie", "differs", "not audited", "not comparable", "same text", "other text")
    counts = dict.fromkeys(names, 0)
    examples: list[dict[str, Any]] = []
    plain = references(ledger.records, ledger.header["methods"][0]["name"])
    seen: set[tuple[str, str]] = set()
    for record in records:
        base = plain.get((record.cell, record.prompt))
        if record.trial is None or base is None or base.trial is None:
            continue
        for index, (one, other) in enumerate(zip(base.trial.answers, record.trial.answers, strict=True)):
            prompt = f"{record.unit[index]}/{record.turn}"
            if not other.tokens and other.text:
                counts["same text" if one.text == other.text else "other text"] += 1
            elif not comparable or not _asked_the_same(ledger, record, index):
                counts["not comparable"] += 1
            elif same(one, other):
                counts["equal"] += 1
            else:
                name = finding_name(record.cell, prompt, one, other)
                finding = ledger.findings.get(name)
                verdict = "not audited" if finding is None else str(finding["verdict"])
                counts[verdict] += 1
                if finding is not None and (prompt, name) not in seen:
                    seen.add((prompt, name))
                    examples.append(finding)
    examples.sort(key=lambda f: (f["verdict"] != "differs", f["prompt"]))
    return {**counts, "examples": examples[:3]}
