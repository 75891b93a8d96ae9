"""The definition of a step: decode, ordinary update, encode. Plain PyTorch, any device, no hidden state.

The fused kernels are held to this bit for bit. It is also what runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from outpace.optim.compand import decode_momentum, decode_root, encode_momentum, encode_root
from outpace.optim.draws import byte_draws, scale_draws, uniforms
from outpace.optim.rules import LIFT, Numbers, Rule
from outpace.optim.settings import GROUP, Storage
from outpace.optim.split import merge, merge_ordinal, split, split_ordinal

CHUNK = 1 << 18  # elements held in float32 at a time: bounds the temporaries, and is twice as fast as no chunks


@dataclass(slots=True, kw_only=True)
class Stored:
    """What is kept of one parameter (or of its local shard), contiguous, changed in place by a step.

    weight: the parameter [*shape]; residual: its codes, or a float32 master, or None where the weight is float32
    first, second: moments, 8-bit codes or float32 [*shape], None where the rule has none
    first_scale, second_scale: one per group, flat in the order of the groups; None where the moments are float32
    held: bool [], set to True when an element was left alone because its update was not finite
    first_slot: place of the first element in the whole parameter, which earlier shards hold the beginning of
    """

    weight: Tensor
    residual: Tensor | None
    first: Tensor | None
    first_scale: Tensor | None
    second: Tensor | None
    second_scale: Tensor | None
    held: Tensor
    first_slot: int = 0


def row_length(weight: Tensor, storage: Storage) -> int:
    """Length of a row of groups: the last dimension, or the whole tensor where groups run flat through it."""
    return weight.numel() if storage.layout == "flat" or weight.ndim == 0 else weight.shape[-1]


def reference_step(
    rule: Rule, storage: Storage, stored: Stored, grad: Tensor, numbers: Numbers, key: int, scale: Tensor | None = None
) -> None:
    """One step of one parameter, in place.

    grad: [*shape], contiguous, float32 or the dtype of the weight
    key: from `draw_key`, used where the residual code is rounded stochastically
    scale: float32 [], what the gradient is multiplied by first (clipping; -1 to go uphill), or None
    An element whose gradient is not finite, whose moment or root of a variance would pass `rules.LARGEST_STATE`, or
    whose new weight would not be finite in the narrow format, is left exactly as it was, and `stored.held` is set.
    """
    stochastic = storage.rounding == "stochastic"
    for part, group in _parts(stored.weight, row_length(stored.weight, storage)):
        narrow = part.read(stored.weight)
        code = None if stored.residual is None else part.read(stored.residual)
        g = part.read(grad).float()
        if scale is not None:
            g = g * scale
        groups = slice(group, group + narrow.shape[0])
        slot, first_draws, second_draws = stored.first_slot + group * GROUP, None, None
        if stochastic:
            first_draws, second_draws = scale_draws(slot // GROUP, narrow.shape[0], key, narrow.device)
        # decode
        theta = narrow if code is None else _decode_weight(narrow, code, storage)
        m, v, r = stored.first, stored.second, None
        if m is not None:
            m = part.read(m)
            if stored.first_scale is not None:
                m = decode_momentum(m, stored.first_scale[groups], storage.states)
        if v is not None:
            v = part.read(v)
            if stored.second_scale is not None:
                v = r = decode_root(v, stored.second_scale[groups])
                if storage.states == "companded8":
                    v = r * r
        # ordinary update
        new = rule.update(g, theta, m, None if v is None else v * LIFT, numbers)
        fine = (new.watched <= new.bound) & (new.theta.abs() <= torch.finfo(narrow.dtype).max)
        stored.held.logical_or_(~fine.all())
        # encode; what did not move is not rounded anew
        moved = fine & (new.theta != theta) if stochastic else fine
        if stored.residual is None or code is None:
            part.write(stored.weight, new.theta.where(moved, narrow))
        else:
            new_narrow, new_code = _encode_weight(new.theta.where(moved, theta), narrow.dtype, storage, slot, key)
            part.write(stored.weight, new_narrow.where(moved, narrow))
            part.write(stored.residual, new_code.where(moved, code))
        if m is not None and new.first is not None and stored.first is not None:
            m = new.first.where(fine, m)
            if stored.first_scale is not None:
                m, stored.first_scale[groups] = encode_momentum(m, storage.states, storage.scales, first_draws)
            part.write(stored.first, m)
        if v is not None and new.second is not None and new.root is not None and stored.second is not None:
            if stored.second_scale is None or r is None:
                part.write(stored.second, (new.second * (1.0 / LIFT)).where(fine, v))
                continue
            by_root = storage.states == "companded8"
            now = new.root * (1.0 / LIFT**0.5) if by_root else new.second * (1.0 / LIFT)
            codes, stored.second_scale[groups] = encode_root(
                now.where(fine, r), storage.states, storage.scales, storage.variance_floor, second_draws
            )
            part.write(stored.second, codes)


def _decode_weight(narrow: Tensor, code: Tensor, storage: Storage) -> Tensor:
    if code.dtype == torch.float32:
        return code
    return merge_ordinal(narrow, code) if storage.residual == "ordinal" else merge(narrow, code)


def _encode_weight(theta: Tensor, dtype: torch.dtype, storage: Storage, slot: int, key: int) -> tuple[Tensor, Tensor]:
    if storage.master == "fp32":
        return theta.to(dtype), theta
    draw = storage.rounding == "stochastic"
    if storage.residual == "ordinal":
        draws = byte_draws(slot, theta.numel(), key, theta.device) if draw and storage.residual_bits == 8 else None
        return split_ordinal(theta, storage.residual_bits, draws=None if draws is None else draws.view(theta.shape))
    uniform = uniforms(slot, theta.numel(), key, theta.device).view(theta.shape) if draw else None
    return split(theta, dtype, storage.residual_bits, uniform=uniform)


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows `width` long of a flattened tensor, seen as groups of 32; ragged rows are padded with zeros."""

    start: int
    stop: int
    width: int

    def read(self, whole: Tensor) -> Tensor:
        rows = whole.view(-1)[self.start : self.stop].view(-1, self.width)
        padding = -self.width % GROUP
        return (F.pad(rows, (0, padding)) if padding else rows).reshape(-1, GROUP)

    def write(self, whole: Tensor, groups: Tensor) -> None:
        rows = whole.view(-1)[self.start : self.stop].view(-1, self.width)
        rows.copy_(groups.view(rows.shape[0], -1)[:, : self.width])


def _parts(weight: Tensor, row: int) -> Iterator[tuple[_Part, int]]:
    """Cut a tensor with rows of this length into chunks, each with the number of its first group."""
    total = weight.numel()
    if total == 0:
        return
    ragged = row % GROUP
    if ragged and total > row:  # many ragged rows: chunks of whole rows
        rows = max(1, CHUNK // row)
        for start in range(0, total, rows * row):
            yield _Part(start, min(start + rows * row, total), row), start // row * -(-row // GROUP)
        return
    whole = total - total % GROUP
    for start in range(0, whole, CHUNK):
        yield _Part(start, min(start + CHUNK, whole), GROUP), start // GROUP
    if ragged:
        yield _Part(whole, total, ragged), whole // GROUP
