"""Between a draft and its pass, on the device: the path's numbers ahead, and a tree laid into the rows of a pass."""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
import triton
import triton.language as tl

from outpace.engine.device.kernels import gumbel_tile, path_number
from outpace.target.fast.launch import dependent_launch, enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.heads import DraftHead
    from outpace.engine.device.kernels import Keys
    from outpace.target.fast.forward import Inputs

WIDEST: Final = 128  # rows a tree can be laid into: one program holds who sees whom
NO_ROOM: Final = -(1 << 40)  # of a request that is not to be drafted for


@triton.jit
def _numbers_kernel(SEEDS, REQUESTS, LENGTHS, U, DEPTH, BLOCK: tl.constexpr):
    request = tl.program_id(0)
    ahead = tl.arange(0, BLOCK)
    position = tl.load(LENGTHS + request) + 1 + ahead
    u = path_number(tl.load(SEEDS + request), tl.load(REQUESTS + request), position)
    tl.store(U + request * DEPTH + ahead, u.to(tl.float32), mask=ahead < DEPTH)


@triton.jit
def _noise_kernel(
    SEEDS, REQUESTS, KINDS, LENGTHS, INDEX, NOISE, RACE, STEPS, V, KNOWN, SIZE,
    BLOCK: tl.constexpr, REDUCED: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """Gumbel noise of one tile of ids at one position ahead; zero for requests that it does not decide.

    APART: the same of draft ids goes to RACE as well. REDUCED: INDEX says of the first KNOWN ids which they are.
    """
    request = tl.program_id(0)
    ahead = tl.program_id(1)
    tile = tl.program_id(2)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    noise = tl.zeros([BLOCK], tl.float32)
    if tl.load(KINDS + request) > 0:
        position = tl.load(LENGTHS + request) + 1 + ahead
        noise = gumbel_tile(tl.load(SEEDS + request), tl.load(REQUESTS + request), position, tile, BLOCK)
    place = (request * STEPS + ahead).to(tl.int64)
    tl.store(NOISE + place * V + at, noise, mask=inside)
    if APART:
        drafted = at
        if REDUCED:
            drafted = tl.load(INDEX + at, mask=at < KNOWN, other=-1).to(tl.int32)
        tl.store(RACE + place * SIZE + drafted, noise, mask=inside & (drafted >= 0) & (drafted < SIZE))


@triton.jit
def _lay_kernel(
    DRAFT, ABOVE, ROOM, LENGTHS, TOKENS, PARENTS, POSITIONS, BITS, ROWS, N, R, TOTAL, V, DEPTH,
    BLOCK: tl.constexpr, WORDS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One request's tree, depth first, behind its root: a node's row is 1 + how many nodes come before it."""
    request = tl.program_id(0)
    enter_kernel(PDL)
    node = tl.arange(0, BLOCK)
    real = node < N
    token = tl.load(DRAFT + request * N + node, mask=real, other=-1)
    named = tl.load(ABOVE + request * N + node, mask=real, other=-1).to(tl.int32)
    above = tl.where(named < node, named, -1)
    room = tl.load(ROOM + request)
    length = tl.load(LENGTHS + request)
    seen = (node[:, None] == node[None, :]) & real[:, None]  # [i, j]: node j is node i, or above it
    depth = tl.where(real, 1, 0)
    up = above
    for _ in range(1, DEPTH):
        seen = seen | (up[:, None] == node[None, :])
        depth += (up >= 0).to(tl.int32)
        higher = tl.load(ABOVE + request * N + up, mask=up >= 0, other=-1).to(tl.int32)
        up = tl.where(higher < up, higher, -1)
    size = tl.sum(seen.to(tl.int32), 0)  # nodes of the subtree
    earlier = (above[:, None] == above[None, :]) & (node[None, :] < node[:, None]) & real[None, :]
    before = tl.sum(tl.where(earlier, size[None, :], 0), 1)  # nodes below elder siblings
    row = depth + tl.sum(tl.where(seen, before[None, :], 0), 1)
    hangs = tl.sum(tl.where(above[:, None] == node[None, :], row[None, :], 0), 1)
    known = (token >= 0) & (token < V)
    valid = known & (depth <= room) & (named < node)
    corner = request * R
    wide = request * TOTAL  # where scouts stand behind the main rows
    tl.store(ROWS + request * N + node, row.to(tl.int64), mask=real)
    tl.store(TOKENS + corner + row, tl.where(known, token, 0), mask=real)
    tl.store(PARENTS + corner + row, tl.where(valid, hangs, -2).to(tl.int64), mask=real)
    tl.store(POSITIONS + wide + row, length + depth, mask=real)
    spare = N + 1 + node
    unused = spare < R
    tl.store(TOKENS + corner + spare, tl.zeros([BLOCK], tl.int64), mask=unused)
    tl.store(PARENTS + corner + spare, tl.full([BLOCK], -2, tl.int64), mask=unused)
    tl.store(POSITIONS + wide + spare, tl.zeros([BLOCK], tl.int64) + length, mask=unused)
    tl.store(PARENTS + corner, -2)
    tl.store(POSITIONS + wide, length)
    for word in tl.static_range(WORDS):
        own = tl.where(row >> 5 == word, tl.full([BLOCK], 1, tl.int32) << (row & 31), 0)
        bits = tl.sum(tl.where(seen, own[None, :], 0), 1)
        alone = tl.where(spare >> 5 == word, tl.full([BLOCK], 1, tl.int32) << (spare & 31), 0)
        if word == 0:
            bits = bits | 1  # everybody sees the root
            tl.store(BITS + wide * WORDS, 1)
        else:
            tl.store(BITS + wide * WORDS + word, 0)
        tl.store(BITS + (wide + row) * WORDS + word, bits, mask=real)
        tl.store(BITS + (wide + spare) * WORDS + word, alone, mask=unused)


def noise_ahead(keys: Keys, lengths: Tensor, steps: int, vocabulary: int, head: DraftHead) -> tuple[Tensor, Tensor]:
    """The Gumbel noise of `steps` positions ahead: of all ids [B, steps, V], of draft ids [B, steps, Vd], float32.

    The latter is what `drafters.ahead.race_ahead` gives. Zero for requests whose tokens it does not decide. A node at
    depth d of a tree is chosen with step d of the former, and its children are drafted with the same step of the
    latter: a position's noise is made once, however many rows stand there. lengths: [B] int64, positions of the roots.
    """
    batch, block = lengths.shape[0], 1024
    noise = torch.empty(batch, steps, vocabulary, dtype=torch.float32, device=lengths.device)
    race = noise if head.size == vocabulary else noise.new_empty(batch, steps, head.size)
    _noise_kernel[(batch, steps, triton.cdiv(vocabulary, block))](
        keys.seeds, keys.requests, keys.kinds, lengths, head.index, noise, race, steps, vocabulary, head.vocabulary,
        head.size, BLOCK=block, REDUCED=head.reduced, APART=race is not noise, num_warps=4,
    )  # fmt: skip
    return noise, race


def numbers_ahead(keys: Keys, lengths: Tensor, depth: int) -> Tensor:
    """The path's numbers of the positions a draft is for, [B, depth] float32, as `drafters.ahead.numbers_ahead`.

    lengths: [B] int64, positions of the roots.
    """
    u = torch.empty(lengths.shape[0], depth, dtype=torch.float32, device=lengths.device)
    _numbers_kernel[(lengths.shape[0],)](
        keys.seeds, keys.requests, lengths, u, depth, BLOCK=triton.next_power_of_2(depth), num_warps=1
    )
    return u


def lay(tokens: Tensor, parents: Tensor, depth: int, room: Tensor, vocabulary: int, inputs: Inputs) -> Tensor:
    """Make drafts the main rows of a pass; its roots and lengths are there already. Returns each node's row, [B, n].

    tokens, parents: [B, n] int64, parents before children, -1: the root; depth: of the deepest node; room: [B] int64.
    A node that is deeper than `room`, or no node at all (an id outside the vocabulary, a parent behind it), keeps its
    row and hangs on nothing, so that no walk passes it. Rows stand depth first, as `Tree.depth_first`.
    """
    batch, count = tokens.shape
    rows = inputs.main
    assert inputs.bits is not None  # rows of a chain have none
    pdl = dependent_launch(tokens.device)
    places = torch.empty_like(tokens, memory_format=torch.contiguous_format)
    _lay_kernel[(batch,)](
        tokens.contiguous(), parents.contiguous(), room, inputs.lengths, inputs.tokens, inputs.parents,
        inputs.positions, inputs.bits, places, count, rows, inputs.rows, vocabulary, depth,
        BLOCK=triton.next_power_of_2(rows), WORDS=inputs.bits.shape[1], PDL=pdl, num_warps=4, **launch_options(pdl),
    )  # fmt: skip
    return places
