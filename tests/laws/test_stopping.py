import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace.laws import IncrementalText, Stopping

TEXTS = ["ab", "c", "", "d\n", "E", "ND", " ", "xyz", "a"]


def decode(ids):
    return "".join(TEXTS[i] for i in ids)


def byte_decode(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def run(tokens, chunks, **options):
    """Feed tokens in chunks; returns (kept tokens, text, reason)."""
    stopping = Stopping(decode, **{"eos": (), "stop": (), "max_tokens": 1000, **options})
    kept, text, at = [], "", 0
    for size in [*chunks, len(tokens)]:
        block = tokens[at : at + size]
        if not block:
            break
        verdict = stopping.feed(block)
        kept += block[: verdict.kept]
        text += verdict.text
        at += len(block)
        if verdict.reason:
            return kept, text, verdict.reason
    return kept, text + stopping.close(), None


tokens_strategy = st.lists(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=25)
chunks_strategy = st.lists(st.integers(1, 6), max_size=10)


@given(tokens_strategy, chunks_strategy, st.integers(1, 30), st.sampled_from([(), (4,), (0, 7)]))
def test_the_outcome_does_not_depend_on_how_tokens_arrive(tokens, chunks, limit, eos):
    options = {"eos": eos, "stop": ("END", "bc"), "max_tokens": limit}
    assert run(tokens, chunks, **options) == run(tokens, [1] * len(tokens), **options)


@given(tokens_strategy, chunks_strategy)
def test_stop_string_across_token_boundaries_is_cut_where_it_begins(tokens, chunks):
    kept, text, reason = run(tokens, chunks, stop=("END", "bc"))
    whole = decode(tokens)
    found = [at for at in (whole.find("END"), whole.find("bc")) if at >= 0]
    if found:
        assert reason == "stop"
        ends = min(at + len(s) for s in ("END", "bc") if (at := whole.find(s)) >= 0)
        assert len(decode(kept)) >= ends > len(decode(kept[:-1])), "the token that completes it is the last one"
        assert "END" not in text
        assert "bc" not in text
        assert whole.startswith(text)
    else:
        assert (kept, text, reason) == (tokens, whole, None)


def test_text_that_may_become_a_stop_string_is_held_back():
    stopping = Stopping(decode, eos=(), stop=("END",), max_tokens=99)
    assert stopping.feed([0, 4]).text == "ab"
    assert stopping.feed([1]).text == "Ec"
    assert stopping.feed([4]).text == ""
    verdict = stopping.feed([5, 0])
    assert (verdict.kept, verdict.text, verdict.reason) == (1, "", "stop")


@pytest.mark.parametrize("at", range(5))
def test_eos_anywhere_in_a_block_ends_it_there(at):
    block = [7, 7, 7, 7, 7]
    block[at] = 4
    verdict = Stopping(decode, eos=(4,), stop=(), max_tokens=99).feed(block)
    assert (verdict.kept, verdict.reason) == (at + 1, "eos")


@pytest.mark.parametrize("limit", range(1, 6))
def test_length_is_exact(limit):
    verdict = Stopping(decode, eos=(4,), stop=(), max_tokens=limit).feed([7] * 5)
    assert (verdict.kept, verdict.reason) == (limit, "length")


def test_the_earliest_of_several_reasons_wins():
    assert run([7, 1, 4, 5], [4], eos=(1,), stop=("ND",))[2] == "eos"
    assert run([7, 4, 5, 1], [4], eos=(1,), stop=("ND",))[2] == "stop"
    assert run([7, 4, 5, 1], [4], eos=(1,), stop=("ND",), max_tokens=2)[2] == "length"


@given(st.text(max_size=30))
def test_characters_split_over_tokens_come_out_whole(text):
    data = list(text.encode("utf-8"))
    incremental = IncrementalText(byte_decode)
    pieces = [incremental.push(byte) for byte in data]
    assert "".join(pieces) + incremental.flush() == byte_decode(data)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end_only():
    incremental = IncrementalText(byte_decode)
    data = "é".encode()
    assert incremental.push(data[0]) == ""
    assert incremental.flush() == "\ufffd"
