"""The parity audit: where speculative and plain decoding part, is it a near tie or a bug?

In exact arithmetic the two never part under rule="path". On a machine a pass over N rows may use other kernels than a
pass over one, so logits carry noise of a few units in the last place, and two nearly equal tokens can swap. The audit
decodes both ways under one seed and, at the first difference, recomputes the target's law by a road that shares
nothing with the engine: the model's own forward over the common prefix, no cache, no blocks, in float32. What follows
a first difference says nothing, since the prefixes differ from there on.

**How much noise is allowed.** `eps` is four times the spacing of the inference dtype at the largest logit, or twice
what that dtype does to the two tokens in question in a pass of the model's own forward, whichever is more; it bounds by
how much the *difference* of two logits may be off.

*Arg-max* (greedy, or Gumbel noise added): the two tokens can swap only if their values differ by at most `eps`, and
can win only if both lie within `eps` of the maximum.

*Inverse CDF*: let S be the mass of the token ids up to some id, and perturb the logits so that no difference moves by
more than eps. Then every weight on one side of the boundary moves against every weight on the other by a factor
within exp(-eps/T) .. exp(eps/T), T the temperature, and so do the odds S / (1 - S): the boundary stays within

    sigmoid(logit(S) - eps/T)  ..  sigmoid(logit(S) + eps/T),    at most tanh(eps / 4T) away.

Let `low < high` be the two tokens. One run drew `low`, so its F(low) was above u; the other drew `high`, so its
F(high - 1) was at most u. Both are possible under noise exactly if F(low) can rise above u and F(high - 1) can fall
to u. Top-k, top-p and min-p add tokens that noise may move into or out of the support (those within eps of its edge,
with the edge of top-p itself taken at odds moved by exp(-eps/T) and exp(eps/T)); their mass counts on the side where
it helps.

Knows no drafter and no rule; judges outputs, whoever made them.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, Literal

import torch

from outpace.drafters import Drafter, make_drafter
from outpace.engine.engine import STRICT_ROWS, Engine
from outpace.engine.output import Output, Stats, total
from outpace.engine.prompts import Prompt, as_batch, encode
from outpace.errors import ConfigError
from outpace.laws import Key, Noise, NoiseDice, Sampler, Settings, Stream, check_names

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

Verdict = Literal["equal", "near tie", "differs"]

SPACINGS: Final = 4  # eps, in spacings of the inference dtype at the largest logit
FLOAT32_LIMIT: Final = 8 << 30  # bytes a float32 copy of the weights may take


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first position at which two runs hold different tokens, and what the target thinks there.

    Attributes:
        position: index among the emitted tokens.
        plain, other: the token of plain decoding and of the run compared with it; None where that run had ended.
        test: what decided: "arg-max", "inverse CDF", or "ending" (same tokens, but one ended earlier or otherwise).
        gap: arg-max: distance of the two tokens' values, in logits. Inverse CDF: how far u lies from the boundary
            between the two tokens, as probability.
        allowed: how large the gap may be for a near tie, in the same unit.
        eps: noise allowed in a difference of two logits.
        below_max: arg-max: how far the lower of the two lies below the maximum (at most eps for a near tie).
        u: inverse CDF: the path's number at this position. boundary: the CDF between the tokens.
        dtype_shift: by how much the model's own dtype moves the difference of the two logits against the reference.
        reference: how the law was recomputed.
    """

    position: int
    plain: int | None
    other: int | None
    test: Literal["arg-max", "inverse CDF", "ending"]
    gap: float | None = None
    allowed: float | None = None
    eps: float | None = None
    below_max: float | None = None
    u: float | None = None
    boundary: float | None = None
    dtype_shift: float | None = None
    reference: str | None = None

    def __str__(self) -> str:
        if self.test == "ending":
            return f"after token {self.position} one run ended and the other did not, or for another reason"
        assert self.gap is not None
        assert self.allowed is not None
        if self.test == "arg-max":
            return (
                f"token {self.position}: the two logits are {self.gap:.3g} apart (noise may be {self.allowed:.3g}) and "
                f"lie up to {self.below_max:.3g} below the maximum, in {self.reference}"
            )
        return (
            f"token {self.position}: u = {self.u:.6f} lies {self.gap:.3g} from the boundary {self.boundary:.6f} "
            f"between the two tokens (noise may move it by {self.allowed:.3g}), in {self.reference}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One prompt: "equal", "near tie" (floating point decided) or "differs" (a bug).

    Attributes:
        prompt: index of the prompt. common: tokens both runs emitted before they parted.
        difference: where they parted; None if they did not.
    """

    prompt: int
    verdict: Verdict
    common: int
    difference: Difference | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What the audit of one drafter found.

    Attributes:
        target, drafter, dtype, device: what was run.
        temperature, seed: of the settings.
        findings: one per prompt, speculative against plain decoding.
        control: the same for plain decoding with passes of `control_rows` rows against plain decoding: what floating
            point does on this machine without any drafter.
        stats: counts of the speculative run.
    """

    target: str
    drafter: str
    dtype: str
    device: str
    temperature: float
    seed: int
    findings: tuple[Finding, ...]
    control: tuple[Finding, ...]
    control_rows: int
    stats: Stats

    @property
    def holds(self) -> bool:
        """Whether every prompt is equal or parted at a near tie. The control does not count: it has no drafter."""
        return all(finding.verdict != "differs" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "target": self.target,
            "drafter": self.drafter,
            "dtype": self.dtype,
            "device": self.device,
            "temperature": self.temperature,
            "seed": self.seed,
            "holds": self.holds,
            "summary": summary(self.findings),
            "findings": [asdict(finding) for finding in self.findings],
            "control_rows": self.control_rows,
            "control_summary": summary(self.control),
            "control": [asdict(finding) for finding in self.control],
            "stats": self.stats.as_dict(),
        }


def summary(findings: Sequence[Finding]) -> dict[str, Any]:
    """Prompts, how many of them parted and how, the mean length until then, and the largest gap."""
    parted = [finding for finding in findings if finding.difference is not None]
    gaps = [f.difference.gap for f in parted if f.difference is not None and f.difference.gap is not None]
    return {
        "prompts": len(findings),
        **{verdict: sum(f.verdict == verdict for f in findings) for verdict in ("equal", "near tie", "differs")},
        "mean_tokens_before_parting": sum(f.common for f in parted) / len(parted) if parted else None,
        "largest_gap": max(gaps, default=None),
    }


def audit(
    target: Target,
    drafter: Drafter | str,
    prompts: Prompt | Sequence[Prompt],
    settings: Settings | None = None,
    *,
    control_rows: int = STRICT_ROWS,
    float32_limit: int = FLOAT32_LIMIT,
    **changes: Any,
) -> AuditReport:
    """Decode each prompt plainly and with the drafter under the same seed, and judge every first difference.

    Args:
        target: the model.
        drafter: what to audit; it never stands down here.
        prompts: as for `Engine.generate`; each is decoded alone.
        settings: sampling and stopping.
        **changes: single settings, applied to `settings`.
        control_rows: width of the control's passes.
        float32_limit: bytes a float32 copy of the weights may take; above it the law is recomputed in the model's own
            dtype, and the report says so.

    Raises:
        ConfigError: on bad settings or prompts, or a drafter of None.
        CheckpointError: if the drafter was made for another target.
    """
    return Auditor(
        target, settings, prompts=prompts, control_rows=control_rows, float32_limit=float32_limit, **changes
    ).run(drafter)


class Auditor:
    """Audits any number of drafters on the same prompts; plain decoding and the control run once.

    Args:
        target: the model.
        settings: sampling and stopping; `changes` are applied to it.
        prompts: as for `Engine.generate`; may be left out where only `judge` is wanted.
        control_rows: width of the control's passes.
        float32_limit: see `audit`.

    Raises:
        ConfigError: on bad settings, or a view of a target (its law has no forward of its own).
    """

    def __init__(
        self,
        target: Target,
        settings: Settings | None = None,
        *,
        prompts: Prompt | Sequence[Prompt] = (),
        control_rows: int = STRICT_ROWS,
        float32_limit: int = FLOAT32_LIMIT,
        **changes: Any,
    ) -> None:
        check_names(changes)
        if len(target.layer_ids) != target.layers_total:
            raise ConfigError(
                f"the audit needs a whole target, but this is a view of {target.name} with layers left out"
            )
        self.target = target
        self.settings = (settings or Settings()).replace(**changes)
        self.control_rows = control_rows
        self._prompts = [encode(target, prompt) for prompt in as_batch(prompts)] if len(prompts) else []
        self._reference = _Reference(target, float32_limit)

    @cached_property
    def plain(self) -> list[Output]:
        """Plain decoding of every prompt."""
        return self._decode(Engine(self.target, None, max_batch=1))

    @cached_property
    def control(self) -> tuple[Finding, ...]:
        """Plain decoding at another row width, judged against plain decoding."""
        wide = self._decode(Engine(self.target, None, max_batch=1, strict=self.control_rows))
        return self._judge_all(wide)

    def run(self, drafter: Drafter | str) -> AuditReport:
        """Audit one drafter.

        Raises:
            ConfigError: if it is no drafter. CheckpointError: if it was made for another target.
        """
        made = make_drafter(drafter)
        if made is None:
            raise ConfigError("the audit compares a drafter with plain decoding; 'none' leaves nothing to compare")
        engine = Engine(self.target, made, max_batch=1, stand_down=False)
        try:
            outputs = self._decode(engine)
        finally:
            engine.close()
        return AuditReport(
            target=self.target.name,
            drafter=drafter if isinstance(drafter, str) else made.name,
            dtype=str(self.target.dtype).removeprefix("torch."),
            device=str(self.target.device),
            temperature=self.settings.temperature,
            seed=self.settings.seed,
            findings=self._judge_all(outputs),
            control=self.control,
            control_rows=self.control_rows,
            stats=total([output.stats for output in outputs]),
        )

    def judge(self, plain: Output, other: Output, *, prompt: int = 0, request: int | None = None) -> Finding:
        """Compare two outputs of one prompt made under these settings.

        prompt: index to report. request: identity in the noise key (default: the settings', else the index).
        """
        if request is None:
            request = self.settings.request if self.settings.request is not None else prompt
        pairs = zip(plain.tokens, other.tokens, strict=False)
        shortest = min(len(plain.tokens), len(other.tokens))
        at = next((i for i, (a, b) in enumerate(pairs) if a != b), shortest)
        if at == shortest:
            if len(plain.tokens) == len(other.tokens) and plain.finish_reason == other.finish_reason:
                return Finding(prompt=prompt, verdict="equal", common=at)
            tails = [output.tokens[at] if len(output.tokens) > at else None for output in (plain, other)]
            ending = Difference(position=at, plain=tails[0], other=tails[1], test="ending")
            return Finding(prompt=prompt, verdict="differs", common=at, difference=ending)
        prefix = [*plain.prompt_tokens, *plain.tokens[:at]]
        settings, target = self.settings, self.target
        eos = () if settings.ignore_eos else settings.eos if settings.eos is not None else target.eos
        dice = NoiseDice(Noise(settings.seed), request, settings.noise)
        sampler = Sampler(settings, dice, prompt_length=len(plain.prompt_tokens), eos=eos)
        pair = (plain.tokens[at], other.tokens[at])
        with torch.inference_mode():
            difference = self._examine(at, pair, prefix, sampler)
        assert difference.gap is not None
        assert difference.allowed is not None
        tie = difference.gap <= difference.allowed
        if difference.below_max is not None:
            tie = tie and difference.below_max <= difference.allowed
        return Finding(prompt=prompt, verdict="near tie" if tie else "differs", common=at, difference=difference)

    def _examine(self, at: int, pair: tuple[int, int], prefix: list[int], sampler: Sampler) -> Difference:
        """Recompute the law behind `prefix` and measure how far apart the two tokens are."""
        settings = self.settings
        logits, own, how = self._reference.logits(prefix)
        penalty = settings.repetition_penalty
        eps = SPACINGS * spacing(float(logits[torch.isfinite(logits)].abs().max()), self.target.dtype)
        eps *= max(penalty, 1 / penalty)  # a penalty that multiplies logits multiplies their noise
        shift = float((own[pair[0]] - own[pair[1]] - logits[pair[0]] + logits[pair[1]]).abs())
        eps = max(eps, 2 * shift)  # what the dtype does to this very pair, one pass this way and another that way
        shared: dict[str, Any] = {
            "position": at,
            "plain": pair[0],
            "other": pair[1],
            "eps": eps,
            "dtype_shift": shift,
            "reference": how,
        }
        if settings.greedy or settings.noise == "gumbel":
            values = sampler.scores(logits, prefix).double()
            if not settings.greedy:
                dice = sampler.dice
                assert isinstance(dice, NoiseDice)
                noise = dice.noise.gumbel(dice.request, len(prefix), values.shape[0], values.device)
                certain, maybe = _support(logits, prefix, sampler, eps)
                values = (values + settings.temperature * noise).masked_fill(~(certain | maybe), float("-inf"))
                # a token that noise may push out of the support may leave the field to another
                top = float(values.masked_fill(maybe, float("-inf")).max()) if bool(certain.any()) else float("-inf")
            else:
                top = float(values.max())
            first, second = float(values[pair[0]]), float(values[pair[1]])
            gap = abs(first - second) if math.isfinite(first) and math.isfinite(second) else math.inf
            return Difference(
                **shared, test="arg-max", gap=gap, allowed=eps, below_max=max(0.0, top - min(first, second))
            )
        dice = sampler.dice
        assert isinstance(dice, NoiseDice)
        u = dice.uniform(Key(Stream.PATH, len(prefix)))
        boundary, gap, allowed = _boundary(logits, prefix, sampler, pair, u, eps)
        return Difference(**shared, test="inverse CDF", gap=gap, allowed=allowed, u=u, boundary=boundary)

    def _decode(self, engine: Engine) -> list[Output]:
        if not self._prompts:
            raise ConfigError("no prompt: the audit needs at least one")
        return engine.generate(self._prompts, self.settings)

    def _judge_all(self, outputs: Sequence[Output]) -> tuple[Finding, ...]:
        pairs = zip(self.plain, outputs, strict=True)
        return tuple(self.judge(plain, other, prompt=i) for i, (plain, other) in enumerate(pairs))


class _Reference:
    """The target's next-token logits by the model's own forward over a whole prefix."""

    def __init__(self, target: Target, limit: int) -> None:
        self._target = target
        self._limit = limit

    @cached_property
    def _wide(self) -> Any:
        """The model in float32: itself, a copy, or None where a copy would be too large."""
        model = self._target.model
        if self._target.dtype in (torch.float32, torch.float64):
            return model
        if 4 * sum(parameter.numel() for parameter in model.parameters()) > self._limit:
            return None
        return copy.deepcopy(model).float()

    def logits(self, prefix: Sequence[int]) -> tuple[Tensor, Tensor, str]:
        """(reference logits [V], those of the model in its own dtype [V], how the reference was made)."""
        own = _forward(self._target.model, prefix, self._target.device)
        name = str(self._target.dtype).removeprefix("torch.")
        if self._wide is self._target.model:
            return own, own, f"{name} (the model's own dtype)"
        if self._wide is None:
            return own, own, f"{name} (a float32 copy would exceed {self._limit / 2**30:.1f} GiB)"
        return _forward(self._wide, prefix, self._target.device), own, "float32"


def _forward(model: Any, prefix: Sequence[int], device: torch.device) -> Tensor:
    extra = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ids = torch.tensor([list(prefix)], device=device)
    logits: Tensor = model(input_ids=ids, use_cache=False, **extra).logits[0, -1]
    return logits if logits.dtype == torch.float64 else logits.float()


def spacing(value: float, dtype: torch.dtype) -> float:
    """Distance of neighbouring numbers of a dtype at a magnitude (bfloat16: 0.125 in [16, 32))."""
    if value <= 0:
        return float(torch.finfo(dtype).tiny)
    return float(torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(value)))


def _support(logits: Tensor, prefix: Sequence[int], sampler: Sampler, eps: float) -> tuple[Tensor, Tensor]:
    """Tokens that are in the support whatever the noise, and those that noise decides: two bool [V].

    Top-k, top-p and min-p all keep the tokens above an edge. Noise moves scores by eps against each other, and the
    mass top-p counts by odds of exp(eps / T).
    """
    settings = sampler.settings
    scores = sampler.scores(logits, prefix)
    if settings.top_k is None and settings.top_p is None and not settings.min_p:
        return torch.isfinite(scores), torch.zeros_like(scores, dtype=torch.bool)
    threshold = -math.inf
    if settings.min_p:
        threshold = float(scores.max()) + settings.temperature * math.log(settings.min_p)
    edges = []
    for sign in (-1, 1):
        changed = settings.replace(min_p=None)
        if settings.top_p is not None and settings.top_p < 1:
            changed = changed.replace(top_p=max(_moved(settings.top_p, sign * eps / settings.temperature), 1e-12))
        law = Sampler(changed, sampler.dice, prompt_length=sampler.prompt_length, eos=sampler.eos).law(logits, prefix)
        edges.append(max(threshold, float(scores[law > 0].min())))
    certain = scores > edges[0] + eps
    leaders = scores >= scores.max() - eps
    if int(leaders.sum()) == 1:
        certain |= leaders
    return certain, (scores >= edges[1] - eps) & ~certain & torch.isfinite(scores)


def _moved(share: float, by: float) -> float:
    """A probability whose odds are multiplied by exp(by)."""
    up, down = share * math.exp(min(by, 0.0)), (1 - share) * math.exp(-max(by, 0.0))
    return up / (up + down)


def _boundary(
    logits: Tensor, prefix: Sequence[int], sampler: Sampler, pair: tuple[int, int], u: float, eps: float
) -> tuple[float, float, float]:
    """(boundary between the two tokens, distance of u from it, how far noise may move it towards u).

    Of the two conditions of a swap (module docstring) the one that is harder to meet is reported.
    """
    temperature = sampler.settings.temperature
    low, high = min(pair), max(pair)
    law = sampler.law(logits, prefix).double()
    below = torch.cumsum(law / law.sum(), 0)
    certain, maybe = _support(logits, prefix, sampler, eps)
    scores = sampler.scores(logits, prefix).double()
    weights = torch.softmax(scores / temperature, 0)
    fixed, open_ = torch.cumsum(weights * certain, 0), torch.cumsum(weights * maybe, 0)
    swing = math.exp(min(eps / temperature, 700.0))

    def share(inside: float, outside: float) -> float:
        return inside / (inside + outside) if inside + outside > 0 else 0.5

    def highest(token: int) -> float:
        inside = float(fixed[token] + open_[token])
        return share(swing * inside, float(fixed[-1] - fixed[token]))

    def lowest(token: int) -> float:
        outside = float(fixed[-1] - fixed[token] + open_[-1] - open_[token])
        return share(float(fixed[token]), swing * outside)

    conditions = []
    rise, fall = float(below[low]), float(below[high - 1])
    if rise <= u:
        conditions.append((rise, u - rise, highest(low) - rise))
    if fall > u:
        conditions.append((fall, fall - u, fall - lowest(high - 1)))
    assert conditions  # below[low] <= below[high - 1]: u cannot lie under the first and not under the second
    impossible = [token for token in pair if not bool(certain[token] | maybe[token])]
    if impossible:
        boundary, gap, _ = conditions[0]
        return boundary, gap, 0.0 if gap > 0 else -1.0
    return max(conditions, key=lambda c: c[1] - c[2])
