"""The arithmetic of partial quadratic decoding against naive definitions, and encodings of numbers."""

import heapq
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from outpace.drafters.ptp import ENCODINGS, MODES, NumberEmbedding
from outpace.drafters.ptp.calibration import BINS, Agreement, Calibration
from outpace.drafters.ptp.encodings import digits
from outpace.drafters.ptp.rows import (
    allocate,
    draw_scored,
    group_rows,
    lineage,
    read_out,
    scout_rows,
    walk_ends,
    worth,
)
from outpace.errors import ConfigError
from outpace.laws import Settings, Tree, draw, intervals

TREES = st.lists(st.integers(-1, 30), max_size=9).map(lambda xs: [min(x, i - 1) for i, x in enumerate(xs)])
SURVIVAL = st.lists(st.floats(0.05, 0.99), min_size=1, max_size=5).map(
    lambda xs: list(itertools.accumulate(xs, lambda a, b: a * b))
)


@given(TREES)
def test_lineage_and_ends_of_walks(parents):
    ancestors = lineage(torch.tensor([parents], dtype=torch.int64).reshape(1, -1))[0]
    for node in range(len(parents) + 1):
        own, at = {node}, node
        while at > 0:
            at = parents[at - 1] + 1
            own.add(at)
        assert ancestors[node].nonzero()[:, 0].tolist() == sorted(own)
    n = len(parents)
    confidence = torch.rand(1, n, generator=torch.Generator().manual_seed(n)) / max(n, 1)
    ends = walk_ends(confidence, torch.tensor([parents], dtype=torch.int64).reshape(1, -1), ancestors[None])[0]
    assert float(ends.sum()) == pytest.approx(1, abs=1e-5), "a walk ends somewhere"
    for node in range(n + 1):
        reach = math.prod(float(confidence[0, a - 1]) for a in ancestors[node].nonzero()[:, 0].tolist() if a)
        stays = 1 - sum(float(confidence[0, c]) for c in range(n) if parents[c] + 1 == node)
        assert float(ends[node]) == pytest.approx(reach * stays, abs=1e-5)


def value(sizes, ends, survival, silent):
    """Expected right drafts of a plan: sum of Pr(end) * H(size)."""
    return sum(p * sum(survival[: max(0, b - silent)]) for b, p in zip(sizes, ends, strict=True))


def sizes_of(branch, slot, count):
    sizes = [0] * count
    for b, s in zip(branch.tolist(), slot.tolist(), strict=True):
        assert s == sizes[b], "slots of a group are taken in order, without holes"
        sizes[b] += 1
    return sizes


@given(
    survival=SURVIVAL,
    weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=4),
    budget=st.integers(1, 12),
)
def test_the_plan_is_the_best_one_where_every_slot_drafts(survival, weights, budget):
    ends = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    branch, slot, gain = allocate(ends, torch.tensor(worth(survival, 0), dtype=torch.float64), budget)
    sizes = sizes_of(branch[0], slot[0], len(weights))
    longest = len(survival)
    best = max(
        value(plan, ends[0].tolist(), survival, 0)
        for plan in itertools.product(range(longest + 1), repeat=len(weights))
        if sum(plan) <= budget
    )
    assert value(sizes, ends[0].tolist(), survival, 0) == pytest.approx(best)
    assert float(gain.sum()) == pytest.approx(best)


def paper_allocation(ends, survival, budget):
    """The published greedy rule for a first slot that drafts nothing: two rows for the first draft, then one each."""
    gains = [survival[0], *(b for b in survival[1:])]
    sizes, left = [0] * len(ends), budget
    heap = [(-p * gains[0] / 2, m) for m, p in enumerate(ends)]
    heapq.heapify(heap)
    while heap and left > 0:
        _, m = heapq.heappop(heap)
        cost = 2 if sizes[m] == 0 else 1
        if cost > left:
            continue
        sizes[m] += cost
        left -= cost
        if sizes[m] - 1 < len(gains):
            heapq.heappush(heap, (-ends[m] * gains[sizes[m] - 1], m))
    return sizes


@settings(max_examples=30)
@given(survival=SURVIVAL, weights=st.lists(st.floats(0.01, 1), min_size=1, max_size=3))
def test_with_a_silent_slot_whole_pieces_of_the_envelope_are_optimal(survival, weights):
    """Where the budget ends between two pieces, no plan of as many slots is better; the paper's rule is never above."""
    ends = torch.tensor([weights], dtype=torch.float64) / sum(weights)
    steps = worth(survival, 1)
    assert steps == sorted(steps, reverse=True)
    everything = allocate(ends, torch.tensor(steps, dtype=torch.float64), 99)
    gains = everything[2][0].tolist()
    for budget in range(1, len(gains)):
        if gains[budget - 1] > gains[budget] + 1e-9:
            sizes = sizes_of(everything[0][0, :budget], everything[1][0, :budget], len(weights))
            ours = value(sizes, ends[0].tolist(), survival, 1)
            best = max(
                value(plan, ends[0].tolist(), survival, 1)
                for plan in itertools.product(range(len(survival) + 2), repeat=len(weights))
                if sum(plan) <= budget
            )
            assert ours == pytest.approx(best)
            paper = paper_allocation(ends[0].tolist(), survival, budget)
            assert value(paper, ends[0].tolist(), survival, 1) <= ours + 1e-9


@settings(max_examples=40)
@given(mode=st.sampled_from(list(MODES)), parents=TREES, budget=st.integers(1, 20), drop=st.integers(0, 3))
def test_slots_stand_behind_their_branch_and_see_their_own(mode, parents, budget, drop):
    shape, root, longest = MODES[mode], 17, 4
    ancestors = lineage(torch.tensor([parents], dtype=torch.int64).reshape(1, -1))
    depths = [0, *Tree([0] * len(parents), parents).depths()]
    ends = torch.rand(1, len(parents) + 1, generator=torch.Generator().manual_seed(budget))
    branch, slot, _ = allocate(ends, torch.tensor([0.9, 0.8, 0.7, 0.6]), budget)
    used = torch.ones_like(branch, dtype=torch.bool)
    used[:, branch.shape[1] - drop :] = False
    positions, carried, sees = scout_rows(torch.tensor([root]), ancestors, branch, slot, used, shape)
    main = len(parents) + 1
    for row in range(branch.shape[1]):
        b, j = int(branch[0, row]), int(slot[0, row])
        start = root + depths[b] + 1  # index of the first token the group guesses
        assert int(carried[0, row]) == start + j
        assert int(positions[0, row]) == start + j + shape.lead - 1, "the index of what it predicts, less one"
        seen = {i for i in range(main) if sees[0, row, i]}
        if not used[0, row]:
            assert sees[0, row].nonzero()[:, 0].tolist() == [main + row]
            continue
        assert seen == set(ancestors[0, b].nonzero()[:, 0].tolist())
        group = {i for i in range(branch.shape[1]) if used[0, i] and branch[0, i] == b and slot[0, i] <= j}
        assert {i for i in range(branch.shape[1]) if sees[0, row, main + i]} == group
    for b in range(main):
        rows, present = group_rows(branch, slot, used, torch.tensor([b]), longest)
        for j in range(longest):
            wanted = [i for i in range(branch.shape[1]) if branch[0, i] == b and slot[0, i] == j and used[0, i]]
            assert bool(present[0, j]) == bool(wanted)
            assert not wanted or int(rows[0, j]) == wanted[0]


@given(seed=st.integers(0, 10**6), u=st.floats(0, 1, exclude_max=True))
def test_drawing_from_a_slot_is_drawing(seed, u):
    logits = torch.randn(9, generator=torch.Generator().manual_seed(seed)) * 2
    law, number = torch.softmax(logits, -1), torch.tensor(u, dtype=torch.float64)
    token, score = draw_scored(law, number)
    assert int(token) == draw(law, u)
    low, high = max(0, u - 0.02), min(1, u + 0.02)
    left, right = (float(x) for x in intervals(law, token))
    assert float(score) == pytest.approx(max(0, min(right, high) - max(left, low)) / (high - low), abs=1e-6)
    tokens, scores = read_out(logits, number, count=4)
    assert int(tokens[0]) == int(token)
    assert scores[1:].tolist() == sorted(scores[1:].tolist(), reverse=True)
    assert float(scores.sum()) <= 1 + 1e-5
    tokens, scores = read_out(logits, None, count=2)
    assert tokens.tolist() == logits.topk(2).indices.tolist()


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_tell_numbers_apart_and_stay_finite(name):
    encoding = ENCODINGS[name]
    u = torch.cat(
        [torch.linspace(0, 1, 64, dtype=torch.float64)[:-1], torch.tensor([1 - 2.0**-53], dtype=torch.float64)]
    )
    features = encoding.features(u, encoding.count)
    assert features.shape == (64, encoding.count)
    assert bool(torch.isfinite(features).all())
    different = torch.unique(features, dim=0).shape[0]
    assert different == (encoding.count if name == "bins" else 64), "bins round on purpose"


@given(st.integers(0, 2**53 - 1))
def test_digits_invert_exactly(integer):
    u = torch.tensor(integer / 2**53, dtype=torch.float64)
    bits = ((digits(u, 53) + 1) / 2).long().tolist()
    assert sum(bit << (52 - i) for i, bit in enumerate(bits)) == integer


def test_numbers_that_are_none_are_refused():
    embedding = NumberEmbedding(8, "anchors")
    for bad in (1.0, -0.1, float("nan")):
        with pytest.raises(ConfigError, match=r"must be in \[0, 1\)"):
            embedding(torch.tensor([0.5, bad], dtype=torch.float64))
    with pytest.raises(ConfigError, match="did you mean 'digits'"):
        NumberEmbedding(8, "digit")


def test_embeddings_start_in_the_midst_of_the_tokens():
    like = 0.05 * torch.randn(500, 64, generator=torch.Generator().manual_seed(0)) + 0.2
    for name in ENCODINGS:
        e = NumberEmbedding(64, name, like=like)(torch.rand(400, dtype=torch.float64))
        assert float(e.mean()) == pytest.approx(0.2, abs=0.05)
        assert 0.5 < float(e.norm(dim=-1).mean()) / float(like.norm(dim=-1).mean()) < 2


def test_trust_rises_with_the_score_and_follows_the_counts():
    calibration = Calibration(2)
    assert calibration.trust() == pytest.approx([(i + 0.5) / BINS for i in range(BINS)]), "itself, without counts"
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, 2, generator=generator)
    right = torch.rand(4000, 2, generator=generator) < scores**2
    tried = torch.ones_like(right)
    tried[::4, 1] = False
    calibration.count(scores, right, tried)
    trust = calibration.trust()
    assert trust == sorted(trust)
    for i in (4, 16, 30):  # a standard deviation is below 0.05 in every bin: 4000 first guesses in 32 bins
        assert trust[i] == pytest.approx(((i + 0.5) / BINS) ** 2, abs=0.15)
    first, both = calibration.survival()
    assert first == pytest.approx(1 / 3, abs=0.04)
    assert both == pytest.approx(first * 1 / 3, abs=0.05)


def test_agreement_of_a_preset_with_other_temperatures():
    logits = 3 * torch.randn(200, 30, generator=torch.Generator().manual_seed(0))
    agreement = Agreement()
    assert agreement.share(1.0) is None
    agreement.count(logits, Settings(temperature=1.0))
    assert agreement.share(1.0) == pytest.approx(1, abs=1e-5)
    assert 0.4 < agreement.share(0.5) < agreement.share(0.7) < 0.95
    counted = 0
    p, q = torch.softmax(logits, -1), torch.softmax(logits / 0.7, -1)
    generator = torch.Generator().manual_seed(1)
    for row in range(200):
        for u in torch.rand(10, dtype=torch.float64, generator=generator).tolist():
            counted += draw(p[row], u) == draw(q[row], u)
    assert counted / 2000 == pytest.approx(agreement.share(0.7), abs=0.05), "five standard deviations"
