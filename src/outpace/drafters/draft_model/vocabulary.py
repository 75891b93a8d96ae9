"""Two tokenizers, one text: ids of the drafter and of the target that stand for the same token.

Source: token-level intersection (Timor et al. 2025, "Accelerating LLM inference with lossless speculative decoding
algorithms for heterogeneous vocabularies"): the drafter's law is restricted to tokens both know.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from outpace.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target, Tokenizer

SMALLEST_SHARE: Final = 0.2  # of the drafter's tokens; below it nearly every draft dies at its first token


class VocabularyMap:
    """Translation between a target's and a drafter's token ids.

    Args:
        target, drafter: the two models, with tokenizers.

    Attributes:
        identical: every id means the same token in both; nothing is translated.

    Raises:
        CheckpointError: if the tokenizers share too few tokens, or one is missing and the widths differ.
    """

    def __init__(self, target: Target, drafter: Target) -> None:
        self.identical = True
        self._to_target: Tensor | None = None
        if target.tokenizer is None or drafter.tokenizer is None:
            if target.vocabulary != drafter.vocabulary:
                raise CheckpointError(
                    f"draft model {drafter.name} has {drafter.vocabulary} token ids and target {target.name} "
                    f"{target.vocabulary}; give both a tokenizer, so that the ids can be matched"
                )
            return
        ours, theirs = target.tokenizer.get_vocab(), drafter.tokenizer.get_vocab()
        if ours == theirs:
            return
        self.identical = False
        shared = {theirs[token]: ours[token] for token in theirs.keys() & ours.keys()}
        if len(shared) < SMALLEST_SHARE * len(theirs):
            raise CheckpointError(
                f"the tokenizers of draft model {drafter.name} ({len(theirs)} tokens) and target {target.name} "
                f"({len(ours)} tokens) share only {len(shared)} tokens; choose a draft model of the target's family"
            )
        table = torch.full((drafter.vocabulary,), -1, dtype=torch.int64)
        for draft_id, target_id in shared.items():
            if draft_id < drafter.vocabulary and target_id < target.vocabulary:
                table[draft_id] = target_id
        self._to_target = table
        self._to_drafter = {target_id: draft_id for draft_id, target_id in shared.items()}
        self._target_tokenizer: Tokenizer = target.tokenizer
        self._drafter_tokenizer: Tokenizer = drafter.tokenizer

    def to_drafter(self, tokens: Sequence[int]) -> list[int]:
        """The same text in the drafter's tokens: shared ids one by one, others by their text."""
        if self.identical:
            return list(tokens)
        result: list[int] = []
        for token in tokens:
            known = self._to_drafter.get(token)
            if known is not None:
                result.append(known)
            else:
                text = self._target_tokenizer.decode([token], skip_special_tokens=False)
                result.extend(self._drafter_tokenizer.encode(text, add_special_tokens=False))
        return result

    def law_for_target(self, logits: Tensor, width: int) -> Tensor:
        """The drafter's logits [V'] over the target's ids [width]; -inf where the drafter has no such token."""
        if self.identical:
            if logits.shape[0] == width:
                return logits
            padded = logits.new_full((width,), float("-inf"))
            common = min(width, logits.shape[0])
            padded[:common] = logits[:common]
            return padded
        assert self._to_target is not None
        table = self._to_target.to(logits.device)
        known = table >= 0
        scattered = logits.new_full((width,), float("-inf"))
        scattered[table[known]] = logits[: table.shape[0]][known]
        return scattered
