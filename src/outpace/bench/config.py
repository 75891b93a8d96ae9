"""What a user may ask of one benchmark run. Frozen, checked once; one definition for Python, flags and result files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from outpace.errors import ConfigError, suggestion
from outpace.laws import NOISES, NoiseKind, RuleName, find_rule

Mode = Literal["natural", "fixed"]
State = Literal["cold", "warm"]
Template = Literal["chat", "vicuna", "none"]
Turns = Literal["plain", "own"]

STOCK: Final = ("transformers", "transformers:prompt_lookup_num_tokens=10")
_WITHOUT_EFFECT_ON_TRIALS: Final = ("budget_s", "replays", "bootstrap", "limit_s", "max_failures", "part")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchConfig:
    """One run: what is measured, how often, and when to stop.

    Attributes:
        drafters: specs as for `Engine`. Plain decoding in the same engine always runs; it is the baseline.
        stock: `transformers.generate` beside it: "transformers", optionally with options of generate, such as
            "transformers:prompt_lookup_num_tokens=10" or "transformers:assistant_model=NAME".
        ceilings: also run a drafter that is always right and one that never is: the best and the worst the machinery
            can do here.
        rule: of verification.
        stand_down: let the engine stop speculating where it does not pay, as it does by default.
        temperatures, batch_sizes, modes: every combination is a cell with tables of its own. "natural" ends at eos;
            "fixed" emits exactly max_new_tokens on all sides.
        max_new_tokens: most tokens of an answer.
        repetitions: times every prompt is run with every method; the median counts.
        noise: what decides tokens at a temperature, see `laws.Settings`.
        seed: of noise, of orders, of subsamples, of the bootstrap.
        state: "cold" makes drafters forget earlier requests before each trial; "warm" lets them learn (only the
            prompt order, shuffled by seed, then decides what they have seen).
        template: "chat" (the model's own, plain text if it has none), "vicuna" (Spec-Bench's), or "none".
        turns: what later turns contain: "plain" decoding's answers, the same for all methods, or each method's "own".
        compat: "spec-bench" adds the published way of counting beside ours.
        tasks: only these tasks of the suite; empty: all.
        per_task: at most so many questions of each task. share: that share of each task. Drawn by seed.
        budget_s: stop before a block of trials that would not end within so many seconds of warm-up and measuring.
            Prompts come in a stratified order, so what was run is a stratified subsample.
        part: (k, n): of the questions only every n-th, from the k-th on. The parts of a run may be measured in several
            processes or on machines alike, each with a ledger of its own; `Ledger.joined` makes one of them.
        limit_s: cut a trial after so many seconds; None: ten times what plain decoding needs, at least 20 s.
        max_failures: after so many crashes or cuts a method is left out.
        warm_up_runs: most warm-up runs per method and prompt length; None: 1 on CPU, 5 elsewhere.
        replays: answers shown round by round in the report.
        bootstrap: resamples of an interval.

    Raises:
        ConfigError: on a value that cannot be.
    """

    drafters: tuple[str, ...] = ("prompt_lookup", "suffix")
    stock: tuple[str, ...] = STOCK
    ceilings: bool = False
    rule: RuleName = "path"
    stand_down: bool = True
    temperatures: tuple[float, ...] = (0.0,)
    batch_sizes: tuple[int, ...] = (1,)
    modes: tuple[Mode, ...] = ("natural",)
    max_new_tokens: int = 128
    repetitions: int = 3
    noise: NoiseKind = "gumbel"
    seed: int = 0
    state: State = "cold"
    template: Template = "chat"
    turns: Turns = "plain"
    compat: Literal["spec-bench"] | None = None
    tasks: tuple[str, ...] = ()
    per_task: int | None = None
    share: float = 1.0
    budget_s: float | None = None
    part: tuple[int, int] = (1, 1)
    limit_s: float | None = None
    max_failures: int = 3
    warm_up_runs: int | None = None
    replays: int = 3
    bootstrap: int = 10_000

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_words()

    def _check_numbers(self) -> None:
        def need(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

        for name in ("temperatures", "batch_sizes", "modes"):
            values = getattr(self, name)
            need(len(values) > 0 and len(set(values)) == len(values), name, "one or more different values")
        need(all(0 <= t < float("inf") for t in self.temperatures), "temperatures", "0 (greedy) or above")
        need(all(b >= 1 for b in self.batch_sizes), "batch_sizes", "at least 1")
        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(self.repetitions >= 1, "repetitions", "at least 1")
        need(0 < self.share <= 1, "share", "in (0, 1]")
        need(self.per_task is None or self.per_task >= 1, "per_task", "at least 1 (or None for all)")
        need(self.budget_s is None or self.budget_s > 0, "budget_s", "above 0 seconds (or None)")
        need(len(self.part) == 2 and 1 <= self.part[0] <= self.part[1], "part", "(k, n) with 1 <= k <= n")
        need(self.part[1] == 1 or self.compat is None, "part", "(1, 1) with compat, which counts a whole run")
        need(self.limit_s is None or self.limit_s > 0, "limit_s", "above 0 seconds (or None)")
        need(self.max_failures >= 1, "max_failures", "at least 1")
        need(self.warm_up_runs is None or self.warm_up_runs >= 0, "warm_up_runs", "0 or more (or None)")
        need(self.bootstrap >= 100, "bootstrap", "at least 100 resamples")
        need(self.replays >= 0, "replays", "0 or more")
        names = (*self.drafters, *self.stock)
        need(len(set(names)) == len(names), "drafters" if self.drafters else "stock", "without repetition")

    def _check_words(self) -> None:
        known: dict[str, tuple[Any, ...]] = {
            "state": ("cold", "warm"),
            "template": ("chat", "vicuna", "none"),
            "turns": ("plain", "own"),
            "noise": NOISES,
            "compat": (None, "spec-bench"),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                words = [word for word in allowed if word is not None]
                raise ConfigError(f"unknown {name} {getattr(self, name)!r}; {suggestion(getattr(self, name), words)}")
        for mode in self.modes:
            if mode not in ("natural", "fixed"):
                raise ConfigError(f"unknown mode {mode!r}; {suggestion(mode, ('natural', 'fixed'))}")
        find_rule(self.rule)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchConfig:
        """The config of a result file.

        Raises:
            ConfigError: on an unknown name, with the closest known one.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r} of a benchmark; {suggestion(name, known)}")
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**plain)

    def identity(self) -> dict[str, Any]:
        """What two runs must share to be one: everything that changes a trial."""
        return {k: v for k, v in self.as_dict().items() if k not in _WITHOUT_EFFECT_ON_TRIALS}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
