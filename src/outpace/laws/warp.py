"""From logits to the law a token is drawn from: every processor and warper, in one place.

Knows no trees and no drafters. The law at a node is whatever plain decoding would sample from at that exact prefix,
and the walk asks for it one node after the other, with the node's own prefix; so each processor, penalty and custom
`LogitsProcessor` runs exactly once per emitted token, in order, as it does without a drafter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from outpace.errors import LawError
from outpace.laws.dice import Dice, Key
from outpace.laws.noise import Stream

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws.settings import Settings

_HEAD: Final = 1024  # top-p looks at this many tokens first: a full sort of 50k ids takes 4 ms, this 0.2 ms


class Sampler:
    """The target's law and its draws, for one request.

    Args:
        settings: what the user asked for.
        dice: where chance comes from.
        prompt_length: number of prompt tokens; presence and frequency penalties count what follows.
        eos: ids that end the sequence (already resolved from settings and model).

    Attributes:
        memoryless: whether the law comes of a node's logits as they are, by temperature and truncation alone.
    """

    def __init__(self, settings: Settings, dice: Dice, *, prompt_length: int = 0, eos: Sequence[int] = ()) -> None:
        self.settings = settings
        self.dice = dice
        self.prompt_length = prompt_length
        self.eos = tuple(eos)
        s = settings
        self.memoryless = not (
            s.logit_bias
            or s.processors
            or s.min_new_tokens
            or s.repetition_penalty != 1.0
            or s.presence_penalty
            or s.frequency_penalty
        )

    @property
    def greedy(self) -> bool:
        """Whether tokens are chosen by arg-max."""
        return self.settings.greedy

    def law(self, logits: Tensor, prefix: Sequence[int]) -> Tensor:
        """The final law p(. | prefix) of the target at one node.

        logits: [V], any float dtype; prefix: every token before the one to be drawn, prompt included.
        Returns [V] float32 (float64 if the logits are), summing to one; one-hot under greedy settings.

        Raises:
            LawError: if no token is left, or the logits hold NaN.
        """
        scores = self.scores(logits, prefix)
        if self.greedy:
            return torch.nn.functional.one_hot(_argmax(scores), scores.shape[0]).to(scores.dtype)
        return warp(scores, self.settings)

    def draft_law(self, logits: Tensor, prefix: Sequence[int]) -> Tensor:
        """The same warping for a drafter's own logits, less the user's processors (they may keep state)."""
        scores = self.scores(logits, prefix, custom=False)
        if self.greedy:
            return torch.nn.functional.one_hot(_argmax(scores), scores.shape[0]).to(scores.dtype)
        return warp(scores, self.settings)

    def choose(self, logits: Tensor, prefix: Sequence[int]) -> int:
        """The token of the path after `prefix`: arg-max, or the draw with that position's own number."""
        if self.greedy:
            return int(_argmax(self.scores(logits, prefix)))
        return self.dice.draw(self.law(logits, prefix), Key(Stream.PATH, len(prefix)))

    def scores(self, logits: Tensor, prefix: Sequence[int], *, custom: bool = True) -> Tensor:
        """Logits in float32 after every history-dependent processor, before temperature and truncation: [V]."""
        scores = logits if logits.dtype == torch.float64 else logits.float()
        if self.memoryless:
            return scores
        settings = self.settings
        scores = scores.clone()
        device = scores.device
        if settings.logit_bias:
            ids = torch.tensor(list(settings.logit_bias.keys()), device=device)
            scores[ids] += torch.tensor(list(settings.logit_bias.values()), dtype=scores.dtype, device=device)
        if settings.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(prefix)), dtype=torch.int64, device=device)
            value = scores[seen]
            penalty = settings.repetition_penalty
            scores[seen] = torch.where(value < 0, value * penalty, value / penalty)
        if settings.presence_penalty or settings.frequency_penalty:
            output = torch.tensor(list(prefix[self.prompt_length :]), dtype=torch.int64, device=device)
            counts = torch.bincount(output, minlength=scores.shape[0])
            scores -= settings.frequency_penalty * counts + settings.presence_penalty * (counts > 0)
        if len(prefix) - self.prompt_length < settings.min_new_tokens and self.eos:
            scores[list(self.eos)] = float("-inf")
        if custom and settings.processors:
            ids = torch.tensor([list(prefix)], dtype=torch.int64, device=device)
            row = scores[None]
            for processor in settings.processors:
                row = processor(ids, row)
            scores = row[0]
        return scores


def _argmax(scores: Tensor) -> Tensor:
    """Lowest id among the largest scores (`torch.argmax` documents the first maximal index on CPU and CUDA alike)."""
    return torch.argmax(scores)


def warp(scores: Tensor, settings: Settings, *, wait: bool = True) -> Tensor:
    """Temperature, top-k, top-p, min-p, then softmax, each row by itself: [..., V] -> [..., V], rows sum to one.

    scores: logits in float32 or float64, after every history-dependent processor. Greedy settings have no softmax;
    they are the caller's (`Sampler.law`). wait: look at values where that saves work or finds an error; False keeps
    the device's queue running, sorts whole rows for top-p, and leaves rows without a law NaN.

    Raises:
        LawError: if a row gives no law.
    """
    if settings.temperature != 1.0:
        scores = scores / settings.temperature
    if settings.top_k is not None and settings.top_k < scores.shape[-1]:
        kth = torch.topk(scores, settings.top_k).values[..., -1:]
        scores = scores.masked_fill(scores < kth, float("-inf"))
    p = torch.softmax(scores, -1)
    truncated = False
    if settings.top_p is not None and settings.top_p < 1.0:
        p = _keep_mass(p.reshape(-1, p.shape[-1]), settings.top_p, wait).reshape(p.shape)
        truncated = True
    if settings.min_p:
        p = torch.where(p < settings.min_p * p.amax(-1, keepdim=True), torch.zeros_like(p), p)
        truncated = True
    if truncated:
        p = p / p.sum(-1, keepdim=True)
    if wait and not bool(
        torch.isfinite(p[..., 0]).all()
    ):  # softmax of a row with NaN, or of all -inf, is NaN everywhere
        raise LawError(
            "the target's logits give no law (all tokens forbidden, or NaN); check logits processors, logit_bias and "
            "the model's dtype"
        )
    return p


def _keep_mass(p: Tensor, mass: float, wait: bool) -> Tensor:
    """Zero all but the smallest set of most likely tokens of each row [N, V] holding at least `mass`.

    Lower ids first among equals. The set is found from sorted values alone, so it does not depend on how a sort orders
    ties (bf16 logits tie often).
    """
    size = p.shape[-1]
    values = torch.topk(p, min(_HEAD if wait else size, size)).values
    cumulated = torch.cumsum(values, -1, dtype=torch.float64)
    if values.shape[-1] < size and bool((cumulated[:, -1] < mass).any()):
        values = torch.sort(p, descending=True).values
        cumulated = torch.cumsum(values, -1, dtype=torch.float64)
    last = (cumulated < mass).sum(-1, keepdim=True).clamp_max_(values.shape[-1] - 1)
    threshold = values.gather(1, last)
    keep = p > threshold
    ties = p == threshold
    wanted = last + 1 - keep.sum(-1, keepdim=True)
    keep |= ties & (torch.cumsum(ties, -1, dtype=torch.int32) <= wanted)
    return torch.where(keep, p, torch.zeros_like(p))
