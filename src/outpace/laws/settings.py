"""What a user may ask of one generation. Frozen, checked once, the same for every drafter and rule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from outpace.errors import ConfigError, suggestion
from outpace.laws.dice import NOISES, NoiseKind

if TYPE_CHECKING:
    from torch import Tensor

Processor = Callable[["Tensor", "Tensor"], "Tensor"]
"""A Hugging Face `LogitsProcessor`: (input_ids [1, L] int64, scores [1, V]) -> scores [1, V]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Sampling and stopping of one request.

    Sampling follows the order of `transformers.generate`: logit bias, repetition, presence and frequency penalties,
    minimum length, custom processors; then temperature, top-k, top-p, min-p.

    Attributes:
        max_new_tokens: most tokens to emit (eos included).
        temperature: 0 is greedy decoding (lowest id on ties); above 0 samples.
        top_k: keep the k most likely tokens (ties with the k-th are kept, as in transformers).
        top_p: keep the smallest set of most likely tokens with at least this mass; in (0, 1].
        min_p: keep tokens at least min_p times as likely as the most likely one; in [0, 1].
        repetition_penalty: divides positive and multiplies negative logits of every token seen in prompt and output.
        presence_penalty: subtracted once from the logit of every token of the output so far.
        frequency_penalty: subtracted per occurrence in the output so far.
        logit_bias: added to single logits, {token id: bias}.
        min_new_tokens: eos is forbidden before that many tokens.
        processors: any Hugging Face logits processors; each is called once per emitted token, with that token's own
            prefix, in order.
        stop: strings that end the text; the text is cut before the first one completed.
        ignore_eos: do not end at an end-of-sequence token.
        eos: end-of-sequence ids; None takes the model's own.
        seed: seed of the noise.
        request: identity of the request in the noise key; None takes the index of the prompt in the call.
        noise: how noise decides a token, in law the same: "gumbel" (Gumbel-max: the largest log p + g, a number for
            each id) or "uniform" (inverse CDF: one number). A drafter whose law is near the target's finds the path's
            token far more often by Gumbel noise; drafters that read numbers (ptp) need "uniform".

    Raises:
        ConfigError: on a value outside its range, or a combination without effect.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    min_new_tokens: int = 0
    processors: tuple[Processor, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    eos: tuple[int, ...] | None = None
    seed: int = 0
    request: int | None = None
    noise: NoiseKind = "gumbel"

    def __post_init__(self) -> None:
        given: dict[str, Any] = {name: getattr(self, name) for name in ("stop", "processors", "eos")}
        for name, value in given.items():
            if isinstance(value, str | int):
                object.__setattr__(self, name, (value,))
            elif isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        self._check_ranges()
        if self.temperature == 0:
            self._refuse_without_effect()

    def _check_ranges(self) -> None:
        def need(holds: bool, name: str, wanted: str) -> None:
            if not holds:
                raise ConfigError(f"{name} must be {wanted}, got {getattr(self, name)!r}")

        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or above")
        need(self.top_k is None or self.top_k >= 1, "top_k", "at least 1 (or None for no limit)")
        need(self.top_p is None or 0 < self.top_p <= 1, "top_p", "in (0, 1] (or None for no limit)")
        need(self.min_p is None or 0 <= self.min_p <= 1, "min_p", "in [0, 1] (or None)")
        need(self.repetition_penalty > 0, "repetition_penalty", "above 0 (1.0 is none)")
        need(self.min_new_tokens >= 0, "min_new_tokens", "0 or more")
        need(
            self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            f"at most max_new_tokens={self.max_new_tokens}",
        )
        need(all(self.stop), "stop", "a tuple of non-empty strings")
        need(0 <= self.seed < 1 << 64, "seed", "from 0 to 2^64 - 1")
        need(self.request is None or 0 <= self.request < 1 << 64, "request", "from 0 to 2^64 - 1")
        need(self.noise in NOISES, "noise", " or ".join(map(repr, NOISES)))

    def _refuse_without_effect(self) -> None:
        for name in ("top_k", "top_p", "min_p"):
            if getattr(self, name) is not None:
                raise ConfigError(
                    f"{name}={getattr(self, name)} has no effect at temperature=0 (greedy decoding takes the most "
                    f"likely token); drop it, or set a temperature above 0"
                )

    @property
    def greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature == 0

    def replace(self, **changes: Any) -> Settings:
        """A copy with some settings changed.

        Raises:
            ConfigError: on an unknown name, with the closest known one.
        """
        check_names(changes)
        return dataclasses.replace(self, **changes)


def check_names(names: Mapping[str, Any]) -> None:
    """Refuse settings that do not exist.

    Raises:
        ConfigError: naming the unknown setting and the closest known one.
    """
    known = [f.name for f in dataclasses.fields(Settings)]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r}; {suggestion(name, known)}")
