"""The two pieces of lookahead's state: the window of Jacobi iterates and the pool of n-grams. Token ids only.

Row r, column c of the window stands for position s + r + c, where s is the root's position and win[0][0] the root.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class NgramPool:
    """At most `capacity` continuations per token, least recently added dropped; adding again refreshes."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._grams: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, key: int, gram: Sequence[int]) -> None:
        """Remember that `gram` may follow `key`."""
        grams = self._grams.setdefault(key, {})
        grams.pop(tuple(gram), None)
        grams[tuple(gram)] = None
        if len(grams) > self.capacity:
            del grams[next(iter(grams))]

    def add_text(self, tokens: Sequence[int], size: int) -> None:
        """Remember every n-gram of a text (`size` tokens, key included)."""
        for start in range(len(tokens) - size + 1):
            self.add(tokens[start], tokens[start + 1 : start + size])

    def get(self, key: int) -> list[tuple[int, ...]]:
        """Continuations of a token, most recently added first."""
        return list(reversed(self._grams.get(key, {})))

    def __len__(self) -> int:
        return sum(len(grams) for grams in self._grams.values())


class Window:
    """Up to `height` rows of `width` iterates.

    Args:
        root: the last committed token. width: columns (W). height: rows when full (N - 1).
        filler: a token for a cell nothing is known about, given a running number.
    """

    def __init__(self, root: int, width: int, height: int, filler: Callable[[int], int]) -> None:
        self.width = width
        self.height = height
        self._filler = filler
        self._filled = 0
        self.rows: list[list[int]] = [[root, *(self._fill() for _ in range(width - 1))]]

    def _fill(self) -> int:
        self._filled += 1
        return self._filler(self._filled)

    def cells(self) -> list[tuple[int, int]]:
        """(row, column) of every cell but the root, in row order: one scout each."""
        return [(r, c) for r in range(len(self.rows)) for c in range(self.width)][1:]

    def visibility(self) -> Tensor:
        """[cells, 1 + cells] bool: which of the root and the cells each cell sees.

        A cell of row 0 sees row 0 up to itself; one below sees row 0 up to its column, and its column down to itself.
        """
        cells = self.cells()
        index = {cell: i + 1 for i, cell in enumerate(cells)} | {(0, 0): 0}
        sees = torch.zeros(len(cells), 1 + len(cells), dtype=torch.bool)
        for i, (row, column) in enumerate(cells):
            seen = [index[0, c] for c in range(column + 1)] + [index[r, column] for r in range(1, row + 1)]
            sees[i, seen] = True
        return sees

    def grams(self, newest: Sequence[int]) -> list[tuple[int, tuple[int, ...]]]:
        """(key, continuation) read down each column of a full window, the newest iterate last; [] while it grows."""
        if len(self.rows) < self.height:
            return []
        return [
            (self.rows[0][c], (*(self.rows[r][c] for r in range(1, self.height)), newest[c])) for c in range(self.width)
        ]

    def advance(self, newest: Sequence[int], emitted: Sequence[int]) -> None:
        """Move on after a round: `newest` are the last row's predictions, `emitted` the round's tokens."""
        count = len(emitted)
        if len(self.rows) < self.height:
            grown = [*self.rows, list(newest)]
            shifted = [row[count:] for row in grown]
        else:
            below = [*self.rows[1:], list(newest)]
            foresaw = below[0][:count] == list(emitted) and count < self.width
            shifted = [row[count - 1 :] if foresaw else row for row in below]
        self.rows = [(row + [self._fill() for _ in range(self.width)])[: self.width] for row in shifted]
        self.rows[0][0] = emitted[-1]
