"""What rounds of one shape write to on the device, and how the host fills it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import torch

from outpace.engine.device.drafts import NO_ROOM
from outpace.engine.device.history import History
from outpace.engine.device.kernels import EMITTED_EXTRA, Chance, Chooser, Keys, Trail
from outpace.engine.device.truncation import Truncation
from outpace.errors import OutOfMemoryError
from outpace.laws import NoiseDice

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters import RequestContext
    from outpace.drafters.device import DeviceDraft
    from outpace.target.fast.forward import Inputs

AHEAD: Final = 1  # rounds that are under way while the host reads the one before


@dataclass(slots=True)
class Flight:
    """A round that has been launched: where its outcome will be, and when. The next pass overwrites the taps.

    stamps: see `Trail`, of this round. drafted: whether it begins with a draft. begin, end: around all of it.
    """

    emitted: Tensor
    stamps: Tensor
    taps: dict[str, Tensor]
    drafted: bool
    begin: torch.cuda.Event
    end: torch.cuda.Event

    def spans(self) -> tuple[float, float, float]:
        """Milliseconds of the draft, the pass and the walk, once it has ended; launching counts as what comes first."""
        whole = self.begin.elapsed_time(self.end)
        drafted, passed, walked = self.stamps.tolist()
        walk = 1e-6 * (walked - passed)
        passing = 1e-6 * (passed - drafted) if self.drafted else whole - walk
        return whole - walk - passing, passing, walk


@dataclass(frozen=True, slots=True)
class Course:
    """What the rounds under way are for: they may go on as long as nothing of it changes.

    Attributes:
        requests: in slot order. speculate: which of them drafts are made for.
        draft: what drafts on the device, or None for plain rounds.
    """

    requests: list[RequestContext]
    speculate: list[bool]
    draft: DeviceDraft | None

    def serves(self, requests: Sequence[RequestContext], draft: DeviceDraft | None) -> bool:
        """Whether these requests are played by these rounds."""
        same = len(requests) == len(self.requests) and all(a is b for a, b in zip(requests, self.requests, strict=True))
        return same and draft is self.draft


class Lane:
    """What walks of one shape write to, and the laws of the requests in it.

    Attributes:
        trail: what walks leave behind.
        temperature, looked_up: [B] float32; the latter zero where noise per id decides. truncation, keys: of the laws
            and of the noise.
    """

    def __init__(self, batch: int, rows: int, vocabulary: int, device: torch.device) -> None:
        longs: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self._vocabulary = vocabulary
        self.chooser = Chooser(batch * rows, vocabulary, device)
        self._heats = torch.zeros(2, batch, dtype=torch.float32, device=device)
        self.temperature, self.looked_up = self._heats.unbind()
        self.truncation = Truncation.room(batch, device)
        self._words = torch.zeros(5, batch, **longs)
        seeds, names, kinds, room, turn = self._words.unbind()
        self.keys = Keys(seeds, names, kinds)
        emitted = torch.zeros(batch, rows + EMITTED_EXTRA, **longs)
        path = torch.zeros(batch, rows, **longs)
        counts, starts = torch.zeros(2, batch, **longs).unbind()
        turns = AHEAD + 2
        results, stamps = host_tensor(emitted.expand(turns, -1, -1)), host_tensor(emitted.new_zeros(turns, 3))
        self.trail = Trail(emitted, path, counts, starts, room, turn[:1], results, stamps)
        self._turn = 0

    def load(self, requests: Sequence[RequestContext]) -> Chance:
        """Put the requests' laws and limits on the device; returns what decides their tokens."""
        batch = self.trail.counts.shape[0]
        spare = batch - len(requests)
        heats = [r.sampler.settings.temperature for r in requests]
        dice = [d for d in (r.sampler.dice for r in requests) if isinstance(d, NoiseDice)]
        seeds, names = [_signed(d.noise.seed) for d in dice], [_signed(d.request) for d in dice]
        kinds = [int(heat > 0 and d.kind == "gumbel") for d, heat in zip(dice, heats, strict=True)]
        room = [r.depth_limit if r.speculate else NO_ROOM for r in requests]
        pad = [0] * spare
        looked_up_at = [0.0 if kind else heat for heat, kind in zip(heats, kinds, strict=True)]
        both = torch.tensor([[*heats, *pad], [*looked_up_at, *pad]], dtype=torch.float32)
        self._heats.copy_(both, non_blocking=True)
        words = [[*seeds, *pad], [*names, *pad], [*kinds, *pad], [*room, *([NO_ROOM] * spare)], [0] * batch]
        self._turn = 0
        self._words.copy_(torch.tensor(words), non_blocking=True)
        looked_up = any(heat > 0 and not kind for heat, kind in zip(heats, kinds, strict=True))
        truncated = self.truncation.load([r.sampler.settings for r in requests])
        remembers = not all(r.sampler.memoryless for r in requests)
        if remembers:
            self.history.load(requests)
        return Chance(looked_up, any(kinds), truncated, remembers)

    @cached_property
    def history(self) -> History:
        """What laws with a history read; made when one is first met.

        Raises:
            OutOfMemoryError: if there is no room for it.
        """
        batch, rows = self.trail.path.shape
        try:
            with torch.inference_mode(False):
                return History(batch, rows, self._vocabulary, self.trail.path.device)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"no GPU memory for the scores of {batch} x {rows} rows, which penalties, biases and minimum lengths "
                f"need: {str(error).splitlines()[0]} Lower max_batch or the draft's length; the engine stays usable"
            ) from error

    def next_place(self) -> tuple[Tensor, Tensor]:
        """Where the host will find what the coming round emits, and its stamps."""
        place = self._turn
        self._turn = (place + 1) % len(self.trail.results)
        return self.trail.results[place], self.trail.stamps[place]


def host_tensor(like: Tensor) -> Tensor:
    """Zeros of a device tensor's shape on the host, where copies need not wait and kernels may write."""
    return torch.zeros(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit integer."""
    return word - (1 << 64) if word >= 1 << 63 else word


def fill(
    host: Tensor,
    inputs: Inputs,
    tokens: list[list[int]],
    parents: list[list[int]],
    positions: list[list[int]],
    lengths: list[int],
) -> None:
    """Fill all static tensors of a shape with one copy; host: [offsets[-1]] int64, for staging.

    tokens, parents, positions: of the main rows. A scout stands at its root's position and sees itself, until it is
    placed.
    """
    rows, total, spare = inputs.main, inputs.rows, inputs.batch - len(tokens)
    flat: list[int] = []
    for part, filler, width in ((tokens, 0, rows), (parents, -2, rows), (positions, 0, total)):
        for row in part:
            flat.extend(row)
            flat.extend(row[:1] * (width - rows))
        flat.extend([filler] * (width * spare))
    flat.extend(lengths)
    flat.extend([0] * spare)
    flat.extend(range(inputs.batch))
    start = inputs.offsets[5]
    host[:start] = torch.tensor(flat)
    if inputs.bits is not None:
        words = inputs.bits.shape[1]
        packed: list[int] = []
        alone = [-2] * (total - rows)
        for row_parents in [*parents, *([[-2] * rows] * spare)]:
            seen: list[int] = []
            for at, parent in enumerate([*row_parents, *alone]):
                seen.append((seen[parent] if parent >= 0 else 0) | (1 << at))
            for mask in seen:
                packed.extend((mask >> (32 * word)) & 0xFFFFFFFF for word in range(words))
        view = host[start:].view(torch.int32)
        view[: len(packed)] = torch.tensor(packed, dtype=torch.int64).to(torch.int32)
    inputs.flat.copy_(host, non_blocking=True)
