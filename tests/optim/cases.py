"""Optimizers to test, weights to test them on, and what it means that two of them are the same."""

import torch
from torch import nn

from outpace.optim import FlashAdamW, FlashLion, FlashSGD

RULES = [
    (FlashAdamW, {}),
    (FlashLion, {}),
    (FlashSGD, {"momentum": 0.9}),
    (FlashSGD, {"momentum": 0.9, "nesterov": True}),
    (FlashSGD, {}),
]
IDS = ["adamw", "lion", "sgd", "nesterov", "plain"]


def weights(*shapes, dtype=torch.bfloat16, seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def run(optimizer, params, steps, seed=1, scale=1.0):
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)
        optimizer.step()
        optimizer.zero_grad()


def bits(tensor):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(-1).view(sizes[tensor.element_size()])


def assert_same(left, right):
    """Weights and states equal bit for bit."""
    for (_, p, _), (_, q, _) in zip(left._places(), right._places(), strict=True):
        assert torch.equal(bits(p), bits(q))
        assert left.state[p].keys() == right.state[q].keys()
        for name in left.state[p]:
            assert torch.equal(bits(left.state[p][name]), bits(right.state[q][name])), name
