"""Slots of a round that stays on the device: where they stand, which of them are heard, and how.

    place    spend the rows of slots on the nodes at which the walk may end; write their positions and whom they see
    hear     the states of the slots behind the node at which the walk did end, for the next draft
    join     both halves of what `SlotJoin` reads, normed

Nodes are looked at in the draft's own order. The value of a node is the log of its chance to be reached, so that the
chance to end there is what its children leave of it; the rest is `rows.allocate` and `rows.scout_rows`, in one program
per request.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl

from outpace.drafters.device.kernels import places, rms
from outpace.target.fast.launch import enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.forward import Inputs

MOST_CANDIDATES: Final = 1024  # nodes times slots of a group, both rounded up to powers of two: of one program
_STEP: Final = 16


@triton.jit
def _place_kernel(
    PARENTS, VALUES, ROWS, ABOVE, SAYS, WORTHS, POSITIONS, BITS, GAINS, BRANCH, SLOT, USED, CARRIED,
    N, M, S, R, TOTAL, least,
    NODES: tl.constexpr, SLOTS: tl.constexpr, SCOUTS: tl.constexpr, WORDS: tl.constexpr, LEAD: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """PARENTS [B, N]: of nodes; ABOVE [B, R]: of the main rows they were laid into (-2: of a row no walk passes)."""
    request = tl.program_id(0)
    end = tl.arange(0, NODES)  # 0 the root, v + 1 node v
    node = tl.maximum(end - 1, 0)
    real = (end > 0) & (end <= N)
    row = tl.load(ROWS + request * N + node, mask=real, other=0).to(tl.int32)
    value = tl.load(VALUES + request * N + node, mask=real, other=0.0)
    passes = real & (tl.load(ABOVE + request * R + row, mask=real, other=-2) >= 0)
    reached = tl.where(passes, tl.exp(tl.minimum(value, 0.0)), 0.0)
    reached = tl.where(end == 0, 1.0, reached)
    hangs = tl.load(PARENTS + request * N + node, mask=real, other=-2).to(tl.int32) + 1
    below = tl.sum(tl.where((hangs[None, :] == end[:, None]) & real[None, :], reached[None, :], 0.0), 1)
    ends = tl.maximum(reached - below, 0.0)
    slot = tl.arange(0, SLOTS)
    worth = tl.load(WORTHS + slot, mask=slot < M, other=0.0)
    size: tl.constexpr = NODES * SLOTS
    there = (end <= N)[:, None] & (slot < M)[None, :]
    gain = tl.reshape(tl.where(there, ends[:, None] * worth[None, :], -1.0), [size])
    branch = tl.reshape(row[:, None] + 0 * slot[None, :], [size])
    which = tl.reshape(slot[None, :] + 0 * end[:, None], [size])
    at = tl.arange(0, size)
    base = GAINS + request * size
    tl.store(base + at, gain)
    tl.debug_barrier()  # gains of others are read
    place = places(base, gain, at, size, size, STEP)
    taken = place < S
    used = (gain > least) & (tl.load(SAYS + request) != 0)
    tl.store(BRANCH + request * S + place, branch, mask=taken)
    tl.store(SLOT + request * S + place, which, mask=taken)
    tl.store(USED + request * S + place, used.to(tl.int32), mask=taken)
    tl.debug_barrier()  # what others chose is read
    scout = tl.arange(0, SCOUTS)
    inside = scout < S
    behind = tl.load(BRANCH + request * S + scout, mask=inside, other=0)
    mine = tl.load(SLOT + request * S + scout, mask=inside, other=0)
    runs = tl.load(USED + request * S + scout, mask=inside, other=0) != 0
    wide = request * TOTAL
    start = tl.load(POSITIONS + wide + behind, mask=inside, other=0) + 1
    tl.store(POSITIONS + wide + R + scout, start + mine + LEAD - 1, mask=inside)
    ahead = start + mine - tl.load(POSITIONS + wide) - 1
    tl.store(CARRIED + request * S + scout, ahead.to(tl.int64), mask=inside)
    group = (behind[:, None] == behind[None, :]) & (mine[None, :] <= mine[:, None])
    sees = (group & runs[:, None] & runs[None, :]) | (scout[:, None] == scout[None, :])
    own = R + scout
    for word in tl.static_range(WORDS):
        bit = tl.where(own >> 5 == word, tl.full([SCOUTS], 1, tl.int32) << (own & 31), 0)
        bits = tl.sum(tl.where(sees & inside[None, :], bit[None, :], 0), 1)
        main = tl.load(BITS + (wide + behind) * WORDS + word, mask=inside & runs, other=0)
        tl.store(BITS + (wide + own) * WORDS + word, bits | main, mask=inside)


@triton.jit
def _hear_kernel(
    STATES, PATH, COUNTS, BRANCH, SLOT, USED, HEARD, THERE, M, S, R, TOTAL, H,
    SCOUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HEARD [B, M, H]: of the group behind the row at which a walk ended; THERE [B, M]: whether that slot ran."""
    request = tl.program_id(0)
    slot = tl.program_id(1)
    last = tl.maximum(tl.load(COUNTS + request) - 1, 0)
    end = tl.load(PATH + request * R + last)
    scout = tl.arange(0, SCOUTS)
    inside = scout < S
    branch = tl.load(BRANCH + request * S + scout, mask=inside, other=-1)
    mine = tl.load(SLOT + request * S + scout, mask=inside, other=-1)
    used = tl.load(USED + request * S + scout, mask=inside, other=0)
    found = tl.max(tl.where((branch == end) & (mine == slot) & (used != 0), scout, -1), 0)
    at = tl.arange(0, BLOCK)
    real = at < H
    source = STATES + (request * TOTAL + R + tl.maximum(found, 0)).to(tl.int64) * H + at
    tl.store(HEARD + (request * M + slot).to(tl.int64) * H + at, tl.load(source, mask=real, other=0.0), mask=real)
    tl.store(THERE + request * M + slot, (found >= 0).to(tl.int32))


@triton.jit
def _join_kernel(
    HEARD, THERE, Y, SLOT_GAMMA, ROW_GAMMA, BOTH, PER, M, depth, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows [B * PER, 2 * SIZE]: slot and row, each behind its norm; zero where there is no slot."""
    row = tl.program_id(0)
    request = row // PER
    enter_kernel(PDL)
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    there = tl.load(THERE + request * M + depth - 1).to(tl.float32)
    slot = tl.load(HEARD + (request * M + depth - 1).to(tl.int64) * SIZE + at, mask=real, other=0.0).to(tl.float32)
    slot = rms(slot, SLOT_GAMMA, at, real, eps, SIZE) * there
    y = tl.load(Y + row.to(tl.int64) * SIZE + at, mask=real, other=0.0).to(tl.float32)
    y = rms(y, ROW_GAMMA, at, real, eps, SIZE) * there
    corner = BOTH + row.to(tl.int64) * 2 * SIZE + at
    tl.store(corner, slot.to(BOTH.dtype.element_ty), mask=real)
    tl.store(corner + SIZE, y.to(BOTH.dtype.element_ty), mask=real)


class Placed(NamedTuple):
    """The slots of a pass: the main row each stands behind, which of its group it is, whether it runs; [B, S] int32."""

    branch: Tensor
    slot: Tensor
    used: Tensor


def fits(nodes: int, slots: int) -> bool:
    """Whether the slots of a draft of that many nodes can be placed, in groups of at most `slots`."""
    return bool(triton.next_power_of_2(nodes + 1) * triton.next_power_of_2(slots) <= MOST_CANDIDATES)


def place_slots(
    parents: Tensor,
    values: Tensor,
    rows: Tensor,
    says: Tensor,
    worths: Tensor,
    inputs: Inputs,
    placed: Placed,
    *,
    lead: int,
    least: float,
) -> Tensor:
    """Fill `placed`, and the slots' positions and bits in `inputs`.

    parents, values: [B, n], of a draft's nodes (-1: the root; log of the chance to be reached); rows: [B, n] int64,
    where they were laid; says: [B] int32, 0 for requests whose slots would say nothing; worths: [M] float32, what each
    slot of a group brings; lead: `Mode.lead`; least: expected drafts a slot has to bring.

    Returns [B, S] int64: which of the numbers ahead each slot carries, the one behind the root's position being 0.
    """
    batch, count = parents.shape
    scouts, longest = placed.slot.shape[1], worths.shape[0]
    nodes, slots = triton.next_power_of_2(count + 1), triton.next_power_of_2(longest)
    gains = torch.empty(batch, nodes * slots, dtype=torch.float32, device=values.device)
    carried = torch.empty(batch, scouts, dtype=torch.int64, device=values.device)
    assert inputs.bits is not None  # there are scouts
    _place_kernel[(batch,)](
        parents.contiguous(), values.contiguous(), rows, inputs.parents, says, worths, inputs.positions, inputs.bits,
        gains, *placed, carried, count, longest, scouts, inputs.main, inputs.rows, least, NODES=nodes, SLOTS=slots,
        SCOUTS=triton.next_power_of_2(scouts), WORDS=inputs.bits.shape[1], LEAD=lead, STEP=_STEP, num_warps=4,
    )  # fmt: skip
    return carried


def hear_group(states: Tensor, path: Tensor, counts: Tensor, placed: Placed, heard: Tensor, there: Tensor) -> None:
    """Keep what the slots behind each walk's end became.

    states: [B, R + S, H], of a pass; path: [B, R] int64, accepted rows, counts: [B] int64 how many; heard: [B, M, H]
    and there: [B, M] int32 are written.
    """
    batch, longest, size = heard.shape
    scouts = placed.slot.shape[1]
    _hear_kernel[(batch, longest)](
        states, path, counts, *placed, heard, there, longest, scouts, path.shape[1], states.shape[1], size,
        SCOUTS=triton.next_power_of_2(scouts), BLOCK=triton.next_power_of_2(size), num_warps=4,
    )  # fmt: skip


def normed_halves(
    heard: Tensor, there: Tensor, y: Tensor, slot_gamma: Tensor, row_gamma: Tensor, depth: int, eps: float, *, pdl: bool
) -> Tensor:
    """What `SlotJoin` reads at a depth: [M, 2H] of rows y [M, H], M a multiple of the batch, zero without a slot."""
    rows, size = y.shape
    both = y.new_empty(rows, 2 * size)
    _join_kernel[(rows,)](
        heard, there, y, slot_gamma, row_gamma, both, rows // heard.shape[0], heard.shape[1], depth, eps, SIZE=size,
        BLOCK=triton.next_power_of_2(size), PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return both
