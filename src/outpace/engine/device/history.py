"""Penalties, biases and minimum lengths on the device: what a law depends on besides the logits of its node.

The definition is `Sampler.scores`. How often each id stands in a request's committed text is kept on the device and
grows with every walk; a row adds the tokens between the root and itself, which its parents name. Rounds that were
launched ahead and thrown away have counted too much: whoever loads requests counts anew.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters import RequestContext

ENDS: Final = 8  # most ends of text of a request
_BLOCK: Final = 1024
_PROMPT: tl.constexpr = tl.constexpr(1 << 30)  # added to a count where the prompt holds the id


@triton.jit
def _scores_kernel(
    LOGITS, SCORES, COUNTS, BIAS, ENDS, LEAST, PENALTIES, TOKENS, PARENTS, POSITIONS, R, V, E, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores of one tile of one row."""
    row = tl.program_id(0)
    request = row // R
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    place = request.to(tl.int64) * V + at
    score = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=0).to(tl.float32)
    score += tl.load(BIAS + place, mask=inside, other=0)
    count = tl.load(COUNTS + place, mask=inside, other=0)
    node = row % R
    while node > 0:
        token = tl.load(TOKENS + request * R + node)
        count += (at == token).to(tl.int32)
        node = tl.load(PARENTS + request * R + node).to(tl.int32)
    repetition = tl.load(PENALTIES + request * 3)
    presence = tl.load(PENALTIES + request * 3 + 1)
    frequency = tl.load(PENALTIES + request * 3 + 2)
    written = tl.where(count >= _PROMPT, count - _PROMPT, count)
    penalised = tl.where(score < 0, score * repetition, tl.div_rn(score, score * 0 + repetition))
    score = tl.where(count > 0, penalised, score)
    score -= frequency * written.to(tl.float32) + presence * (written > 0).to(tl.float32)
    if tl.load(POSITIONS + row) + 1 < tl.load(LEAST + request):
        for e in range(0, E):
            score = tl.where(at == tl.load(ENDS + request * E + e), float("-inf"), score)
    tl.store(SCORES + row.to(tl.int64) * V + at, score, mask=inside)


@triton.jit
def _count_kernel(EMITTED, COUNTS, V, WIDTH):
    """Add what a walk emitted to a request's counts."""
    request = tl.program_id(0)
    for i in range(0, tl.load(EMITTED + request * WIDTH)):
        token = tl.load(EMITTED + request * WIDTH + 1 + i)
        if token >= 0:
            where = COUNTS + request.to(tl.int64) * V + token
            tl.store(where, tl.load(where) + 1)


class History:
    """Of the requests of a lane: counts and settings, and room for the scores of all its rows.

    Args:
        batch: requests. rows: main rows of each. vocabulary: token ids. device: where.
    """

    def __init__(self, batch: int, rows: int, vocabulary: int, device: torch.device) -> None:
        self.scores = torch.empty(batch, rows, vocabulary, dtype=torch.float32, device=device)
        self.counts = torch.zeros(batch, vocabulary, dtype=torch.int32, device=device)
        self._bias = torch.zeros(batch, vocabulary, dtype=torch.float32, device=device)
        self._penalties = torch.zeros(batch, 3, dtype=torch.float32, device=device)
        self._least = torch.zeros(batch, dtype=torch.int64, device=device)
        self._ends = torch.full((batch, ENDS), -1, dtype=torch.int64, device=device)

    @staticmethod
    def serves(request: RequestContext) -> bool:
        """Whether a request's scores can be made here: no processor of the user's, and few ends of text."""
        sampler = request.sampler
        return not sampler.settings.processors and len(sampler.eos) <= ENDS

    def load(self, requests: Sequence[RequestContext]) -> None:
        """Count the committed text of requests, and put their settings on the device."""
        batch, vocabulary = self.counts.shape
        counts, bias = torch.zeros(batch, vocabulary, dtype=torch.int32), None
        penalties, least, ends = [[1.0, 0.0, 0.0]] * batch, [0] * batch, [[-1] * ENDS for _ in range(batch)]
        for b, request in enumerate(requests):
            sampler, settings, begin = request.sampler, request.sampler.settings, request.prompt_length
            if sampler.memoryless:
                continue
            tokens = torch.tensor(request.tokens)
            counts[b] = torch.bincount(tokens[begin:], minlength=vocabulary)
            counts[b, tokens[:begin]] += int(_PROMPT.value)
            penalties[b] = [settings.repetition_penalty, settings.presence_penalty, settings.frequency_penalty]
            least[b] = begin + settings.min_new_tokens
            ends[b][: len(sampler.eos)] = sampler.eos
            if settings.logit_bias:
                bias = torch.zeros(batch, vocabulary) if bias is None else bias
                bias[b, list(settings.logit_bias)] = torch.tensor(list(settings.logit_bias.values()))
        self.counts.copy_(counts, non_blocking=True)
        self._penalties.copy_(torch.tensor(penalties), non_blocking=True)
        self._least.copy_(torch.tensor(least), non_blocking=True)
        self._ends.copy_(torch.tensor(ends), non_blocking=True)
        if bias is None:
            self._bias.zero_()
        else:
            self._bias.copy_(bias, non_blocking=True)

    def score(self, logits: Tensor, tokens: Tensor, parents: Tensor, positions: Tensor) -> Tensor:
        """Scores [B, R, V] float32 of logits [B, R, V]; tokens, parents [B, R], positions [B * R]: of the rows."""
        batch, rows, vocabulary = logits.shape
        options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
        _scores_kernel[(batch * rows, triton.cdiv(vocabulary, _BLOCK))](
            logits, self.scores, self.counts, self._bias, self._ends, self._least, self._penalties, tokens, parents,
            positions, rows, vocabulary, ENDS, BLOCK=_BLOCK, **options,
        )  # fmt: skip
        return self.scores

    def count(self, emitted: Tensor, counts: Tensor) -> None:
        """Add what a walk emitted [B, R + 4] (`kernels.walk`) to counts [B, V]: its own, or a copy."""
        _count_kernel[(emitted.shape[0],)](emitted, counts, counts.shape[1], emitted.shape[1], num_warps=1)
