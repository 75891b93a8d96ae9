import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.errors import LawError
from outpace.laws import Key, Noise, NoiseDice, Stream, draw

ALMOST_ONE = 1 - 2**-53


@given(
    st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.5, 3.0]), min_size=1, max_size=30), st.floats(0, 1, exclude_max=True)
)
def test_draw_never_returns_a_token_of_zero_mass(weights, u):
    weights = torch.tensor(weights)
    if float(weights.sum()) == 0:
        with pytest.raises(LawError):
            draw(weights, u)
    else:
        assert float(weights[draw(weights, u)]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draw_at_the_ends_of_the_unit_interval(dtype):
    weights = torch.tensor([0, 0, 0.25, 0, 0.75, 0, 0], dtype=dtype)
    assert draw(weights, 0.0) == 2
    assert draw(weights, ALMOST_ONE) == 4


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8))
def test_draw_is_the_inverse_cdf(weights):
    p = torch.tensor(weights, dtype=torch.float64)
    edges = torch.cumsum(p / p.sum(), 0)
    for token in range(len(weights)):
        low = float(edges[token - 1]) if token else 0.0
        middle = (low + float(edges[token])) / 2
        assert draw(p, middle) == token


def test_draw_refuses_what_is_no_law():
    for bad in ([0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(LawError, match="cannot draw"):
            draw(torch.tensor(bad), 0.5)


class FixedDice(NoiseDice):
    def __init__(self, u):
        self.u, self.kind = u, "uniform"

    def uniform(self, key):
        return self.u


@pytest.mark.parametrize("u", [0.0, 0.5, ALMOST_ONE])
def test_accept_is_right_at_the_edges(u):
    key = Key(Stream.ACCEPT, 0)
    assert FixedDice(u).accept(0.3, 0.3, key), "p >= q is always accepted"
    assert not FixedDice(u).accept(0.0, 0.3, key), "a forbidden token never is, even at u == 0"


def test_dice_that_foresaw_answer_the_same(monkeypatch):
    dice, fresh = ([NoiseDice(Noise(seed), request) for seed, request in ((1, 0), (2**63, 7))] for _ in range(2))
    places, cpu = [[4, 5, 6, 5], range(9, 11)], torch.device("cpu")
    NoiseDice.foresee(dice, places, 50, cpu)
    wanted = [[one.gumbel(at, 50, cpu) for at in some] for one, some in zip(fresh, places, strict=True)]
    monkeypatch.setattr(Noise, "gumbel", None)  # nothing is made again
    NoiseDice.foresee(dice, places, 50, cpu)
    found = [[one.gumbel(at, 50, cpu) for at in some] for one, some in zip(dice, places, strict=True)]
    assert all(torch.equal(a, b) for x, y in zip(found, wanted, strict=True) for a, b in zip(x, y, strict=True))


def test_gumbel_dice_draw_the_law():
    """10,000 draws over three tokens; chi-square below 27.6 (2 degrees of freedom) fails once in 10^6."""
    p = torch.tensor([0.5, 0.3, 0.2])
    dice = NoiseDice(Noise(1), 0, "gumbel")
    counts = torch.zeros(3)
    for position in range(10_000):
        counts[dice.draw(p, Key(Stream.PATH, position))] += 1
    assert float(((counts - 1e4 * p) ** 2 / (1e4 * p)).sum()) < 27.6
