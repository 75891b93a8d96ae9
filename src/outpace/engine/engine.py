"""The engine: requests join and leave a ragged batch at any round; every round is `play_round`.

Which method drafts, and which rule verifies, is none of its business.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from outpace.drafters import Context, Drafter, RequestContext, make_drafter
from outpace.engine.output import Chunk, Output, Round, Stats
from outpace.engine.pace import Pace
from outpace.engine.prompts import Prompt, as_batch, encode
from outpace.engine.round import Played, Timing, play_round
from outpace.errors import ConfigError, OutpaceError
from outpace.laws import (
    GUARANTEES,
    Guarantee,
    Noise,
    NoiseDice,
    RuleName,
    Sampler,
    Settings,
    Stopping,
    check_names,
    find_rule,
)
from outpace.target import STRICT_ALIGN, PathName, Target

if TYPE_CHECKING:
    from outpace.engine.device.rounds import DeviceRounds

STRICT_ROWS = 16


@dataclass(eq=False)
class _Live:
    """A request inside the engine."""

    uid: int
    context: RequestContext
    stopping: Stopping
    guarantee: Guarantee
    stats: Stats = field(default_factory=Stats)
    rounds: list[Round] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    admitted: float = 0.0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a step did for one request: `output` is set when it ended."""

    uid: int
    chunk: Chunk


class Engine:
    """Decodes, with or without a drafter; the text is the same.

    Args:
        target: the model whose text is wanted.
        drafter: a `Drafter`, a spec such as "suffix", "prompt_lookup:draft_len=8" or "prompt_lookup+suffix", or None
            for plain decoding (the baseline of every comparison).
        rule: "path" (default: same tokens as plain decoding), or "token", "block", "tree" for drafts that are truly
            sampled (same law).
        max_batch: most requests in one pass; others wait.
        strict: run every pass at the same number of rows (True: 16, or that many), so that plain and speculative
            decoding use the same kernels. Slower; for audits.
        stand_down: decode plainly where drafts measurably do not pay.
        check_integrity: check the cache's invariants after every round (tests).
        path: how passes and rounds run: "auto" (captured on CUDA where possible), "readable" (the model's own modules
            and the loop of `engine.round`), "fast" (refuse any other pass; learned drafters draft on the device too).

    Raises:
        ConfigError: on an unknown rule or drafter, or a drafter the rule cannot verify.
        CheckpointError: if the drafter was made for another target.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | str | None = None,
        *,
        rule: RuleName = "path",
        max_batch: int = 8,
        strict: bool | int = False,
        stand_down: bool = True,
        check_integrity: bool = False,
        path: PathName | None = None,
    ) -> None:
        self.target = target if path is None else target.through(path)
        self.drafter = make_drafter(drafter)
        self.rule_name: RuleName = rule
        self._rule = find_rule(rule)
        self.strict_rows = STRICT_ROWS if strict is True else int(strict)
        self.max_batch = max_batch
        _check_options(self.drafter, rule, max_batch, self.strict_rows)
        self.timing = Timing()
        self.pace = Pace(enabled=stand_down)
        self._checks = check_integrity
        self._context = Context(
            self.target, target.new_cache(align=STRICT_ALIGN) if self.strict_rows else target.new_cache()
        )
        self._device: DeviceRounds | None = None
        self._live: list[_Live] = []
        self._waiting: deque[_Live] = deque()
        self._next_uid = 0
        self._open = ExitStack()
        if self.drafter is not None:
            self.drafter.fit(target)
            if self.drafter.adapter is not None:
                self._open.enter_context(target.adapted(self.drafter.adapter))

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        drafter: Drafter | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Engine:
        """Load a target (see `Target.from_pretrained`) and build an engine around it; `options` go to `Engine`."""
        made = make_drafter(drafter)
        rule: RuleName = options.get("rule", "path")
        find_rule(rule)
        _check_options(made, rule, 1, 0)  # a mistake here should not cost the loading of a model
        target = Target.from_pretrained(name_or_path, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        return cls(target, made, **options)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], settings: Settings | None = None, **changes: Any
    ) -> list[Output]:
        """Answer prompts, as one ragged batch.

        Args:
            prompts: one prompt or several: a string (one user turn, through the chat template if there is one), chat
                messages, or token ids.
            settings: sampling and stopping.
            **changes: single settings, applied to `settings` or to the defaults.

        Returns:
            One `Output` per prompt, in order. Prompt i draws its noise as request i unless settings name a request.

        Raises:
            ConfigError: on bad settings or prompts, before anything is decoded.
            OutpaceError: whatever goes wrong later carries what was decoded so far in its `partial` attribute; so
                does KeyboardInterrupt.
        """
        settings = _settings(settings, changes)
        batch = as_batch(prompts)
        encoded = [encode(self.target, prompt) for prompt in batch]
        uids = [
            self._enqueue(ids, settings, settings.request if settings.request is not None else i, streamed=False)
            for i, ids in enumerate(encoded)
        ]
        done: dict[int, Output] = {}
        try:
            while len(done) < len(uids):
                for progress in self.step():
                    if progress.chunk.output is not None:
                        done[progress.uid] = progress.chunk.output
        except BaseException as error:
            partial = [done[uid] if uid in done else self.cancel(uid) for uid in uids]
            if isinstance(error, OutpaceError | KeyboardInterrupt):
                error.partial = partial  # type: ignore[union-attr]
            raise
        return [done[uid] for uid in uids]

    def stream(self, prompt: Prompt, settings: Settings | None = None, **changes: Any) -> Iterator[Chunk]:
        """Answer one prompt piece by piece, a chunk per round; the last chunk carries the `Output`.

        Text is handed out in order and never taken back. Leaving the loop early cancels the request.
        """
        settings = _settings(settings, changes)
        uid = self.submit(prompt, settings)
        finished = False
        try:
            while not finished:
                for progress in self.step():
                    if progress.uid == uid:
                        finished = progress.chunk.output is not None
                        yield progress.chunk
        finally:
            if not finished:
                self.cancel(uid)

    def submit(self, prompt: Prompt, settings: Settings | None = None, **changes: Any) -> int:
        """Queue a request; it joins the batch at the next `step` with room. Returns its handle."""
        settings = _settings(settings, changes)
        return self._enqueue(encode(self.target, prompt), settings, settings.request or 0)

    def step(self) -> list[Progress]:
        """Admit waiting requests, play one round, retire what ended. Empty when there is nothing to do."""
        with torch.inference_mode():
            while self._waiting and len(self._live) < self.max_batch:
                self._admit(self._waiting.popleft())
            if not self._live:
                return []
            requests = self._context.requests
            self.pace.decide(requests)
            try:
                played = self._play()
            except BaseException:
                self._context.cache.drop()
                raise
            if self.drafter is not None:
                self.pace.learn(requests, played.rounds, played.ms, self.drafter.name)
            return self._settle(played)

    def _play(self) -> Played:
        """One round, on the device where that can be, else the readable one."""
        stoppings = [live.stopping for live in self._live]
        device = self._device_rounds()
        if device is not None and device.takes(self._context):
            return device.play(self._context, self.drafter, stoppings, self.timing)
        if device is not None:
            device.forget()
        return play_round(self._context, self.drafter, self._rule, stoppings, self.timing, strict_rows=self.strict_rows)

    def _device_rounds(self) -> DeviceRounds | None:
        """The captured loop, where target, rule and drafter allow it."""
        fast = self.target.captured
        if fast is None or self.rule_name != "path" or self.strict_rows:
            return None
        if self._device is None or self._device.fast is not fast:
            from outpace.engine.device.rounds import DeviceRounds

            if self._device is not None:
                self._device.forget()  # the model was moved: what its rounds left owed is the host's again
            self._device = DeviceRounds(fast, self.target.layer_ids)
        return self._device if self._device.serves(self.drafter) else None

    def cancel(self, uid: int) -> Output:
        """Take a request out, wherever it is, and return what it had.

        Raises:
            ConfigError: if there is no such request.
        """
        for live in list(self._waiting):
            if live.uid == uid:
                self._waiting.remove(live)
                return self._output(live, "interrupted")
        for slot, live in enumerate(self._live):
            if live.uid == uid:
                live.text.append(live.stopping.close())
                output = self._output(live, "interrupted")
                with torch.inference_mode():
                    self._retire(slot)
                return output
        raise ConfigError(f"no request with handle {uid}; it has ended, or was never submitted")

    @property
    def active(self) -> int:
        """Requests in the batch or waiting for it."""
        return len(self._live) + len(self._waiting)

    def close(self) -> None:
        """Take the drafter's adapter off the model; the engine is not to be used afterwards."""
        self._open.close()

    def _enqueue(self, ids: list[int], settings: Settings, request: int, *, streamed: bool = True) -> int:
        target = self.target
        eos = () if settings.ignore_eos else settings.eos if settings.eos is not None else target.eos
        if settings.stop and target.tokenizer is None:
            raise ConfigError(f"stop strings need a tokenizer, and {target.name} has none; use eos=(ids) instead")
        bad = next((t for t in (*eos, *settings.logit_bias) if not 0 <= t < target.vocabulary), None)
        if bad is not None:
            raise ConfigError(
                f"token id {bad} in eos or logit_bias; {target.name} has ids 0 to {target.vocabulary - 1}"
            )
        room = min(settings.max_new_tokens, target.context - len(ids))
        sampler = Sampler(
            settings,
            NoiseDice(Noise(settings.seed), request, settings.noise),
            prompt_length=len(ids),
            eos=eos,
        )
        context = RequestContext(list(ids), len(ids), sampler, room)
        stopping = Stopping(_decoder(target), eos=eos, stop=settings.stop, max_tokens=room, streamed=streamed)
        plain = self.drafter is None or settings.greedy
        guarantee: Guarantee = "path" if plain else GUARANTEES[self.rule_name]
        self._waiting.append(_Live(self._next_uid, context, stopping, guarantee))
        self._next_uid += 1
        return self._next_uid - 1

    def _admit(self, live: _Live) -> None:
        """Prefill a request into the next slot."""
        cache, request, drafter = self._context.cache, live.context, self.drafter
        started = perf_counter()
        slot = len(self._live)
        cache.reserve(slots=self._slots(slot + 1), capacity=self._capacity(request))
        self._live.append(live)
        self._context.requests.append(request)
        taps = self.target.prefill(
            request.tokens[:-1], cache, slot=slot, taps=drafter.needs.taps if drafter is not None else ()
        )
        if drafter is not None:
            drafter.start(self._context, request, taps)
        live.admitted = perf_counter()
        live.stats.prefill_ms = 1e3 * (live.admitted - started)
        self.timing.prefill_ms += live.stats.prefill_ms

    def _slots(self, wanted: int) -> int:
        """Slots to hold when so many are needed: doubling, since growing moves the whole cache."""
        slots = self._context.cache.slots
        return slots if wanted <= slots else min(max(wanted, 2 * slots), max(wanted, self.max_batch))

    def _capacity(self, request: RequestContext) -> int:
        """Entries to hold for a request: on a GPU all that it may need, since growing there means capturing anew."""
        rows = 64
        if self.target.captured is None:
            return len(request.tokens) + rows
        return len(request.tokens) + min(request.remaining, 1024) + rows

    def _settle(self, played: Played) -> list[Progress]:
        """Record a round and retire what ended."""
        progress = []
        now = perf_counter()
        ended = []
        for slot, live in enumerate(self._live):
            one, verdict = played.rounds[slot], played.verdicts[slot]
            live.rounds.append(one)
            live.stats.count(one, played.reached[slot])
            live.text.append(verdict.text)
            output = None
            if verdict.reason is not None:
                live.stats.decode_ms = 1e3 * (now - live.admitted)
                output = self._output(live, verdict.reason)
                ended.append(slot)
            progress.append(Progress(live.uid, Chunk(verdict.text, one, output)))
        for slot in reversed(ended):
            self._retire(slot)
        if self._checks:
            self._context.cache.check_integrity([len(r.tokens) for r in self._context.requests])
        return progress

    def _retire(self, slot: int) -> None:
        """Free a slot; the last request moves into it, so that the batch stays without gaps."""
        last = len(self._live) - 1
        cache = self._context.cache
        cache.move(last, slot)
        cache.truncate(last, 0)
        self._live[slot] = self._live[last]
        self._context.requests[slot] = self._context.requests[last]
        self._live.pop()
        self._context.requests.pop()

    def _output(self, live: _Live, reason: str) -> Output:
        request = live.context
        if reason == "interrupted" and live.admitted:
            live.stats.decode_ms = 1e3 * (perf_counter() - live.admitted)
        return Output(
            text="".join(live.text),
            tokens=tuple(request.tokens[request.prompt_length :]),
            prompt_tokens=tuple(request.tokens[: request.prompt_length]),
            finish_reason=reason,
            rounds_detail=tuple(live.rounds),
            stats=live.stats,
            guarantee=live.guarantee,
            notes=self.pace.notes(request),
        )


def _check_options(drafter: Drafter | None, rule: RuleName, max_batch: int, strict_rows: int) -> None:
    if max_batch < 1:
        raise ConfigError(f"max_batch must be at least 1, got {max_batch}")
    if strict_rows < 0 or strict_rows == 1:
        raise ConfigError(f"strict needs at least 2 rows, got {strict_rows}")
    if drafter is None:
        return
    if rule != "path" and drafter.kind == "deterministic":
        raise ConfigError(
            f"rule={rule!r} verifies drafts sampled from a known law, but {drafter.name!r} chooses its tokens; use "
            "rule='path' (nothing is lost: it accepts the most any exact rule can), or a sampling drafter such as "
            "draft_model with draw='own'"
        )
    if strict_rows and drafter.needs.scouts:
        raise ConfigError(f"strict runs passes of a fixed width, but {drafter.name!r} adds scouts; drop one of them")


def _settings(settings: Settings | None, changes: dict[str, Any]) -> Settings:
    if settings is None:
        check_names(changes)
        return Settings(**changes)
    return settings.replace(**changes) if changes else settings


def _decoder(target: Target) -> Callable[[Sequence[int]], str]:
    tokenizer = target.tokenizer
    if tokenizer is None:
        return lambda ids: ""
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True)
