"""The unrolled attention: kernels against the mask written out, and against steps made one after the other."""

import pytest
import torch

from outpace.drafters.unroll import dense_attention, unrolled_attention

DOCUMENTS = torch.tensor([[1] * 10 + [2] * 20 + [0] * 7, [1] * 37])
BOUNDS = torch.tensor([0, 10, 30, 37, 74], dtype=torch.int32)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_kernels_equal_the_definition_with_gradients(steps, key_heads):
    torch.manual_seed(steps)
    q = torch.randn(2, 37, 4, 16, dtype=torch.float64, requires_grad=True)
    keys, values = (
        [torch.randn(2, 37, key_heads, 16, dtype=torch.float64, requires_grad=True) for _ in range(steps)]
        for _ in range(2)
    )
    want = dense_attention(q, keys, values, DOCUMENTS)
    grad = torch.randn_like(want)
    flat = [[x.flatten(0, 1) for x in both] for both in (keys, values)]
    ours = unrolled_attention(q.flatten(0, 1), *flat, bounds=BOUNDS, longest=37).view_as(want)
    torch.testing.assert_close(ours, want, atol=1e-10, rtol=1e-10)
    leaves = [q, *keys, *values]
    for a, b in zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(want, leaves, grad), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_a_later_step_sees_no_other_rows_own_keys():
    """The off-diagonal of a diagonal block is masked, not merely small."""
    torch.manual_seed(0)
    q, k0, k1, v0, v1 = (torch.randn(1, 6, 2, 8, dtype=torch.float64) for _ in range(5))
    documents, bounds = torch.ones(1, 6, dtype=torch.int64), torch.tensor([0, 6], dtype=torch.int32)

    def run(k, v):
        flat = [[x.flatten(0, 1) for x in both] for both in ((k0, k), (v0, v))]
        return unrolled_attention(q.flatten(0, 1), *flat, bounds=bounds, longest=6)

    before = run(k1, v1)
    k2, v2 = k1.clone(), v1.clone()
    k2[:, 3], v2[:, 3] = 50.0, -50.0
    after = run(k2, v2)
    changed = (before - after).abs().amax((1, 2)) > 0
    assert changed.tolist() == [False, False, False, True, False, False]
    assert torch.equal(dense_attention(q, [k0, k1], [v0, v1], documents)[0, :3], dense_attention(
        q, [k0, k2], [v0, v2], documents)[0, :3])  # fmt: skip
