"""A widened model on disk, written a shard at a time."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from outpace.errors import CheckpointError
from outpace.target.widen.shapes import Shape
from outpace.target.widen.widening import Widening

if TYPE_CHECKING:
    from torch import Tensor, nn

_SHARD_BYTES: Final = 2 << 30


def save_widened(
    model: nn.Module,
    shape: Shape | str,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    tokenizer: Any = None,
    seed: int = 0,
    shard_bytes: int = _SHARD_BYTES,
) -> list[Path]:
    """Write the widened model as sharded safetensors, one shard in memory at a time; `Target.from_pretrained` reads it.

    Returns the files written. An unfinished folder has no config.json, so that nothing takes it for a model.

    Raises:
        CheckpointError: if the folder already holds a model, or the disk is too small or fails.
        UnsupportedError, ConfigError: see `Widening`.
    """
    widening = Widening(model, shape, seed=seed)
    path = Path(folder)
    if (path / "config.json").exists():
        raise CheckpointError(f"{str(path)!r} already holds a model; pass another folder")
    config = widening.large_config()
    config.dtype = dtype
    need = widening.shape.parameters * torch.empty(0, dtype=dtype).element_size()
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < need:
            raise CheckpointError(
                f"the widened model takes {need / 1e9:.1f} GB, and {str(path)!r} has {free / 1e9:.1f} GB left; free "
                "some space, pass another folder, or build it in memory: outpace bench MODEL --widen SHAPE"
            )
        return _write_shards(widening, config, path, dtype, tokenizer, shard_bytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the widened model to {str(path)!r}: {error}; the folder is left without a config.json"
        ) from error


def _write_shards(
    widening: Widening, config: Any, path: Path, dtype: torch.dtype, tokenizer: Any, shard_bytes: int
) -> list[Path]:
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if held:
            file = path / f"shard-{len(shards) + 1:05d}.tmp"
            save_file(held, file, metadata={"format": "pt"})
            shards.append((file, list(held)))
            held.clear()
            size = 0

    for name, tensor in widening.tensors(dtype=dtype, device="cpu"):
        count = tensor.numel() * tensor.element_size()
        if size + count > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        size += count
        total += count
    flush()
    files, where = [], {}
    for number, (file, names) in enumerate(shards, 1):
        final = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.replace(final)
        files.append(final)
        where.update(dict.fromkeys(names, final.name))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    generation = getattr(widening.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return [*files, index, path / "config.json"]
