"""Optimizer states in a safetensors file: nothing is pickled, and an interrupted save leaves the old file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from outpace.errors import CheckpointError, UnsupportedError
from outpace.optim import shards
from outpace.optim.base import FlashOptimizer

_NAMES: Final = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int64: "I64",
}
_DTYPES: Final = {name: dtype for dtype, name in _NAMES.items()}
_LARGEST_HEADER: Final = 100_000_000  # bytes, as the format says


def flatten(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict as (named tensors, text), which is what a safetensors file holds.

    Raises UnsupportedError for sharded states.
    """
    tensors: dict[str, Tensor] = {}
    for key, state in state_dict["state"].items():
        for name, value in state.items():
            if shards.as_dtensor(value) is not None:
                raise UnsupportedError(
                    "sharded states do not fit one file; save with torch.distributed.checkpoint, or gather them with "
                    "full_tensor() on every rank first"
                )
            tensors[f"{key}/{name}"] = value
    return tensors, {"param_groups": json.dumps(state_dict["param_groups"])}


def unflatten(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """The inverse of `flatten`. Raises CheckpointError if the text is missing or damaged."""
    try:
        groups = json.loads(metadata["param_groups"])
        state: dict[Any, dict[str, Tensor]] = {}
        for full, tensor in tensors.items():
            key, name = full.rsplit("/", 1)
            state.setdefault(int(key) if key.isdigit() else key, {})[name] = tensor
    except (KeyError, ValueError) as problem:
        raise CheckpointError(f"this is no optimizer checkpoint of outpace ({problem!r})") from problem
    for group in groups:
        if "betas" in group:
            group["betas"] = tuple(group["betas"])
    return {"state": state, "param_groups": groups}


def save(optimizer: FlashOptimizer, path: str | os.PathLike[str]) -> None:
    """Write the optimizer's state to one safetensors file, under a temporary name first.

    Weights are not in it: save the model as usual, its 16-bit weights belong to these residuals.
    """
    target = Path(path)
    tensors, metadata = flatten(optimizer.state_dict())
    # Wide types first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in order:
                data = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
                file.write(data.numpy().data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(optimizer: FlashOptimizer, path: str | os.PathLike[str]) -> None:
    """Read what `save` wrote into an optimizer of the same rule, with any storage settings; see `load_state_dict`.

    Raises CheckpointError if the file is missing, damaged, or of another optimizer.
    """
    optimizer.load_state_dict(unflatten(*_read(Path(path))))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, _LARGEST_HEADER):
                raise CheckpointError(f"{path} is no safetensors file, or was cut off; take an older checkpoint")
            header: dict[str, Any] = json.loads(file.read(length))
    except OSError as problem:
        raise CheckpointError(f"{path} cannot be read: {problem}") from problem
    except ValueError as problem:
        raise CheckpointError(f"the header of {path} is damaged ({problem}); take an older checkpoint") from problem
    metadata = header.pop("__metadata__", {})
    body = size - 8 - length
    tensors: dict[str, Tensor] = {}
    whole = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None or not 0 <= start <= stop <= body:
            raise CheckpointError(f"{path} is damaged or cut off at {name!r}; take an older checkpoint")
        if stop - start != torch.Size(entry["shape"]).numel() * dtype.itemsize:
            raise CheckpointError(
                f"{path} gives {name!r} a shape that does not fit its bytes; take an older checkpoint"
            )
        data = whole[8 + length + start : 8 + length + stop].clone()
        tensors[name] = data.view(dtype).view(entry["shape"])
    return tensors, metadata
