"""Growing trees: against brute force, against drafting along each path, and with scores that tie."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafters.learned import DIALOGUES, batch_for, fresh
from outpace.drafters.calibrate import count_ranks, path_values
from outpace.drafters.eagle import Eagle3
from outpace.drafters.growth import Draws, FixedTree, Plan, best_paths, children, extend, grow, grow_fixed, kept
from outpace.drafters.rowcache import RowCache
from outpace.errors import ConfigError
from outpace.laws import Key, Noise, NoiseDice, Stream, Tree
from tiny import target


def born(generator, depth, branches, *, sure=0.0):
    """Random births of a dynamic tree: tokens, parents, values; `sure` of the confidences are exactly one."""
    tokens, parents, values = [], [], []
    frontier = [-1]
    for _ in range(depth):
        new = []
        for node in frontier:
            ids = torch.randperm(20, generator=generator)[:branches].tolist()
            for token in ids:
                certain = bool(torch.rand((), generator=generator) < sure)
                logq = 0.0 if certain else float(torch.rand((), generator=generator).log())
                tokens.append(token)
                parents.append(node)
                values.append((values[node] if node >= 0 else 0.0) + logq)
                new.append(len(tokens) - 1)
        frontier = sorted(sorted(new, key=lambda i: (-values[i], i))[:branches])
    return tokens, parents, values


@given(
    seed=st.integers(0, 2**31), depth=st.integers(1, 4), branches=st.integers(1, 4), nodes=st.integers(1, 40),
    sure=st.sampled_from([0.0, 0.5, 1.0]),
)  # fmt: skip
def test_tree_1_and_2_the_kept_nodes_are_the_most_probable_and_a_tree(seed, depth, branches, nodes, sure):
    """Certain confidences make children tie with their parents; parents must win."""
    tokens, parents, values = born(torch.Generator().manual_seed(seed), depth, branches, sure=sure)
    values32 = torch.tensor([values])
    count = min(nodes, len(tokens))
    ours_tokens, ours_parents, ours_values = kept(torch.tensor([tokens]), torch.tensor([parents]), values32, count)
    want = sorted(sorted(range(len(tokens)), key=lambda i: (-float(values32[0, i]), i))[:count])
    number = {-1: -1} | {node: i for i, node in enumerate(want)}
    assert ours_tokens[0].tolist() == [tokens[i] for i in want]
    assert torch.equal(ours_values[0], values32[0, want])
    assert ours_parents[0].tolist() == [number[parents[i]] for i in want], "every kept node's parent is kept"
    tree = Tree(ours_tokens[0].tolist(), ours_parents[0].tolist())
    tree.check(20, "growth")
    assert max(tree.depths()) <= depth
    for siblings in tree.children():
        assert len({tree.tokens[s] for s in siblings}) == len(siblings)


def grown(drafter, draws=None, rows=15):
    """A cache with a dialogue in it, and the tree behind that."""
    net = drafter.module
    batch = batch_for(drafter, [[DIALOGUES[0]]])
    cache = RowCache.empty(net.layers, 2, 8, 32, device=torch.device("cpu"), dtype=torch.float32)
    cache.reserve(slots=1)
    features = torch.cat([batch.taps[tap] for tap in net.taps], -1)[:, :rows]
    extend(net, target().embed, cache, features, batch.tokens[:, 1 : rows + 1], torch.tensor([rows]), 128)
    cache.advance([rows])
    return net, cache, features, batch.tokens[:, : rows + 1]


def along(net, features, tokens, path):
    """log q(. | path) by reading everything anew: true rows, then the path's tokens one by one."""
    cache = RowCache.empty(net.layers, 2, 8, 32, device=torch.device("cpu"), dtype=torch.float32)
    cache.reserve(slots=1)
    size = features.shape[1]
    extend(net, target().embed, cache, features, tokens[:, 1:], torch.tensor([size]), 128)
    y = cache.top[:, None].clone()
    from outpace.drafters.growth import _step

    for depth, token in enumerate(path, start=1):
        sees = torch.ones(1, 1, depth, dtype=torch.bool)
        y = _step(net, target().embed, cache, torch.tensor([[token]]), net.feedback(y), sees, depth, 128)
    return torch.log_softmax(net.head(net.readout(y[0, 0])).float(), -1)


@torch.no_grad()
@pytest.mark.parametrize("layers", [1, 2])
def test_tree_5_and_2_a_grown_tree_is_that_of_plain_drafting_along_each_path(layers):
    """The whole dynamic tree, by a slow algorithm that knows no cache of drafts: beams, values, ranks, renumbering."""
    drafter = fresh(Eagle3(layers=layers, vocabulary=0))
    net, cache, features, tokens = grown(drafter)
    depth, k, nodes = 4, 3, 14
    ours = grow(net, target().embed, cache, Plan(depth=depth, branches=k, nodes=nodes), 1, 128)
    born_nodes = [((), 0.0)]
    frontier, everything = [((), 0.0)], []
    for _ in range(depth):
        born_nodes = []
        for path, value in frontier:
            logq = along(net, features, tokens, path)
            best, ids = torch.topk(logq, k)
            born_nodes += [((*path, int(i)), value + float(b)) for b, i in zip(best, ids, strict=True)]
        everything += born_nodes
        frontier = sorted(born_nodes, key=lambda node: -node[1])[:k]
    want = sorted(everything, key=lambda node: -node[1])[:nodes]
    tree = Tree(ours[0][0].tolist(), ours[1][0].tolist())
    assert len(tree) == nodes
    found = set()
    for node in range(nodes):
        path, at = (), node
        while at >= 0:
            path, at = (tree.tokens[at], *path), tree.parents[at]
        found.add(path)
    assert found == {path for path, _ in want}
    assert float(cache.at) == 15, "nothing drafted was kept"


@torch.no_grad()
def test_a_fixed_tree_takes_the_ranks_of_each_parents_own_law():
    drafter = fresh(Eagle3(vocabulary=0))
    net, cache, features, tokens = grown(drafter)
    paths = [(0,), (1,), (2,), (0, 0), (0, 1), (2, 0), (0, 0, 0), (0, 0, 2), (2, 0, 1)]
    tree = FixedTree(paths)
    ours_tokens, ours_parents = grow_fixed(net, target().embed, cache, tree, 1, 128)
    token_of = dict(zip(tree.paths, ours_tokens[0].tolist(), strict=True))
    assert tree.scratch == 4
    for path in paths:
        above = [token_of[path[:i]] for i in range(1, len(path))]
        ranked = torch.topk(along(net, features, tokens, above), 3).indices.tolist()
        assert token_of[path] == ranked[path[-1]]
    parents = [tree.paths.index(path[:-1]) if len(path) > 1 else -1 for path in tree.paths]
    assert ours_parents[0].tolist() == parents


@pytest.mark.parametrize("paths", [[], [(0, 0)], [()], [(0,), (1, 0)]])
def test_what_is_no_tree_is_refused(paths):
    with pytest.raises(ConfigError, match="closed under prefixes"):
        FixedTree(paths)


def test_best_paths_equal_brute_force_over_all_trees():
    """Three depths, three ranks, up to six nodes: no prefix-closed set of that size holds more."""
    rates = [[0.6, 0.25, 0.1], [0.5, 0.2, 0.15], [0.45, 0.3, 0.05]]
    every = [p for n in (1, 2, 3) for p in itertools.product(range(3), repeat=n)]
    value = {p: torch.tensor([rates[d][r] for d, r in enumerate(p)]).double().prod().item() for p in every}
    closed = {frozenset()}
    last = 0.0
    for size in range(1, 7):
        closed = {s | {p} for s in closed for p in every if p not in s and (len(p) == 1 or p[:-1] in s)}
        ours = best_paths(rates, size)
        assert len({p for p, _ in ours}) == size
        total = sum(v for _, v in ours)
        assert total == pytest.approx(max(sum(value[p] for p in s) for s in closed))
        assert total > last, "more nodes never hold less"
        last = total


def test_joint_frequencies_beat_products_where_depths_depend_on_one_another():
    """Rank 1 at depth 1 is always followed by rank 0: the product does not know, the joint count does."""
    ranks = torch.tensor([[0, 0, 0, 1, 1] * 40, [3, 3, 0, 0, 0] * 40])
    usable = torch.ones_like(ranks, dtype=torch.bool)
    values = dict(path_values(ranks, usable, 3, 4))
    assert values[(0,)] == pytest.approx(0.6)
    assert values[(1,)] == pytest.approx(0.4)
    assert values[(1, 0)] == pytest.approx(0.4)
    assert values[(0, 0)] == pytest.approx(0.2)
    with pytest.raises(ConfigError, match="nothing to calibrate"):
        path_values(ranks, ~usable, 3, 4)


def test_ranks_of_labels():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0]] * 3)
    assert count_ranks(logits, torch.tensor([1, 3, 0]), 3).tolist() == [0, 2, 3]
    assert count_ranks(logits[:1], torch.tensor([-1]), 3).tolist() == [3]


def test_children_under_the_paths_number_hold_the_token_it_draws():
    """At a temperature the token the law gives at u comes first if the coupling is above the rest's probability."""
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 50)
    u = torch.tensor([[0.3], [0.9]])
    heat = torch.tensor([0.7, 0.0])
    draws = Draws(heat, None, u, heat, 0.6)
    _, ids = children(logits, 4, draws)
    p = torch.softmax(logits[0] / 0.7, -1).double()
    for row in range(3):
        drawn = int(torch.searchsorted(p[row].cumsum(0), 0.3, right=True))
        assert int(ids[0, row, 0]) == drawn
    assert torch.equal(ids[1], torch.topk(logits[1], 4).indices), "a greedy request takes the most likely ones"
    for row in ids.flatten(0, 1).tolist():
        assert len(set(row)) == 4


def test_children_under_gumbel_noise_are_the_likeliest_winners():
    """Best first by logit / temperature + noise, beside a request whose number is looked up and a greedy one."""
    torch.manual_seed(0)
    logits, race = torch.randn(3, 2, 50), torch.zeros(3, 2, 50)
    race[0] = Noise(1).gumbel(0, 9, 100).view(2, 50)
    draws = Draws(torch.tensor([0.7, 0.7, 0.0]), race, torch.tensor([[0.3], [0.3], [0.3]]).expand(-1, 2),
                  torch.tensor([0.0, 0.7, 0.0]), 0.6)  # fmt: skip
    values, ids = children(logits, 4, draws, 2)
    scores = torch.log_softmax(logits[0] / 0.7 + race[0, 1], -1)
    best, wanted = scores.topk(4)
    assert torch.equal(ids[0], wanted)
    torch.testing.assert_close(values[0], best)
    alone = draws._replace(race=None)
    assert torch.equal(ids[1:], children(logits, 4, alone, 2)[1][1:])
    only = Draws(torch.tensor([0.7]), race[:1], None, torch.zeros(1), 0.6)
    assert torch.equal(children(logits[:1], 4, only, 2)[1][0], wanted)


def test_a_law_that_is_near_finds_the_paths_token_more_often_by_gumbel_noise():
    """Why it is worth its cost: two laws at a distance of 0.3, 400 positions; chances of 0.54 to 0.7 against fewer."""
    generator = torch.Generator().manual_seed(2)
    target = 2 * torch.randn(400, 300, generator=generator)
    drafter = target + 0.6 * torch.randn(400, 300, generator=generator)
    p, q = torch.softmax(target, -1), torch.softmax(drafter, -1)
    distance = float((p - q).abs().sum(-1).mean()) / 2
    agreed = {}
    for kind in ("gumbel", "uniform"):
        dice = NoiseDice(Noise(3), 0, kind)
        pairs = [[dice.draw(law[row], Key(Stream.PATH, row)) for law in (p, q)] for row in range(400)]
        agreed[kind] = sum(one == two for one, two in pairs) / 400
    assert agreed["gumbel"] > (1 - distance) / (1 + distance) - 0.07  # three standard deviations below the bound
    assert agreed["gumbel"] > agreed["uniform"] + 0.1


@pytest.mark.parametrize("bad", [{"depth": 0}, {"branches": 0}, {"nodes": 0}])
def test_impossible_plans_are_refused(bad):
    with pytest.raises(ConfigError, match="at least 1"):
        Plan(**({"depth": 2, "branches": 2, "nodes": 2} | bad))
