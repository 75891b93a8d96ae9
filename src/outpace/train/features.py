"""What drafters read of the target, computed in the same process: one pass of the frozen target over packed rows.

Nothing is written to disk unless a `Ring` of bounded size is given.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from outpace.errors import ConfigError
from outpace.target.packed import run_packed

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.learning import Batch


@torch.no_grad()
def read_taps(batch: Batch, taps: Collection[str]) -> dict[str, Tensor]:
    """The target's states over a batch, [B, T, H] each, without gradient; see `run_packed`."""
    return run_packed(batch.target, batch, taps)


class Ring:
    """States of whole batches on disk, the oldest forgotten first: for several epochs where the target is expensive.

    Args:
        folder: where. limit: most bytes kept.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int) -> None:
        if limit < 1 << 20:
            raise ConfigError(f"a ring of features needs at least 1 MiB, got {limit} bytes; leave it away for none")
        self.folder = Path(folder)
        self.limit = limit
        self.folder.mkdir(parents=True, exist_ok=True)
        files = sorted(self.folder.glob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        self._sizes: OrderedDict[str, int] = OrderedDict((file.name, file.stat().st_size) for file in files)

    @property
    def bytes(self) -> int:
        """Bytes kept."""
        return sum(self._sizes.values())

    def get(self, key: str, device: torch.device) -> dict[str, Tensor] | None:
        """The states kept under a key, or None."""
        name = f"{key}.safetensors"
        if name not in self._sizes:
            return None
        try:
            found: dict[str, Tensor] = load_file(self.folder / name, device=str(device))
        except (OSError, SafetensorError):
            self._sizes.pop(name)
            return None
        return found

    def put(self, key: str, taps: dict[str, Tensor]) -> None:
        """Keep states, forgetting the oldest ones beyond the limit."""
        name = f"{key}.safetensors"
        size = sum(tap.numel() * tap.element_size() for tap in taps.values())
        if size > self.limit:
            return
        while self._sizes and self.bytes + size > self.limit:
            oldest, _ = self._sizes.popitem(last=False)
            (self.folder / oldest).unlink(missing_ok=True)
        temporary = self.folder / f".{name}.tmp"
        save_file({tap: value.cpu().contiguous() for tap, value in taps.items()}, temporary)
        temporary.replace(self.folder / name)
        self._sizes[name] = size
