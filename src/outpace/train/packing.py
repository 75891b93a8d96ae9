"""From documents of any length to rows of one length, and from rows to batches.

Documents stand one behind the other in a row and never see one another: positions restart, and attention and labels
stay inside. A document longer than a row is cut, and counted. The plan of a corpus is a pure function of corpus, row
length and seed, so that a run that was stopped continues on the same rows.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from outpace.drafters.learning import Batch, Origin
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.target import Target
    from outpace.train.corpus import Corpus

_POOL = 4096  # documents packed together: large enough to leave few holes, small enough to stay shuffled


@dataclass(frozen=True)
class Packing:
    """Which documents stand in which row.

    Attributes:
        corpus: where they are. length: tokens of a row. rows: document indices of each row, in order.
        answers: [rows] answer tokens of each row. dropped: documents that could not be used, by reason.
    """

    corpus: Corpus
    length: int
    rows: list[list[int]]
    answers: np.ndarray[Any, np.dtype[np.int64]]
    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, corpus: Corpus, length: int, *, seed: int = 0) -> Packing:
        """Shuffle, then fill rows, the longest document that fits first.

        Raises:
            ConfigError: if no document has an answer token within the row length.
        """
        whole = corpus.lengths()
        sizes = np.minimum(whole, length)
        answers = np.maximum(sizes - corpus.prompt, 0)
        dropped = {"no answer token": int((answers == 0).sum()), "cut at the row length": int((whole > length).sum())}
        usable = np.flatnonzero(answers > 0)
        if not len(usable):
            raise ConfigError(
                f"no document of the corpus has an answer token within rows of {length} tokens; pass a longer "
                "--row-length, or look at the corpus"
            )
        order = np.random.default_rng(seed).permutation(usable)
        rows: list[list[int]] = []
        for start in range(0, len(order), _POOL):
            rows.extend(_fill(order[start : start + _POOL], sizes, length))
        counts = np.array([answers[row].sum() for row in rows], np.int64)
        return cls(corpus, length, rows, counts, dropped)

    @property
    def tokens(self) -> int:
        """Tokens in use, of len(rows) * length."""
        return sum(min(int(self.corpus.lengths()[i]), self.length) for row in self.rows for i in row)

    def order(self, epoch: int, seed: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The rows of an epoch, shuffled."""
        return np.random.default_rng([seed, epoch]).permutation(len(self.rows))

    def batch(self, rows: Sequence[int], target: Target, *, shifts: Sequence[int], answers: float) -> Batch:
        """Rows as a batch on the target's device; the copy is asynchronous where there is pinned memory.

        shifts: prepared for `Batch.slots_before`. answers: see `Batch.answers`.
        """
        batch = assemble(
            [[self._document(i) for i in self.rows[row]] for row in rows],
            self.length,
            target,
            origin_of=self.corpus,
            shifts=shifts,
            answers=answers,
        )
        batch.rows = tuple(rows)
        return batch

    def _document(self, index: int) -> Document:
        corpus = self.corpus
        start = int(corpus.starts[index])
        stop = min(int(corpus.starts[index + 1]), start + self.length)
        return Document(
            corpus.tokens[start:stop],
            int(corpus.prompt[index]),
            int(corpus.request[index]),
            float(corpus.temperature[index]),
        )


@dataclass(frozen=True, slots=True)
class Document:
    """One dialogue: ids, of which the first `prompt` were read and the rest written by the target."""

    tokens: Any
    prompt: int
    request: int = 0
    temperature: float = 0.0


def assemble(
    rows: Sequence[Sequence[Document]],
    length: int,
    target: Target,
    *,
    origin_of: Corpus | None = None,
    shifts: Sequence[int] = (),
    answers: float | None = None,
) -> Batch:
    """Documents in rows as a batch. Padding is a document of its own (number 0), so that nothing sees it."""
    shape = (len(rows), length)
    tokens, documents = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    positions, request = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    answer, temperature = np.zeros(shape, bool), np.zeros(shape, np.float32)
    bounds = [0]
    for b, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, start=1):
            size = len(document.tokens)
            span = slice(at, at + size)
            tokens[b, span] = document.tokens
            documents[b, span] = number
            positions[b, span] = np.arange(size)
            answer[b, at + document.prompt : at + size] = True
            request[b, span] = document.request
            temperature[b, span] = document.temperature
            at += size
            bounds.append(b * length + at)
        if at < length:
            positions[b, at:] = np.arange(length - at)
            bounds.append((b + 1) * length)
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    slots = {s: np.flatnonzero((answer & (positions >= s)).reshape(-1)) - s for s in shifts}
    device = target.device

    def send(array: np.ndarray[Any, Any]) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor

    return Batch(
        tokens=send(tokens),
        documents=send(documents),
        positions=send(positions),
        answer=send(answer),
        temperature=send(temperature),
        request=send(request),
        target=target,
        bounds=send(np.asarray(bounds, np.int32)),
        longest=longest,
        answers=float(answer.sum()) if answers is None else answers,
        slots={s: send(index) for s, index in slots.items()},
        origin=Origin() if origin_of is None else origin_of.origin,
    )


def _fill(documents: Any, sizes: Any, length: int) -> list[list[int]]:
    """Best fit, longest first: each document goes into the fullest row it still fits."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), rising
    for index in sorted(documents.tolist(), key=lambda i: -sizes[i]):
        size = int(sizes[index])
        at = bisect.bisect_left(room, (size, -1))
        if at < len(room):
            left, row = room.pop(at)
        else:
            left, row = length, len(rows)
            rows.append([])
        rows[row].append(index)
        if left - size >= 8:  # smaller holes are not worth looking at
            bisect.insort(room, (left - size, row))
    return rows


def steps_in(rows: int, per_step: int) -> int:
    """Optimiser steps of an epoch; the last one may hold fewer rows."""
    return math.ceil(rows / per_step)
