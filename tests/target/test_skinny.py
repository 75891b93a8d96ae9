"""Products of a few rows: the same numbers as the library's, whichever way round they are taken."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from outpace.target.skinny import MOST_ROWS, Linear, linear, same_product


@pytest.fixture(autouse=True, params=["on", "off"])
def compiled(request, monkeypatch):
    """Both ways: with compiled kernels (where there is a compiler), and without."""
    monkeypatch.setenv("OUTPACE_NATIVE", request.param)


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


@torch.no_grad()
@pytest.mark.parametrize(("rows", "more"), [(1, 4), (3, 4), (5, 7), (9, 12), (13, 16)])
@pytest.mark.parametrize("shape", [(960, 576), (576, 1536), (64, 32)])
def test_rows_that_fill_up_a_product_leave_the_others_alone(rows, more, shape):
    """Bit for bit, in any place: what rides along may stand between the rows of a batch."""
    generator = torch.Generator().manual_seed(rows)
    weight = torch.randn(shape, generator=generator)
    x = torch.randn(more, shape[1], generator=generator)
    chosen = torch.randperm(more, generator=generator)[:rows]
    assert same_product(rows, more)
    assert torch.equal(linear(x, weight)[chosen], linear(x[chosen], weight))


def test_other_numbers_of_rows_are_other_products():
    assert not same_product(4, 5)
    assert not same_product(MOST_ROWS, MOST_ROWS + 1)
    assert not same_product(MOST_ROWS + 1, MOST_ROWS + 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_some_rows_of_one_request_are_no_batch_of_products(dtype):
    """On some processors a batched product takes many times as long."""
    x, weight = torch.randn(1, 24, 64).to(dtype), torch.randn(40, 64).to(dtype)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU]) as seen:
        found = linear(x[:, :20], weight)
    assert found.shape == (1, 20, 40)
    assert "aten::bmm" not in {event.key for event in seen.key_averages()}
    torch.testing.assert_close(found, torch.nn.functional.linear(x[0, :20], weight)[None])
