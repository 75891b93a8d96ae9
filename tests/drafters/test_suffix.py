import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace import Engine
from outpace.drafters.suffix import Suffix, SuffixTrie
from outpace.errors import ConfigError
from tiny import PROMPTS, target

DEPTH = 4


def counts(trie):
    """Every stored sequence and its count."""
    found, stack = {}, [((), trie.root)]
    while stack:
        prefix, node = stack.pop()
        for token, child in node.children.items():
            found[(*prefix, token)] = child.count
            stack.append(((*prefix, token), child))
    return found


def quadratic(texts):
    """Count every window of every text."""
    found = {}
    for text in texts:
        for start in range(len(text)):
            for end in range(start + 1, min(len(text), start + DEPTH) + 1):
                key = tuple(text[start:end])
                found[key] = found.get(key, 0) + 1
    return found


operations = st.lists(
    st.tuples(
        st.sampled_from(["extend", "extend", "extend", "remove"]),
        st.integers(0, 3),
        st.lists(st.integers(0, 2), max_size=6),
    ),
    max_size=25,
)


@given(operations)
def test_counts_equal_a_quadratic_count_after_any_history(plan):
    trie, texts = SuffixTrie(DEPTH, 10_000), {}
    for kind, key, tokens in plan:
        if kind == "extend":
            trie.extend(key, tokens)
            texts.setdefault(key, []).extend(tokens)
        else:
            trie.remove(key)
            texts.pop(key, None)
    assert counts(trie) == quadratic(texts.values())
    assert trie.tokens == sum(len(t) for t in texts.values())


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=8), st.integers(DEPTH, 12))
def test_memory_is_bounded_and_the_newest_stays(chunks, limit):
    trie, newest = SuffixTrie(DEPTH, limit), []
    for number, tokens in enumerate(chunks):
        trie.extend(number, tokens)
        newest = tokens
    assert trie.tokens <= max(limit, DEPTH)
    assert trie.find(newest[-DEPTH:]) is not None


@given(st.lists(st.integers(0, 2), min_size=1, max_size=60))
def test_a_single_long_text_forgets_its_beginning(tokens):
    trie = SuffixTrie(DEPTH, 20)
    trie.extend("only", tokens)
    kept = tokens[-20:] if len(tokens) > 20 else tokens
    assert trie.tokens == len(kept)
    found = counts(trie)
    wanted = quadratic([kept])
    assert found == wanted


def test_parents_are_seen_at_least_as_often_as_their_children():
    rng = random.Random(0)
    trie = SuffixTrie(6, 10_000)
    trie.extend(0, [rng.randrange(3) for _ in range(500)])
    stack = [trie.root.children[t] for t in trie.root.children]
    while stack:
        node = stack.pop()
        assert node.count >= sum(child.count for child in node.children.values())
        stack.extend(node.children.values())


def test_score_is_the_expected_number_of_accepted_tokens():
    """Simulate: texts continued as the counts say are accepted as often as the score says (10,000 draws, 5 sigma)."""
    trie = SuffixTrie(5, 10_000)
    for number, text in enumerate([[7, 1, 2], [7, 1, 3], [7, 1, 2], [7, 4, 2]]):
        trie.extend(number, text)
    node = trie.find([7])
    score, taken = trie.expand(node, 3, 0.01)
    assert [token for token, _ in taken] == [1, 2, 4] or [token for token, _ in taken] == [1, 2, 3]
    assert score == pytest.approx(0.75 + 0.5 + 0.25)
    continuations = [[1, 2], [1, 3], [1, 2], [4, 2]]
    rng, accepted = random.Random(1), 0
    for _ in range(10_000):
        path = rng.choice(continuations)
        at, depth = -1, 0
        while depth < len(path):
            at = next((i for i, (token, parent) in enumerate(taken) if parent == at and token == path[depth]), None)
            if at is None:
                break
            depth += 1
        accepted += depth
    assert accepted / 10_000 == pytest.approx(score, abs=5 * 0.7 / 100)


def test_long_matches_earn_longer_drafts():
    engine = Engine(target(), Suffix(draft_len=16, factor=1.0), stand_down=False)
    output = engine.generate([PROMPTS[1] * 3], max_new_tokens=20, ignore_eos=True)[0]
    assert max(r.drafted for r in output.rounds_detail) <= 16


def test_history_is_off_by_default_and_can_be_cleared():
    assert Suffix().history is None
    drafter = Suffix(history=True, min_probability=0.05)
    engine = Engine(target(), drafter, stand_down=False)
    cold = engine.generate([PROMPTS[0]], max_new_tokens=30, ignore_eos=True)[0]
    warm = engine.generate([PROMPTS[0]], max_new_tokens=30, ignore_eos=True)[0]
    assert warm.tokens == cold.tokens
    assert warm.rounds < cold.rounds, "the same answer again is in the history"
    drafter.forget()
    again = engine.generate([PROMPTS[0]], max_new_tokens=30, ignore_eos=True)[0]
    assert again.rounds == cold.rounds


@pytest.mark.parametrize("bad", [{"draft_len": 0}, {"max_depth": 1}, {"min_probability": 0}, {"min_probability": 1.5}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        Suffix(**bad)
