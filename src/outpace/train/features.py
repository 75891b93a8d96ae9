"""What drafters read of the target, computed in the same process: one pass of the frozen target over packed rows.

Nothing is kept unless room is given. Where a run sees its corpus several times, `KeptRows` keeps the states of rows in
host memory, and on disk if asked, and the target is run once for each instead of once an epoch.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from outpace.errors import ConfigError
from outpace.target.fast.wide import COMPILED_ROWS
from outpace.target.packed import run_packed
from outpace.train.files import whole_file

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.learning import Batch

_SLAB: Final = 1 << 29  # bytes of host memory taken at a time


@torch.no_grad()
def read_taps(batch: Batch, taps: Collection[str]) -> dict[str, Tensor]:
    """The target's states over a batch, [B, T, H] each, without gradient; see `run_packed`."""
    return run_packed(batch.target, batch, taps)


class KeptRows:
    """States of packed rows that come again, up to a bound.

    What was kept stays: rows come in another order every epoch, so whatever is dropped for a new row would be missed as
    often as the new one. A row that found no place is computed each time; a batch computes only the rows it misses.

    Args:
        shape: (tokens of a row, width of a state). dtype, device: of the states, where they are computed.
        taps: which states.
        memory: most bytes of host memory (pinned for a GPU). disk: most bytes of files in `folder`.
        folder: of this very run's files, found again when it is continued; what lies beside it is another run's and is
            removed.

    Raises:
        ConfigError: if there is less memory than asked for.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        taps: Collection[str],
        *,
        memory: int = 0,
        disk: int = 0,
        folder: Path | None = None,
    ) -> None:
        self.shape, self.dtype, self.device, self.taps = shape, dtype, device, tuple(sorted(taps))
        self.row_bytes = row_bytes(shape, dtype, len(self.taps))
        self._most = memory // self.row_bytes
        self._slabs: list[Tensor] = []
        self._places: dict[int, int] = {}
        free = _free_memory()
        if free is not None and memory > free:
            raise ConfigError(
                f"asked to keep {memory / 2**30:.1f} GiB of features in memory, of which {free / 2**30:.1f} GiB are "
                "free; pass a smaller --keep-gib, or --keep-disk-gib"
            )
        self._folder = folder if disk else None
        self._files: set[int] = set()
        if self._folder is not None:
            for other in self._folder.parent.glob("*"):
                if other != self._folder:
                    shutil.rmtree(other, ignore_errors=True)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._files = {int(file.stem) for file in self._folder.glob("*.safetensors")}
        self._most_files = disk // self.row_bytes

    def __len__(self) -> int:
        """Rows kept."""
        return len(self._places.keys() | self._files)

    def read(self, rows: Sequence[int], compute: Callable[[list[int]], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The states of rows, by their numbers: [B, T, H] for every tap; `compute` gives those of rows not kept.

        On CUDA it is asked for the same number of rows each time, so that nothing is compiled anew.

        Raises:
            ConfigError: if a row cannot be written to disk.
        """
        found = torch.empty((len(self.taps), len(rows), *self.shape), dtype=self.dtype, device=self.device)
        missing = [b for b, row in enumerate(rows) if not self._fetch(row, found[:, b])]
        piece = min(len(rows), -(-COMPILED_ROWS // self.shape[0]))
        for start in range(0, len(missing), piece):
            some = missing[start : start + piece]
            pad = piece - len(some) if self.device.type == "cuda" else 0
            made = compute([rows[b] for b in [*some, *some[-1:] * pad]])
            for place, b in enumerate(some):
                for number, tap in enumerate(self.taps):
                    found[number, b] = made[tap][place]
                self._keep(rows[b], found[:, b])
        return dict(zip(self.taps, found, strict=True))

    def _fetch(self, row: int, into: Tensor) -> bool:
        """Copy a kept row's states [taps, T, H] to their place."""
        if row in self._places:
            into.copy_(self._slot(self._places[row]), non_blocking=True)
            return True
        if row not in self._files:
            return False
        try:
            into.copy_(load_file(self._file(row))["states"])
        except (OSError, SafetensorError, KeyError):  # half written by a run that was killed, or not ours
            self._files.discard(row)
            return False
        return True

    def _keep(self, row: int, states: Tensor) -> None:
        if len(self._places) < self._most:
            place = len(self._places)
            self._slot(place).copy_(states, non_blocking=True)  # read again behind this copy, on the same stream
            self._places[row] = place
        elif len(self._files) < self._most_files:
            file = self._file(row)
            try:
                with whole_file(file) as temporary:
                    save_file({"states": states.cpu().contiguous()}, temporary)
            except (OSError, SafetensorError) as error:
                raise ConfigError(
                    f"cannot keep features in {str(file.parent)!r}: {error}. Free some space, or lower --keep-disk-gib"
                ) from error
            self._files.add(row)

    def _slot(self, place: int) -> Tensor:
        each = max(1, _SLAB // self.row_bytes)
        slab, inside = divmod(place, each)
        if slab == len(self._slabs):
            size = min(each, self._most - place)
            shape = (size, len(self.taps), *self.shape)
            self._slabs.append(torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda"))
        return self._slabs[slab][inside]

    def _file(self, row: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{row}.safetensors"


def row_bytes(shape: tuple[int, int], dtype: torch.dtype, taps: int) -> int:
    """Bytes of the states of one row."""
    return taps * shape[0] * shape[1] * dtype.itemsize


def _free_memory() -> int | None:
    """Bytes the host has left, where it says so."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
