"""`transformers.generate` as it comes: plain, with its prompt lookup, with its assistant, or any of its options.

Same weights, dtype, ids and stop rule as the engine's; passes are counted by a hook, the first token is timed by a
logits processor that looks at the clock once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from outpace.bench.methods import Clock, Kind, Method, wait_for
from outpace.bench.trials import Answer, Job, Trial
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

_ASSISTED = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit")


class StockMethod(Method):
    """A call of `generate`.

    Args:
        target: the model.
        spec: "transformers" or "transformers:option=value,...", with options of `generate`; `assistant_model` names a
            model to load.

    Raises:
        ConfigError: if the spec is not of that form.
    """

    kind: ClassVar[Kind] = "stock"

    def __init__(self, target: Target, spec: str) -> None:
        self.name = spec
        self._target = target
        self._options = _options(spec)
        self.alone = any(name in self._options for name in _ASSISTED)
        self._assistant: Any = None
        self._lookahead: int | None = None

    def open(self) -> None:
        """Load the assistant, if there is one."""
        name = self._options.get("assistant_model")
        if name is None or self._assistant is not None:
            return
        from outpace.target import Target

        loaded = Target.from_pretrained(str(name), dtype=self._target.dtype, device=self._target.device)
        self._assistant = loaded.model
        self._lookahead = getattr(self._assistant.generation_config, "num_assistant_tokens", None)

    def forget(self) -> None:
        """Take back what the assistant's adaptive draft length has learned."""
        if self._assistant is not None:
            self._assistant.generation_config.num_assistant_tokens = self._lookahead

    def answer(self, jobs: Sequence[Job], clock: Clock = time.perf_counter) -> Trial:
        """See `Method.answer`; prompts of a batch are padded to the left."""
        self.open()
        target, settings = self._target, jobs[0].settings
        device = target.device
        ids, mask = _padded(jobs, device)
        passes = 0
        first = _First(clock, device, lambda: passes > 0)

        def count(*_: Any) -> None:
            nonlocal passes
            passes += 1

        eos = [target.vocabulary] if settings.ignore_eos or not target.eos else list(target.eos)
        sampling: dict[str, Any] = {"do_sample": False}
        if settings.temperature:
            sampling = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
        options = {k: v for k, v in self._options.items() if k != "assistant_model"}
        if self._assistant is not None:
            options["assistant_model"] = self._assistant
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        hook = target.model.register_forward_pre_hook(count)
        devices = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.inference_mode():
                torch.manual_seed(settings.seed)
                wait_for(device)
                started = clock()
                out = target.model.generate(
                    ids, attention_mask=mask, max_new_tokens=settings.max_new_tokens, eos_token_id=eos,
                    pad_token_id=eos[0] if eos[0] < target.vocabulary else 0, logits_processor=[first], **sampling,
                    **options,
                )  # fmt: skip
                wait_for(device)
                total = clock() - started
        finally:
            hook.remove()
        ttft = 1e3 * (first.at - started) if first.at is not None else None
        answers = [
            self._answer(job, row, ttft, 1e3 * total, passes or None)
            for job, row in zip(jobs, out[:, ids.shape[1] :].tolist(), strict=True)
        ]
        return Trial(
            answers=tuple(answers),
            total_ms=1e3 * total,
            rounds=passes or None,
            peak_bytes=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        )

    def _answer(self, job: Job, row: list[int], ttft_ms: float | None, total_ms: float, passes: int | None) -> Answer:
        """Emitted ids up to and including the first eos, whatever stands behind it."""
        eos = () if job.settings.ignore_eos else self._target.eos
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        tokens = tuple(row[: min(end, job.settings.max_new_tokens)])
        tokenizer = self._target.tokenizer
        return Answer(
            tokens=tokens,
            emitted=len(tokens),
            prompt_tokens=len(job.ids),
            text="" if tokenizer is None else tokenizer.decode(list(tokens), skip_special_tokens=True),
            finish_reason="eos" if tokens and tokens[-1] in eos else "length",
            ttft_ms=ttft_ms,
            total_ms=total_ms,
            passes=passes,
        )


class _First:
    """A logits processor that notes when the model's logits were first at hand, and leaves them alone.

    begun: whether the model has run; candidate generators call processors before that.
    """

    def __init__(self, clock: Clock, device: torch.device, begun: Callable[[], bool]) -> None:
        self._clock = clock
        self._device = device
        self._begun = begun
        self.at: float | None = None

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        if self.at is None and self._begun():
            wait_for(self._device)
            self.at = self._clock()
        return scores


def _padded(jobs: Sequence[Job], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(len(job.ids) for job in jobs)
    ids = [[0] * (width - len(job.ids)) + list(job.ids) for job in jobs]
    mask = [[0] * (width - len(job.ids)) + [1] * len(job.ids) for job in jobs]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _options(spec: str) -> Mapping[str, Any]:
    name, _, rest = spec.partition(":")
    if name != "transformers":
        raise ConfigError(
            f"unknown stock method {spec!r}; expected 'transformers', or with options of generate: "
            "'transformers:prompt_lookup_num_tokens=10', 'transformers:assistant_model=NAME'"
        )
    options: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"option {key!r} of {spec!r} needs a value: transformers:{key}=...")
        options[key] = _converted(value)
    return options


def _converted(value: str) -> Any:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value
