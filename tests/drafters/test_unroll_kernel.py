"""The kernels of unrolled attention in Triton's interpreter, against the tensors they stand for."""

import pytest
import torch

from interpreted import require_interpreter

require_interpreter()

from outpace.drafters import unroll, unroll_fused


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 16), (4, 4, 24), (4, 1, 8)])
def test_kernels_equal_the_tensors(steps, heads, key_heads, size):
    torch.manual_seed(steps)
    rows, scale = 37, size**-0.5
    q, out, grad, dq = (torch.randn(rows, heads, size) for _ in range(4))
    lse = torch.randn(rows, heads)
    keys, values = (torch.randn(steps, rows, key_heads, size) for _ in range(2))
    found, wanted = (m.merge(q, out, lse, keys, values, scale) for m in (unroll_fused, unroll))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
    both = [dq.clone(), dq.clone()]
    slopes = [
        m.slopes(grad, q, *wanted, keys, values, into, scale)
        for m, into in zip((unroll_fused, unroll), both, strict=True)
    ]
    torch.testing.assert_close(both[0], both[1], atol=1e-5, rtol=1e-5)
    for a, b in zip(*slopes, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
