"""The demo: SmolLM2 answers real prompts, plainly, with drafters that need no training, and with those that ship."""

from __future__ import annotations

import itertools
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from outpace.cli.compare import COLUMNS, UNBELIEVABLE, Lap, race, row, warm_up
from outpace.cli.options import Debug, Device, Dtype, MaxNewTokens, Model, Seed, load_target
from outpace.cli.prompts import SAMPLES, Sample
from outpace.cli.render import console, legend, segments, show_rounds, table, verdict

if TYPE_CHECKING:
    from outpace.engine import Auditor, Engine, Finding
    from outpace.laws import Settings
    from outpace.target import Target

DRAFTERS: Final = ("prompt_lookup", "suffix", "layer_skip", "lookahead")
TEMPERATURES: Final = (0.0, 0.8)
PAYS: Final = 1.03  # below that, a single run cannot tell a gain from noise
BUDGET_S: Final = 210  # no race begins that would, at the pace so far, end later than this


def demo(
    model: Model = "smollm2",
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = 7,
    dtype: Dtype = "auto",
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Watch drafters race plain decoding.

    Every training-free drafter on real prompts: same tokens, fewer passes, and honest clocks.
    """
    from outpace.engine import Auditor, Engine
    from outpace.laws import Settings

    started = time.perf_counter()
    on = console()
    settings = Settings(max_new_tokens=max_new_tokens, seed=seed)
    target = load_target(model, dtype=dtype, device=device, trust_remote_code=False)
    drafters = (*DRAFTERS, *_shipped(target))
    on.print(
        f"{len(SAMPLES)} prompts at temperatures {' and '.join(f'{t:g}' for t in TEMPERATURES)}, each answered "
        f"plainly and with {len(drafters)} drafters ({', '.join(drafters)}), from the same seed. Two to three minutes "
        f"on two idle CPU cores; what does not fit into {BUDGET_S} s is left out. Ctrl-C leaves.\n"
    )
    engines = {"plain": Engine(target, None)} | {name: Engine(target, name) for name in drafters}
    warm_up(list(engines.values()), _ids(target, SAMPLES[0]), settings)
    on.print(legend(on))
    races: list[Race] = []
    auditors = {t: Auditor(target, settings.replace(temperature=t)) for t in TEMPERATURES}
    racing = time.perf_counter()
    for (temperature, auditor), (index, sample) in itertools.product(auditors.items(), enumerate(SAMPLES)):
        now = time.perf_counter()
        if races and now - started + (now - racing) / len(races) > BUDGET_S:
            on.print("\nThis machine is busy or slow: the remaining races are left out.")
            break
        one = settings.replace(temperature=temperature, request=index)
        races.append(_race(target, engines, auditor, sample, one))
        _show(races[-1], target, on)
    _close(races, time.perf_counter() - started, on)


def _shipped(target: Target) -> list[str]:
    """Names of the drafters that ship for this target."""
    from outpace.drafters import drafter_names
    from outpace.drafters.checkpoint import find_shipped

    return [name for name in drafter_names() if find_shipped(name, target) is not None]


@dataclass(frozen=True)
class Race:
    """One prompt at one temperature: plain decoding and every drafter, a round of each in turn."""

    sample: Sample
    temperature: float
    plain: Lap
    laps: dict[str, Lap]
    findings: dict[str, Finding]

    @property
    def fastest(self) -> str:
        """The drafter with the most tokens per second."""
        return max(self.laps, key=lambda name: self.laps[name].tokens_per_second)


def _ids(target: Target, sample: Sample) -> list[int]:
    from outpace.engine import encode

    return encode(target, sample.text)


def _race(target: Target, engines: dict[str, Engine], auditor: Auditor, sample: Sample, settings: Settings) -> Race:
    laps = race(engines, _ids(target, sample), settings)
    plain = laps.pop("plain")
    request = settings.request or 0
    findings = {
        name: auditor.judge(plain.output, lap.output, prompt=request, request=request) for name, lap in laps.items()
    }
    return Race(sample, settings.temperature, plain, laps, findings)


def _show(one: Race, target: Target, on: Any) -> None:
    tokenizer = target.tokenizer
    assert tokenizer is not None  # prompts are text
    best = one.fastest
    on.print(f"\n--- {one.sample.kind}, temperature {one.temperature:g} (rounds of {best} shown) ---")
    show_rounds(segments(one.laps[best].output, lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)), on)
    rows = [[*row("plain", one.plain, one.plain), "-"]]
    for name, lap in one.laps.items():
        same = one.findings[name].verdict
        rows.append([*row(name, lap, one.plain), "yes" if same == "equal" else same])
    on.print(table((*COLUMNS, "same tokens"), rows))
    for name, finding in one.findings.items():
        if finding.difference is not None:
            on.print(f"{name}: {verdict(finding, lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False))}")
    on.print(_judgement(one))


def _judgement(one: Race) -> str:
    """One honest line on a race."""
    best = one.fastest
    gain = one.laps[best].speed(one.plain)
    if not all(lap.believable(one.plain) for lap in one.laps.values()):
        return f"verdict: none; {UNBELIEVABLE}."
    if gain >= PAYS:
        return f"verdict: {best} pays here, {gain:.2f} times plain decoding."
    return f"verdict: nothing pays here; the best, {best}, runs at {gain:.2f} times plain decoding."


def _close(races: list[Race], seconds: float, on: Any) -> None:
    findings = [finding for one in races for finding in one.findings.values()]
    equal = sum(finding.verdict == "equal" for finding in findings)
    ties = sum(finding.verdict == "near tie" for finding in findings)
    beyond = len(findings) - equal - ties
    on.print(
        f"\n{equal} of {len(findings)} answers hold the very tokens of plain decoding, {ties} part at a near tie, "
        f"{beyond} otherwise{' (a bug: please report it)' if beyond else ''}. Each answer was timed once, so read "
        f"speeds to about ten percent. {seconds:.0f} s in all."
    )
    on.print('Next: outpace generate --compare "your own prompt"; outpace check smollm2; outpace doctor')


if __name__ == "__main__":
    from outpace.cli import main

    main(["demo", *sys.argv[1:]])
