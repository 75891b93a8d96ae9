"""Toy targets and drafters given by tables: a law for every context, nothing learned."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TableModel:
    """A language model over a tiny vocabulary: `law(context) -> [V]` float64."""

    vocabulary: int
    law: Callable[[tuple[int, ...]], Tensor]

    @classmethod
    def constant(cls, p: Sequence[float]) -> TableModel:
        """The same law after every context."""
        row = torch.tensor(p, dtype=torch.float64)
        return cls(len(p), lambda context: row)

    @classmethod
    def markov(cls, start: Sequence[float], rows: Sequence[Sequence[float]]) -> TableModel:
        """First order: a law for the empty context and one after each token."""
        first = torch.tensor(start, dtype=torch.float64)
        after = torch.tensor(rows, dtype=torch.float64)
        return cls(len(start), lambda context: after[context[-1]] if context else first)

    @classmethod
    def dirichlet(
        cls, vocabulary: int, depth: int, seed: int, *, alpha: float = 0.7, zeros: bool = False
    ) -> TableModel:
        """A random law for every context up to `depth` tokens; with `zeros`, some tokens are impossible."""
        generator = torch.Generator().manual_seed(seed)
        rows = {}
        for length in range(depth + 1):
            for context in itertools.product(range(vocabulary), repeat=length):
                u = torch.rand(vocabulary, generator=generator, dtype=torch.float64).clamp_min(1e-12)
                weights = (-u.log()) ** (1 / alpha)
                if zeros:
                    gone = torch.rand(vocabulary, generator=generator) < 0.35
                    gone[int(torch.randint(vocabulary, (), generator=generator))] = False
                    weights = weights.masked_fill(gone, 0.0)
                rows[context] = weights / weights.sum()
        return cls(vocabulary, lambda context: rows[context[-depth:] if depth else ()])

    def logits(self, context: tuple[int, ...]) -> Tensor:
        """Logits whose softmax is the law."""
        return self.law(context).log()

    def sequence_law(self, length: int, warp: Callable[[Tensor], Tensor]) -> Tensor:
        """Exact law of the first `length` tokens, every row warped: float64, shape [V] * length."""
        result = torch.zeros((self.vocabulary,) * length, dtype=torch.float64)
        for sequence in itertools.product(range(self.vocabulary), repeat=length):
            mass = 1.0
            for position, token in enumerate(sequence):
                mass *= float(warp(self.logits(sequence[:position]))[token])
                if mass == 0:
                    break
            result[sequence] = mass
        return result
