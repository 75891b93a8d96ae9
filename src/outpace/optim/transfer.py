"""Moving states between storage settings: read anything as float32, write float32 into anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from outpace.errors import CheckpointError, OutpaceError
from outpace.optim import shards
from outpace.optim.compand import decode_momentum, decode_variance, encode_momentum, encode_variance
from outpace.optim.reference import row_length
from outpace.optim.settings import FORMAT, GROUP, Storage
from outpace.optim.split import merge, merge_ordinal, split, split_ordinal

if TYPE_CHECKING:
    from outpace.optim.base import FlashOptimizer

# Keys of torch.optim's param groups that say how to compute, not what.
_TORCH_ONLY = ("foreach", "fused", "capturable", "differentiable")


def to_groups(whole: Tensor, row: int) -> Tensor:
    """A contiguous tensor with rows of this length as [groups, 32], ragged rows padded with zeros."""
    rows = whole.reshape(-1, max(row, 1))
    return F.pad(rows, (0, -row % GROUP)).reshape(-1, GROUP)


def from_groups(groups: Tensor, like: Tensor, row: int) -> Tensor:
    """The inverse of `to_groups`."""
    return groups.view(-1, row + -row % GROUP)[:, :row].reshape(like.shape)


def read_master(weight: Tensor, state: Mapping[str, Any], storage: Storage) -> Tensor:
    """The float32 value of a (local) weight, from its 16-bit form and whatever its state adds."""
    if "master" in state:
        return shards.local(state["master"]).clone()
    if "residual" not in state:
        return weight.float().clone()
    code = shards.local(state["residual"])
    narrow = weight if weight.dtype == storage.narrow else weight.to(storage.narrow or torch.bfloat16)
    return merge_ordinal(narrow, code) if storage.residual == "ordinal" else merge(narrow, code)


@torch.no_grad()
def write_master(optimizer: FlashOptimizer, param: Tensor, group: dict[str, Any], theta: Tensor) -> None:
    """Set a weight to a float32 value (its local part), creating its state where there is none."""
    theta = theta.to(device=shards.local(param).device, dtype=torch.float32)
    weight = shards.local(param)
    if weight.dtype == torch.float32:
        weight.copy_(theta)
        return
    state, storage = optimizer._state_of(param, group), Storage.of_group(group)
    narrow, code = _encode_master(theta, weight.dtype, storage)
    weight.copy_(narrow)
    shards.local(state["master" if storage.master == "fp32" else "residual"]).copy_(code)


def _encode_master(theta: Tensor, dtype: torch.dtype, storage: Storage) -> tuple[Tensor, Tensor]:
    if storage.master == "fp32":
        return theta.to(dtype), theta
    if storage.residual == "ordinal":
        return split_ordinal(theta, storage.residual_bits)
    return split(theta, dtype, storage.residual_bits)


def read_moment(param: Tensor, state: Mapping[str, Any], name: str, storage: Storage) -> Tensor:
    """One moment of the local part as float32, whatever it is kept as."""
    value = shards.part_of(param, state[name])
    if f"{name}_scale" not in state:
        return value.float()
    row = row_length(shards.local(param), storage)
    scale = shards.part_of(param, state[f"{name}_scale"]).reshape(-1)
    decode = decode_momentum if value.dtype == torch.int8 else decode_variance
    return from_groups(decode(to_groups(value, row), scale, storage.states), value, row)


def write_moment(param: Tensor, state: dict[str, Any], name: str, value: Tensor, storage: Storage) -> None:
    """Put a float32 moment into the state as the settings keep it."""
    target = shards.local(state[name])
    if f"{name}_scale" not in state:
        target.copy_(value)
        return
    row = row_length(target, storage)
    groups = to_groups(value.float(), row)
    if target.dtype == torch.int8:
        code, scale = encode_momentum(groups, storage.states, storage.scales)
    else:
        code, scale = encode_variance(groups, storage.states, storage.scales, storage.variance_floor)
    target.copy_(from_groups(code, target, row))
    kept = shards.local(state[f"{name}_scale"])
    kept.copy_(scale.view(kept.shape))


def load(optimizer: FlashOptimizer, state_dict: Mapping[str, Any]) -> None:
    """See `FlashOptimizer.load_state_dict`. Everything is checked and converted before anything is changed."""
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved_groups]:
        raise CheckpointError(
            f"the checkpoint's param groups hold {[len(g['params']) for g in saved_groups]} parameters and this "
            f"optimizer's {[len(g['params']) for g in groups]}; build it with the same groups in the same order"
        )
    new_groups = [_merged_group(optimizer, mine, saved) for mine, saved in zip(groups, saved_groups, strict=True)]
    planned: list[tuple[Tensor, dict[str, Any], Tensor | None]] = []
    seen: set[Any] = set()
    for mine, saved, new in zip(groups, saved_groups, new_groups, strict=True):
        for param, key in zip(mine["params"], saved["params"], strict=True):
            seen.add(key)
            entry = state_dict["state"].get(key)
            if entry:
                planned.append(_planned(optimizer, param, entry, saved, new))
    strange = [key for key in state_dict["state"] if key not in seen]
    if strange:
        raise CheckpointError(f"the checkpoint holds a state for {strange[0]!r}, which is in none of its param groups")
    optimizer.state.clear()
    for param, state, theta in planned:
        optimizer.state[param] = state
        if theta is not None:
            group = next(g for g in new_groups if any(p is param for p in g["params"]))
            write_master(optimizer, param, group, theta)
    for mine, new in zip(groups, new_groups, strict=True):
        mine.clear()
        mine.update(new)


def _merged_group(optimizer: FlashOptimizer, mine: dict[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    from outpace.optim.base import OWN_KEYS

    if saved.get("format", FORMAT) != FORMAT:
        raise CheckpointError(f"the checkpoint has state format {saved['format']}, this version reads {FORMAT}")
    if saved.get("amsgrad") or ("betas" in saved and saved.get("decoupled_weight_decay") is False):
        raise CheckpointError(
            "the checkpoint is of Adam with amsgrad or coupled weight decay, which FlashAdamW does not do; its moments "
            "would go on under another rule"
        )
    skip = (*OWN_KEYS, *_TORCH_ONLY, "amsgrad", "params")
    if optimizer.kind == "adamw":
        skip = (*skip, "decoupled_weight_decay")
    return mine | {key: value for key, value in saved.items() if key not in skip} | {"params": mine["params"]}


def _planned(
    optimizer: FlashOptimizer, param: Tensor, entry: Mapping[str, Any], saved: Mapping[str, Any], new: dict[str, Any]
) -> tuple[Tensor, dict[str, Any], Tensor | None]:
    """(parameter, its new state, a float32 weight to write or None) of one saved entry."""
    target, rule = Storage.of_group(new), optimizer.rule(new)
    source = _source(saved, entry)
    expected = {"step", "residual", "master"}
    expected |= {f"{name}{tail}" for name in (rule.first, rule.second) if name for tail in ("", "_scale")}
    unknown = set(entry) - expected
    if unknown:
        raise CheckpointError(
            f"the checkpoint's state holds {sorted(unknown)[0]!r}, and {type(optimizer).__name__} keeps "
            f"{sorted(expected)}; it was saved by another optimizer"
        )
    entry = {name: value for name, value in entry.items() if value is not None}
    for name in set(entry) & {"residual", "master", rule.first, rule.second}:
        if tuple(entry[name].shape) not in (tuple(param.shape), tuple(shards.local(param).shape)):
            raise CheckpointError(
                f"the checkpoint's {name} has shape {tuple(entry[name].shape)} and its parameter {tuple(param.shape)}; "
                "the parameters are in another order, or of another model"
            )
    lacking = [name for name in (rule.first, rule.second) if name and name not in entry]
    if lacking and int(entry.get("step", 0)) > 0:
        raise CheckpointError(
            f"the checkpoint's state lacks {lacking[0]!r} after {int(entry['step'])} steps; it was saved by another "
            "optimizer"
        )
    kept = optimizer.state.get(param, {})
    before = optimizer.state.pop(param, None)
    try:
        state = optimizer._state_of(param, new)
    finally:
        optimizer.state.pop(param, None)
        if before is not None:
            optimizer.state[param] = before
    device = shards.local(param).device

    def part(name: str) -> Tensor:
        return shards.part_of(param, entry[name]).to(device)

    moved = {name: part(name) for name in entry if name != "step"}
    begun = int(any(name in entry for name in (rule.first, rule.second)))  # torch's SGD: no count
    state["step"] = torch.tensor(int(entry.get("step", begun)), dtype=torch.int64)
    for moment in (rule.first, rule.second):
        if moment is None or moment not in entry:
            continue
        name, scale = moment, f"{moment}_scale"
        same = source == target and (scale in entry) == (scale in state)
        if same or (scale not in entry and scale not in state):
            shards.local(state[name]).copy_(moved[name])
            if scale in entry:
                shards.local(state[scale]).copy_(moved[scale])
        else:
            try:
                value = read_moment(param, moved, name, source)
            except (OutpaceError, RuntimeError) as problem:
                raise CheckpointError(f"the checkpoint's {name} cannot be decoded: {problem}") from problem
            write_moment(param, state, name, value, target)
    if "residual" in state and "residual" in moved and _same_master(source, target):
        shards.local(state["residual"]).copy_(moved["residual"])
        return param, state, None
    if "residual" in moved or "master" in moved:
        return param, state, read_master(shards.local(param), moved, source)
    for name in ("residual", "master"):
        if name in state and name in kept:
            shards.local(state[name]).copy_(shards.local(kept[name]))
    return param, state, None


def _same_master(source: Storage, target: Storage) -> bool:
    return (source.master, source.residual) == (target.master, target.residual)


def _source(saved: Mapping[str, Any], entry: Mapping[str, Any]) -> Storage:
    """The storage settings a saved group states; a checkpoint of torch.optim states none and needs none."""
    from outpace.optim.base import STORAGE_KEYS

    if any(name.endswith("_scale") or name == "residual" for name in entry) and "format" not in saved:
        raise CheckpointError("the checkpoint's states are coded but its param groups do not say how; it is incomplete")
    try:
        return Storage(**{name: saved[name] for name in STORAGE_KEYS if name in saved})
    except OutpaceError as problem:
        raise CheckpointError(f"the checkpoint's storage settings are not known here: {problem}") from problem


def export_portable(optimizer: FlashOptimizer) -> dict[str, Any]:
    """The state as the torch.optim class of the same rule would save it: float32 moments, its own keys only.

    Loads into torch.optim.AdamW or SGD built with the same groups, and into any Flash optimizer of the rule. The
    float32 weights are not in it: see `FlashOptimizer.master_weights`.
    """
    from outpace.optim.base import OWN_KEYS

    packed = optimizer.state_dict()
    skip = (*OWN_KEYS, "seed", *(("decoupled_weight_decay",) if optimizer.kind == "sgd" else ()))
    result: dict[str, Any] = {
        "state": {},
        "param_groups": [{k: v for k, v in g.items() if k not in skip} for g in packed["param_groups"]],
    }
    for mine, group in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        rule, storage = optimizer.rule(mine), Storage.of_group(mine)
        for param, key in zip(mine["params"], group["params"], strict=True):
            state = packed["state"].get(key)
            if not state:
                continue
            plain: dict[str, Any] = {} if optimizer.kind == "sgd" else {"step": state["step"].float()}
            for name in (rule.first, rule.second):
                if name is not None:
                    moment = read_moment(param, state, name, storage).clone()
                    plain[name] = shards.like(param, moment, tuple(param.shape))
            result["state"][key] = plain
    return result
