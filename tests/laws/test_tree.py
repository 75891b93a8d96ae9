import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.errors import DraftError
from outpace.laws import Draft, Tree

paths = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), max_size=6)


@given(paths, st.integers(1, 30))
def test_merge_holds_exactly_the_prefixes_of_its_paths(given_paths, budget):
    tree = Tree.merge(given_paths, budget)
    assert len(tree) <= budget
    tree.check(4, "test")
    found = set()
    for path in tree.paths():
        found |= {tuple(path[: i + 1]) for i in range(len(path))}
    wanted = {tuple(path[: i + 1]) for path in given_paths for i in range(len(path))}
    assert len(found) == len(tree), "no two nodes spell the same path"
    assert found <= wanted
    if len(wanted) <= budget:
        assert found == wanted


@given(paths, st.integers(0, 5))
def test_limited_cuts_by_depth_and_keeps_order(given_paths, depth):
    tree = Tree.merge(given_paths, 99)
    cut = tree.limited(depth)
    assert max(cut.depths(), default=0) <= depth
    assert len(cut) == sum(d <= depth for d in tree.depths())
    cut.check(4, "test")


@given(paths)
def test_depth_first_is_the_same_tree_with_its_first_path_in_front(given_paths):
    tree = Tree.merge(given_paths, 99)
    ordered = tree.depth_first()
    assert sorted(ordered.paths()) == sorted(tree.paths())
    ordered.check(4, "test")
    first, node = 0, -1
    children = ordered.children()
    while children[node + 1]:
        node = children[node + 1][0]
        assert node == first
        first += 1


@given(st.lists(paths, min_size=1, max_size=4))
def test_a_batch_of_trees_survives_packing(batch):
    trees = [Tree.merge(item, 20) for item in batch]
    draft = Draft.of(trees)
    assert draft.tokens.shape == draft.parents.shape == draft.valid.shape
    assert [(t.tokens, t.parents) for t in draft.trees()] == [(list(t.tokens), list(t.parents)) for t in trees]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (Tree([7], [-1]), "token id 7 at node 0, but the target's vocabulary has ids 0 to 4"),
        (Tree([-2], [-1]), "token id -2"),
        (Tree([1, 2], [1, -1]), "gave node 0 the parent 1"),
        (Tree([1], [-2]), "parent -2"),
        (Tree([1, 2], [-1]), "2 tokens with 1 parents"),
        (Tree([1], [-1], "iid"), "without the laws"),
        (Tree([1], [-1], "iid", torch.ones(1, 5)), "1 law rows for 1 nodes"),
        (Tree([1], [-1], "iid", torch.tensor([[1.0, 0, 0, 0, 0]] * 2)), "law that gives it no mass"),
    ],
)
def test_what_is_not_a_draft_is_refused_in_words(tree, words):
    with pytest.raises(DraftError, match=words):
        tree.check(5, "drafter 'x'")
