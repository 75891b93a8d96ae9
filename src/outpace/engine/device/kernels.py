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

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
import triton
import triton.language as tl

from outpace.engine.device.truncation import Cutter, Truncation, kept, shift_of

if TYPE_CHECKING:
    from torch import Tensor

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
def gumbel_words(seed, identity, position, counter):  # noqa: ANN201  # Triton's language
    """The four words behind the Gumbel noise of ids 4 * counter to 4 * counter + 3: `laws.Noise.gumbel`."""
    place = counter.to(tl.uint32) * 0 + position.to(tl.uint32)
    low = (identity & 0xFFFFFFFF).to(tl.uint32) + place * 0
    high = ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32) + place * 0
    return tl.philox(seed, place, low, high, counter.to(tl.uint32) | 0x40000000)


@triton.jit
def gumbel_of(word):  # noqa: ANN201  # Triton's language
    """`laws.noise.gumbel_of`: log1p is made of log, exact where 1 - w was rounded."""
    w = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    left = 1.0 - w
    lost = 1.0 - left
    return -tl.log(tl.where(lost > 0, -tl.log(left) * (w / tl.where(lost > 0, lost, 1.0)), w))


@triton.jit
def _peaks_kernel(
    LOGITS, PEAKS, IDS, SUMS, TEMPERATURE, KINDS, SEEDS, REQUESTS, POSITIONS, CUTS, LASTS, R, V, TILES,
    BLOCK: tl.constexpr, SAMPLED: tl.constexpr, RACED: tl.constexpr, CUT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Largest logit of a tile, its lowest id, and (if sampled) the sum of exp((logit - largest) / temperature).

    RACED: where the request's tokens are decided by Gumbel noise, logit / temperature + noise stands for the logit.
    CUT: rows may be truncated.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    request = row // R
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    logits = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=float("-inf")).to(tl.float32)
    if CUT:
        logits = tl.where(kept(logits, at, tl.load(CUTS + row), tl.load(LASTS + row), SHIFT), logits, float("-inf"))
    looked_up = True
    if RACED:
        looked_up = tl.load(KINDS + request) == 0
        if not looked_up:
            x0, x1, x2, x3 = gumbel_words(
                tl.load(SEEDS + request), tl.load(REQUESTS + request), tl.load(POSITIONS + row) + 1,
                tile * (BLOCK // 4) + tl.arange(0, BLOCK // 4),
            )  # fmt: skip
            words = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
            logits = logits / tl.load(TEMPERATURE + request) + gumbel_of(words)
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
    LOGITS, PEAKS, IDS, SUMS, TEMPERATURE, KINDS, SEEDS, REQUESTS, POSITIONS, CUTS, LASTS, CHOSEN, R, V, TILES,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, SAMPLED: tl.constexpr, RACED: tl.constexpr, CUT: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The token of the path at one row: arg-max, or the draw with the number of the position behind the row's."""
    row = tl.program_id(0)
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


@triton.jit
def _walk_kernel(TOKENS, PARENTS, POSITIONS, CHOSEN, EMITTED, PATH, COUNTS, R, WIDTH, BLOCK: tl.constexpr):
    """Follow the draft as long as it holds the path's token. EMITTED row: count, tokens, then what the draft was."""
    request = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    inside = at < R
    tokens = tl.load(TOKENS + request * R + at, mask=inside, other=-1)
    parents = tl.load(PARENTS + request * R + at, mask=inside, other=-2)
    positions = tl.load(POSITIONS + request * R + at, mask=inside, other=0)
    out = EMITTED + request * WIDTH
    node = 0
    last = 0
    count = 0
    while node >= 0:
        last = node
        token = tl.load(CHOSEN + request * R + node)
        tl.store(out + 1 + count, token)
        tl.store(PATH + request * R + count, node)
        count += 1
        child = tl.min(tl.where(inside & (parents == node) & (tokens == token), at, BLOCK), 0)
        node = tl.where(child < BLOCK, child, -1)
    tl.store(out, count)
    tl.store(COUNTS + request, count)
    drafted = parents >= 0
    tl.store(out + R + 1, tl.sum(drafted.to(tl.int64), 0))
    tl.store(out + R + 2, tl.max(tl.where(drafted, positions - tl.load(POSITIONS + request * R), 0), 0))
    tl.store(out + R + 3, tl.max((parents == last).to(tl.int64), 0))


@triton.jit
def _advance_kernel(EMITTED, COUNTS, ROOM, TOKENS, POSITIONS, LENGTHS, R, TOTAL, WIDTH):
    """Make the last emitted token the root of the next round: TOKENS [B, R] column 0, lengths and root positions.

    Where there was no law (-1) the round under way runs on some token, and the host will refuse its outcome.
    """
    request = tl.program_id(0)
    count = tl.load(COUNTS + request)
    length = tl.load(LENGTHS + request) + count
    tl.store(LENGTHS + request, length)
    tl.store(ROOM + request, tl.load(ROOM + request) - count)
    tl.store(TOKENS + request * R, tl.maximum(tl.load(EMITTED + request * WIDTH + count), 0))
    tl.store(POSITIONS + request * TOTAL, length)


class Chance(NamedTuple):
    """What decides tokens of a batch: numbers looked up in a law, Gumbel noise; neither where all is greedy.

    truncated: some law is. history: some law depends on more than logits.
    """

    uniform: bool
    gumbel: bool
    truncated: bool = False
    history: bool = False


class Keys(NamedTuple):
    """Of each request, [B] int64 each: seed and identity (bit patterns), and 1 where Gumbel noise decides."""

    seeds: Tensor
    requests: Tensor
    kinds: Tensor


class Chooser:
    """Room for choosing tokens at M rows of a vocabulary, and the choice itself."""

    def __init__(self, rows: int, vocabulary: int, device: torch.device) -> None:
        self.tiles = -(-vocabulary // _TILE)
        self.peaks = torch.empty(rows, self.tiles, dtype=torch.float32, device=device)
        self.ids = torch.empty(rows, self.tiles, dtype=torch.int32, device=device)
        self.sums = torch.empty(rows, self.tiles, dtype=torch.float64, device=device)
        self.cutter = Cutter(rows, vocabulary, device)
        self.chosen = torch.empty(rows, dtype=torch.int64, device=device)

    def __call__(
        self,
        logits: Tensor,
        temperature: Tensor,
        truncation: Truncation,
        keys: Keys,
        positions: Tensor,
        *,
        chance: Chance,
    ) -> Tensor:
        """Tokens [B * R] of the path at every row; -1 where the logits give no law.

        logits: [B, R, V] contiguous; temperature: [B] float32, 0 for greedy; truncation, keys: of the requests;
        positions: [B * R] int64 of the rows; chance: what may decide a token of these requests.
        """
        batch, rows, vocabulary = logits.shape
        grid = (batch * rows, self.tiles)
        if chance.truncated:
            self.cutter(logits, temperature, truncation)
        cuts, lasts = self.cutter.cuts, self.cutter.lasts
        _peaks_kernel[grid](
            logits, self.peaks, self.ids, self.sums, temperature, keys.kinds, keys.seeds, keys.requests, positions,
            cuts, lasts, rows, vocabulary, self.tiles, BLOCK=_TILE, SAMPLED=chance.uniform,
            RACED=chance.gumbel, CUT=chance.truncated, SHIFT=shift_of(logits), num_warps=4,
        )  # fmt: skip
        _choose_kernel[(batch * rows,)](
            logits, self.peaks, self.ids, self.sums, temperature, keys.kinds, keys.seeds, keys.requests, positions,
            cuts, lasts, self.chosen, rows, vocabulary, self.tiles, BLOCK=_TILE,
            WIDTH=triton.next_power_of_2(self.tiles), SAMPLED=chance.uniform, RACED=chance.gumbel,
            CUT=chance.truncated, SHIFT=shift_of(logits), num_warps=4,
        )  # fmt: skip
        return self.chosen


EMITTED_EXTRA: Final = 4  # numbers of a row of `emitted` besides its tokens


def walk(
    tokens: Tensor, parents: Tensor, positions: Tensor, chosen: Tensor, emitted: Tensor, path: Tensor, counts: Tensor
) -> None:
    """Walk every request's tree.

    tokens, parents: [B, R] int64, column 0 the root, parents as rows (-2 for padding and the root); positions, chosen:
    [B * R] int64.
    Written: emitted [B, R + 4] (count; tokens; then nodes drafted, the deepest one's depth, whether the draft went on
    behind the last accepted one), path [B, R] (accepted rows, the root first), counts [B].
    """
    batch, rows = tokens.shape
    _walk_kernel[(batch,)](
        tokens, parents, positions, chosen, emitted, path, counts, rows, emitted.shape[1],
        BLOCK=triton.next_power_of_2(rows), num_warps=1,
    )  # fmt: skip


def advance(emitted: Tensor, counts: Tensor, room: Tensor, tokens: Tensor, positions: Tensor, lengths: Tensor) -> None:
    """Begin the next round where this one ended (see the kernel); for rounds of one row, or before a draft is laid.

    room: [B] int64, how deep the next draft may be, less what was emitted; positions: of all rows, scouts too.
    """
    batch, rows = tokens.shape
    _advance_kernel[(batch,)](
        emitted, counts, room, tokens, positions, lengths, rows, positions.shape[0] // batch, emitted.shape[1],
        num_warps=1,
    )  # fmt: skip
