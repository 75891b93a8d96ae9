import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.errors import ConfigError
from outpace.train.corpus import Corpus
from outpace.train.packing import Packing
from tiny import target


def made(sizes, prompts):
    starts = np.concatenate([[0], np.cumsum(sizes)])
    meta = {"sampling": {"seed": 0, "top_k": None, "top_p": None, "min_p": None}, "held_out": []}
    return Corpus(
        np.arange(starts[-1], dtype=np.int32) % 40, starts.astype(np.int64), np.asarray(prompts, np.int64),
        np.arange(len(sizes)), np.linspace(0, 1, len(sizes), dtype=np.float32), meta, "x",
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(2, 40), st.integers(1, 50)), min_size=1, max_size=60), st.integers(0, 5))
def test_every_usable_document_stands_in_exactly_one_row(shapes, seed):
    sizes, prompts = [a for a, _ in shapes], [b for _, b in shapes]
    corpus = made(sizes, prompts)
    usable = [i for i, (size, prompt) in enumerate(shapes) if min(size, 24) > prompt]
    if not usable:
        with pytest.raises(ConfigError, match="no document of the corpus has an answer token"):
            Packing.of(corpus, 24, seed=seed)
        return
    packing = Packing.of(corpus, 24, seed=seed)
    assert sorted(i for row in packing.rows for i in row) == usable
    assert all(sum(min(sizes[i], 24) for i in row) <= 24 for row in packing.rows)
    assert packing.dropped == {
        "no answer token": len(shapes) - len(usable), "cut at the row length": sum(s > 24 for s in sizes),
    }  # fmt: skip
    again = Packing.of(corpus, 24, seed=seed)
    assert again.rows == packing.rows
    assert sorted(packing.order(3, seed)) == list(range(len(packing.rows)))


def test_rows_are_full():
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 400, 2000)
    packing = Packing.of(made(sizes, np.full(2000, 5)), 2048)
    assert packing.tokens / (len(packing.rows) * 2048) > 0.98


def test_a_batch_says_what_stands_where():
    corpus = made([5, 3, 4, 9], [2, 1, 3, 8])
    packing = Packing.of(corpus, 10)
    batch = packing.batch(range(len(packing.rows)), target(), shifts=(1, 2), answers=4.0)
    bounds = batch.bounds.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == batch.tokens.numel()
    assert batch.longest == max(b - a for a, b in itertools.pairwise(bounds))
    spans = {}
    for row, documents in enumerate(packing.rows):
        at = 0
        for number, i in enumerate(documents, start=1):
            size = int(corpus.lengths()[i])
            span = (row, slice(at, at + size))
            assert batch.tokens[span].tolist() == corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]].tolist()
            assert batch.documents[span].eq(number).all()
            assert batch.positions[span].tolist() == list(range(size))
            assert batch.answer[span].tolist() == [p >= corpus.prompt[i] for p in range(size)]
            assert batch.request[span].eq(int(corpus.request[i])).all()
            torch.testing.assert_close(batch.temperature[span], torch.full((size,), float(corpus.temperature[i])))
            spans[row * 10 + at] = row * 10 + at + size
            at += size
        assert batch.documents[row, at:].eq(0).all()
        assert not batch.answer[row, at:].any()
    assert set(spans) <= set(bounds)
    assert set(spans.values()) <= set(bounds)
    assert batch.answers == 4.0
