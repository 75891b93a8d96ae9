"""The head of a drafter: from a hidden state to logits over a draft vocabulary, by the target's rows or its own.

A reduced vocabulary is a sorted list of target ids. In checkpoints it is `d2t`, *offsets*: target id = i + d2t[i]
(specs of the EAGLE-3 releases); absolute ids there would load without an error and never be accepted, so they are
checked. Tokens outside are never proposed; the text does not depend on it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from outpace.errors import CheckpointError, ConfigError
from outpace.target.skinny import Eight, linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

HeadKind = Literal["target", "own"]


class DraftHead(nn.Module):
    """Logits over the draft vocabulary.

    Args:
        target: whose head it starts from.
        size: tokens of the draft vocabulary; 0 for the target's own vocabulary.
        kind: "target": frozen rows of the target's head, not stored; "own": trained, stored.
        ids: [size] int64, the target ids of the draft vocabulary, sorted; None: the first `size` (until a checkpoint is
            loaded).
    """

    weight: Tensor
    eight: Eight | None = None

    def __init__(self, target: Target, size: int, kind: HeadKind, ids: Tensor | None = None) -> None:
        super().__init__()
        full = target.model.get_output_embeddings().weight
        full = full[: getattr(target.config, "widened_vocabulary", full.shape[0])]  # what lies behind is never said
        self.vocabulary = int(full.shape[0])
        self.reduced = 0 < size < self.vocabulary
        self.kind = kind
        self._full = (full,)  # in a tuple: neither parameter nor buffer of this module
        if self.reduced:
            ids = torch.arange(size) if ids is None else ids
            check_ids(ids, self.vocabulary)
            self.register_buffer("d2t", (ids - torch.arange(size)).to(full.device))
        rows = full.detach()[self.ids] if self.reduced else full.detach()
        if kind == "own":
            self.weight = nn.Parameter(rows.float().clone())
        else:
            self.register_buffer("weight", rows, persistent=False)
        self.register_buffer("_teacher", None if kind == "target" else rows, persistent=False)
        self.register_buffer("index", self._index(), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._refresh())  # type: ignore[no-untyped-call]

    @property
    def size(self) -> int:
        """Tokens of the draft vocabulary."""
        return int(self.weight.shape[0])

    @property
    def ids(self) -> Tensor:
        """[size] int64: the target's id of each draft token, rising."""
        if not self.reduced:
            return torch.arange(self.vocabulary, device=self._full[0].device)
        d2t = cast("Tensor", self.offsets)
        return torch.arange(d2t.shape[0], device=d2t.device) + d2t

    @property
    def offsets(self) -> Tensor | None:
        """[size] int64: target id less draft id; None where they are the same."""
        return cast("Tensor", self.d2t) if self.reduced else None

    @property
    def teacher(self) -> Tensor:
        """[size, H]: the target's own rows for the draft vocabulary, frozen."""
        found = cast("Tensor | None", self._teacher)
        return self.weight if found is None else found

    @property
    def teacher_full(self) -> Tensor:
        """[V, H]: the target's whole head, frozen."""
        full: Tensor = self._full[0].detach()
        return full

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., size]."""
        return linear(hidden, self.weight.to(hidden.dtype), eight=self.eight)

    def to_target(self, drafted: Tensor) -> Tensor:
        """Draft ids -> target ids."""
        return drafted if self.offsets is None else drafted + self.offsets[drafted]

    def to_draft(self, tokens: Tensor) -> Tensor:
        """Target ids -> draft ids, -1 where there is none."""
        return cast("Tensor", self.index)[tokens] if self.reduced else tokens

    def _index(self) -> Tensor | None:
        if not self.reduced:
            return None
        ids = self.ids
        index = torch.full((self.vocabulary,), -1, dtype=torch.int64, device=ids.device)
        index[ids] = torch.arange(ids.shape[0], device=ids.device)
        return index

    @torch.no_grad()
    def _refresh(self) -> None:
        """A checkpoint has brought its vocabulary: take the rows that belong to it."""
        if not self.reduced:
            return
        check_ids(self.ids, self.vocabulary)
        rows = self._full[0].detach()[self.ids]
        if self.kind == "target":
            self.weight = rows
        else:
            self._teacher = rows
        self.index = self._index()


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Refuse a draft vocabulary that is none.

    Raises:
        CheckpointError: if the ids do not rise, or leave the target's vocabulary.
    """
    rising = bool((ids[1:] > ids[:-1]).all()) and int(ids[0]) >= 0
    if not rising or int(ids[-1]) >= vocabulary:
        raise CheckpointError(
            f"the draft vocabulary of this drafter is no list of rising token ids below {vocabulary} (it ends at "
            f"{int(ids[-1])}); the stored d2t must hold offsets, target id = i + d2t[i], not ids"
        )


def choose_ids(counts: Tensor, size: int, forced: Collection[int] = ()) -> Tensor:
    """The draft vocabulary of a corpus: [size] int64, sorted.

    The most frequent answer tokens, `forced` ones always (end of turn, or the last token of each turn could never be
    drafted), filled up with the smallest unused ids where the corpus has fewer.

    counts: [V] int64. Raises ConfigError if size is not within 1..V or cannot hold the forced ones.
    """
    vocabulary = counts.shape[0]
    if not len(forced) <= size <= vocabulary or size < 1:
        raise ConfigError(
            f"a draft vocabulary of {size} tokens is impossible: the target has {vocabulary}, and {len(forced)} are "
            "always in it"
        )
    weight = counts.double()
    weight[list(forced)] = float("inf")
    order = torch.sort(weight, descending=True, stable=True).indices  # unused ids last, smallest first
    return order[:size].sort().values


def special_ids(target: Target) -> tuple[int, ...]:
    """Ids a draft vocabulary always holds: ends of text, and every token the tokenizer marks as special or added."""
    tokenizer: Any = target.tokenizer
    found = set(target.eos)
    if tokenizer is not None:
        found |= set(getattr(tokenizer, "all_special_ids", ()))
        added = getattr(tokenizer, "get_added_vocab", None)
        found |= set(added().values()) if added is not None else set()
    return tuple(sorted(i for i in found if 0 <= i < target.vocabulary))
