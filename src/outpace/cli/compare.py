"""`outpace generate --compare`: plain decoding and the drafter on the same prompts, paired in one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import typer

from outpace.cli.options import INTERRUPTED
from outpace.cli.render import console, legend, segments, show_rounds, table, tell, verdict, write_json

if TYPE_CHECKING:
    from outpace.engine import Engine, Finding, Output
    from outpace.laws import Settings
    from outpace.target import Target

WARM_UP: Final = 8  # tokens each side decodes before anything is timed
HICCUP: Final = 4  # a round longer than this many medians was interrupted by something else


def warm_up(engines: list[Engine], ids: list[int], settings: Settings) -> None:
    """Decode a few tokens with every engine, so that none of them pays for being first."""
    short = settings.replace(max_new_tokens=min(WARM_UP, settings.max_new_tokens), min_new_tokens=0)
    for engine in engines:
        engine.generate([ids], short)


@dataclass(frozen=True, slots=True)
class Lap:
    """An answer and the time its rounds took, in milliseconds, prefill apart."""

    output: Output
    ms: float

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens over the time of the rounds."""
        return 1e3 * len(self.output.tokens) / self.ms if self.ms else 0.0

    def speed(self, plain: Lap) -> float:
        """Tokens per second over those of plain decoding."""
        return self.tokens_per_second / plain.tokens_per_second if plain.tokens_per_second else 0.0

    def believable(self, plain: Lap) -> bool:
        """A round is never cheaper than a plain one, so no speed can exceed emitted_per_round but by noise."""
        return self.speed(plain) <= 1.15 * self.output.emitted_per_round


def race(engines: Mapping[str, Engine], ids: list[int], settings: Settings) -> dict[str, Lap]:
    """Let several engines answer one prompt, a round of each in turn, so that whatever else the machine does hits all.

    A round that took more than four times the median of its engine was interrupted from outside, and counts as four.
    """
    handles = {name: engine.submit(ids, settings) for name, engine in engines.items()}
    times: dict[str, list[float]] = {name: [] for name in engines}
    outputs: dict[str, Output] = {}
    while len(outputs) < len(handles):
        for name, handle in handles.items():
            if name in outputs:
                continue
            started = perf_counter()
            progress = engines[name].step()
            times[name].append(1e3 * (perf_counter() - started))
            for one in progress:
                if one.uid == handle and one.chunk.output is not None:
                    outputs[name] = one.chunk.output
    laps = {}
    for name, output in outputs.items():
        rounds = times[name]
        rounds[0] = max(0.0, rounds[0] - output.stats.prefill_ms)  # the first step reads the prompt, too
        longest = HICCUP * median(rounds)
        laps[name] = Lap(output, sum(min(ms, longest) for ms in rounds))
    return {name: laps[name] for name in engines}


def compare_prompts(
    target: Target,
    engine: Engine,
    texts: list[str],
    ids: list[list[int]],
    settings: Settings,
    about: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Race plain decoding against `engine`, prompt by prompt, and print the answers coloured by round.

    An interrupt keeps the prompts that were finished.
    """
    from outpace.engine import Auditor
    from outpace.engine import Engine as Plain

    engines = {"plain": Plain(target, None, strict=engine.strict_rows), "drafted": engine}
    auditor = Auditor(target, settings)
    same_path = settings.greedy or engine.rule_name == "path"
    tell("warming up, then one prompt after the other: a plain round, a round with the drafter, in turn")
    on = console()
    documents: list[dict[str, Any]] = []
    interrupted = False
    try:
        warm_up(list(engines.values()), ids[0], settings)
        for index, (text, prompt) in enumerate(zip(texts, ids, strict=True)):
            request = settings.request if settings.request is not None else index
            plain, drafted = race(engines, prompt, settings.replace(request=request)).values()
            finding = None
            if same_path:
                finding = auditor.judge(plain.output, drafted.output, prompt=index, request=request)
            documents.append(_document(text, plain, drafted, finding))
            if not as_json:
                _show(target, about["drafter"], text if len(texts) > 1 else None, plain, drafted, finding, on)
    except KeyboardInterrupt:
        tell(f"interrupted after {len(documents)} of {len(texts)} prompts")
        interrupted = True
    if as_json:
        write_json({**about, "comparisons": documents})
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _show(
    target: Target, drafter: str, heading: str | None, plain: Lap, drafted: Lap, finding: Finding | None, on: Any
) -> None:
    tokenizer = target.tokenizer
    assert tokenizer is not None  # the prompt was text
    if heading is not None:
        on.print(f"> {heading}\n")
    show_rounds(segments(drafted.output, lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)), on)
    on.print(f"\n{legend(on)}")
    on.print(table(COLUMNS, [row("plain", plain, plain), row(drafter, drafted, plain)]))
    for note in drafted.output.notes:
        on.print(note)
    if finding is None:
        guarantee = drafted.output.guarantee
        on.print(f"guarantee {guarantee!r}: same distribution, not the same tokens; nothing to compare")
    else:
        on.print(verdict(finding, lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)))
    if not drafted.believable(plain):
        on.print(UNBELIEVABLE)
    on.print()


COLUMNS: Final = ("decoding", "tokens", "rounds", "emitted/round", "accepted/drafted", "tokens/s", "speed")
UNBELIEVABLE: Final = (
    "the clock is not to be trusted here: faster than the emitted tokens per round allow; the machine is busy"
)


def row(name: str, lap: Lap, plain: Lap) -> list[str]:
    """A line of the race: `speed` is tokens per second over those of plain decoding."""
    stats = lap.output.stats
    return [
        name,
        str(stats.emitted),
        str(stats.rounds),
        f"{stats.emitted_per_round:.2f}",
        f"{stats.accepted_per_drafted:.2f}" if stats.drafted else "-",
        f"{lap.tokens_per_second:.1f}",
        f"{lap.speed(plain):.2f}x",
    ]


def _document(text: str, plain: Lap, drafted: Lap, finding: Finding | None) -> dict[str, Any]:
    return {
        "prompt": text,
        "plain": {**plain.output.as_dict(), "race_tokens_per_second": plain.tokens_per_second},
        "drafted": {**drafted.output.as_dict(), "race_tokens_per_second": drafted.tokens_per_second},
        "speed": drafted.speed(plain),
        "clock_believable": drafted.believable(plain),
        "tokens_equal": plain.output.tokens == drafted.output.tokens,
        "audit": dataclasses.asdict(finding) if finding is not None else None,
    }
