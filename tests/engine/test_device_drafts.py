"""Between a draft and its pass: numbers ahead as the host's, trees laid as the host lays them."""

from types import SimpleNamespace

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.engine.device.drafts import NO_ROOM, lay, noise_ahead, numbers_ahead
from outpace.engine.device.kernels import Keys
from outpace.engine.device.lanes import fill
from outpace.laws import Noise, Tree
from outpace.target.fast.forward import Inputs


@torch.inference_mode()
def test_numbers_ahead_are_the_paths():
    seeds, requests = [3, 2**63 + 5], [7, 2**40 + 1]
    signed = torch.tensor([[3, 2**63 + 5 - 2**64], requests])
    keys = Keys(signed[0], signed[1], torch.zeros(2, dtype=torch.int64))
    found = numbers_ahead(keys, torch.tensor([11, 4000]), 5)
    for b, start in enumerate((12, 4001)):
        wanted = [Noise(seeds[b]).uniform(requests[b], start + ahead) for ahead in range(5)]
        assert torch.equal(found[b], torch.tensor(wanted))


@torch.inference_mode()
@pytest.mark.parametrize("size", [1500, 1900, 2050])
def test_noise_ahead_is_the_paths_and_its_draft_ids_are_picked_out(size):
    """Of a reduced vocabulary, of one that a widened model's head leaves, and of all ids."""
    vocabulary, known = 2050, 1900 if size < 2050 else 2050
    seeds, requests = [3, 2**63 + 5, 1, 2], [7, 2**40 + 1, 0, 0]
    keys = Keys(torch.tensor([3, 2**63 + 5 - 2**64, 1, 2]), torch.tensor(requests), torch.tensor([1, 1, 0, 0]))
    ids = torch.arange(size) + (torch.arange(size) // 7 if size == 1500 else 0)
    index = torch.full((known,), -1)
    index[ids] = torch.arange(size)
    head = SimpleNamespace(size=size, vocabulary=known, index=index if size == 1500 else None, reduced=size == 1500)
    noise, race = noise_ahead(keys, torch.tensor([11, 4000, 5, 5]), 3, vocabulary, head)
    assert (noise.shape, race.shape) == ((4, 3, vocabulary), (4, 3, size))
    for b, start in enumerate((12, 4001)):
        for ahead in range(3):
            wanted = Noise(seeds[b]).gumbel(requests[b], start + ahead, vocabulary)
            torch.testing.assert_close(noise[b, ahead], wanted, atol=2e-6, rtol=2e-6)
            assert torch.equal(race[b, ahead], noise[b, ahead][ids])
    assert not noise[2:].any(), "where numbers are looked up, and where nothing is drawn"
    assert not race[2:].any()


def random_tree(generator, count, depth):
    """Tokens and parents of a tree in order of birth."""
    parents, depths = [], []
    while len(parents) < count:
        parent = int(torch.randint(-1, len(parents), (), generator=generator))
        level = 1 + (depths[parent] if parent >= 0 else 0)
        if level <= depth:
            parents.append(parent)
            depths.append(level)
    return torch.randint(0, 50, (count,), generator=generator).tolist(), parents


@torch.inference_mode()
@pytest.mark.parametrize(("count", "rows", "depth"), [(1, 2, 1), (7, 8, 7), (9, 12, 3), (31, 32, 6), (40, 48, 5)])
def test_trees_are_laid_depth_first_with_the_bits_of_their_ancestors(count, rows, depth):
    generator = torch.Generator().manual_seed(count)
    drafts = [random_tree(generator, count, depth) for _ in range(3)]
    lengths = [5, 0, 90]
    wanted, found = (Inputs.empty(4, rows, torch.device("cpu"), chain=False) for _ in range(2))
    trees = [Tree(*draft).depth_first() for draft in drafts]
    spare = rows - 1 - count
    fill(
        torch.zeros_like(wanted.flat), wanted, [[9, *tree.tokens, *([0] * spare)] for tree in trees],
        [[-2, *(p + 1 for p in tree.parents), *([-2] * spare)] for tree in trees],
        [[n, *(n + d for d in tree.depths()), *([n] * spare)] for n, tree in zip(lengths, trees, strict=True)], lengths,
    )  # fmt: skip
    found.flat.fill_(77)
    found.slots.copy_(torch.arange(4))
    found.tokens[:, 0] = torch.tensor([9, 9, 9, 0])
    found.lengths.copy_(wanted.lengths)
    tokens, parents = (torch.tensor([*(draft[i] for draft in drafts), drafts[0][i]]) for i in range(2))
    room = torch.tensor([depth, depth + 3, depth, depth])
    lay(tokens, parents, depth, room, 50, found)
    for name in ("tokens", "parents", "positions", "bits"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert torch.equal(ours.view(4, -1)[:3], theirs.view(4, -1)[:3]), name


@torch.inference_mode()
def test_what_is_no_node_hangs_on_nothing():
    inputs = Inputs.empty(3, 8, torch.device("cpu"), chain=False)
    tokens = torch.tensor([[5, 50, 7, 8, -1]] * 3)
    parents = torch.tensor([[-1, 0, 1, 0, -1], [-1, 4, 1, 0, -1], [-1, 0, 1, 0, -1]])
    lay(tokens, parents, 3, torch.tensor([2, 9, NO_ROOM]), 50, inputs)
    # rows: the root, node 0, node 1 (no token), node 2 (too deep), node 3, node 4 (no token)
    assert inputs.parents[0].tolist() == [-2, 0, -2, -2, 1, -2, -2, -2]
    assert inputs.tokens[0].tolist() == [0, 5, 0, 7, 8, 0, 0, 0]
    assert inputs.parents[1].tolist() == [-2, 0, 1, -2, 3, -2, -2, -2], "a parent behind its child is none"
    assert inputs.parents[2].tolist() == [-2] * 8
