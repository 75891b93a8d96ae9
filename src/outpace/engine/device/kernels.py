"""Choosing the path's token at every row, and walking the tree, on the device.

The law is `laws.warp`'s of logits, or of scores (`history`): softmax over temperature in float32, truncated
(`truncation`), its cumulated sum in float64, the path's number from Philox. The sums run in another order than
torch's, so a draw within about 1e-7 of an edge of its interval may fall on the other side; greedy choices are the same
outright. Gumbel noise is added in float32, whose last digits may differ from torch's.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import triton
import triton.language as tl

from outpace.engine.device.truncation import Cuts, Cutter, Truncation, kept, shift_of
from outpace.target.fast.launch import dependent_launch, enter_kernel, launch_options

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.forward import Inputs

_TILE: Final = 2048


@triton.jit
def path_number(seed, identity, position):  # noqa: ANN201  # Triton's language
    """The path's number of a position, float64 in [0, 1): `laws.Noise.uniform`. identity: of the request, a scalar."""
    position = position.to(tl.uint32)
    low = (identity & 0xFFFFFFFF).to(tl.uint32) + position * 0
    high = ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32) + position * 0
    x0, x1, _x2, _x3 = tl.philox(seed, position, low, high, high * 0)
    return ((x0 >> 5).to(tl.float64) * 67108864.0 + (x1 >> 6).to(tl.float64)) / 9007199254740992.0


@triton.jit
def gumbel_tile(seed, identity, position, tile, BLOCK: tl.constexpr):  # noqa: ANN201  # Triton's language
    """The Gumbel noise of a position for ids tile * BLOCK on, [BLOCK] float32: `laws.Noise.gumbel`."""
    counter = tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    place = counter.to(tl.uint32) * 0 + position.to(tl.uint32)
    low = (identity & 0xFFFFFFFF).to(tl.uint32) + place * 0
    high = ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32) + place * 0
    x0, x1, x2, x3 = tl.philox(seed, place, low, high, counter.to(tl.uint32) | 0x40000000)
    return _gumbel_of(tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3)))


@triton.jit
def _gumbel_of(word):
    """`laws.noise.gumbel_of`: log1p is made of log, exact where 1 - w was rounded."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    left = 1.0 - w
    lost = 1.0 - left
    return -tl.log(tl.where(lost > 0, -tl.log(left) * (w / tl.where(lost > 0, lost, 1.0)), w))


@triton.jit
def _peaks_kernel(
    LOGITS, PEAKS, IDS, SUMS, TEMPERATURE, KINDS, SEEDS, REQUESTS, POSITIONS, NOISE, CUTS, LASTS, R, V, TILES,
    STEPS: tl.constexpr, BLOCK: tl.constexpr, SAMPLED: tl.constexpr, RACED: tl.constexpr, CUT: tl.constexpr,
    SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Largest logit of a tile, its lowest id, and (if sampled) the sum of exp((logit - largest) / temperature).

    RACED: where the request's tokens are decided by Gumbel noise, logit / temperature + noise stands for the logit.
    STEPS: how many positions from the root's on NOISE has been made for; 0: it is made here.
    CUT: rows may be truncated.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    request = row // R
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    enter_kernel(PDL)
    logits = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=float("-inf")).to(tl.float32)
    if CUT:
        logits = tl.where(kept(logits, at, tl.load(CUTS + row), tl.load(LASTS + row), SHIFT), logits, float("-inf"))
    looked_up = True
    if RACED:
        looked_up = tl.load(KINDS + request) == 0
        if not looked_up:
            position = tl.load(POSITIONS + row)
            if STEPS > 0:
                step = position - tl.load(POSITIONS + request * R)
                noise = tl.load(NOISE + (request * STEPS + step) * V + at, mask=inside, other=0.0)
            else:
                noise = gumbel_tile(tl.load(SEEDS + request), tl.load(REQUESTS + request), position + 1, tile, BLOCK)
            logits = logits / tl.load(TEMPERATURE + request) + noise
    peak = tl.max(logits, 0)
    tl.store(PEAKS + row * TILES + tile, peak)
    tl.store(IDS + row * TILES + tile, tl.min(tl.where((logits == peak) & inside, at, V), 0))
    if SAMPLED:
        heat = tl.load(TEMPERATURE + request)
        if (heat > 0) & looked_up:
            weight = tl.exp(logits / heat - peak / heat)
            tl.store(SUMS + row * TILES + tile, tl.sum(tl.where(inside, weight, 0.0).to(tl.float64), 0))


@triton.jit
def _choose_kernel(
    LOGITS, PEAKS, IDS, SUMS, TEMPERATURE, KINDS, SEEDS, REQUESTS, POSITIONS, CUTS, LASTS, CHOSEN, ARRIVED,
    TOKENS, PARENTS, ALL_POSITIONS, LENGTHS, EMITTED, PATH, COUNTS, STARTS, ROOM, TURN, RESULTS, R, TOTAL, V, TILES,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SAMPLED: tl.constexpr, RACED: tl.constexpr,
    CUT: tl.constexpr, SHIFT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The token of the path at one row: arg-max, or the draw with the number of the position behind the row's.

    The last program of a request to come here walks its tree.
    """
    row = tl.program_id(0)
    enter_kernel(PDL)
    tiles = tl.arange(0, WIDTH)
    there = tiles < TILES
    peaks = tl.load(PEAKS + row * TILES + tiles, mask=there, other=float("-inf"))
    peak = tl.max(peaks, 0)
    ids = tl.load(IDS + row * TILES + tiles, mask=there, other=V)
    chosen = tl.min(tl.where(peaks == peak, ids, V), 0).to(tl.int64)
    chosen = tl.where(chosen < V, chosen, -1)  # NaN: no largest
    request = row // R
    looked_up = True
    if RACED:
        looked_up = tl.load(KINDS + request) == 0
        chosen = tl.where(looked_up | (peak > float("-inf")), chosen, -1)
    if SAMPLED:
        heat = tl.load(TEMPERATURE + request)
        if (heat > 0) & looked_up:
            lift = tl.exp(peaks / heat - peak / heat).to(tl.float64)
            sums = tl.load(SUMS + row * TILES + tiles, mask=there, other=0.0)
            sums = tl.where(there & (lift > 0), sums * lift, 0.0)
            total = tl.sum(sums, 0)
            goal = (
                path_number(tl.load(SEEDS + request), tl.load(REQUESTS + request), tl.load(POSITIONS + row) + 1) * total
            )
            reached = tl.cumsum(sums, 0)
            tile = tl.min(tl.where((reached > goal) & there, tiles, WIDTH), 0)
            tile = tl.where(tile < WIDTH, tile, tl.max(tl.where(sums > 0, tiles, 0), 0))
            before = tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
            factor = tl.sum(tl.where(tiles == tile, lift, 0.0), 0)
            height = tl.max(tl.where(tiles == tile, peaks, float("-inf")), 0)
            at = tile * BLOCK + tl.arange(0, BLOCK)
            inside = at < V
            logits = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=float("-inf")).to(tl.float32)
            if CUT:
                stays = kept(logits, at, tl.load(CUTS + row), tl.load(LASTS + row), SHIFT)
                logits = tl.where(stays, logits, float("-inf"))
            weight = tl.where(inside, tl.exp(logits / heat - height / heat), 0.0).to(tl.float64) * factor
            within = before + tl.cumsum(weight, 0)
            first = tl.min(tl.where((within > goal) & (weight > 0), at, V), 0)
            last = tl.max(tl.where(weight > 0, at, -1), 0)
            drawn = tl.where(first < V, first, last).to(tl.int64)
            chosen = tl.where(total > 0, drawn, -1)
            chosen = tl.where(total < float("inf"), chosen, -1)
    tl.store(CHOSEN + row, chosen)
    tl.debug_barrier()
    if tl.atomic_add(ARRIVED + request, 1, sem="acq_rel", scope="gpu") == R - 1:
        tl.store(ARRIVED + request, 0)
        _walk(
            TOKENS, PARENTS, POSITIONS, ALL_POSITIONS, LENGTHS, CHOSEN, EMITTED, PATH, COUNTS, STARTS, ROOM, TURN,
            RESULTS, request, R, TOTAL, ROWS,
        )  # fmt: skip


@triton.jit
def _walk(
    TOKENS, PARENTS, POSITIONS, ALL_POSITIONS, LENGTHS, CHOSEN, EMITTED, PATH, COUNTS, STARTS, ROOM, TURN, RESULTS,
    request, R, TOTAL, ROWS: tl.constexpr,
):  # fmt: skip
    """Follow a request's draft as long as it holds the path's token; the last token is the root of the next round.

    Where there was no law (-1) the round under way runs on some token, and the host will refuse its outcome.
    """
    at = tl.arange(0, ROWS)
    inside = at < R
    tokens = tl.load(TOKENS + request * R + at, mask=inside, other=-1)
    parents = tl.load(PARENTS + request * R + at, mask=inside, other=-2)
    positions = tl.load(POSITIONS + request * R + at, mask=inside, other=0)
    chosen = tl.load(CHOSEN + request * R + at, mask=inside, other=-1, cache_modifier=".cg")  # other programs wrote it
    said = tl.zeros([ROWS], tl.int64)
    path = tl.zeros([ROWS], tl.int64)
    token = tl.sum(tl.where(at == 0, chosen, 0), 0)
    node = 0
    last = 0
    count = 0
    while node >= 0:
        last = node
        token = tl.sum(tl.where(at == node, chosen, 0), 0)
        said = tl.where(at == count, token, said)
        path = tl.where(at == count, node, path)
        count += 1
        child = tl.min(tl.where(inside & (parents == node) & (tokens == token), at, ROWS), 0)
        node = tl.where(child < ROWS, child, -1)
    drafted = parents >= 0
    root = tl.sum(tl.where(at == 0, positions, 0), 0)
    nodes = tl.sum(drafted.to(tl.int64), 0)
    deepest = tl.max(tl.where(drafted, positions - root, 0), 0)
    went_on = tl.max((parents == last).to(tl.int64), 0)
    tl.store(PATH + request * R + at, path, mask=inside)
    tl.store(COUNTS + request, count)
    place = tl.load(TURN) * (tl.num_programs(0) // R) + request
    for copy in tl.static_range(2):  # for what follows on the device, and for the host
        out = EMITTED + request * (R + 4) if copy == 0 else RESULTS + place * (R + 4)
        tl.store(out, count)
        tl.store(out + 1 + at, said, mask=inside)
        tl.store(out + R + 1, nodes)
        tl.store(out + R + 2, deepest)
        tl.store(out + R + 3, went_on)
    length = tl.load(LENGTHS + request)
    tl.debug_barrier()  # all has been read of this round
    tl.store(STARTS + request, length)
    tl.store(LENGTHS + request, length + count)
    tl.store(ROOM + request, tl.load(ROOM + request) - count)
    tl.store(TOKENS + request * R, tl.maximum(token, 0))
    tl.store(ALL_POSITIONS + request * TOTAL, length + count)


@triton.jit
def _stamp_kernel(STAMPS, TURN, WHICH: tl.constexpr, TURNS: tl.constexpr, TIMED: tl.constexpr, PDL: tl.constexpr):
    """The device's clock, once all before is done."""
    enter_kernel(PDL)
    turn = tl.load(TURN)
    now = turn * 0
    if TIMED:
        now = tl.extra.cuda.globaltimer()
    tl.store(STAMPS + turn * 3 + WHICH, now)
    if WHICH == 2:
        tl.store(TURN, (turn + 1) % TURNS)


class Chance(NamedTuple):
    """What decides tokens of a batch: numbers looked up in a law, Gumbel noise; neither where all is greedy.

    truncated: by what some law is. history: some law depends on more than logits.
    """

    uniform: bool
    gumbel: bool
    truncated: Cuts = Cuts()
    history: bool = False


class Keys(NamedTuple):
    """Of each request, [B] int64 each: seed and identity (bit patterns), and 1 where Gumbel noise decides."""

    seeds: Tensor
    requests: Tensor
    kinds: Tensor


class Trail(NamedTuple):
    """What walks of a shape leave behind.

    Attributes:
        emitted: [B, R + 4] int64: count; tokens; then nodes drafted, the deepest one's depth, whether the draft went on
            behind the last accepted one. path: [B, R] int64, accepted rows, the root first. counts: [B] int64.
        starts: [B] int64, what was committed before. room: [B] int64, how deep the next draft may be.
        turn: [1] int64, which of the host's places is written. results: [turns, B, R + 4] int64, there: `emitted`.
        stamps: [turns, 3] int64, there: nanoseconds of the device's clock, behind the draft, the pass and the walk.
    """

    emitted: Tensor
    path: Tensor
    counts: Tensor
    starts: Tensor
    room: Tensor
    turn: Tensor
    results: Tensor
    stamps: Tensor

    def copies(self) -> Trail:
        """Copies on the device, for walks that shall leave nothing."""
        device = self.emitted.device
        return Trail(*(t.to(device, copy=True) for t in self))

    def stamp(self, which: int) -> None:
        """Note when what was launched is done: 0 the draft, 1 the pass, 2 the walk, which ends the round."""
        pdl = dependent_launch(self.turn.device)
        _stamp_kernel[(1,)](
            self.stamps, self.turn, WHICH=which, TURNS=self.stamps.shape[0], TIMED=self.turn.is_cuda, PDL=pdl,
            num_warps=1, **launch_options(pdl),
        )  # fmt: skip


EMITTED_EXTRA: Final = 4  # numbers of a row of `emitted` besides its tokens


class Chooser:
    """Room for choosing tokens at M rows of a vocabulary; the choice itself, and the walks behind it."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.tiles = -(-vocabulary // _TILE)
        self.peaks = torch.empty(rows, self.tiles, dtype=torch.float32, device=device)
        self.ids = torch.empty(rows, self.tiles, dtype=torch.int32, device=device)
        self.sums = torch.empty(rows, self.tiles, dtype=torch.float64, device=device)
        self.cutter = Cutter(rows, vocabulary, device)
        self.chosen = torch.empty(rows, dtype=torch.int64, device=device)
        self.arrived = torch.zeros(rows, dtype=torch.int32, device=device)  # rows of a request that have chosen
        self.pdl = dependent_launch(device)

    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        truncation: Truncation,
        keys: Keys,
        positions: Tensor,
        inputs: Inputs,
        trail: Trail,
        *,
        chance: Chance,
        noise: Tensor | None = None,
    ) -> None:
        """Choose the path's token at every row, walk every request's tree, and begin the next round where it ended.

        What was chosen stays in `chosen` [B * R]; -1 where the logits give no law.

        logits: [B, R, V] contiguous; temperature: [B] float32, 0 for greedy; truncation, keys: of the requests;
        positions: [B * R] int64 of the main rows; inputs: the rows, whose roots, lengths and root positions move on;
        trail: written; chance: what may decide a token of these requests; noise: [B, steps, V] float32, the Gumbel
        noise of the positions behind each root and its nodes (`drafts.noise_ahead`), None: made at every row anew.
        """
        batch, rows, vocabulary = logits.shape
        if chance.truncated:
            self.cutter(logits, temperature, truncation, chance.truncated)
        cuts, lasts = self.cutter.cuts, self.cutter.lasts
        options: dict[str, Any] = {
            "BLOCK": _TILE, "SAMPLED": chance.uniform, "RACED": chance.gumbel, "CUT": bool(chance.truncated),
            "SHIFT": shift_of(logits), "PDL": self.pdl, "num_warps": 4, **launch_options(self.pdl),
        }  # fmt: skip
        _peaks_kernel[(batch * rows, self.tiles)](
            logits, self.peaks, self.ids, self.sums, temperature, keys.kinds, keys.seeds, keys.requests, positions,
            noise, cuts, lasts, rows, vocabulary, self.tiles, STEPS=0 if noise is None else noise.shape[1], **options,
        )  # fmt: skip
        _choose_kernel[(batch * rows,)](
            logits, self.peaks, self.ids, self.sums, temperature, keys.kinds, keys.seeds, keys.requests, positions,
            cuts, lasts, self.chosen, self.arrived, inputs.tokens, inputs.parents, inputs.positions, inputs.lengths,
            trail.emitted, trail.path, trail.counts, trail.starts, trail.room, trail.turn, trail.results, rows,
            inputs.rows, vocabulary, self.tiles, WIDTH=triton.next_power_of_2(self.tiles),
            ROWS=triton.next_power_of_2(rows), **options,
        )  # fmt: skip
