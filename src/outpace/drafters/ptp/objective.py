"""What is learned: from text, the numbers that would have produced it; from numbers, the text.

A step reads the packed documents once with the bare target, infers u for every token under the sampling preset,
and runs many windows of slots behind that reading (section 3.1 of Draxler et al. 2025). Without a teacher, a
categorical drafter infers the numbers under its own laws, slot by slot (inverse autoregressive training, section 3.3).

The vocabulary is large and slots are many, so the head runs in pieces, each of which leaves its gradient behind and is
forgotten. Where kernels run, a piece's logits are read a few times in the dtype the head gave them (`laws_fused`,
`losses_fused`); what is written out here in tensors is the definition, and what truncated presets take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.nn import functional as F

from outpace.drafters.learning import Batch, Losses, LossKind, Recipe
from outpace.drafters.ptp.eagle import hear_windows
from outpace.drafters.ptp.rows import draw_scored, safety
from outpace.drafters.ptp.sampler import taught
from outpace.drafters.ptp.windows import Windows
from outpace.drafters.rows import unrolled_losses
from outpace.errors import ConfigError
from outpace.laws import Settings, infer_numbers, place_numbers, warp
from outpace.target import Kernel, Reading, choose_kernel, read, run_behind

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.ptp.calibration import Agreement, Calibration
    from outpace.drafters.ptp.modes import Mode
    from outpace.drafters.ptp.module import PtpModule

PIECE: Final = 1 << 27  # logits held at once: 0.25 GB in bfloat16; written out, 1 GB while numbers are inferred
_COLD: Final = 1e-3  # temperature that stands for greedy in a law
_SOME: Final = 128  # tokens of an answer, about, at which other temperatures are compared with the preset
LOSSES: Final[dict[bool, tuple[LossKind, ...]]] = {False: ("hard",), True: ("soft", "kl", "reverse_kl", "hard")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """How windows are drawn and judged.

    Attributes:
        slots: N. density: slots per token of the batch.
        preset: the sampling under which numbers mean something. any_temperature: each document's own temperature
            stands in for the preset's.
        beta: a number lies in its token's interval as a Beta(beta, beta) variable; 1 is uniform.
        inverse: infer numbers under the drafter's own laws, without the teacher.
        loss: "hard" (the corpus's token), "soft" or "kl" (the teacher's law), "reverse_kl".
        decay: weight of slot j is decay^j. draws: slots' laws are read by drawing, not by arg-max.
        kernel: "dense" for the definition written out, "fused" for kernels, None for what suits the device.
        bare: weight of the loss of slots without the sampler, beside the loss with it.
    """

    slots: int
    density: float
    preset: Settings
    any_temperature: bool
    beta: float
    inverse: bool
    loss: LossKind
    decay: float
    draws: bool
    kernel: Kernel | None = None
    bare: float = 0.0


def check_loss(loss: LossKind, mode: Mode, preset: Settings, inverse: bool) -> None:
    """Refuse losses that mean nothing here.

    Raises:
        ConfigError: saying which would.
    """
    known = LOSSES[mode.law]
    if loss not in known:
        why = "" if mode.law else " (its slots learn a function, not a law: there is one right answer, the token)"
        raise ConfigError(f"loss {loss!r} cannot train this mode{why}; pass loss={' or '.join(map(repr, known))}")
    if inverse and loss != "hard":
        raise ConfigError(f"loss {loss!r} compares with the teacher, and inverse training has none; pass loss='hard'")
    if loss == "reverse_kl" and (preset.top_k or preset.top_p or preset.min_p):
        raise ConfigError("loss 'reverse_kl' is infinite where a truncated preset has no mass; pass loss='kl'")


@dataclass(frozen=True, slots=True)
class Judged:
    """What became of windows: total with gradient; losses, hits (0 or 1), scores, alive, each [B, W, N]."""

    total: Tensor
    losses: Tensor
    hits: Tensor
    scores: Tensor
    alive: Tensor

    def guesses(self, silent: int) -> tuple[Tensor, Tensor, Tensor]:
        """(scores, right, tried) of the slots that draft, [B * W, depths] each."""
        parts = (self.scores, self.hits > 0, self.alive)
        scores, right, tried = (part[:, :, silent:].flatten(0, 1) for part in parts)
        return scores, right, tried


def objective(batch: Batch, module: PtpModule, mode: Mode, task: Task) -> Losses:
    """Losses per slot over windows drawn from the batch's answers."""
    training = torch.is_grad_enabled()
    generator = None if training else torch.Generator(batch.tokens.device).manual_seed(0)
    reading = read(batch.target, batch.tokens, batch.documents, batch.positions, task.kernel)
    count = max(1, round(task.density * batch.shape[1] / task.slots))
    windows = Windows.sample(_places(batch, task), count, task.slots, mode, generator)
    judged = judge(batch, module, mode, task, reading, windows, generator)
    scores, right, tried = judged.guesses(mode.silent)
    module.calibration.count(scores, right, tried)
    return Losses(
        total=judged.total,
        sums=(judged.losses * judged.alive).sum((0, 1)),
        counts=judged.alive.sum((0, 1)).float(),
        hits=(judged.hits * judged.alive).sum((0, 1)),
        extra={"right_in_a_row": torch.cumprod((right & tried).float(), 1).sum() / tried[:, 0].sum().clamp_min(1)},
    )


def joint_objective(batch: Batch, module: PtpModule, mode: Mode, task: Task, recipe: Recipe) -> Losses:
    """EAGLE-3's training-time test at every place of the batch, which hears slots where windows begin.

    Losses and hits are per depth of the network. Of rows that hear slots it is counted how far their likeliest tokens
    reach in the text. `gained`: by how much more often the likeliest token of such rows is the text's than that of the
    others, over all depths; places where no window may begin are among the others.
    """
    assert module.net is not None
    assert module.join is not None
    generator = None if torch.is_grad_enabled() else torch.Generator(batch.tokens.device).manual_seed(0)
    count = max(1, round(task.density * batch.shape[1] / task.slots))
    places = _places(batch, task)
    windows = Windows.sample(places, count, task.slots, mode, generator)
    with torch.autocast(batch.tokens.device.type, enabled=False):
        reading = read(batch.target, batch.tokens, batch.documents, batch.positions, task.kernel)
        u = torch.zeros(*windows.starts.shape, task.slots, dtype=torch.float64, device=batch.tokens.device)
        counts = places
        if mode.reads:
            drawn, valid = teacher_numbers(batch, reading, task, generator)
            counts = places & valid
            u = drawn.gather(1, windows.indices(0, batch.shape[1]).flatten(1)).view_as(u)
        slots = _run_slots(batch, module, task, reading, windows, u).hidden
    losses = unrolled_losses(module.net, batch, recipe, hear=hear_windows(module.join, windows, slots))
    assert losses.hit_map is not None
    alive = windows.lives(batch.documents, counts)
    right = losses.hit_map[:, windows.fronts(batch.shape[1])].permute(1, 2, 0)  # [B, W, N]
    module.calibration.count(None, right.flatten(0, 1), alive.flatten(0, 1))
    heard, hits = alive.sum(), (right & alive).sum()
    others = (losses.hits.sum() - hits) / (losses.counts.sum() - heard).clamp_min(1)
    return replace(losses, extra={"gained": hits / heard.clamp_min(1) - others})


@torch.no_grad()
def replay(
    batch: Batch, module: PtpModule, mode: Mode, task: Task, calibration: Calibration, agreement: Agreement
) -> tuple[int, int]:
    """Walk through an answer as decoding would, counting guesses: (tokens, rounds).

    batch: one document. A round starts where the last one ended, in front of what was hard to guess: an average over
    all places is better than decoding ever gets. Waits for the device.
    """
    reading = read(batch.target, batch.tokens, batch.documents, batch.positions, task.kernel)
    places = batch.answer & (batch.positions > 0)
    starts = places.nonzero()[:, 1][None]
    windows = Windows(starts, torch.ones_like(starts, dtype=torch.bool), task.slots, mode)
    generator = torch.Generator(batch.tokens.device).manual_seed(0)
    scores, right, tried = judge(batch, module, mode, task, reading, windows, generator).guesses(mode.silent)
    runs = torch.cumprod((right & tried).long(), 1).sum(1).tolist()
    visited, at = [], 0
    while at < len(runs):
        visited.append(at)
        at += 1 + runs[at]
    where = torch.tensor(visited, device=scores.device)
    calibration.count(scores[where], right[where], tried[where], keep=1.0)
    if not task.any_temperature:
        compare_presets(batch, reading, task, agreement)
    return at, len(visited)


@torch.no_grad()
def compare_presets(batch: Batch, reading: Reading, task: Task, agreement: Agreement) -> None:
    """Count, at some places of an answer, how often a number decides the same token under the preset and otherwise."""
    starts = (batch.answer & (batch.positions > 0)).nonzero()[:, 1]
    states = reading.hidden[0, starts - 1]
    agreement.count(_wide(_head(batch.target)(states[:: 1 + len(starts) // _SOME])), task.preset)


def judge(
    batch: Batch,
    module: PtpModule,
    mode: Mode,
    task: Task,
    reading: Reading,
    windows: Windows,
    generator: torch.Generator | None = None,
) -> Judged:
    """Run windows of slots behind a reading, with the numbers their text has, and compare what they say with it."""
    target, length = batch.target, batch.shape[1]
    places = _places(batch, task)
    numbers = None
    if task.inverse and torch.is_grad_enabled():
        u, counts = _own_numbers(batch, module, windows, reading, task, generator)
    else:
        drawn, counts = teacher_numbers(batch, reading, task, generator)
        counts &= places
        u = drawn.gather(1, windows.indices(0, length).flatten(1))
        if task.draws:
            numbers = drawn.gather(1, windows.indices(mode.lead, length).flatten(1)).flatten()
    alive = windows.lives(batch.documents, counts)
    temperature = batch.temperature.gather(1, windows.starts)
    rows = _run_slots(batch, module, task, reading, windows, u.view(alive.shape))
    predicted = windows.indices(mode.lead, length).flatten(1)
    weights = task.decay ** torch.arange(task.slots, device=u.device) * alive / (batch.answers * task.density)
    teacher = None
    if mode.law and task.loss != "hard":
        before = (predicted - 1)[..., None].expand(-1, -1, reading.hidden.shape[-1])
        teacher = reading.hidden.gather(1, before).flatten(0, 1)
    labels, head, hidden, known = batch.tokens.gather(1, predicted).flatten(), _head(target), rows.hidden, None
    heats = temperature[..., None].expand(alive.shape).flatten()
    total = torch.zeros((), device=u.device)
    if module.sampler is not None:
        if task.bare:
            bare, *_ = _judge(hidden.flatten(0, 1), labels, weights.flatten(), teacher, numbers, heats, head, task)
            total = task.bare * bare
        hidden = taught(module.sampler, batch, reading, windows, hidden)
        weights = F.pad(weights[..., mode.silent :], (mode.silent, 0))  # what no draft is read from
        if module.head is not None:
            head, labels = module.head, module.head.to_draft(labels)
            known, labels = (labels >= 0).view(alive.shape), labels.clamp_min(0)
            weights = weights * known  # given that a token is of the draft vocabulary, its law is the one over that
    found, *parts = _judge(hidden.flatten(0, 1), labels, weights.flatten(), teacher, numbers, heats, head, task)
    total = total + found
    losses, hits, scores = (part.view(alive.shape) for part in parts)
    if known is not None:
        losses, hits = losses * known, hits * known
    return Judged(total, losses, hits, scores, alive)


def _run_slots(batch: Batch, module: PtpModule, task: Task, reading: Reading, windows: Windows, u: Tensor) -> Reading:
    """Slots that carry u [B, W, N], behind the reading."""
    return run_behind(
        batch.target,
        reading,
        module.embed(u, batch.temperature.gather(1, windows.starts)).flatten(1, 2),
        windows.positions(batch.positions),
        windows.spans(batch.documents),
        module.adapter,
        task.kernel,
    )


def _head(target: Any) -> Callable[[Tensor], Tensor]:
    return target.model.get_output_embeddings()  # type: ignore[no-any-return]


@torch.no_grad()
def teacher_numbers(
    batch: Batch, reading: Reading, task: Task, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A number for every token, from its interval under the target's own law: (u [B, T] float64, has one [B, T]).

    The first token of a document has none.
    """
    hidden = reading.hidden[:, :-1].flatten(0, 1)
    tokens, temperature = batch.tokens[:, 1:].flatten(), batch.temperature[:, 1:].flatten()
    within = _within(tokens, task.beta, generator)
    numbers, valid = torch.empty_like(within), torch.empty_like(tokens, dtype=torch.bool)
    head = _head(batch.target)
    fused, heat = _fused(hidden, task), _heat(temperature, task)
    size = max(1, PIECE // batch.target.vocabulary)
    for start in range(0, tokens.shape[0], size):
        piece = slice(start, start + size)
        logits = head(hidden[piece])
        if fused:
            from outpace.drafters.ptp.laws_fused import token_edges

            edges = token_edges(logits, tokens[piece], heat[piece])
            numbers[piece], valid[piece] = place_numbers(*edges, within[piece])
        else:
            law = laws(_wide(logits), temperature[piece], task)
            numbers[piece], valid[piece] = infer_numbers(law, tokens[piece], within[piece])
    if task.any_temperature:  # greedy tokens come from any number
        greedy = temperature == 0
        numbers, valid = torch.where(greedy, within, numbers), valid | greedy
    shape = batch.tokens[:, 1:].shape
    follows = batch.documents[:, 1:] == batch.documents[:, :-1]
    return (
        F.pad(numbers.view(shape), (1, 0), value=0.5),
        F.pad(valid.view(shape) & follows & (batch.documents[:, 1:] > 0), (1, 0)),
    )


def laws(scores: Tensor, temperature: Tensor, task: Task) -> Tensor:
    """The laws tokens were, or are to be, drawn from: scores [n, V], temperature [n] of their documents -> [n, V]."""
    if not task.any_temperature:
        return warp(scores, task.preset, wait=False)
    return warp(scores / temperature.clamp_min(_COLD)[:, None], task.preset.replace(temperature=1.0), wait=False)


def _heat(temperature: Tensor, task: Task) -> Tensor:
    """[n] float32 temperatures of `laws`."""
    if task.any_temperature:
        return temperature.float().clamp_min(_COLD)
    return torch.full_like(temperature, task.preset.temperature, dtype=torch.float32)


def _fused(hidden: Tensor, task: Task) -> bool:
    """Whether kernels read the logits of these states: they know no truncated laws."""
    preset = task.preset
    return choose_kernel(task.kernel, hidden) == "fused" and not (preset.top_k or preset.top_p or preset.min_p)


def _places(batch: Batch, task: Task) -> Tensor:
    """[B, T] bool: tokens windows may start at: answers, sampled at the preset's temperature where any were."""
    places = batch.answer & (batch.positions > 0)
    if task.any_temperature:
        return places
    fitting = places & (batch.temperature == task.preset.temperature)
    return torch.where(fitting.any(), fitting, places)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _within(like: Tensor, beta: float, generator: torch.Generator | None) -> Tensor:
    """Where in their intervals numbers lie: Beta(beta, beta), float64 in [0, 1)."""
    if beta == 1.0:
        return torch.rand(like.shape, dtype=torch.float64, device=like.device, generator=generator)
    gamma = torch._standard_gamma(torch.full((2, *like.shape), beta, dtype=torch.float64, device=like.device))
    return (gamma[0] / gamma.sum(0)).nan_to_num(0.5).clamp(max=1 - 2.0**-53)


@torch.no_grad()
def _own_numbers(
    batch: Batch,
    module: PtpModule,
    windows: Windows,
    reading: Reading,
    task: Task,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Numbers under the drafter's own laws: (u [B, W * N], has one [B, T] as far as it matters).

    The first of a window comes from the target's last real row, which is the drafter without slots; each further one
    from the slot before, so that the windows run slot by slot.
    """
    target, length = batch.target, batch.tokens.shape[1]
    head = _head(target)
    temperature = batch.temperature.gather(1, windows.starts)
    spots = windows.indices(0, length)
    positions = windows.positions(batch.positions).view(spots.shape)
    spans = windows.spans(batch.documents)
    within = _within(spots, task.beta, generator)
    index = (windows.starts - 1)[..., None].expand(-1, -1, reading.hidden.shape[-1])
    hidden = reading.hidden.gather(1, index)
    earlier: Reading | None = None
    chosen = []
    for j in range(task.slots):
        tokens = batch.tokens.gather(1, spots[:, :, j])
        law = torch.softmax(_wide(head(hidden)), -1)
        u, _ = infer_numbers(law, tokens, within[:, :, j])
        chosen.append(u)
        embeds = module.embed(u[..., None], temperature).flatten(1, 2)
        rows = run_behind(target, reading, embeds, positions[:, :, j], spans, module.adapter, task.kernel, earlier)
        hidden, earlier = rows.hidden, rows if earlier is None else earlier.grown(rows, spots.shape[1])
    follows = F.pad(batch.documents[:, 1:] == batch.documents[:, :-1], (1, 0))
    return torch.stack(chosen, 2).flatten(1), batch.answer & follows


def _judge(
    hidden: Tensor,
    tokens: Tensor,
    weights: Tensor,
    teacher: Tensor | None,
    numbers: Tensor | None,
    temperature: Tensor,
    head: Callable[[Tensor], Tensor],
    task: Task,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(weighted sum of losses with gradient, loss, hit and score of each of n rows), the head run in pieces.

    hidden, teacher: [n, H]; tokens, numbers, weights, temperature: [n]. A hit: what `rows.read_out` guesses is the
    token.
    """

    def judged(piece: slice, states: Tensor) -> tuple[Tensor, ...]:
        logits = _wide(head(states))
        log_p = torch.log_softmax(logits, -1)
        token = tokens[piece]
        if teacher is None:
            loss = -log_p.gather(1, token[:, None])[:, 0]
        else:
            with torch.no_grad():
                q = laws(_wide(head(teacher[piece])), temperature[piece], task)
            if task.loss == "reverse_kl":
                loss = (log_p.exp() * (log_p - q.clamp_min(1e-30).log())).sum(-1)
            else:
                loss = -(q * log_p).sum(-1)
                if task.loss == "kl":
                    loss = loss + torch.xlogy(q, q).sum(-1)
        with torch.no_grad():
            p = log_p.exp()
            if numbers is None:
                score, guess = p.max(-1)
            else:
                guess, score = draw_scored(p, numbers[piece])
        return (loss * weights[piece]).sum(), loss.detach(), (guess == token).to(loss.dtype), score.to(loss.dtype)

    def written_out(piece: slice, states: Tensor, wants: bool) -> tuple[Tensor | None, ...]:
        states.requires_grad_(wants)
        with torch.set_grad_enabled(wants):
            total, *others = judged(piece, states)
        return torch.autograd.grad(total, states)[0] if wants else None, total.detach(), *others

    def in_kernels(piece: slice, states: Tensor, wants: bool) -> tuple[Tensor | None, ...]:
        from outpace.drafters.losses_fused import hard_rows, soft_rows
        from outpace.drafters.ptp.laws_fused import draw_rows

        logits, token, weight = head(states), tokens[piece], weights[piece]
        drawn = None if numbers is None else draw_rows(logits, numbers[piece])
        if teacher is None:
            loss, guess, score = hard_rows(logits, token)
        else:
            heat = _heat(temperature[piece], task)
            loss, guess, score = soft_rows(
                logits, head(teacher[piece]), divergence=task.loss == "kl", temperature=heat
            )  # fmt: skip
        if drawn is not None and numbers is not None:
            guess, score = drawn[0], safety(*drawn[1:], numbers[piece])
        gradient = (logits @ matrix).mul_(weight[:, None]) if wants else None  # the kernel left the loss's gradient
        return gradient, (loss * weight).sum(), loss, (guess == token).to(loss.dtype), score.to(loss.dtype)

    matrix: Tensor = head.weight  # type: ignore[attr-defined]
    size = max(1, PIECE // matrix.shape[0])
    one = in_kernels if task.loss != "reverse_kl" and _fused(hidden, task) else written_out
    return _Pieces.apply(hidden, one, size)  # type: ignore[no-any-return, no-untyped-call]


class _Pieces(torch.autograd.Function):
    """Run a function over pieces of rows and keep, of each, the gradient it gives, a total and other results."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, one: Callable[..., tuple[Tensor, ...]], size: int) -> tuple[Tensor, ...]:
        wants = hidden.requires_grad
        gradients, results = [], []
        for start in range(0, hidden.shape[0], size):
            piece = slice(start, start + size)
            gradient, total, *others = one(piece, hidden[piece].detach(), wants)
            gradients.append(gradient)
            results.append((total[None], *others))
        joined = [torch.cat(parts) for parts in zip(*results, strict=True)]
        if wants:
            ctx.save_for_backward(torch.cat(gradients))
            ctx.mark_non_differentiable(*joined[1:])
        return joined[0].sum(), *joined[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None
