import pytest
import torch

from drafters.learned import fresh
from outpace import Engine
from outpace.drafters import TokenDrafter
from outpace.drafters.eagle import Eagle3
from outpace.drafters.medusa import Medusa
from outpace.drafters.merged import Merged
from outpace.drafters.ptp import Ptp
from outpace.drafters.ptp import eagle as behind
from outpace.drafters.suffix import Suffix
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


def states_read(drafter, engine):
    """What a drafter that follows features stands on, by the tokens known."""
    found, grow = {}, drafter.grow

    def watch(batch, width, draws):
        for seat, request in enumerate(drafter.seats.requests):
            found[tuple(request.tokens)] = drafter.cache.top[seat].clone()
        return grow(batch, width, draws)

    drafter.grow = watch
    texts = [o.tokens for o in engine.generate(PROMPTS[:3], max_new_tokens=30, ignore_eos=True)]
    return found, texts


def test_one_that_follows_features_reads_those_of_the_path_whoever_guessed_it():
    alone = fresh(Eagle3(draft_len=3, branches=2, nodes=5, vocabulary=0))
    merged = fresh(Eagle3(draft_len=3, branches=2, nodes=5, vocabulary=0))
    wanted, text = states_read(alone, Engine(target(), alone, stand_down=False))
    engine = Engine(target(), Merged([Suffix(), merged]), stand_down=False)
    found, same = states_read(merged, engine)
    assert same == text
    shared = wanted.keys() & found.keys()
    assert len(shared) > 20
    for at in shared:
        torch.testing.assert_close(found[at], wanted[at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_a_network_behind_slots_reads_the_path_whoever_guessed_it(first, monkeypatch):
    """Slots stand behind the merged draft, and the path leads through nodes of that."""

    def read_by(ptp, engine):
        found = {}

        def watch(*given):
            follower = ptp._eagle.follower
            found.update(
                {tuple(r.tokens): follower.cache.top[seat].clone() for seat, r in enumerate(follower.seats.requests)}
            )
            return born(*given)

        monkeypatch.setattr(behind, "born", watch)
        outputs = engine.generate(PROMPTS[:3], max_new_tokens=30, ignore_eos=True)
        return found, [o.tokens for o in outputs], sum(o.stats.accepted for o in outputs)

    born = behind.born
    alone, merged = (
        fresh(Ptp(mode="mask", sampler="eagle", slots=3, rank=4, branches=2, nodes=5, budget=8, min_gain=0.0))
        for _ in range(2)
    )
    wanted, text, few = read_by(alone, Engine(target(), alone, stand_down=False))
    both = Merged([merged, Suffix()] if first else [Suffix(), merged])
    found, same, more = read_by(merged, Engine(target(), both, stand_down=False))
    assert same == text
    assert more > few, "the other one's tokens were accepted too"
    shared = wanted.keys() & found.keys()
    assert len(shared) > 20
    for at in shared:
        torch.testing.assert_close(found[at], wanted[at], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_learned_ones_merge_with_others_and_the_text_stays(temperature):
    medusa = fresh(Medusa(heads=2, nodes=4, vocabulary=0))
    options = {"max_new_tokens": 30, "temperature": temperature, "seed": 5}
    wanted = Engine(target()).generate(PROMPTS, **options)
    found = Engine(target(), Merged([medusa, Suffix()]), stand_down=False).generate(PROMPTS, **options)
    assert [o.tokens for o in found] == [o.tokens for o in wanted]
    assert sum(o.stats.drafted for o in found) > 0
