"""Products of a few rows: the same numbers as the library's, whichever way round they are taken."""

import pytest
import torch

from outpace.target.skinny import MOST_ROWS, Linear, linear


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 24), (1, 2, 24), (3, 5, 24), (1, MOST_ROWS, 24), (MOST_ROWS + 1, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_it_is_the_linear_layer(dtype, shape, biased):
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if biased else None
    found = linear(x, weight, bias)
    assert found.is_contiguous()
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias), atol=2e-5, rtol=1e-5)


def test_it_has_gradients_where_they_are_wanted():
    layer, x = Linear(24, 40), torch.randn(3, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(3, -1))
