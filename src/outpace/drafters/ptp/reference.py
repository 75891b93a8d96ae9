"""Two-pass decoding, as in the paper: a pass that drafts, a pass that verifies, the same numbers in both.

The definition beside which `Ptp` is read: no groups, no budget, no batch. It costs two passes per round.
"""

from __future__ import annotations

import torch

from outpace.drafters.ptp.drafter import Ptp
from outpace.drafters.ptp.rows import read_out
from outpace.drafters.ptp.sampler import follow
from outpace.errors import ConfigError
from outpace.laws import NoiseDice, Sampler
from outpace.target import Block, BlockCache, Scouts, Target


def draft_alone(
    target: Target, drafter: Ptp, sampler: Sampler, tokens: list[int], numbers: torch.Tensor, cache: BlockCache
) -> list[int]:
    """Guess what follows `tokens` in a pass of its own: the root, and one window of slots behind it.

    The first token comes from the root itself, the others from slots. cache holds all of `tokens` but the last;
    numbers: float64, by index of token, for at least len(tokens) + slots + 1 of them.
    """
    start, slots, mode = len(tokens), drafter.slots, drafter.shape
    sees_root = torch.ones(slots, 1, dtype=torch.bool)
    scouts = Scouts(
        positions=(torch.arange(start, start + slots) + mode.lead - 1)[None],
        sees=torch.cat([sees_root, torch.ones(slots, slots, dtype=torch.bool).tril()], 1)[None],
        embeds=drafter.module.embed(numbers[None, start : start + slots], torch.tensor([sampler.settings.temperature])),
        adapter=drafter.module.adapter,
        logits=drafter.module.sampler is None,
    )
    root = Block.chain([[tokens[-1]]], cache.lengths, target.device)
    read = target.run(Block(root.tokens, root.positions, None, scouts), cache, taps=drafter.needs.taps)
    cache.drop()
    assert read.logits is not None  # asked for
    predicted = numbers[start + mode.lead : start + mode.lead + slots]
    if drafter.module.sampler is not None:
        known, states = sampler.choose(read.logits[0, 0], tokens), read.taps["post_norm"]
        guesses, _ = follow(
            drafter.module.sampler, target, drafter.module.head, states[:, 1 + mode.silent :], torch.tensor([known]),
            states[:, 0], predicted[None, mode.silent :], [drafter.draws(sampler)],
        )  # fmt: skip
        return [known, *guesses[0, :, 0].tolist()]
    assert read.scout_logits is not None
    guesses, _ = read_out(read.scout_logits[0], predicted if drafter.draws(sampler) else None)
    return [sampler.choose(read.logits[0, 0], tokens), *guesses[mode.silent :, 0].tolist()]


@torch.inference_mode()
def two_pass(target: Target, drafter: Ptp, sampler: Sampler, prompt: list[int], count: int) -> tuple[list[int], int]:
    """`count` tokens after the prompt, and the rounds they took (Draxler et al. 2025, algorithm 1).

    Needs a fitted drafter, uniform noise and a sampler without custom processors (they would run twice).

    Raises:
        ConfigError: for a drafter behind EAGLE-3's network, whose cache of verified features this knows nothing of.
    """
    if drafter.sampler == "eagle":
        raise ConfigError("two_pass drafts from slots, with sampler 'none' or 'chain'; decode 'eagle' with an Engine")
    assert isinstance(sampler.dice, NoiseDice)
    tokens, rounds, longest = list(prompt), 0, len(prompt) + count + 2 * drafter.slots
    numbers = sampler.dice.noise.grid(torch.tensor(sampler.dice.request), torch.arange(longest))
    if sampler.greedy:
        numbers.fill_(0.5)
    cache = target.new_cache()
    target.prefill(prompt[:-1], cache)
    with target.adapted(drafter.module.adapter):
        while len(tokens) < len(prompt) + count:
            draft = draft_alone(target, drafter, sampler, tokens, numbers, cache)
            block = Block.chain([[tokens[-1], *draft]], cache.lengths, target.device)
            logits = target.run(block, cache).logits
            assert logits is not None  # asked for
            right = 0
            tokens.append(sampler.choose(logits[0, 0], tokens))
            while right < len(draft) and draft[right] == tokens[-1]:
                right += 1
                tokens.append(sampler.choose(logits[0, right], tokens))
            cache.commit([range(right + 1)])
            rounds += 1
    return tokens[len(prompt) : len(prompt) + count], rounds
