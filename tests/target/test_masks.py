import torch
from hypothesis import given
from hypothesis import strategies as st

from outpace.laws import Tree
from outpace.target import Block
from outpace.target.masks import additive_mask


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    paths=st.lists(st.lists(st.integers(0, 2), max_size=4), max_size=5),
    window=st.sampled_from([None, 1, 3, 8]),
    spare=st.integers(0, 9),
)
def test_every_row_sees_each_position_in_reach_exactly_once(lengths, paths, window, spare):
    trees = [Tree.merge(paths[i:], 9) for i in range(len(lengths))]
    block = Block.of([0] * len(lengths), trees, lengths, torch.device("cpu"))
    width = max(lengths) + block.rows + spare
    mask = additive_mask(block.sees, block.positions, lengths, width, torch.float32, window)
    assert mask.shape == (len(lengths), 1, block.rows, width)
    assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
    for b, tree in enumerate(trees):
        at = {slot: slot for slot in range(lengths[b])}
        at |= {lengths[b] + row: int(block.positions[b, row]) for row in range(block.rows)}
        for row in range(len(tree) + 1):
            position = int(block.positions[b, row])
            seen = sorted(at[slot] for slot in torch.nonzero(mask[b, 0, row] == 0)[:, 0].tolist())
            first = 0 if window is None else max(0, position - window + 1)
            assert seen == list(range(first, position + 1))
