from outpace import Engine
from outpace.drafters import TokenDrafter
from outpace.drafters.merged import Merged
from outpace.laws import Tree
from tiny import PROMPTS, target


class Fixed(TokenDrafter):
    def __init__(self, name, tree):
        self.name, self.tree, self.heard = name, tree, []

    def guess(self, request):
        return self.tree

    def observe(self, context, walks, read):
        self.heard += [(walk.nodes, walk.tokens) for walk in walks]


def test_the_tree_is_the_union_and_each_hears_of_its_own_nodes():
    want = Engine(target()).generate([PROMPTS[0]], max_new_tokens=3, ignore_eos=True)[0].tokens
    right = Fixed("right", Tree.chain(list(want[:2])))
    half = Fixed("half", Tree([38, want[0]], [-1, -1]))
    merged = Merged([half, right])
    output = Engine(target(), merged, stand_down=False).generate([PROMPTS[0]], max_new_tokens=3, ignore_eos=True)[0]
    assert output.rounds == 1
    assert output.rounds_detail[0].drafted == 3, "a shared node counts once"
    assert right.heard == [((0, 1), want)]
    assert half.heard == [((1,), want)]


def test_the_budget_favours_the_first():
    merged = Merged([Fixed("a", Tree.chain([1, 2])), Fixed("b", Tree.chain([3, 4]))], max_nodes=3)
    engine = Engine(target(), merged, stand_down=False)
    output = engine.generate([PROMPTS[0]], max_new_tokens=5, ignore_eos=True)[0]
    assert output.rounds_detail[0].drafted == 3
