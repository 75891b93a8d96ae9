import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.target import BlockCache, CacheIntegrityError

HEADS, SIZE = 2, 4


def written(first, rows, base):
    """Keys whose numbers tell where they came from: base + row."""
    values = base + torch.arange(rows, dtype=torch.float64)
    return values[None, None, :, None].expand(1, HEADS, rows, SIZE)


class Model:
    """What a cache should hold, as plain lists."""

    def __init__(self, slots):
        self.texts = [[] for _ in range(slots)]


steps = st.lists(
    st.tuples(
        st.integers(1, 6),
        st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=3, max_size=3),
        st.booleans(),
    ),
    min_size=1,
    max_size=8,
)


@given(steps, st.integers(0, 3))
def test_ragged_writes_commits_and_drops_keep_exactly_the_accepted_rows(plan, start):
    cache = BlockCache(layers=2, slots=3)
    wanted = [[] for _ in range(3)]
    for slot in range(3):  # begin ragged
        cache.open(slot, 1, slot * start + 1)
        for layer in range(2):
            keys = written(0, slot * start + 1, 1000.0 * slot)
            cache.update(keys, -keys, layer)
        cache.commit([range(slot * start + 1)])
        wanted[slot] += [1000.0 * slot + r for r in range(slot * start + 1)]
    for number, (rows, masks, drop) in enumerate(plan, start=1):
        cache.open(0, 3, rows)
        base = [10_000.0 * number + 1000.0 * slot for slot in range(3)]
        keys = torch.cat([written(0, rows, b) for b in base])
        for layer in range(2):
            seen, _ = cache.update(keys, -keys, layer)
            assert seen.shape[2] == cache.attended(max(cache.lengths) + rows)
            for slot in range(3):
                length = cache.lengths[slot]
                assert seen[slot, 0, :length, 0].tolist() == wanted[slot]
                assert seen[slot, 0, length : length + rows, 0].tolist() == [base[slot] + r for r in range(rows)]
        if drop:
            cache.drop()
            continue
        kept = [[0, *(r for r in range(1, rows) if masks[slot][r])] for slot in range(3)]
        cache.commit(kept)
        for slot in range(3):
            wanted[slot] += [base[slot] + r for r in kept[slot]]
    for slot in range(3):
        for layer in range(2):
            keys, values = cache.entries(layer, slot)
            assert keys[0, :, 0].tolist() == wanted[slot]
            assert torch.equal(values, -keys)
    cache.check_integrity([length + 1 for length in cache.lengths])


def filled(lengths):
    cache = BlockCache(layers=1, slots=len(lengths))
    for slot, length in enumerate(lengths):
        cache.open(slot, 1, length)
        cache.update(written(0, length, 100.0 * slot), written(0, length, 100.0 * slot), 0)
        cache.commit([range(length)])
    return cache


def test_growing_keeps_what_is_stored():
    cache = filled([3, 5])
    before = [cache.entries(0, slot)[0].clone() for slot in range(2)]
    cache.reserve(slots=4, capacity=2000)
    assert cache.slots == 4
    assert cache.capacity >= 2000
    assert all(torch.equal(cache.entries(0, slot)[0], before[slot]) for slot in range(2))
    cache.open(0, 2, 600)
    assert cache.capacity >= 605


def test_move_and_truncate_follow_requests_that_leave():
    cache = filled([3, 5, 2])
    last = cache.entries(0, 2)[0].clone()
    cache.move(2, 0)
    cache.truncate(2, 0)
    assert cache.lengths == [2, 5, 0]
    assert torch.equal(cache.entries(0, 0)[0], last)
    cache.move(1, 1)
    assert cache.lengths == [2, 5, 0]
    with pytest.raises(CacheIntegrityError, match="cannot cut"):
        cache.truncate(0, 3)


def test_scratch_is_forgotten_even_after_an_error():
    cache = filled([3])

    def crash():
        with cache.scratch():
            cache.open(0, 1, 2)
            cache.update(written(0, 2, 0.0), written(0, 2, 0.0), 0)
            raise RuntimeError("drafter died")

    with pytest.raises(RuntimeError, match="drafter died"):
        crash()
    cache.check_integrity([4])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda c: c.lengths.__setitem__(0, 2), "invariant 1"),
        (lambda c: c.entries(0, 0)[0].fill_(float("nan")), "invariant 2"),
        (lambda c: c.lengths.__setitem__(1, 4), "invariant 4"),
        (lambda c: c.open(0, 1, 1), "invariant 5"),
    ],
)
def test_integrity_check_catches_every_fault(break_it, words):
    cache = filled([3, 1])
    cache.truncate(1, 0)
    cache.check_integrity([4])
    break_it(cache)
    with pytest.raises(CacheIntegrityError, match=words):
        cache.check_integrity([4])


def test_misuse_is_caught():
    cache = filled([3])
    with pytest.raises(CacheIntegrityError, match="outside a pass"):
        cache.update(written(0, 1, 0.0), written(0, 1, 0.0), 0)
    cache.open(0, 1, 1)
    with pytest.raises(CacheIntegrityError, match="already open"):
        cache.open(0, 1, 1)
    with pytest.raises(CacheIntegrityError, match="2 paths for a block of 1"):
        cache.commit([[0], [0]])


def test_memory_is_what_it_says():
    cache = filled([3])
    assert cache.bytes == 2 * HEADS * cache.capacity * SIZE * 8
    assert "lengths=[3]" in repr(cache)
