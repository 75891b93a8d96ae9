"""Slots placed, heard and joined by kernels, as the functions of `ptp.rows` and `SlotJoin` do it."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.drafters.ptp import rows
from outpace.drafters.ptp.eagle import SlotJoin
from outpace.drafters.ptp.modes import MODES
from outpace.drafters.ptp.placing import Placed, fits, hear_group, normed_halves, place_slots
from outpace.engine.device.drafts import NO_ROOM, lay
from outpace.target.fast.forward import Inputs
from outpace.target.fast.graphs import pack_bits

WORTHS = torch.tensor([0.55, 0.3, 0.3, 0.05])


def valued_tree(generator, count):
    """Parents before children, and the log of each node's chance to be reached; siblings' chances sum below one."""
    parents = [int(torch.randint(-1, i, (), generator=generator)) if i else -1 for i in range(count)]
    left, values = {-1: 1.0}, []
    reached = {-1: 1.0}
    for node, parent in enumerate(parents):
        share = left[parent] * float(torch.rand((), generator=generator)) * 0.8
        left[parent] -= share
        left[node], reached[node] = 1.0, reached[parent] * share
        values.append(reached[node])
    return parents, torch.tensor(values).log()


def laid(count, main, scouts, *, room):
    """Inputs in which a batch of random trees stands, and what `place_slots` is told of them."""
    generator = torch.Generator().manual_seed(count)
    trees = [valued_tree(generator, count) for _ in range(3)]
    parents, values = torch.tensor([t[0] for t in trees]), torch.stack([t[1] for t in trees])
    inputs = Inputs.empty(3, main, torch.device("cpu"), chain=False, embeds=torch.zeros(3, scouts, 8))
    inputs.flat[inputs.offsets[5] :] = 77  # bits of another round
    inputs.lengths.copy_(torch.tensor([11, 400, 3]))
    tokens = torch.randint(0, 50, (3, count), generator=generator)
    where = lay(tokens, parents, count, room, 50, inputs)
    return inputs, parents, values, where


@torch.inference_mode()
@pytest.mark.parametrize("mode", ["mask", "categorical"])
@pytest.mark.parametrize(("count", "main", "scouts"), [(1, 2, 2), (5, 8, 9), (14, 17, 31), (40, 41, 60)])
def test_slots_are_placed_as_the_host_places_them(mode, count, main, scouts):
    inputs, parents, values, where = laid(count, main, scouts, room=torch.tensor([count, count, 2]))
    before = inputs.bits.view(3, -1, inputs.bits.shape[1])[:, :main].clone()
    says, least = torch.tensor([1, 1, 1], dtype=torch.int32), 0.004
    placed = Placed(*(torch.full((3, scouts), 9, dtype=torch.int32) for _ in range(3)))
    carried = place_slots(
        parents, values, where, says, WORTHS, inputs, placed, lead=MODES[mode].lead, least=least
    )  # fmt: skip
    # the same in rows, by the functions the host uses
    above = torch.where(inputs.parents[:, 1:] >= 0, inputs.parents[:, 1:] - 1, -1)
    up = torch.where(parents >= 0, values.gather(1, parents.clamp_min(0)), 0.0)
    sure = torch.zeros(3, main).scatter(1, where, (values - up).exp())[:, 1:]
    sure = torch.where(inputs.parents[:, 1:] >= 0, sure, 0.0)
    ancestors = rows.lineage(above)
    chances = rows.walk_ends(sure, above, ancestors)
    branch, slot, gain = rows.allocate(chances, WORTHS, scouts)
    used = gain > least
    positions, numbers, sees = rows.scout_rows(inputs.lengths, ancestors, branch, slot, used, MODES[mode])
    bits = inputs.bits.view(3, inputs.rows, -1)
    assert torch.equal(bits[:, :main], before), "main rows are left alone"
    ordered = torch.zeros(3, inputs.rows, inputs.rows, dtype=torch.bool)
    ordered[:, main:] = sees
    wanted = pack_bits(ordered)[:, main:]
    for b in range(3):
        count_used = int(used[b].sum())
        assert int(placed.used[b].sum()) == count_used > 0
        theirs = {(int(b1), int(s1)) for b1, s1, u in zip(branch[b], slot[b], used[b], strict=True) if u}
        ours = {(int(b1), int(s1)) for b1, s1, u in zip(*(p[b] for p in placed), strict=True) if u}
        assert ours == theirs
        for i in range(scouts):
            if not placed.used[b, i]:
                assert int(bits[b, main + i].ne(0).sum()) == 1, "sees itself"
                continue
            j = next(j for j in range(scouts) if (branch[b, j], slot[b, j]) == (placed.branch[b, i], placed.slot[b, i]))
            assert inputs.positions.view(3, -1)[b, main + i] == positions[b, j]
            assert carried[b, i] == numbers[b, j] - inputs.lengths[b] - 1
            assert torch.equal(seen(bits[b, main + i])[:main], sees[b, j, :main])
        if torch.equal(placed.branch[b].long(), branch[b]):  # no two of equal gain: not only the sets are the same
            assert torch.equal(bits[b, main:], wanted[b])


def seen(words):
    """Bits of a row, as booleans."""
    return torch.stack([(words >> at) & 1 for at in range(32)], 1).flatten().bool()


@torch.inference_mode()
def test_no_slot_runs_where_it_would_say_nothing_or_nothing_is_drafted_for():
    inputs, parents, values, where = laid(4, 5, 6, room=torch.tensor([4, 4, NO_ROOM]))
    placed = Placed(*(torch.zeros(3, 6, dtype=torch.int32) for _ in range(3)))
    says = torch.tensor([1, 0, 1], dtype=torch.int32)
    place_slots(parents, values, where, says, WORTHS, inputs, placed, lead=1, least=0.0)
    assert placed.used[0].any()
    assert not placed.used[1].any()
    assert placed.branch[2][placed.used[2] != 0].eq(0).all(), "only the root is left to end at"


@torch.inference_mode()
def test_the_group_behind_the_walks_end_is_heard():
    placed = Placed(
        torch.tensor([[0, 2, 2, 1], [1, 1, 0, 1]], dtype=torch.int32),
        torch.tensor([[0, 1, 0, 0], [0, 1, 0, 2]], dtype=torch.int32),
        torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]], dtype=torch.int32),
    )
    states = torch.randn(2, 3 + 4, 12, generator=torch.Generator().manual_seed(0))
    heard, there = torch.ones(2, 3, 12), torch.full((2, 3), 7, dtype=torch.int32)
    path = torch.tensor([[0, 2, 0], [0, 1, 0]])
    hear_group(states, path, torch.tensor([2, 2]), placed, heard, there)
    assert there.tolist() == [[1, 1, 0], [1, 1, 0]]
    assert torch.equal(heard[0, :2], states[0, [3 + 2, 3 + 1]])
    assert torch.equal(heard[1, :2], states[1, [3 + 0, 3 + 1]])
    hear_group(states, path, torch.tensor([1, 1]), placed, heard, there)
    assert there.tolist() == [[1, 0, 0], [1, 0, 0]]
    assert torch.equal(heard[0, 0], states[0, 3])


@torch.inference_mode()
def test_halves_are_normed_as_the_layer_norms_them_and_zero_without_a_slot():
    torch.manual_seed(0)
    join = SlotJoin(24, 8, 1e-5)
    for parameter in join.parameters():
        parameter += torch.rand_like(parameter)
    heard, there = torch.randn(2, 3, 24), torch.tensor([[1, 1, 0], [1, 0, 0]], dtype=torch.int32)
    y = torch.randn(4, 24)
    both = normed_halves(heard, there, y, join.slot_norm.weight, join.row_norm.weight, 2, 1e-5, pdl=False)
    slot = heard[:, 1].repeat_interleave(2, 0)
    torch.testing.assert_close(both[:2], torch.cat([join.slot_norm(slot), join.row_norm(y)], -1)[:2])
    assert not both[2:].any()


def test_what_one_program_cannot_compare_does_not_fit():
    assert fits(31, 8)
    assert fits(100, 8)
    assert not fits(128, 8)
