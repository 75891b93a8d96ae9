"""Gradient release: the same bits as ordinary steps, no gradient left, and every misuse refused in words."""

import copy

import pytest
import torch
from torch import nn

from outpace.errors import ConfigError, UnsupportedError
from outpace.optim import FlashAdamW, FlashLion, FlashSGD, release_gradients
from outpace.optim.stepping import step_parameters


class Tied(nn.Module):
    """Two uses of one matrix, so that its gradient has two parts."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(40, 64)
        self.inner = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)

    def forward(self, tokens):
        hidden = self.norm(self.frozen(self.inner(self.embedding(tokens))))
        return hidden @ self.embedding.weight.T


def build(cls=FlashAdamW, **settings):
    torch.manual_seed(0)
    model = Tied().bfloat16()
    return model, cls(model.parameters(), lr=1e-2, small=0, **settings)


def backward(model, seed, scale=1.0):
    tokens = torch.randint(0, 40, (8,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens).float(), tokens.roll(1)) * scale
    loss.backward()
    return loss


def same(one, two):
    for (_, p, _), (_, q, _) in zip(one._places(), two._places(), strict=True):
        assert torch.equal(p, q)
        for name in one.state.get(p, {}):
            assert torch.equal(one.state[p][name], two.state[q][name]), name


@pytest.mark.parametrize("cls", [FlashAdamW, FlashLion, FlashSGD])
def test_released_steps_are_ordinary_steps(cls):
    model, optimizer = build(cls)
    released_model, released = build(cls)
    handle = release_gradients(released_model, released)
    for seed in range(4):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        backward(released_model, seed)
        assert all(p.grad is None for p in released_model.parameters())
        released.step()
        released.zero_grad()
    same(optimizer, released)
    assert int(released.state[released_model.embedding.weight]["step"]) == 4  # tied: once a step
    handle.remove()
    backward(released_model, 9)
    assert released_model.inner.weight.grad is not None
    copy.deepcopy(released)


def test_a_second_backward_is_an_error():
    model, optimizer = build()
    release_gradients(model, optimizer)
    backward(model, 0)
    before = model.inner.weight.detach().clone()
    with pytest.raises(ConfigError, match=r"second backward pass.*optimizer.step\(\)"):
        backward(model, 1)
    assert torch.equal(model.inner.weight, before)
    with pytest.raises(UnsupportedError, match="remove"):
        copy.deepcopy(optimizer)


def test_accumulation_is_the_sum_and_is_counted():
    model, optimizer = build()
    released_model, released = build()
    release_gradients(released_model, released, accumulate=3)
    for _round in range(2):
        for seed in range(3):
            backward(model, seed)
            backward(released_model, seed)
            if seed == 1:
                with pytest.raises(ConfigError, match="after 2 of accumulate=3"):
                    released.step()
        optimizer.step()
        optimizer.zero_grad()
        assert released_model.inner.weight.grad is None
        released.step()
    same(optimizer, released)
    backward(released_model, 0)
    released.zero_grad()  # dropping an unfinished accumulation starts it again
    for seed in range(3):
        backward(released_model, seed)
    released.step()


def global_norm(model):
    return torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()


def test_two_passes_clip_by_the_exact_norm():
    model, optimizer = build()
    released_model, released = build()
    handle = release_gradients(released_model, released, max_norm=0.5, clip="two_pass")
    for seed in range(3):
        backward(model, seed, 10.0)
        norm = global_norm(model)
        for p in model.parameters():
            if p.grad is not None:  # in float32, as the release does; torch's clipping rounds back to bf16
                scale = (0.5 / (norm + 1e-6)).clamp(max=1.0)
                position = [q is p for _, q, _ in optimizer._places()].index(True)
                step_parameters(optimizer, [(position, p, optimizer.param_groups[0])], scale)
        optimizer.zero_grad()
        with handle.measure():
            backward(released_model, seed, 10.0)
        backward(released_model, seed, 10.0)
        released.step()
        torch.testing.assert_close(handle.norm(), norm, rtol=1e-5, atol=0)
    for p, q in zip(model.parameters(), released_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-4)
    with pytest.raises(ConfigError, match="needs the norm first"):
        backward(released_model, 0)


def test_running_clip_uses_the_last_norm_or_the_one_so_far():
    model, optimizer = build(FlashSGD, master="bf16+16", residual="ordinal")
    handle = release_gradients(model, optimizer, max_norm=0.05)
    before = [p.detach().float().clone() for p in optimizer.master_weights()]
    assert handle.norm() is None
    backward(model, 0)
    optimizer.step()
    first = handle.norm().item()
    moved = torch.stack([(a - b).norm() for a, b in zip(optimizer.master_weights(), before, strict=True)]).norm().item()
    assert 0 < moved <= 1e-2 * 0.05 * len(before) ** 0.5 * 1.01  # lr * max_norm for each parameter at the worst
    before = [p.detach().float().clone() for p in optimizer.master_weights()]
    backward(model, 0)
    optimizer.step()
    moved = torch.stack([(a - b).norm() for a, b in zip(optimizer.master_weights(), before, strict=True)]).norm().item()
    assert handle.norm().item() == pytest.approx(first, rel=0.1)
    assert moved == pytest.approx(1e-2 * 0.05, rel=0.2)  # the same batch again: the last norm is the norm


def test_misuse_is_refused_in_words():
    model, optimizer = build()
    with pytest.raises(ConfigError, match="accumulate=0"):
        release_gradients(model, optimizer, accumulate=0)
    with pytest.raises(ConfigError, match="no effect without max_norm"):
        release_gradients(model, optimizer, clip="two_pass")
    with pytest.raises(ConfigError, match="max_norm="):
        release_gradients(model, optimizer, max_norm=-1.0)
    with pytest.raises(ConfigError, match="clip="):
        release_gradients(model, optimizer, max_norm=1.0, clip="exact")
    with pytest.raises(ConfigError, match="1 trainable parameters of the model are not in the optimizer"):
        release_gradients(model, FlashAdamW(list(model.parameters())[1:]))
    backward(model, 0)
    with pytest.raises(ConfigError, match="hold gradients already"):
        release_gradients(model, optimizer)
    optimizer.zero_grad()
    handle = release_gradients(model, optimizer)
    with pytest.raises(ConfigError, match="releases gradients already"):
        release_gradients(model, optimizer)
    with pytest.raises(ConfigError, match="first pass of clip='two_pass'"), handle.measure():
        pass


def test_a_bad_gradient_is_refused_inside_backward():
    model, optimizer = build(nonfinite="raise")
    release_gradients(model, optimizer)
    with pytest.raises(ConfigError, match="NaN or infinity"):
        backward(model, 0, float("nan"))
