"""Widen what was trained beside a model: any module made of linear layers and norms over the model's sizes.

A drafter's module, built for the widened target, is filled so that it computes what the small one computed: hidden
sizes, heads and feed-forward units are recognised by their sizes and by the field's names for projections (q_proj,
o_proj, ...); inputs and outputs may be several hidden states side by side. Added rows give zero; in linear layers,
whatever meets a zero is random. Unlike the target itself this is exact only up to eps in the norms, which costs nothing
but a guess.

Knows no drafter.
"""

from __future__ import annotations

import math
import re
import zlib
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from outpace.errors import UnsupportedError
from outpace.target.widen.widening import Widening

if TYPE_CHECKING:
    from torch import Tensor

Layout = tuple[list[int], list[int]]
"""Places in the small dimension, and where each of them goes in the large one."""

_STD: Final = 0.02


def widen_module(widening: Widening, small: nn.Module, large: nn.Module) -> None:
    """Fill `large`, built for the widened target, with the function of `small`, built for the target as it was.

    Raises:
        UnsupportedError: if a tensor is laid out in a way that is not understood; `large` is left as it was.
    """
    wide = large.state_dict()
    linear = {f"{name}.weight" for name, module in large.named_modules() if isinstance(module, nn.Linear)}
    found = {}
    for name, tensor in small.state_dict().items():
        if name not in wide:
            raise UnsupportedError(
                f"cannot widen tensor {name!r}: the module for the large target has none of that name"
            )
        found[name] = _widened(widening, name, tensor, wide[name], spend=name in linear)
    large.load_state_dict(found, strict=False)


def _widened(widening: Widening, name: str, small: Tensor, large: Tensor, *, spend: bool) -> Tensor:
    """One tensor; `spend`: it multiplies states and nothing else, so what meets a zero may be random."""
    if small.shape == large.shape:
        return small.to(large.device, large.dtype)
    if small.dim() == 1:
        return _vector(widening, name, small, large)
    if small.dim() != 2:
        raise UnsupportedError(f"cannot widen tensor {name!r} with {small.dim()} dimensions")
    rows = _layout(widening, name, small.shape[0], large.shape[0], output=True)
    columns = _layout(widening, name, small.shape[1], large.shape[1], output=False)
    out = torch.zeros_like(large)
    if spend:
        generator = torch.Generator(large.device).manual_seed(widening.seed ^ zlib.crc32(name.encode()))
        out = torch.randn(large.shape, generator=generator, dtype=large.dtype, device=large.device) * _STD
    heads = widening.small.num_attention_heads * widening.small.head_dim
    live = {*columns[1], *_constants(widening, large.shape[1])}
    if _projection(name) == "o_proj" and small.shape[1] == heads != large.shape[1]:
        live |= widening.live_outputs()
    out[:, sorted(live)] = 0
    queries = _projection(name) == "q_proj" and small.shape[0] == heads != large.shape[0]
    scale = math.sqrt(widening.shape.head_dim / widening.small.head_dim) if queries else 1.0
    values = (small.float() * scale)[rows[0]][:, columns[0]].to(large.device, large.dtype)
    places = torch.tensor(rows[1], device=large.device)
    out[places[:, None], torch.tensor(columns[1], device=large.device)] = values
    return out


def _vector(widening: Widening, name: str, small: Tensor, large: Tensor) -> Tensor:
    """The weight of a norm, which also makes up for the larger mean; or anything else, zero where it is new."""
    source, places = _layout(widening, name, small.shape[0], large.shape[0], output=True)
    out = torch.zeros_like(large)
    scale = 1.0
    if name.rpartition(".")[2] == "weight":
        out += 1
        out[sorted(_constants(widening, large.shape[0]))] = 0
        scale = math.sqrt(widening.small.hidden_size / widening.shape.hidden_size)
    out[places] = (small.float() * scale)[source].to(large.device, large.dtype)
    return out


def _constants(widening: Widening, size: int) -> set[int]:
    """Places of the constants, in every hidden state that a dimension of this size may hold."""
    width, first = widening.shape.hidden_size, widening.small.hidden_size
    if size % width:
        return set()
    return {start + first + i for start in range(0, size, width) for i in range(widening.constants)}


def _projection(name: str) -> str:
    """The field's name for the projection a tensor belongs to, or ""."""
    return next((part for part in reversed(re.split(r"[./]", name)) if part.endswith("_proj")), "")


def _layout(widening: Widening, name: str, small: int, large: int, *, output: bool) -> Layout:
    """Where the entries of a dimension go."""
    if small == large:
        return list(range(small)), list(range(small))
    projection = _projection(name)
    a, b = widening.small, widening.shape
    heads = widening.query_slots()
    keys = [(h, h * widening.copies + c) for h in range(a.num_key_value_heads) for c in range(widening.copies)]
    if projection == "q_proj" and output and small == a.num_attention_heads * a.head_dim:
        return _heads(widening, list(enumerate(heads)), rotary=True)
    if projection == "o_proj" and not output and small == a.num_attention_heads * a.head_dim:
        return _heads(widening, list(enumerate(heads)), rotary=False)
    if projection in ("k_proj", "v_proj") and output and small == a.num_key_value_heads * a.head_dim:
        return _heads(widening, keys, rotary=projection == "k_proj")
    if small == a.intermediate_size and large == b.intermediate_size:
        return list(range(small)), list(range(small))
    if small % a.hidden_size == 0 and large * a.hidden_size == small * b.hidden_size:
        places = [start * b.hidden_size + i for start in range(small // a.hidden_size) for i in range(a.hidden_size)]
        return list(range(small)), places
    raise UnsupportedError(
        f"cannot widen tensor {name!r}: a dimension of {small} becomes {large}, and that is neither heads, nor "
        f"feed-forward units, nor hidden states of {a.hidden_size}"
    )


def _heads(widening: Widening, pairs: list[tuple[int, int]], *, rotary: bool) -> Layout:
    """Dimensions of heads, each to its slot."""
    size = widening.small.head_dim
    source: list[int] = []
    places: list[int] = []
    for head, slot in pairs:
        source += range(head * size, (head + 1) * size)
        start = slot * widening.shape.head_dim
        places += widening.rotary_rows(slot) if rotary else list(range(start, start + size))
    return source, places
