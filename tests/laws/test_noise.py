import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from outpace.errors import ConfigError
from outpace.laws import Noise, Stream
from outpace.laws.noise import gumbel_grid, gumbel_of, philox, signed


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The known-answer vectors published with Random123 for philox4x32-10."""
    assert philox(counter, key) == expected
    tensors = tuple(torch.tensor([word]) for word in counter)
    assert tuple(int(word) for word in philox(tensors, key)) == expected


@given(
    seed=st.integers(0, 2**64 - 1),
    requests=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
    positions=st.lists(st.integers(0, 2**31), min_size=1, max_size=4),
)
def test_grid_equals_single_numbers_for_any_shape(seed, requests, positions):
    noise = Noise(seed)
    grid = noise.grid(torch.tensor(requests)[:, None], torch.tensor(positions))
    assert grid.dtype == torch.float64
    for i, request in enumerate(requests):
        for j, position in enumerate(positions):
            assert float(grid[i, j]) == noise.uniform(request, position)


@pytest.mark.parametrize("vocabulary", [1, 4, 255, 257, 49_153])
def test_compiled_words_are_those_of_numpy(vocabulary, monkeypatch):
    """Bit for bit, for seeds, requests and positions of all their bits; the numpy way is the definition."""
    keys = [(0, 0, 0), (2**64 - 1, 2**64 - 1, 2**32 - 1), (0x9E3779B97F4A7C15, 2**63 + 12345, 71)]
    found = [Noise(seed).gumbel(request, position, vocabulary) for seed, request, position in keys]
    monkeypatch.setenv("OUTPACE_NATIVE", "off")
    wanted = [Noise(seed).gumbel(request, position, vocabulary) for seed, request, position in keys]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, wanted, strict=True))


def test_streams_requests_positions_and_rounds_are_independent():
    """Chi-square on pairs of numbers that differ in one part of the key; each fails by chance once in 10^5."""
    noise, count = Noise(3), 4000
    base = [noise.uniform(0, t) for t in range(count)]
    others = {
        "position": [noise.uniform(0, t + 1) for t in range(count)],
        "request": [noise.uniform(1, t) for t in range(count)],
        "seed": [Noise(4).uniform(0, t) for t in range(count)],
        "draft stream": [noise.uniform(0, t, Stream.DRAFT) for t in range(count)],
        "accept stream": [noise.uniform(0, t, Stream.ACCEPT) for t in range(count)],
        "residual stream": [noise.uniform(0, t, Stream.RESIDUAL) for t in range(count)],
        "index": [noise.uniform(0, t, Stream.PATH, index=1) for t in range(count)],
        "round": [noise.uniform(0, t, Stream.PATH, round_index=1) for t in range(count)],
    }
    assert stats.kstest(base, "uniform").pvalue > 1e-5
    for name, other in others.items():
        cells = torch.zeros(5, 5)
        for u, v in zip(base, other, strict=True):
            cells[int(5 * u), int(5 * v)] += 1
        assert stats.chisquare(cells.flatten().numpy()).pvalue > 1e-5, name


def test_numbers_have_53_bits_and_stay_below_one():
    values = [Noise(1).uniform(0, t) for t in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert any(value * 2**53 % 2 == 1 for value in values)
    assert all((value * 2**53).is_integer() for value in values)


def test_gumbel_noise_is_gumbel_and_keyed():
    noise = Noise(5)
    g = noise.gumbel(0, 7, 20_000)
    assert stats.kstest(g.numpy(), "gumbel_r").pvalue > 1e-5
    assert torch.equal(g[:100], noise.gumbel(0, 7, 100))
    assert not torch.equal(g[:100], noise.gumbel(0, 8, 100))
    assert not torch.equal(g[:100], noise.gumbel(1, 7, 100))
    assert torch.equal(g[:7], noise.gumbel(0, 7, 7)), "a vocabulary that no fours fill"


def test_gumbel_noise_of_many_positions_is_that_of_each():
    seeds, requests, positions = [3, 2**64 - 1, 2**63], [2**63 + 9, 0, 5], [0, 77, 2**32 - 1]
    words = [torch.tensor([signed(n) for n in numbers]) for numbers in (seeds, requests, positions)]
    found = gumbel_grid(*words, 130)
    for row, seed, request, position in zip(found, seeds, requests, positions, strict=True):
        assert torch.equal(row, Noise(seed).gumbel(request, position, 130))


def test_gumbel_noise_of_an_id_is_a_word_of_its_four():
    """One value by hand, from the integers up; and the words of arrays are those of tensors."""
    noise, request, position = Noise(2**40 + 5), 2**35 + 3, 9
    tail = Stream.GUMBEL << 28
    words = philox((position, request & 0xFFFFFFFF, request >> 32, 2 | tail), (5, 2**8))
    found = noise.gumbel(request, position, 12).double()
    for index, word in enumerate(words):
        assert float(found[8 + index]) == pytest.approx(
            -math.log(-math.log1p(-(word + 0.5) / 2**32)), rel=1e-6, abs=1e-6
        )
    counter = np.arange(50, dtype=np.uint64) * np.uint64(2**31 + 12345) % np.uint64(2**32)
    arrays = philox((counter, counter[::-1].copy(), counter + np.uint64(1), counter), (7, 2**32 - 1))
    tensor = torch.from_numpy(counter.astype(np.int64))
    tensors = philox((tensor, tensor.flip(0), tensor + 1, tensor), (7, 2**32 - 1))
    for one, two in zip(arrays, tensors, strict=True):
        assert torch.equal(torch.from_numpy(one.astype(np.int64)), two)


def test_gumbel_noise_is_finite_for_every_word():
    words = torch.tensor([0, 1, 2, 2**31, 2**32 - 2**9, 2**32 - 2, 2**32 - 1], dtype=torch.int64)
    noise = gumbel_of(words.float())
    assert torch.isfinite(noise).all()
    assert (noise[:-1] >= noise[1:]).all()
    assert float(noise[0]) == pytest.approx(33 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_seed_out_of_range_is_refused(seed):
    with pytest.raises(ConfigError, match="seed must be"):
        Noise(seed)
