"""When not to speculate: measured cost against measured gain, per request.

A round with a draft costs more than a plain one and emits more. So may a round whose drafter was asked and had nothing
to say: plain is a round in which nobody was asked. The pace adds up, per request, what drafts have lost lately (cost in
plain rounds, less tokens emitted; never below zero) and lets the drafter stand down when that exceeds a fixed
allowance: an expensive drafter is judged after two rounds, a cheap one after twenty. It tries again later, ever more
rarely. It decides from times, so *when* it stands down differs from run to run; what is emitted does not.
"""

from __future__ import annotations

import warnings
from collections import deque
from statistics import median
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from outpace.drafters import RequestContext
    from outpace.engine.output import Round

_ALLOWANCE: Final = 3.0  # plain rounds that drafts may lose before they stand down
_FIRST_PAUSE: Final = 16  # rounds; doubles at each further stand-down
_LONGEST_PAUSE: Final = 512
_PLAIN_EVERY: Final = 64  # rounds between plain ones, when a drafter always drafts: the baseline must stay measured
_DEAD_AFTER: Final = 100  # drafted rounds of an engine
_FREE: Final = 1.05  # plain rounds that asking in vain may cost without being held against a drafter
_FOR_GOOD: Final = 1 << 30


class Costs:
    """Milliseconds of rounds, by width: the median of the latest few, so that one hiccup decides nothing."""

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=15)
        self._drafted: dict[int, deque[float]] = {}

    def add(self, nodes: int | None, ms: float) -> None:
        """A round with drafts of up to `nodes` nodes took so long; None: no drafter was asked."""
        if nodes is None:
            self._plain.append(ms)
        else:
            self._drafted.setdefault(nodes.bit_length(), deque(maxlen=15)).append(ms)

    @property
    def plain_ms(self) -> float | None:
        """A plain round, or None before one was measured."""
        return median(self._plain) if len(self._plain) >= 2 else None

    def ratio(self, nodes: int) -> float | None:
        """How many plain rounds one with drafts of `nodes` nodes costs, or None if unknown."""
        plain, drafted = self.plain_ms, self._drafted.get(nodes.bit_length())
        return median(drafted) / plain if plain and drafted else None


class _Record:
    """What drafts have brought one request lately."""

    __slots__ = ("emitted", "loss", "notes", "paid", "pause", "resume")

    def __init__(self, pause: int) -> None:
        self.emitted: deque[int] = deque(maxlen=16)
        self.paid: deque[float] = deque(maxlen=16)
        self.loss = 0.0
        self.pause = pause
        self.resume = 0
        self.notes: list[str] = []


class Pace:
    """Decides, before each round, which requests speculate.

    Args:
        enabled: False never stands down (benchmarks of drafters, tests).
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self.dead = False
        self._costs: dict[int, Costs] = {}
        self._records: WeakKeyDictionary[RequestContext, _Record] = WeakKeyDictionary()
        self._rounds = 0
        self._since_plain = 0
        self._drafted_rounds = 0
        self._accepted = 0
        self._stood_down = 0  # requests in a row whose drafts did not pay: the next one pauses longer at once

    def decide(self, requests: list[RequestContext]) -> None:
        """Set `speculate` and `rest` of every request for the coming round."""
        self._rounds += 1
        calibrate = self.enabled and self._needs_plain(len(requests))
        for request in requests:
            pause = _FIRST_PAUSE << min(self._stood_down, 4)
            record = self._records.setdefault(request, _Record(pause))
            resume = _FOR_GOOD if self.dead else record.resume
            request.speculate = not (calibrate or request.round_index < resume)
            request.rest = max(0, resume - request.round_index - 1)

    def _needs_plain(self, batch: int) -> bool:
        costs = self._costs.get(batch)
        if costs is None:
            return False  # begin with what the user asked for
        return costs.plain_ms is None or self._since_plain >= _PLAIN_EVERY

    def learn(self, requests: list[RequestContext], rounds: list[Round], ms: float, drafter: str) -> None:
        """A round of the batch is over and took `ms`."""
        asked = any(request.speculate for request in requests)
        widest = max(one.drafted for one in rounds)
        costs = self._costs.setdefault(len(requests), Costs())
        costs.add(widest if asked else None, ms)
        self._since_plain = self._since_plain + 1 if asked else 0
        ratio = costs.ratio(widest) if asked else None
        for request, one in zip(requests, rounds, strict=True):
            if one.drafted:
                self._drafted_rounds += 1
                self._accepted += one.accepted
            if one.drafted or (request.speculate and not widest):
                self._judge(request, one, ratio)
        if self.enabled and not self.dead and self._drafted_rounds >= _DEAD_AFTER:
            self._look_for_life(drafter)

    def _judge(self, request: RequestContext, one: Round, ratio: float | None) -> None:
        record = self._records[request]
        if not self.enabled or ratio is None or (not one.drafted and ratio < _FREE):
            return
        record.emitted.append(len(one.tokens))
        record.paid.append(ratio)
        record.loss = max(0.0, record.loss + ratio - len(one.tokens))
        if record.loss == 0:
            record.pause = _FIRST_PAUSE
            self._stood_down = 0
        if record.loss < _ALLOWANCE:
            return
        gain = sum(record.emitted) / len(record.emitted)
        cost = sum(record.paid) / len(record.paid)
        record.resume = request.round_index + 1 + record.pause
        record.notes.append(
            f"stood down at round {request.round_index} for {record.pause} rounds: drafts emitted {gain:.2f} tokens "
            f"per round at {cost:.2f} times the cost of a plain round"
        )
        record.pause = min(_LONGEST_PAUSE, 2 * record.pause)
        record.loss = 0.0
        record.emitted.clear()
        record.paid.clear()
        self._stood_down += 1

    def _look_for_life(self, drafter: str) -> None:
        if self._accepted * _DEAD_AFTER <= self._drafted_rounds:
            self.dead = True
            warnings.warn(
                f"drafter {drafter!r} had {self._accepted} tokens accepted in {self._drafted_rounds} drafted rounds "
                "and is switched off. That is rarely bad luck: check that it was trained for this very target, "
                "tokenizer and chat template, that it reads the taps it was trained on, and that positions are not "
                "shifted by one",
                stacklevel=4,
            )

    def notes(self, request: RequestContext) -> tuple[str, ...]:
        """What was decided for a request, in words."""
        record = self._records.get(request)
        return tuple(record.notes) if record else ()
