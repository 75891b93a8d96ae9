"""What can be timed: anything that answers a batch of prompts and says how.

The one place where engines are built. Which drafter is inside one is none of this package's business.
"""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import torch

from outpace.bench.scripted import Scripted
from outpace.bench.trials import Answer, Job, Trial
from outpace.drafters import Drafter, make_drafter
from outpace.drafters.learning import LearnedDrafter
from outpace.engine import Engine, Output

if TYPE_CHECKING:
    from outpace.bench.config import BenchConfig
    from outpace.target import Target
    from outpace.target.widen import Widening

Clock = Callable[[], float]
"""Seconds, monotonic."""

PLAIN: Final = "plain"

Kind = Literal["engine", "ceiling", "stock", "endpoint"]


class Method(ABC):
    """Something that answers prompts.

    Attributes:
        name: what tables call it. kind: where it comes from.
        alone: it can answer one prompt at a time only.
        follows: it needs to be told what plain decoding said, and so runs after it.
        decoding: how a learned drafter drafted, once opened: it may have been tuned for this device.
    """

    name: str
    kind: ClassVar[Kind]
    alone: bool = False
    follows: bool = False
    decoding: Mapping[str, Any] | None = None

    def open(self) -> None:
        """Make ready; called before the first trial and after every failure."""
        return

    def close(self) -> None:
        """Free what `open` took."""
        return

    def forget(self) -> None:
        """Drop what earlier prompts taught (the cold state)."""
        return

    def hear(self, prompt: Sequence[int], said: Sequence[int]) -> None:
        """What plain decoding said behind a prompt; most methods do not listen."""
        return

    def comparable(self, temperature: float) -> bool:
        """Whether its tokens must be those of plain decoding under the same seed."""
        return temperature == 0

    @abstractmethod
    def answer(self, jobs: Sequence[Job], clock: Clock = time.perf_counter) -> Trial:
        """Answer all prompts together, timed from the first submission to the last token."""


class EngineMethod(Method):
    """An outpace engine.

    Args:
        target: the model.
        name: what tables call it.
        make: makes its drafter anew (None for plain decoding).
        config: rule, and most prompts of a batch.
        stand_down: overrides the config's.
    """

    kind: ClassVar[Kind] = "engine"

    def __init__(
        self,
        target: Target,
        name: str,
        make: Callable[[], Drafter | None],
        config: BenchConfig,
        *,
        stand_down: bool | None = None,
    ) -> None:
        self.name = name
        self._target = target
        self._make = make
        self._config = config
        self._stand_down = config.stand_down if stand_down is None else stand_down
        self._engine: Engine | None = None

    def open(self) -> None:
        """Build the engine; a drafter that cannot be made or does not fit says so here."""
        self.close()
        self._engine = self.build()
        drafter = self._engine.drafter
        if isinstance(drafter, LearnedDrafter):
            options = drafter.options()
            self.decoding = {name: options[name] for name in sorted(drafter.decoding)}

    def build(self, wrap: Callable[[Drafter], Drafter] | None = None) -> Engine:
        """An engine of this method's, `wrap` around its drafter."""
        drafter = self._make()
        if drafter is not None and wrap is not None:
            drafter = wrap(drafter)
        return Engine(
            self._target,
            drafter,
            rule=self._config.rule if drafter is not None else "path",
            max_batch=max(self._config.batch_sizes),
            stand_down=self._stand_down,
        )

    def close(self) -> None:
        """Take its adapter off the model."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def forget(self) -> None:
        """Ask the drafter to."""
        if self._engine is not None and self._engine.drafter is not None:
            self._engine.drafter.forget()

    def comparable(self, temperature: float) -> bool:
        """Always under the path rule."""
        return temperature == 0 or self._config.rule == "path" or self.name == PLAIN

    def answer(self, jobs: Sequence[Job], clock: Clock = time.perf_counter) -> Trial:
        """See `Method.answer`."""
        if self._engine is None:
            self.open()
        assert self._engine is not None
        return drive(self._engine, jobs, clock)


class CeilingMethod(EngineMethod):
    """What the machinery can do with a drafter of known quality that costs nothing: the frame for all others.

    Args:
        right: how many of its `draft_len` tokens are right, always.
    """

    kind: ClassVar[Kind] = "ceiling"
    follows = True

    def __init__(self, target: Target, config: BenchConfig, *, right: int, draft_len: int = 7) -> None:
        self._script = Scripted([right], draft_len)
        word = "always right" if right else "never right"
        super().__init__(
            target,
            f"ceiling: {word}",
            lambda: self._script,
            dataclasses.replace(config, rule="path"),
            stand_down=False,
        )

    def hear(self, prompt: Sequence[int], said: Sequence[int]) -> None:
        """Learn the text."""
        self._script.learn(prompt, said)


def drive(engine: Engine, jobs: Sequence[Job], clock: Clock = time.perf_counter) -> Trial:
    """Answer jobs as one batch, round by round, and keep the books.

    Whatever goes wrong, the engine is left without requests.
    """
    device = engine.target.device
    before, graphs = dataclasses.asdict(engine.timing), _graphs(engine)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    wait_for(device)
    started = clock()
    uids: list[int] = []
    first: dict[int, float] = {}
    ended: dict[int, float] = {}
    outputs: dict[int, Output] = {}
    try:
        for job in jobs:
            uids.append(engine.submit(job.ids, job.settings))
        while len(outputs) < len(jobs):
            progress = engine.step()
            now = clock()
            for one in progress:
                first.setdefault(one.uid, now)
                if one.chunk.output is not None:
                    outputs[one.uid] = one.chunk.output
                    ended[one.uid] = now
        total = max(ended.values()) - started  # rounds begun ahead of a stop are nobody's to wait for
        wait_for(device)
    except BaseException:
        for uid in uids:
            if uid not in outputs:
                engine.cancel(uid)
        raise
    spent = {name: value - before[name] for name, value in dataclasses.asdict(engine.timing).items()}
    return Trial(
        answers=tuple(_answer(outputs[uid], first[uid] - started, ended[uid] - started) for uid in uids),
        total_ms=1e3 * total,
        split_ms={name.removesuffix("_ms"): value for name, value in spent.items() if name.endswith("_ms")},
        rounds=int(spent["rounds"]),
        peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        captures=_graphs(engine) - graphs,
    )


def _graphs(engine: Engine) -> int:
    captured = engine.target.captured
    return 0 if captured is None else captured.capture.graphs


def wait_for(device: torch.device) -> None:
    """Let a device finish what it was given, so that clocks mean something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _answer(output: Output, ttft_s: float, total_s: float) -> Answer:
    stats = output.stats
    return Answer(
        tokens=output.tokens,
        emitted=len(output.tokens),
        prompt_tokens=len(output.prompt_tokens),
        text=output.text,
        finish_reason=output.finish_reason,
        ttft_ms=1e3 * ttft_s,
        total_ms=1e3 * total_s,
        rounds=tuple((len(r.tokens), r.accepted, r.drafted, r.depth) for r in output.rounds_detail),
        passes=stats.rounds,
        reached=tuple(stats.reached),
        accepted_at=tuple(stats.accepted_at),
        guarantee=output.guarantee,
        notes=output.notes,
    )


def engine_methods(
    target: Target, config: BenchConfig, *, small: Target | None = None, widening: Widening | None = None
) -> list[Method]:
    """Plain decoding and one method per drafter spec.

    small, widening: where the target is another one, widened: drafters that read features are fitted to that one, then
    widened with it.

    Raises:
        ConfigError: on an unknown drafter.
    """

    def maker(spec: str) -> Callable[[], Drafter | None]:
        def make() -> Drafter | None:
            drafter = make_drafter(spec)
            if drafter is None or widening is None or small is None:
                return drafter
            drafter.fit(small)
            return drafter.widened(widening, target)

        return make

    for spec in config.drafters:
        make_drafter(spec)  # a word nobody knows is said before anything is measured
    methods: list[Method] = [EngineMethod(target, PLAIN, lambda: None, config)]
    methods += [EngineMethod(target, spec, maker(spec), config) for spec in config.drafters]
    if config.ceilings:
        methods += [CeilingMethod(target, config, right=7), CeilingMethod(target, config, right=0)]
    return methods
