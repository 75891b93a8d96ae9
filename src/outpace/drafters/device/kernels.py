"""Kernels of a draft that is made on the device, beside those of `target.fast`.

    collect    what the next draft reads of a round: taps along the accepted path, tokens
    enter      embedding and state of each row side by side, normed, for the block
    expand     the same for the nodes of a depth that are expanded, which it chooses
    top        the output of the last row read, and how many rows are kept now
    tiles      of each piece of the vocabulary: sum of exp, and its best tokens
    births     the best children of each row, with the value of their paths
    keep       of all that was born the most probable nodes, parents renumbered

Each has its definition in `drafters.growth`. Choices between equal values fall on the lower index.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from outpace.target.fast.launch import enter_kernel

_LEAST: tl.constexpr = tl.constexpr(-0x7F800001 << 32)


@triton.jit
def rms(x, GAMMA, at, real, eps, SIZE: tl.constexpr):
    """RMS norm of one row, in float32."""
    gamma = tl.load(GAMMA + at, mask=real, other=0.0).to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps) * gamma


@triton.jit
def _one_of(which, ONE, TWO, THREE, FOUR, at, real):
    """A row from one of four tensors, in float32 (Triton has no conditional expression over pointers)."""
    if which == 0:
        x = tl.load(ONE + at, mask=real, other=0.0).to(tl.float32)
    elif which == 1:
        x = tl.load(TWO + at, mask=real, other=0.0).to(tl.float32)
    elif which == 2:
        x = tl.load(THREE + at, mask=real, other=0.0).to(tl.float32)
    else:
        x = tl.load(FOUR + at, mask=real, other=0.0).to(tl.float32)
    return x


@triton.jit
def collect_kernel(
    TAP0, TAP1, TAP2, TAP3, GAMMA0, GAMMA1, GAMMA2, GAMMA3, PATH, EMITTED, COUNTS, RAW, READY, SQUARES, TOKENS, OWED,
    R, tap_rows, emitted_stride, W, eps,
    TAPS: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, EACH: tl.constexpr, ALL: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """RAW: taps as they are; READY: behind a norm of each tap (EACH), or scaled for a norm over all of them (ALL)."""
    row = tl.program_id(0)
    tap = tl.program_id(1)
    request = row // W
    step = row % W
    enter_kernel(PDL)
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    source = (request * tap_rows + tl.load(PATH + request * R + step)) * SIZE + at
    x = _one_of(tap, TAP0, TAP1, TAP2, TAP3, source, real)
    to = (row * TAPS + tap).to(tl.int64) * SIZE + at
    tl.store(RAW + to, x.to(RAW.dtype.element_ty), mask=real)
    if EACH or ALL:
        gamma = _one_of(tap, GAMMA0, GAMMA1, GAMMA2, GAMMA3, at, real)
        squares = tl.sum(x * x, 0)
        if ALL:
            tl.store(SQUARES + row * TAPS + tap, squares)
            scale = 1.0
        else:
            scale = tl.rsqrt(squares / SIZE + eps)
        tl.store(READY + to, (x * scale * gamma).to(READY.dtype.element_ty), mask=real)
    if tap == 0:
        tl.store(TOKENS + row, tl.maximum(tl.load(EMITTED + request * emitted_stride + step), 0))
        if step == 0:
            tl.store(OWED + request, tl.load(COUNTS + request))


@triton.jit
def _halves(
    EMBED, Y, BOTH, RESIDUAL, NORM_EMBED, NORM_STATE, NORM_OUT, row, token, source, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EMBED_NORMED: tl.constexpr, STATE_NORMED: tl.constexpr,
    OUT_NORMED: tl.constexpr, EMBED_FIRST: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Row `row` of BOTH [M, 2 * SIZE]; KEEP: 1 the state as the residual, 2 the normed one."""
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    kind = BOTH.dtype.element_ty
    embedded = tl.load(EMBED + token.to(tl.int64) * SIZE + at, mask=real, other=0.0).to(tl.float32)
    if EMBED_NORMED:
        embedded = rms(embedded, NORM_EMBED, at, real, eps, SIZE)
    state = tl.load(Y + source.to(tl.int64) * SIZE + at, mask=real, other=0.0).to(tl.float32)
    if OUT_NORMED:
        state = rms(state, NORM_OUT, at, real, eps, SIZE).to(kind).to(tl.float32)
    normed = state
    if STATE_NORMED:
        normed = rms(state, NORM_STATE, at, real, eps, SIZE)
    corner = BOTH + row.to(tl.int64) * 2 * SIZE + at
    if EMBED_FIRST:
        tl.store(corner, embedded.to(kind), mask=real)
        tl.store(corner + SIZE, normed.to(kind), mask=real)
    else:
        tl.store(corner + SIZE, embedded.to(kind), mask=real)
        tl.store(corner, normed.to(kind), mask=real)
    if KEEP == 1:
        tl.store(RESIDUAL + row.to(tl.int64) * SIZE + at, state.to(kind), mask=real)
    if KEEP == 2:
        tl.store(RESIDUAL + row.to(tl.int64) * SIZE + at, normed.to(kind), mask=real)


@triton.jit
def enter_rows_kernel(
    EMBED, Y, BOTH, RESIDUAL, NORM_EMBED, NORM_STATE, NORM_OUT, TOKENS, AT, POSITIONS, W, eps,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EMBED_NORMED: tl.constexpr, STATE_NORMED: tl.constexpr,
    EMBED_FIRST: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """W rows of each request, from position AT on; their states are rows of Y."""
    row = tl.program_id(0)
    enter_kernel(PDL)
    tl.store(POSITIONS + row, tl.load(AT + row // W) + row % W)
    _halves(
        EMBED, Y, BOTH, RESIDUAL, NORM_EMBED, NORM_STATE, NORM_OUT, row, tl.load(TOKENS + row), row, eps,
        SIZE, BLOCK, EMBED_NORMED, STATE_NORMED, False, EMBED_FIRST, KEEP,
    )  # fmt: skip


@triton.jit
def places(base, value, node, COUNT, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """How many of the COUNT values at `base` come before each of them: larger ones, and equal ones in front."""
    place = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, COUNT, STEP):
        index = begin + tl.arange(0, STEP)
        other = tl.load(base + index, mask=index < COUNT, other=float("-inf"))
        before = (other[None, :] == value[:, None]) & (index[None, :] < node[:, None])
        before = (before | (other[None, :] > value[:, None])) & (index < COUNT)[None, :]
        place += tl.sum(before.to(tl.int32), 1)
    return place


@triton.jit
def expand_kernel(
    EMBED, Y, BOTH, RESIDUAL, NORM_EMBED, NORM_STATE, NORM_OUT, BORN_TOKENS, BORN_VALUES, AT, ABOVE,
    VALUES, BIRTHS, POSITIONS, ENTRIES, BITS, born, start, COUNT, depth, eps,
    K: tl.constexpr, WORDS: tl.constexpr, CHOICES: tl.constexpr, STEP: tl.constexpr, FIRST: tl.constexpr,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, EMBED_NORMED: tl.constexpr, STATE_NORMED: tl.constexpr,
    OUT_NORMED: tl.constexpr, EMBED_FIRST: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The K best of COUNT nodes born at one depth, best first; `depth` is theirs. FIRST: children of the root."""
    row = tl.program_id(0)
    request = row // K
    rank = row % K
    enter_kernel(PDL)
    node = tl.arange(0, CHOICES)
    base = BORN_VALUES + request * born + start
    value = tl.load(base + node, mask=node < COUNT, other=float("-inf"))
    place = places(base, value, node, COUNT, CHOICES, STEP)
    pick = tl.min(tl.where((place == rank) & (node < COUNT), node, COUNT - 1), 0)
    token = tl.maximum(tl.load(BORN_TOKENS + request * born + start + pick), 0)
    length = tl.load(AT + request)
    tl.store(VALUES + row, tl.load(base + pick))
    tl.store(BIRTHS + row, start + pick)
    tl.store(POSITIONS + row, length + depth - 1)
    if rank == 0:
        tl.store(ENTRIES + request, length + (depth - 1) * K)
    own = (depth - 1) * K + rank
    slot = request * K + pick // K
    for word in tl.static_range(WORDS):
        bits = tl.where(own >> 5 == word, 1 << (own & 31), 0)
        if not FIRST:
            bits = bits | tl.load(ABOVE + slot * WORDS + word)
        tl.store(BITS + row * WORDS + word, bits)
    source = request if FIRST else slot
    _halves(
        EMBED, Y, BOTH, RESIDUAL, NORM_EMBED, NORM_STATE, NORM_OUT, row, token, source, eps,
        SIZE, BLOCK, EMBED_NORMED, STATE_NORMED, OUT_NORMED, EMBED_FIRST, KEEP,
    )  # fmt: skip


@triton.jit
def top_kernel(
    Y, TOP, SCALED, SQUARES, GAMMA, COUNTS, AT, W,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """TOP: the last row read, where one was; AT moves on. SCALED and SQUARES: for the norm in front of the head."""
    request = tl.program_id(0)
    enter_kernel(PDL)
    at = tl.arange(0, BLOCK)
    real = at < SIZE
    count = tl.load(COUNTS + request)
    length = tl.load(AT + request)
    new = tl.load(Y + (request * W + tl.maximum(count - 1, 0)) * SIZE + at, mask=real, other=0.0)
    old = tl.load(TOP + request * SIZE + at, mask=real, other=0.0)
    top = tl.where(count > 0, new, old.to(new.dtype))
    tl.store(TOP + request * SIZE + at, top.to(TOP.dtype.element_ty), mask=real)
    tl.store(AT + request, length + count)
    if NORMED:
        wide = top.to(tl.float32)
        gamma = tl.load(GAMMA + at, mask=real, other=0.0).to(tl.float32)
        tl.store(SCALED + request * SIZE + at, (wide * gamma).to(SCALED.dtype.element_ty), mask=real)
        tl.store(SQUARES + request, tl.sum(wide * wide, 0))


@triton.jit
def _ranked(value, index):
    """One number for both: of a larger value, and among equal values of a smaller index, it is larger."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # no -0.0
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def _ranked_last(index):
    """`_ranked` of minus infinity."""
    return (0x7FFFFFFF - index).to(tl.int64) + _LEAST


@triton.jit
def _value_of(ranked):
    order = (ranked >> 32).to(tl.int32)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _index_of(ranked):
    return 0x7FFFFFFF - (ranked & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def children_kernel(
    LOGITS, PEAKS, SUMS, BEST, ARRIVED, TEMPERATURE, RACE, LOOKED_UP, U, OFFSETS, VALUES, BIRTHS, BORN_TOKENS,
    BORN_PARENTS, BORN_VALUES, PER, V, TILES, born, start, step, steps, races, coupling,
    K: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    FIRST: tl.constexpr, SAMPLED: tl.constexpr, RACED: tl.constexpr, REDUCED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Of one tile of a row: the largest logit, the sum of exp((logit - largest) / temperature), the K best tokens.

    The last tile of a row to come here makes the row's children of them. RACED: where Gumbel noise RACE[request, step]
    decides, logit / temperature + noise stands for the logit, at temperature one.
    """
    row = tl.program_id(0)
    tile = tl.program_id(1)
    enter_kernel(PDL)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < V
    logits = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=float("-inf")).to(tl.float32)
    heat = 1.0
    if SAMPLED or RACED:
        given = tl.load(LOOKED_UP + row // PER)
        heat = tl.where(given > 0, given, 1.0)
    if RACED:
        hot = tl.load(TEMPERATURE + row // PER)
        if (hot > 0) & (given <= 0):
            place = ((row // PER) * races + step).to(tl.int64) * V
            logits = logits / hot + tl.load(RACE + place + at, mask=inside, other=0.0)
    spot = row * TILES + tile
    ranked = _ranked(logits, at)
    best = tl.max(ranked, 0)
    peak = _value_of(best)
    tl.store(PEAKS + spot, peak)
    tl.store(SUMS + spot, tl.sum(tl.where(inside, tl.exp((logits - peak) / heat), 0.0), 0))
    ranks = tl.arange(0, PLACES)
    kept = tl.zeros([PLACES], tl.int64)
    for rank in tl.static_range(K):
        kept = tl.where(ranks == rank, best, kept)
        if rank + 1 < K:
            ranked = tl.where(ranked == best, _ranked_last(_index_of(best)), ranked)
            best = tl.max(ranked, 0)
    tl.store(BEST + spot * K + ranks, kept, mask=ranks < K)
    tl.debug_barrier()
    if tl.atomic_add(ARRIVED + row, 1, sem="acq_rel", scope="gpu") == TILES - 1:
        tl.store(ARRIVED + row, 0)
        _births(
            LOGITS, PEAKS, SUMS, BEST, LOOKED_UP, U, OFFSETS, VALUES, BIRTHS, BORN_TOKENS, BORN_PARENTS, BORN_VALUES,
            row, PER, V, TILES, born, start, step, steps, coupling, K, PLACES, BLOCK, WIDTH, CHOICES, FIRST, SAMPLED,
            REDUCED,
        )  # fmt: skip


@triton.jit
def _births(
    LOGITS, PEAKS, SUMS, BEST, LOOKED_UP, U, OFFSETS, VALUES, BIRTHS, BORN_TOKENS, BORN_PARENTS, BORN_VALUES,
    row, PER, V, TILES, born, start, step, steps, coupling,
    K: tl.constexpr, PLACES: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, CHOICES: tl.constexpr,
    FIRST: tl.constexpr, SAMPLED: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    """The K best children of one row, best first, at births `start + K * (row of the request)` on.

    SAMPLED: where a number is looked up, the token that the row's law gives at U[request, step] counts as `coupling`
    more probable; it has a place of its own among the choices, behind those of the tiles.
    """
    request = row // PER
    tiles = tl.arange(0, WIDTH)
    there = tiles < TILES  # what other programs wrote is read past the first cache
    peaks = tl.load(PEAKS + row * TILES + tiles, mask=there, other=float("-inf"), cache_modifier=".cg")
    sums = tl.load(SUMS + row * TILES + tiles, mask=there, other=0.0, cache_modifier=".cg")
    choice = tl.arange(0, CHOICES)
    listed = choice < TILES * K
    best = tl.load(BEST + row * TILES * K + choice, mask=listed, other=0, cache_modifier=".cg")
    ids = tl.where(listed, _index_of(best), V)
    peak = tl.max(peaks, 0)
    heat = 1.0
    if SAMPLED:
        given = tl.load(LOOKED_UP + request)
        heat = tl.where(given > 0, given, 1.0)
    sums = tl.where(there, sums * tl.exp((peaks - peak) / heat), 0.0)
    total = tl.sum(sums, 0)
    mass = tl.log(total)
    score = tl.where(listed, (_value_of(best) - peak) / heat - mass, float("-inf"))
    if SAMPLED:
        goal = tl.load(U + request * steps + step) * total
        reached = tl.cumsum(sums, 0)
        tile = tl.min(tl.where((reached > goal) & there, tiles, TILES - 1), 0)
        below = tl.sum(tl.where(tiles < tile, sums, 0.0), 0)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < V
        logits = tl.load(LOGITS + row.to(tl.int64) * V + at, mask=inside, other=float("-inf")).to(tl.float32)
        within = below + tl.cumsum(tl.where(inside, tl.exp((logits - peak) / heat), 0.0), 0)
        drawn = tl.min(tl.where((within > goal) & inside, at, V - 1), 0)
        drawn = tl.where(given > 0, drawn, -1)
        share = tl.where(given > 0, coupling, 0.0)
        own = tl.exp(tl.max(tl.where(at == drawn, logits - peak, float("-inf")), 0) / heat - mass)
        lifted = tl.log((1.0 - share) * own + share)
        score = score + tl.log(1.0 - share)
        score = tl.where(ids == drawn, float("-inf"), score)
        extra = choice == tl.where(given > 0, TILES * K, CHOICES)
        score = tl.where(extra, lifted, score)
        ids = tl.where(extra, drawn, ids)
    value = 0.0
    parent = -1
    if not FIRST:
        value = tl.load(VALUES + row)
        parent = tl.load(BIRTHS + row)
    spot = request * born + start + (row % PER) * K
    ranked = _ranked(score, ids)
    ranks = tl.arange(0, PLACES)
    kept = tl.zeros([PLACES], tl.int64)
    for rank in tl.static_range(K):
        first = tl.max(ranked, 0)
        kept = tl.where(ranks == rank, first, kept)
        ranked = tl.where(ranked == first, _ranked_last(ids), ranked)
    real = ranks < K
    highest, chosen = _value_of(kept), _index_of(kept)
    known = real & (chosen < V) & (highest == highest)  # not NaN
    token = chosen.to(tl.int64)
    if REDUCED:
        token += tl.load(OFFSETS + chosen, mask=known, other=0)
    tl.store(BORN_TOKENS + spot + ranks, tl.where(known, token, -1), mask=real)
    tl.store(BORN_VALUES + spot + ranks, value + tl.minimum(highest, 0.0), mask=real)
    tl.store(BORN_PARENTS + spot + ranks, tl.zeros([PLACES], tl.int32) + parent, mask=real)


@triton.jit
def keep_kernel(
    BORN_TOKENS, BORN_PARENTS, BORN_VALUES, AT, NUMBERS, TOKENS, PARENTS, VALUES, born, COUNT,
    BLOCK: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The COUNT nodes of most value in order of birth; -1 for tokens of a request that nothing was read of."""
    request = tl.program_id(0)
    enter_kernel(PDL)
    node = tl.arange(0, BLOCK)
    real = node < born
    base = request * born
    value = tl.load(BORN_VALUES + base + node, mask=real, other=float("-inf"))
    keep = real & (places(BORN_VALUES + base, value, node, born, BLOCK, STEP) < COUNT)
    number = tl.cumsum(keep.to(tl.int32), 0) - 1
    keep = keep & (number < COUNT)
    tl.store(NUMBERS + base + node, number, mask=keep)
    tl.debug_barrier()  # numbers of parents are read by other threads
    parent = tl.load(BORN_PARENTS + base + node, mask=keep, other=-1)
    up = tl.load(NUMBERS + base + parent, mask=keep & (parent >= 0), other=-1)
    token = tl.load(BORN_TOKENS + base + node, mask=keep, other=-1)
    token = tl.where(tl.load(AT + request) > 0, token, -1)
    tl.store(TOKENS + request * COUNT + number, token, mask=keep)
    tl.store(VALUES + request * COUNT + number, value, mask=keep)
    tl.store(PARENTS + request * COUNT + number, up.to(tl.int64), mask=keep)
