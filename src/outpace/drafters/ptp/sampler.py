"""The sampler: slots speak in parallel, and a small network behind them reads the token before, which is known by then.

A slot has to guess its token without the ones just before it: numbers decide them, but by inverse laws over a whole
vocabulary, which takes long to learn. When a group is read, the first of these tokens is no guess any more: the walk
has just drawn it. A chain of small steps passes it on:

    state_j = slot_j + f(slot_j, embedding of the token before, state_(j-1)),    law_j = head(state_j)

It begins with token i, the one the walk drew, and with the real row's state that gave its law; the token chosen from
law_j is the token before of step j + 1. In training the tokens before are the text's own. f is zero at the start, so
that an untrained sampler changes nothing. Slots give depth, in parallel; the chain gives dependence, at the cost of a
layer and a head per token.

Source: Samragh et al. 2025, "Your LLM Knows the Future" (a two-layer network over slot and token before); the state is
passed on as in EAGLE (Li et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from torch.nn import functional as F

from outpace.drafters.layers import RMSNorm
from outpace.drafters.ptp.rows import read_out
from outpace.target.skinny import Linear, linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.heads import DraftHead
    from outpace.drafters.learning import Batch
    from outpace.drafters.ptp.windows import Windows
    from outpace.target import Reading, Target

SamplerName = Literal["none", "chain", "eagle"]


class Gated(nn.Module):
    """A gated layer that is zero at the start, in the dtype of what it reads, whatever its weights have.

    Args:
        read: numbers it reads. inner: units between. hidden: numbers it gives.
    """

    def __init__(self, read: int, inner: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(read, inner, bias=False)
        self.up_proj = Linear(read, inner, bias=False)
        self.down_proj = Linear(inner, hidden, bias=False)
        for layer in (self.gate_proj, self.up_proj):
            nn.init.normal_(layer.weight, std=read**-0.5)
        nn.init.zeros_(self.down_proj.weight)

    def gated(self, read: Tensor) -> Tensor:
        """[..., read] -> [..., hidden]."""
        return _product(self.down_proj, F.silu(_product(self.gate_proj, read)) * _product(self.up_proj, read))


class ChainedSampler(Gated):
    """One step of the chain, and the whole chain where all tokens before are known.

    Args:
        hidden: H. inner: units of the gated layer between. eps: of the norms.
    """

    def __init__(self, hidden: int, inner: int, eps: float) -> None:
        super().__init__(3 * hidden, inner, hidden)
        self.slot_norm, self.token_norm, self.state_norm = (RMSNorm(hidden, eps) for _ in range(3))

    def forward(self, slot: Tensor, token: Tensor, state: Tensor) -> Tensor:
        """What the head reads: slot, token (its embedding) and state before, [..., H] each -> [..., H].

        In the slot's dtype, products too, whatever the weights have.
        """
        read = torch.cat([self.slot_norm(slot), self.token_norm(token), self.state_norm(state)], -1)
        return slot + self.gated(read)

    def chain(self, slots: Tensor, tokens: Tensor, state: Tensor) -> Tensor:
        """All steps: slots and embeddings of the tokens before them [..., N, H], the first state [..., H]."""
        states = []
        for slot, token in zip(slots.unbind(-2), tokens.unbind(-2), strict=True):
            state = self(slot, token, state)
            states.append(state)
        return torch.stack(states, -2)


def _product(layer: Linear, x: Tensor) -> Tensor:
    """A layer in the dtype of what it reads."""
    if layer.eight is not None and layer.eight.serves(x):
        return layer.eight(x)
    return linear(x, layer.weight.to(x.dtype))


def taught(sampler: ChainedSampler, batch: Batch, reading: Reading, windows: Windows, hidden: Tensor) -> Tensor:
    """States of slots behind the chain, the tokens before being the text's: [B, W * N, H] -> [B, W * N, H].

    Silent slots stay as they are: the chain begins behind them, as in decoding. State j depends on slots up to j of its
    window, and on tokens up to the one before its own.
    """
    silent, width, length = windows.mode.silent, hidden.shape[-1], batch.shape[1]
    slots = hidden.view(*windows.starts.shape, windows.slots, width)
    index = (windows.starts - 1).clamp_min(0)[..., None].expand(-1, -1, width)
    before = windows.indices(windows.mode.lead - 1, length)[:, :, silent:]
    tokens = batch.target.embed(batch.tokens.gather(1, before.flatten(1)).view_as(before)).to(hidden.dtype)
    states = sampler.chain(slots[:, :, silent:], tokens, reading.hidden.gather(1, index).to(hidden.dtype))
    return torch.cat([slots[:, :, :silent], states], 2).flatten(1, 2)


def follow(
    sampler: ChainedSampler,
    target: Target,
    head: DraftHead | None,
    slots: Tensor,
    token: Tensor,
    state: Tensor,
    numbers: Tensor,
    draws: Sequence[bool],
    count: int = 1,
    race: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Guesses along the likeliest chain: (tokens [B, M, count] target ids, scores [B, M, count]), best first.

    Args:
        sampler: of the drafter.
        target: whose embedding, and whose head where `head` is None, it uses.
        head: over a draft vocabulary: tokens outside have no probability, in the laws drawn from too.
        slots: [B, M, H], states of the slots that draft.
        token: [B], what the walk drew.
        state: [B, H], of the row that gave its law.
        numbers: [B, M] float64, of the predicted positions.
        draws: per request, whether its laws are drawn from by numbers; the likeliest token is taken otherwise.
        count: candidates per depth; the first is passed on.
        race: [B, M, Vd] float32, Gumbel noise added to the head's logits, zero where it decides nothing; or None.
    """
    score_all = whole_head(target) if head is None else head
    mixed = torch.tensor(draws, device=slots.device)[:, None] if any(draws) and not all(draws) else None
    tokens, scores = [], []
    for j in range(slots.shape[1]):
        state = sampler(slots[:, j], target.embed(token).to(slots.dtype), state)
        logits = score_all(state)
        if race is not None:
            logits = logits.float() + race[:, j]
        most = min(count, logits.shape[-1])
        guess, score = read_out(logits, numbers[:, j].contiguous() if any(draws) else None, most)
        if mixed is not None:
            likeliest, probability = read_out(logits, None, most)
            guess, score = torch.where(mixed, guess, likeliest), torch.where(mixed, score, probability)
        guess = guess if head is None else head.to_target(guess)
        token = guess[:, 0]
        tokens.append(guess)
        scores.append(score)
    return torch.stack(tokens, 1), torch.stack(scores, 1)


def whole_head(target: Target) -> Callable[[Tensor], Tensor]:
    """The target's own head, [..., H] -> [..., V], quick for a few rows on a CPU too."""
    head = target.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return head  # type: ignore[no-any-return]
    return lambda states: linear(states, head.weight, head.bias)
