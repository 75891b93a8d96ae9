"""The kernels of attention behind a reading in Triton's interpreter, against the mask they stand for."""

import pytest
import torch
from torch.nn import functional as F

from interpreted import require_interpreter

require_interpreter()

from outpace.target import GatedLoRA, Spans, Target, read, run_behind
from outpace.target.behind import _range
from outpace.target.behind_fused import attend, tile_sizes
from tiny import FAMILIES, make_model


def documents_of(*rows):
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in rows])


def positions_of(documents):
    spans = Spans.of(torch.arange(documents.shape[1]).expand_as(documents), documents)
    return torch.arange(documents.shape[1]) - spans.firsts


def by_mask(q, keys, values, own, mask, scale):
    """Dense attention, [B, rows, heads, D] throughout."""
    groups = q.shape[2] // keys.shape[2]
    k, v = (
        torch.cat(pair, 1).repeat_interleave(groups, 2).transpose(1, 2)
        for pair in zip((keys, values), own, strict=True)
    )
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask[:, None], scale=scale).transpose(1, 2)


# rows of a window, how many of them ran before, query heads, key heads, head size, sliding window
SHAPES = [
    (8, 0, 9, 3, 16, None),
    (5, 0, 3, 3, 16, None),
    (5, 0, 4, 1, 24, None),
    (8, 0, 6, 2, 16, 6),  # slides, within a window too
    (9, 0, 16, 1, 8, None),  # a group in parts of programs: its gradients are added up
    (64, 0, 3, 1, 16, None),
    (1, 0, 3, 1, 16, None),
    (2, 3, 3, 1, 16, None),
]


@pytest.mark.parametrize(("slots", "before", "heads", "key_heads", "size", "sliding"), SHAPES)
def test_kernels_equal_the_mask(slots, before, heads, key_heads, size, sliding):
    """float32: sums in another order. Two rows, one with three documents; starts at the second token of one, at the
    last of another (the window crosses its end), twice the same; the last document is padding."""
    torch.manual_seed(slots)
    documents = documents_of([9, 70, 21, 10], [110])
    starts = torch.tensor([[1, 8, 10, 70, 70, 78, 80, 99, 109], [1, 2, 3, 50, 60, 61, 62, 63, 64]])
    windows, length = starts.shape[1], documents.shape[1]
    spans, positions = Spans.of(starts, documents), positions_of(documents)
    q = torch.randn(2, windows * slots, heads, size, requires_grad=True)
    keys, values = (torch.randn(2, key_heads, length, size).transpose(1, 2) for _ in range(2))
    joined = torch.randn(2, windows * (before + slots), 2 * key_heads + 1, size)  # of different strides, as in a pass
    own = [joined[:, :, :key_heads].requires_grad_(), joined[:, :, key_heads : 2 * key_heads].clone().requires_grad_()]
    at = (positions.gather(1, starts)[..., None] + torch.arange(before + slots)).flatten(1)
    rows_at = at.unflatten(1, (windows, -1))[:, :, before:].flatten(1)
    mask = spans.mask(length, q.shape[1], own[0].shape[1])
    if sliding is not None:
        mask &= rows_at[:, :, None] - torch.cat([positions, at], 1)[:, None] < sliding
    found = attend(q, keys, values, tuple(own), _range(spans, rows_at, positions, sliding), size**-0.5)
    wanted = by_mask(q, keys, values, own, mask, size**-0.5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    grad = torch.randn_like(found)
    for a, b in zip(*(torch.autograd.grad(x, [q, *own], grad) for x in (found, wanted)), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_with_the_kernel_is_a_pass_with_the_mask(family):
    """Readings, windows at once and slot by slot, through modules and joined weights, with gradients."""
    model = make_model(family, dtype=torch.float32).requires_grad_(False)
    documents = documents_of([9, 11, 4], [24])
    positions, starts = positions_of(documents), torch.tensor([[2, 9, 17], [1, 4, 6]])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 40, (2, 24), generator=generator)
    adapter = GatedLoRA.for_all_layers(model, rank=2)
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    spans, at = Spans.of(starts, documents), (positions.gather(1, starts)[..., None] + torch.arange(3)).flatten(1)
    for path in ("readable", "auto"):
        target = Target(model, path=path)
        embeds = torch.randn(2, 9, target.hidden_size, generator=generator).requires_grad_()
        found = []
        for kernel in ("dense", "fused"):
            reading = read(target, tokens, documents, positions, kernel)
            rows = run_behind(target, reading, embeds, at, spans, adapter, kernel)
            gradients = torch.autograd.grad(rows.hidden.square().sum(), [embeds, *adapter.parameters()])
            with torch.no_grad():
                one = run_behind(target, reading, embeds[:, ::3], at[:, ::3], spans, adapter, kernel)
                two = run_behind(target, reading, embeds[:, 1::3], at[:, 1::3], spans, adapter, kernel, one)
            found.append([reading.hidden, rows.hidden, one.grown(two, 3).hidden, *gradients])
        for a, b in zip(*found, strict=True):
            assert float((a - b).abs().max()) < 1e-4 * float(b.abs().max().clamp_min(1))


@pytest.mark.parametrize("groups", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("slots", [1, 5, 8, 16, 33, 64])
def test_programs_hold_whole_windows(slots, groups):
    for each in (2, 4):
        sizes = tile_sizes(slots, slots, groups, 64, each)
        assert 1 <= sizes["GB"] <= groups
        assert sizes["BW"] * slots * sizes["GB"] <= sizes["BM"] <= 128
        assert sizes["BW"] * slots <= sizes["BO"] <= 128
