"""The rows of one pass: root and draft nodes, which verify, and scouts, which serve only the next draft.

Invariant: the visible set of every main row (cache included) holds exactly one token for each position from 0 to its
own. Main rows never see scouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from outpace.errors import DraftError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.laws import Tree
    from outpace.target.adapters import GatedLoRA


@dataclass(frozen=True, slots=True)
class Scouts:
    """Rows that verify nothing. Their keys and values are never committed.

    Attributes:
        positions: [B, S] int64.
        sees: [B, S, R + S] bool: which main rows (root first) and scouts each scout sees, itself included. Every scout
            sees the whole cache.
        tokens: [B, S] int64, or None when `embeds` or `build` provide the rows.
        embeds: [B, S, H] input embeddings instead of tokens.
        adapter: the attached adapter that applies to these rows, or None.
        enter: layer before which the rows join the pass; 0 is the embedding.
        build: for enter > 0: main hidden states at that layer [B, R, H] -> scouts' hidden states [B, S, H].
        logits: whether their logits are wanted.
    """

    positions: Tensor
    sees: Tensor
    tokens: Tensor | None = None
    embeds: Tensor | None = None
    adapter: GatedLoRA | None = None
    enter: int = 0
    build: Callable[[Tensor], Tensor] | None = None
    logits: bool = True

    def __post_init__(self) -> None:
        sources = sum(source is not None for source in (self.tokens, self.embeds, self.build))
        if sources != 1:
            raise DraftError(f"scouts need exactly one of tokens, embeds and build, got {sources}")
        if (self.build is not None) != (self.enter > 0):
            raise DraftError("scouts that enter at a layer above 0 come from `build`, those at 0 from tokens or embeds")

    @property
    def count(self) -> int:
        """Rows per request."""
        return int(self.positions.shape[1])


@dataclass(frozen=True, slots=True)
class Block:
    """Main rows of a pass, for the requests in slots first .. first + B - 1.

    Attributes:
        tokens: [B, R] int64; column 0 is the root.
        positions: [B, R] int64.
        sees: [B, R, R] bool, which rows of the block each row sees (itself included); None: a causal chain.
        scouts: rows for the next draft, or None.
        first: slot of the first request.
    """

    tokens: Tensor
    positions: Tensor
    sees: Tensor | None = None
    scouts: Scouts | None = None
    first: int = 0

    @property
    def rows(self) -> int:
        """Main rows per request."""
        return int(self.tokens.shape[1])

    @classmethod
    def chain(
        cls, tokens: Sequence[Sequence[int]], lengths: Sequence[int], device: torch.device, first: int = 0
    ) -> Block:
        """Consecutive tokens behind `lengths` cached ones; shorter rows are padded with rows that are not used."""
        width = max(len(row) for row in tokens)
        padded = torch.tensor([[*row, *([0] * (width - len(row)))] for row in tokens]).to(device, non_blocking=True)
        start = torch.tensor(lengths).to(device, non_blocking=True)[:, None]
        return cls(padded, start + torch.arange(width, device=device), None, None, first)

    @classmethod
    def of(
        cls,
        roots: Sequence[int],
        trees: Sequence[Tree],
        lengths: Sequence[int],
        device: torch.device,
        *,
        width: int | None = None,
    ) -> Block:
        """Root and draft of each request; padded to `width` rows (default: the widest draft plus one).

        Padding rows repeat the root's position and see themselves only, besides the cache.
        """
        rows = max((len(tree) for tree in trees), default=0) + 1
        rows = max(rows, width or 0)
        tokens, positions = [], []
        chain = True
        for root, tree, length in zip(roots, trees, lengths, strict=True):
            pad = rows - 1 - len(tree)
            chain = chain and pad == 0 and tree.is_chain()
            tokens.append([root, *tree.tokens, *([0] * pad)])
            positions.append([length, *(length + depth for depth in tree.depths()), *([length] * pad)])
        sees = None if chain else _ancestors(trees, rows).to(device)
        return cls(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), sees)

    def check(self) -> None:
        """Assert the invariant of main rows (used by tests; costs R^2 host work)."""
        rows = self.rows
        sees = torch.ones(rows, rows, dtype=torch.bool).tril().expand(len(self.tokens), -1, -1)
        sees = sees if self.sees is None else self.sees.cpu()
        for b, positions in enumerate(self.positions.tolist()):
            for row in range(rows):
                seen = sorted(positions[other] for other in range(rows) if sees[b, row, other])
                if seen != list(range(positions[0], positions[row] + 1)):
                    raise AssertionError(f"row {row} of request {b} at position {positions[row]} sees {seen}")


def _ancestors(trees: Sequence[Tree], rows: int) -> Tensor:
    """[B, rows, rows] bool: each row sees itself and its ancestors."""
    sees = torch.eye(rows, dtype=torch.bool).repeat(len(trees), 1, 1)
    for b, tree in enumerate(trees):
        mask = sees[b]
        for node, parent in enumerate(tree.parents):
            mask[node + 1] |= mask[parent + 1]
    return sees


@dataclass(frozen=True, slots=True)
class Readout:
    """What a pass gives back.

    Attributes:
        logits: [B, R, V] in the model's dtype, or None where none were asked for.
        scout_logits: [B, S, V], or None.
        taps: captured hidden states by tap name, [B, R + S, H] (before the scouts' layer: [B, R, H]).
    """

    logits: Tensor | None
    scout_logits: Tensor | None = None
    taps: Mapping[str, Tensor] = field(default_factory=dict)
