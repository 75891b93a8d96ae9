"""The figures that matter: the real decode loop on held-out prompts, and what training would have predicted.

`decode` lets the engine decode with the drafter as it is; `simulate` replays the same answers through the objective,
where every depth sees the corpus's tokens, and walks them as a chain drafter would. The two must agree, or training
and decoding do not see the same thing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from outpace.engine import Engine, Output, Stats, total
from outpace.laws import Settings
from outpace.target import Block
from outpace.train.features import read_taps
from outpace.train.packing import Document, assemble

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.learning import Batch, LearnedDrafter
    from outpace.target import Target


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Counts of the decode loop over a set of prompts."""

    stats: Stats
    outputs: list[Output]

    @property
    def emitted_per_round(self) -> float:
        """Tokens per target pass."""
        return self.stats.emitted_per_round

    def as_dict(self) -> dict[str, Any]:
        """Figures for curves and logs."""
        return {
            "emitted_per_round": round(self.stats.emitted_per_round, 4),
            "accept_given_reached": [round(a, 4) for a in self.stats.accept_given_reached],
            "rounds": self.stats.rounds,
        }


def decode(
    drafter: LearnedDrafter,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    settings: Settings | None = None,
    max_batch: int = 32,
    weights: Mapping[str, Tensor] | None = None,
    target: Target | None = None,
) -> Evaluation:
    """Decode prompts with the drafter as it is now (or with these weights, for this target), never standing down.

    settings: of sampling; None for greedy.
    """
    settings = (settings or Settings()).replace(max_new_tokens=max_new_tokens)
    drafter = drafter.for_decoding(weights, target)
    engine = Engine(drafter.target, drafter, max_batch=max_batch, stand_down=False)
    try:
        outputs = engine.generate([list(prompt) for prompt in prompts], settings)
    finally:
        engine.close()
    return Evaluation(total([output.stats for output in outputs]), outputs)


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a tuned target has moved from the one it was, on greedy answers of the latter.

    Attributes:
        mean_kl: KL(original || tuned) per token, nats. greedy_agreement: share of places where both would choose the
            same token. tokens: places compared.
    """

    mean_kl: float
    greedy_agreement: float
    tokens: int


def drift(original: Target, tuned: Target, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> Drift:
    """Let the original answer prompts greedily, and compare both laws at every token of the answers.

    Laws are those of the decoding pass, untempered, each in the dtype its target decodes in.
    """
    engine = Engine(original, max_batch=32)
    try:
        outputs = engine.generate([list(prompt) for prompt in prompts], max_new_tokens=max_new_tokens)
    finally:
        engine.close()
    divergence = agreed = tokens = 0.0
    for output in outputs:
        before, after = (_log_laws(target, output) for target in (original, tuned))
        divergence += float((before.exp() * (before - after)).sum())
        agreed += float((before.argmax(-1) == after.argmax(-1)).sum())
        tokens += len(output.tokens)
    return Drift(max(divergence, 0.0) / max(tokens, 1), agreed / max(tokens, 1), int(tokens))


@torch.no_grad()
def _log_laws(target: Target, output: Output) -> Tensor:
    """[n, V] float32: log of the law behind each of the n tokens of an answer."""
    ids = [*output.prompt_tokens, *output.tokens]
    first = len(output.prompt_tokens) - 1
    cache = target.new_cache()
    target.prefill(ids[:first], cache)
    read = target.run(Block.chain([ids[first:-1]], [first], target.device), cache)
    assert read.logits is not None  # asked for
    return torch.log_softmax(read.logits[0, : len(output.tokens)].float(), -1)


@torch.no_grad()
def simulate(drafter: LearnedDrafter, outputs: Sequence[Output], *, depth: int) -> float:
    """Tokens per round a chain of `depth` greedy draft tokens would have reached on these answers, by the objective.

    Only the objective is asked: no cache, no tree, no engine.
    """
    rounds = tokens = 0
    before = drafter.recipe
    drafter.recipe = before.replace(depths=depth)
    try:
        for output in outputs:
            losses = drafter.objective(replay(drafter, output))
            assert losses.hit_map is not None
            run = losses.hit_map.long().cumprod(0).sum(0).tolist()  # tokens in a row right, by slot
            at, end = len(output.prompt_tokens) - 2, len(output.prompt_tokens) + len(output.tokens) - 2
            while at < end:
                step = min((run[at] if at >= 0 else 0) + 1, end - at)
                at += step
                tokens += step
                rounds += 1
    finally:
        drafter.recipe = before
    return tokens / rounds if rounds else 0.0


def replay(drafter: LearnedDrafter, output: Output, *, temperature: float = 0.0) -> Batch:
    """An answer, sampled at a temperature, as a batch of one document, with the taps training reads."""
    ids = [*output.prompt_tokens, *output.tokens]
    document = Document(ids, len(output.prompt_tokens), temperature=temperature)
    batch = assemble([[document]], len(ids), drafter.target, shifts=drafter.shifts)
    batch.taps = read_taps(batch, drafter.training_taps)
    return batch
