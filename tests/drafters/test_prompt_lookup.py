import pytest
from hypothesis import given
from hypothesis import strategies as st

from outpace.drafters import Context, RequestContext
from outpace.drafters.prompt_lookup import NgramIndex, PromptLookup
from outpace.errors import ConfigError
from outpace.laws import Noise, NoiseDice, Sampler, Settings, Walk
from outpace.target import Readout
from tiny import PROMPTS, target

text = st.lists(st.integers(0, 3), max_size=40)


def brute_force(tokens, sizes, length):
    """Most recent earlier occurrence of the longest matching n-gram, by scanning."""
    for size in sorted(sizes, reverse=True):
        if len(tokens) < size:
            continue
        key = tokens[-size:]
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == key:
                return size, tokens[end : end + length]
    return 0, None


@given(text, st.integers(1, 8))
def test_index_equals_a_scan(tokens, length):
    index = NgramIndex([1, 2, 3])
    for token in tokens:
        index.extend([token])
    size, found = index.continuations(length, 1)
    assert (size, found[0] if found else None) == brute_force(tokens, [1, 2, 3], length)


@given(text, st.integers(1, 5))
def test_several_continuations_are_different_and_recent_first(tokens, count):
    index = NgramIndex([2])
    index.extend(tokens)
    _, found = index.continuations(4, count)
    assert len(found) <= count
    assert all(found.count(one) == 1 for one in found)


def fresh(tokens, remaining=100, **options):
    drafter = PromptLookup(**options)
    request = RequestContext(list(tokens), len(tokens), Sampler(Settings(), NoiseDice(Noise(0), 0)), remaining)
    context = Context(target(), target().new_cache(), [request])
    drafter.start(context, request, {})
    return drafter, request, context


def test_drafts_what_followed_last_time():
    drafter, request, _ = fresh([1, 2, 3, 4, 9, 1, 2, 3, 5, 8, 1, 2, 3], max_ngram=3)
    assert drafter.guess(request).tokens == [5, 8, 1, 2, 3]


def test_no_match_no_draft():
    drafter, request, _ = fresh([1, 2, 3, 4])
    assert len(drafter.guess(request)) == 0


def test_branches_share_prefixes():
    drafter, request, _ = fresh([1, 2, 7, 4, 1, 2, 7, 5, 1, 2], branches=3, draft_len=3, adapt=False)
    tree = drafter.guess(request)
    assert sorted(tree.paths()) == [[7, 4, 1], [7, 5, 1]]


def test_length_halves_after_refusal_and_doubles_after_success():
    drafter, request, context = fresh([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12] * 2 + [1, 2, 3, 4], draft_len=8)
    sizes = [len(drafter.guess(request))]
    for nodes in ((), (), (0,), tuple(range(4))):
        accepted = nodes if len(nodes) < sizes[-1] else tuple(range(sizes[-1]))
        drafter.observe(context, [Walk(accepted, (0,) * (len(accepted) + 1))], Readout(None))
        sizes.append(len(drafter.guess(request)))
    assert sizes == [8, 4, 2, 2, 4]


def test_never_deeper_than_what_may_still_be_emitted():
    drafter, request, _ = fresh([1, 2, 3, 4, 5, 6, 1, 2], remaining=3)
    assert len(drafter.guess(request)) == 2


@pytest.mark.parametrize("bad", [{"min_ngram": 0}, {"min_ngram": 4, "max_ngram": 3}, {"draft_len": 0}, {"branches": 0}])
def test_impossible_options_are_refused(bad):
    with pytest.raises(ConfigError):
        PromptLookup(**bad)


def test_finished_requests_are_forgotten():
    from outpace import Engine

    drafter = PromptLookup()
    Engine(target(), drafter).generate(PROMPTS[:3], max_new_tokens=4)
    assert len(drafter._index) == 0
