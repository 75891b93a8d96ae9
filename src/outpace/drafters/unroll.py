"""Attention of an unrolled drafter: step k of the training-time test (EAGLE-3, section 4.5 of the spec).

Every row runs K steps at once, on its own outputs. At step k row t sees the step-0 keys of rows 0..t of its document
and the keys it made itself at steps 1..k: the mask [causal | I | I | ...]. A diagonal block is a row-wise dot product,
so only the causal part is a product of matrices:

    out = (e^lse0 * out0 + sum_j e^s_j v_j) / (e^lse0 + sum_j e^s_j),     s_j = q . k_j / sqrt(D)

`dense_attention` is the definition, with the mask written out. `unrolled_attention` runs the causal part document by
document through a flash kernel. Backwards that kernel is given the *merged* output and normaliser: with those, its own
formula yields the gradients of its part of the merged softmax, and those of the diagonals are elementwise.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from outpace.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.learning import Batch


class Unrolled:
    """Keys and values of the steps so far, per layer; `attend` is what blocks call (`layers.Attend`).

    Args:
        batch: whose documents bound what is seen. Rows are the batch's tokens, [B, T, ...].
        dense: use the definition instead of kernels (None: where no kernel fits).
    """

    def __init__(self, batch: Batch, *, dense: bool | None = None) -> None:
        self.documents = batch.documents
        self.bounds = batch.bounds
        self.longest = batch.longest
        self.dense = dense
        self._keys: dict[int, list[Tensor]] = {}
        self._values: dict[int, list[Tensor]] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the current step: q [B, T, heads, D], k and v [B, T, key heads, D] -> [B, T, heads, D]."""
        keys, values = self._keys.setdefault(layer, []), self._values.setdefault(layer, [])
        keys.append(k)
        values.append(v)
        dense = self.dense if self.dense is not None else not fits_kernel(q)
        if dense:
            return dense_attention(q, keys, values, self.documents)
        shape = q.shape
        flat = [x.flatten(0, 1) for x in (*keys, *values)]
        out = unrolled_attention(
            q.flatten(0, 1), flat[: len(keys)], flat[len(keys) :], bounds=self.bounds, longest=self.longest
        )
        return out.view(shape)


def dense_attention(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], documents: Tensor) -> Tensor:
    """The definition: q [B, T, heads, D]; keys, values: one [B, T, key heads, D] per step; documents [B, T]."""
    batch, rows, heads, size = q.shape
    groups = heads // keys[0].shape[2]
    same = documents[:, :, None] == documents[:, None, :]
    order = torch.arange(rows, device=q.device)
    causal = same & (order[:, None] >= order[None, :])
    eye = torch.eye(rows, dtype=torch.bool, device=q.device).expand(batch, -1, -1)
    mask = torch.cat([causal, *[eye] * (len(keys) - 1)], 2)[:, None]
    k = torch.cat(list(keys), 1).repeat_interleave(groups, 2).transpose(1, 2)
    v = torch.cat(list(values), 1).repeat_interleave(groups, 2).transpose(1, 2)
    scores = q.transpose(1, 2) @ k.transpose(2, 3) / size**0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(scores.to(wide).masked_fill(~mask, float("-inf")), -1)
    return (weights.to(v.dtype) @ v).transpose(1, 2)


def fits_kernel(q: Tensor) -> bool:
    """Whether a flash kernel takes such queries."""
    if q.is_cuda:
        return q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    return q.device.type == "cpu"


def unrolled_attention(
    q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], *, bounds: Tensor, longest: int
) -> Tensor:
    """`dense_attention` over flattened rows: q [N, heads, D]; keys, values: one [N, key heads, D] per step.

    bounds: [documents + 1] int32, where each document starts; longest: rows of the longest one.
    """
    dtype = q.dtype
    keys, values = [k.to(dtype) for k in keys], [v.to(dtype) for v in values]
    out: Tensor = _Merged.apply(q, bounds, longest, len(keys), *keys, *values)  # type: ignore[no-untyped-call]
    return out


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, bounds: Tensor, longest: int, steps: int, *both: Tensor) -> Tensor:
        q, keys, values = q.contiguous(), both[:steps], both[steps:]
        scale = q.shape[-1] ** -0.5
        out, lse, state = _causal_forward(q, keys[0], values[0], bounds, longest, scale)
        if steps > 1:
            own = torch.stack(keys[1:]), torch.stack(values[1:])
            out, lse = _own_keys(q)[0](q, out, lse, *own, scale)
            both = keys[0], values[0], *own
        ctx.save_for_backward(q, bounds, out, lse, *state, *both)
        ctx.longest, ctx.extra = longest, len(state)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad = gradients[0].contiguous()
        q, bounds, out, lse, *rest = ctx.saved_tensors
        state, (key, value, *own) = rest[: ctx.extra], rest[ctx.extra :]
        scale = q.shape[-1] ** -0.5
        dq, dk, dv = _causal_backward(grad, q, key, value, out, lse, bounds, ctx.longest, scale, state)
        if not own:
            return (dq, None, None, None, dk, dv)
        dks, dvs = _own_keys(q)[1](grad, q, out, lse, *own, dq, scale)
        return (dq, None, None, None, dk, *dks, dv, *dvs)


def _own_keys(q: Tensor) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., tuple[Tensor, Tensor]]]:
    """`merge` and `slopes`, or the kernels that are the same (torch for CUDA comes with Triton, on Linux)."""
    if not q.is_cuda or importlib.util.find_spec("triton") is None:
        return merge, slopes
    from outpace.drafters import unroll_fused

    return unroll_fused.merge, unroll_fused.slopes


def merge(q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The softmax over causal keys (out, lse) extended by each row's own keys: (out, lse) of the whole.

    q, out: [N, heads, D]; lse: [N, heads]; keys, values: [K, N, key heads, D].
    """
    wide = lse.dtype
    scores = torch.stack([_dot(q, k, scale, wide) for k in keys])  # [K, N, heads]
    merged = torch.logsumexp(torch.cat([lse[None], scores]), 0)
    total = out.to(wide) * torch.exp(lse - merged)[..., None]
    for score, value in zip(scores, values, strict=True):
        total += torch.exp(score - merged)[..., None] * _spread(value, q).to(wide)
    return total.to(q.dtype), merged


def slopes(
    grad: Tensor, q: Tensor, out: Tensor, lse: Tensor, keys: Tensor, values: Tensor, dq: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the rows' own keys and values, [K, N, key heads, D]; `dq` gets their part added.

    grad, q, out, dq: [N, heads, D]; out, lse: of the whole softmax; keys, values as in `merge`.
    """
    wide = lse.dtype
    delta = (grad.to(wide) * out.to(wide)).sum(-1)
    total, dks, dvs = dq.to(wide), [], []
    for k, v in zip(keys, values, strict=True):
        weight = torch.exp(_dot(q, k, scale, wide) - lse)  # [N, heads]
        slope = weight * ((grad.to(wide) * _spread(v, q).to(wide)).sum(-1) - delta) * scale
        total = total + slope[..., None] * _spread(k, q).to(wide)
        dks.append(_gather(slope[..., None] * q.to(wide), k))
        dvs.append(_gather(weight[..., None] * grad.to(wide), v))
    dq.copy_(total)
    return torch.stack(dks), torch.stack(dvs)


def _dot(q: Tensor, k: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Row-wise scores [N, heads] of queries [N, heads, D] with their own keys [N, key heads, D]."""
    return (q.to(dtype) * _spread(k, q).to(dtype)).sum(-1) * scale


def _spread(x: Tensor, q: Tensor) -> Tensor:
    """Repeat key heads for the query heads of their group."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1)


def _gather(x: Tensor, like: Tensor) -> Tensor:
    """Sum a gradient [N, heads, D] over the query heads of each group."""
    rows, _, size = x.shape
    summed: Tensor = x.reshape(rows, like.shape[1], -1, size).sum(2).to(like.dtype)
    return summed


def _causal_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """(out [N, heads, D], lse [N, heads], what the backward kernel wants besides)."""
    if q.is_cuda:
        found = torch.ops.aten._flash_attention_forward(
            q.contiguous(), k.contiguous(), v.contiguous(), bounds, bounds, longest, longest, 0.0, True, False,
            scale=scale,
        )  # fmt: skip
        out, lse, *state = found[:4]
        if lse.shape != (q.shape[1], q.shape[0]):
            raise UnsupportedError(
                f"this build's flash attention gives normalisers of shape {tuple(lse.shape)} for {q.shape[0]} rows of "
                f"{q.shape[1]} heads; this PyTorch cannot train unrolled drafters on a GPU"
            )
        return out, lse.T.contiguous(), tuple(state)
    outs, lses = [], []
    for start, stop in _pairs(bounds):
        one = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_heads_first(x[start:stop], q) for x in (q, k, v)), 0.0, True, scale=scale
        )
        outs.append(one[0][0].transpose(0, 1))
        lses.append(one[1][0].T)
    return torch.cat(outs), torch.cat(lses), ()


def _causal_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
    state: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the causal part, given output and normaliser of the whole softmax."""
    if q.is_cuda:
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            grad, q.contiguous(), k.contiguous(), v.contiguous(), out.contiguous(), lse.T.contiguous(), bounds, bounds,
            longest, longest, 0.0, True, state[0], state[1], scale=scale,
        )  # fmt: skip
        return dq, dk, dv
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start, stop in _pairs(bounds):
        rows = slice(start, stop)
        parts.append(
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *(_heads_first(x[rows], q) for x in (grad, q, k, v, out)), lse[rows].T[None].contiguous(), 0.0, True,
                scale=scale,
            )
        )  # fmt: skip
    dq, dk, dv = (torch.cat([part[i][0].transpose(0, 1) for part in parts]) for i in range(3))
    return dq, _gather(dk, k), _gather(dv, v)


def _heads_first(x: Tensor, q: Tensor) -> Tensor:
    return _spread(x, q).transpose(0, 1)[None].contiguous()


def _pairs(bounds: Tensor) -> list[tuple[int, int]]:
    """Spans of documents, on the host."""
    cuts = bounds.tolist()
    return [(a, b) for a, b in itertools.pairwise(cuts) if b > a]
