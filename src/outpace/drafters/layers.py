"""The decoder block learned drafters are made of: LLaMA's shape, with the width, heads and rotary of the target.

Knows no cache and no mask: attention is a function the caller hands in, so that training (many rows at once, unrolled)
and decoding (a few rows behind a cache) run the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from outpace.target.families import part
from outpace.target.skinny import Linear

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

Attend = Callable[[int, "Tensor", "Tensor", "Tensor"], "Tensor"]
"""(layer, q [B, R, heads, D], k [B, R, key heads, D], v [B, R, key heads, D]) -> [B, R, heads, D]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a block."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    head_size: int
    eps: float = 1e-6

    @classmethod
    def of(cls, target: Target, *, intermediate: int = 0) -> Self:
        """Those of the target's own layers; `intermediate` widens or narrows the MLP (0: as the target's)."""
        config: Any = target.config
        heads = int(config.num_attention_heads)
        own = int(getattr(config, "intermediate_size", 0) or 4 * target.hidden_size)
        return cls(
            hidden=target.hidden_size,
            intermediate=intermediate or own,
            heads=heads,
            key_heads=int(getattr(config, "num_key_value_heads", 0) or heads),
            head_size=int(getattr(config, "head_dim", 0) or target.hidden_size // heads),
            eps=float(getattr(config, "rms_norm_eps", 1e-6)),
        )


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size], in x's dtype."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class Rotary(nn.Module):
    """Rotary angles with the target's own frequencies (Su et al. 2021), in float32 whatever the module is cast to."""

    def __init__(self, target: Target, head_size: int) -> None:
        super().__init__()
        found = None
        if target.family is not None:
            found = getattr(part(target.model, target.family.rotary), "inv_freq", None)
        if found is None or found.shape[0] * 2 != head_size:
            rope = getattr(target.config, "rope_parameters", None) or {}
            theta = float(rope.get("rope_theta", 0) or getattr(target.config, "rope_theta", 0) or 10_000.0)
            found = theta ** -(torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
        # in a tuple, not a buffer: cast to bfloat16 with the module, an angle at position 1000 would be off by a radian
        self._frequencies = (found.detach().float().to(target.device).clone(),)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, R] -> (cos, sin), each [B, R, 1, head size] float32."""
        angles = positions[..., None].float() * self._frequencies[0]
        angles = torch.cat([angles, angles], -1)[:, :, None]
        return angles.cos(), angles.sin()

    def table(self, positions: int) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the first positions, [positions, head size / 2] float32 each; halves of a head share them."""
        frequencies = self._frequencies[0]
        angles = torch.arange(positions, device=frequencies.device)[:, None].float() * frequencies
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys [B, R, heads, D] by angles [B, R, 1, D]."""
    first, second = x.chunk(2, -1)
    turned: Tensor = x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)
    return turned


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Attention(nn.Module):
    """Projections around an attention function; inputs may be wider than the block."""

    def __init__(self, shape: Shape, width: int) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_size = shape.heads, shape.key_heads, shape.head_size
        self.q_proj = Linear(width, shape.heads * shape.head_size, bias=False)
        self.k_proj = Linear(width, shape.key_heads * shape.head_size, bias=False)
        self.v_proj = Linear(width, shape.key_heads * shape.head_size, bias=False)
        self.o_proj = Linear(shape.heads * shape.head_size, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, R, width] -> q [B, R, heads, D], k and v [B, R, key heads, D]; `o_proj` is the caller's to apply."""
        rows = x.shape[:2]
        q = rotate(self.q_proj(x).view(*rows, self.heads, self.head_size), cos, sin)
        k = rotate(self.k_proj(x).view(*rows, self.key_heads, self.head_size), cos, sin)
        return q, k, self.v_proj(x).view(*rows, self.key_heads, self.head_size)


class Block(nn.Module):
    """A decoder block; `normed_input=False` leaves out the norm before attention (the caller has done it)."""

    def __init__(self, shape: Shape, *, width: int = 0, normed_input: bool = True) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.hidden, shape.eps) if normed_input else None
        self.self_attn = Attention(shape, width or shape.hidden)
        self.post_attention_layernorm = RMSNorm(shape.hidden, shape.eps)
        self.mlp = MLP(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, *, residual: Tensor | None = None
    ) -> Tensor:
        """X [B, R, width]; residual [B, R, H] where it differs from x. Returns [B, R, H]."""
        residual = x if residual is None else residual
        return self.rest(residual, attend(layer, *self.before(x, cos, sin)))

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Up to attention."""
        x = self.input_layernorm(x) if self.input_layernorm is not None else x
        found: tuple[Tensor, Tensor, Tensor] = self.self_attn(x, cos, sin)
        return found

    def rest(self, residual: Tensor, attended: Tensor) -> Tensor:
        """Behind attention."""
        return finish(residual, attended, self.self_attn, self.post_attention_layernorm, self.mlp)


def finish(residual: Tensor, attended: Tensor, attention: Attention, norm: RMSNorm, mlp: MLP) -> Tensor:
    """What a block does behind attention: residual [B, R, H], attended [B, R, heads, D] -> [B, R, H]."""
    x = residual + attention.o_proj(attended.flatten(2))
    out: Tensor = x + mlp(norm(x))
    return out


def compile_halves(module: nn.Module) -> None:
    """Compile what stands before and behind attention in every block: eager, training is bound by such small steps."""
    for block in module.modules():
        for half in ("before", "rest"):
            if hasattr(block, half):
                setattr(block, half, torch.compile(getattr(block, half), dynamic=False))


def initialise(module: nn.Module, *, std: float = 0.02) -> None:
    """Normal weights for every linear layer, zero biases."""
    for one in module.modules():
        if isinstance(one, nn.Linear):
            nn.init.normal_(one.weight, std=std)
            if one.bias is not None:
                nn.init.zeros_(one.bias)


@torch.no_grad()
def copy_norm(target: Target, norm: RMSNorm) -> None:
    """Start from the target's final norm, where it is one of this kind."""
    if target.family is None:
        return
    found: Any = getattr(part(target.model, target.family.norm), "weight", None)
    if found is not None and found.shape == norm.weight.shape and "gemma" not in target.family.name:
        norm.weight.copy_(found)
