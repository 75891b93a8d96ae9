import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace import Engine
from outpace.drafters import make_drafter
from outpace.drafters.lookahead import Lookahead, NgramPool, Window
from outpace.errors import ConfigError
from outpace.target import Target
from tiny import PROMPTS, target


@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("height", [1, 2, 4])
def test_each_cell_sees_one_token_per_position_itself_last(width, height):
    window = Window(0, width, height, lambda number: number)
    while len(window.rows) < height:
        window.advance([0] * width, [0])
    cells = [(0, 0), *window.cells()]
    sees = window.visibility()
    for i, (row, column) in enumerate(window.cells()):
        seen = [sum(cells[j]) for j in range(len(cells)) if sees[i, j]]
        assert sorted(seen) == list(range(row + column + 1))
    assert len(window.cells()) == width * height - 1


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=30), st.integers(1, 4))
def test_pool_keeps_the_most_recently_added(adds, capacity):
    pool, wanted = NgramPool(capacity), {}
    for key, value in adds:
        pool.add(key, (value, value))
        recent = wanted.setdefault(key, [])
        if (value, value) in recent:
            recent.remove((value, value))
        recent.insert(0, (value, value))
        del recent[capacity:]
    assert {key: pool.get(key) for key in wanted} == wanted
    assert len(pool) == sum(map(len, wanted.values()))


def test_window_keeps_positions_as_it_grows_and_moves():
    """Cells hold position numbers; after a round of n tokens every cell must still hold its own position."""
    root = 100
    window = Window(root, 12, 3, lambda number: -1)
    window.rows[0] = [root + c for c in range(12)]
    for emitted in (1, 2, 1, 3, 1):
        height = len(window.rows)
        newest = [window.rows[0][0] + height + c for c in range(12)]
        start = window.rows[0][0]
        window.advance(newest, [start + 1 + i for i in range(emitted)])
        for r, row in enumerate(window.rows):
            for c, value in enumerate(row):
                assert value in (-1, window.rows[0][0] + r + c)
    assert len(window.rows) == 3


def test_window_shifts_by_one_where_it_did_not_foresee():
    window = Window(0, 4, 2, lambda number: -1)
    window.advance([1, 2, 3, 4], [1])
    window.advance([11, 12, 13, 14], [50, 51])
    assert window.rows[0][0] == 51


def test_a_periodic_text_is_foreseen():
    """Once the period is in the pool, every round but the last few emits a whole n-gram and the bonus token."""
    import torch

    base = target()
    cycle = {token: (token * 7 + 3) % 11 for token in range(40)}

    class Scripted(Target):
        def run(self, block, cache, *, taps=(), logits=True):
            read = super().run(block, cache, taps=taps, logits=logits)
            if read.logits is None:
                return read

            def points(tokens):
                rows = torch.zeros(*tokens.shape, self.vocabulary)
                nxt = torch.tensor([[cycle[int(t)] for t in row] for row in tokens])
                return rows.scatter(2, nxt[..., None], 5.0)

            scouts = block.scouts
            return type(read)(points(block.tokens), points(scouts.tokens) if scouts is not None else None, read.taps)

    scripted = Scripted(base.model)
    engine = Engine(scripted, Lookahead(window=6, ngram=4, guesses=4, seed_text=False), stand_down=False)
    output = engine.generate([[2, 5]], max_new_tokens=80, ignore_eos=True)[0]
    late = output.rounds_detail[12:-1]
    assert late
    assert all(len(r.tokens) == 4 for r in late), "three drafted tokens and the bonus, each round"


def test_rows_per_pass_are_what_the_formula_says(monkeypatch):
    rows = []
    run = Target.run

    def spy(self, block, cache, **options):
        if block.scouts is not None:
            rows.append(block.scouts.count)
        return run(self, block, cache, **options)

    monkeypatch.setattr(Target, "run", spy)
    engine = Engine(target(), Lookahead(window=4, ngram=3, guesses=2), stand_down=False)
    engine.generate([PROMPTS[0]], max_new_tokens=12, ignore_eos=True)
    assert rows[0] == 3, "the window starts with one row, less the root"
    assert set(rows[1:]) == {4 * 2 - 1}


def test_text_does_not_depend_on_the_branch_being_there():
    options = {"max_new_tokens": 30, "temperature": 0.7, "ignore_eos": True}
    want = Engine(target()).generate(PROMPTS[:3], **options)
    for spec in (
        "lookahead:seed_text=false",
        "lookahead:window=2,ngram=2,guesses=1",
        "lookahead:window=9,ngram=6,guesses=9",
    ):
        got = Engine(target(), spec, stand_down=False, check_integrity=True).generate(PROMPTS[:3], **options)
        assert [o.tokens for o in got] == [o.tokens for o in want]


@pytest.mark.parametrize("bad", ["window=1", "ngram=1", "guesses=0"])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        make_drafter(f"lookahead:{bad}")
