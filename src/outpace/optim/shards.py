"""Parameters that are DTensors (FSDP2): the local part, its place in the whole, states with the same placement."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from outpace.errors import UnsupportedError
from outpace.optim.settings import GROUP, Layout


def as_dtensor(tensor: Tensor) -> Any | None:
    """The tensor itself if it is a DTensor, else None; never imports torch.distributed for those who do not use it."""
    module = sys.modules.get("torch.distributed.tensor")
    return tensor if module is not None and isinstance(tensor, module.DTensor) else None


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor, or the tensor itself; always plain and without gradient, sharing memory."""
    sharded = as_dtensor(tensor)
    return tensor.detach() if sharded is None else sharded.detach().to_local()


def offsets(param: Tensor) -> tuple[int, ...]:
    """Where the local part starts in the whole, per dimension."""
    sharded = as_dtensor(param)
    if sharded is None:
        return (0,) * param.ndim
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(sharded.shape, sharded.device_mesh, sharded.placements)
    return tuple(offset)


def first_slot(param: Tensor) -> int:
    """Place of the local part's first element, rows padded to whole groups (0 where nothing is sharded)."""
    start = offsets(param)
    if not any(start):
        return 0
    rows = 0
    for place, length in zip(start[:-1], param.shape[:-1], strict=True):
        rows = rows * length + place
    return rows * math.ceil(param.shape[-1] / GROUP) * GROUP + start[-1]


def cuts_groups(param: Tensor, layout: Layout) -> bool:
    """Whether the sharding separates elements that share a scale."""
    sharded = as_dtensor(param)
    if sharded is None:
        return False
    for axis, placement in enumerate(sharded.placements):
        if not placement.is_shard():
            continue
        length, parts = param.shape[placement.dim], sharded.device_mesh.size(axis)
        if layout == "flat":
            inner = math.prod(param.shape[1:])
            if placement.dim != 0 or length % parts or (length // parts * inner) % GROUP:
                return True
        elif placement.dim in (-1, param.ndim - 1) and math.ceil(length / parts) % GROUP and parts > 1:
            return True
    return False


def like(param: Tensor, part: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Wrap a local state as a DTensor of this global shape, placed as the parameter is; plain stays plain."""
    sharded = as_dtensor(param)
    if sharded is None:
        return part
    stride = torch.empty(shape, device="meta").stride()
    result: Tensor = type(sharded.detach()).from_local(
        part, sharded.device_mesh, sharded.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )
    return result


def part_of(param: Tensor, whole: Tensor) -> Tensor:
    """The local part of a state given whole or sharded. The state's dimensions follow those of the parameter.

    Raises UnsupportedError if the state is sharded in another way than the parameter.
    """
    sharded = as_dtensor(whole)
    mine = as_dtensor(param)
    if sharded is not None:
        if mine is None or tuple(mine.placements) != tuple(sharded.placements):
            raise UnsupportedError(
                f"a state is sharded as {tuple(sharded.placements)} and its parameter as "
                f"{None if mine is None else tuple(mine.placements)}; load through torch.distributed.checkpoint, "
                "which reshards, or gather the state first with full_tensor()"
            )
        return local(whole)
    if mine is None:
        return whole.detach()
    start, mine_local = offsets(param), local(param)
    for dim in range(min(whole.ndim, param.ndim)):
        if mine_local.shape[dim] != param.shape[dim]:
            last = dim == param.ndim - 1 and whole.shape[dim] != param.shape[dim]  # a dimension of groups
            place = start[dim] // GROUP if last else start[dim]
            length = math.ceil(mine_local.shape[dim] / GROUP) if last else mine_local.shape[dim]
            whole = whole.narrow(dim, min(place, whole.shape[dim]), length)
    return whole.detach()
