"""The step of many parameters in one launch: every stored byte is read once and written once, with no fp32 temporary.

A program takes one chunk of one parameter, tile by tile: G groups of 32 neighbours, 16 elements a thread. Tables in
device memory say which parameter a chunk belongs to and where its parts are (`launch`).

Nearly every tile is free of elements that must be held (a gradient that is not finite, say). So it is only asked
whether the largest result of the tile is in bounds; if not, its old values are read again and kept where needed.

It is never autotuned: a trial run would apply the update.
"""

# Triton's language is its own: arguments have no Python types, and constants are written in capitals.
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806, SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from outpace.optim.draws import SCALES as SCALES_STREAM
from outpace.optim.fused.arithmetic import mixed, reciprocal, root, square, widen, worse
from outpace.optim.fused.codes import (
    decode_momentum,
    decode_root,
    decode_weight,
    encode_momentum,
    encode_root,
    encode_weight,
    scale_draws,
)
from outpace.optim.rules import LARGEST_STATE, LIFT
from outpace.optim.settings import GROUP

COLUMNS = 12  # of the table: seven addresses, groups, groups per row, columns per row, key, first slot

_G: tl.constexpr = tl.constexpr(GROUP)
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)
_LARGEST: tl.constexpr = tl.constexpr(LARGEST_STATE)
_LIFT: tl.constexpr = tl.constexpr(LIFT)
_DROP: tl.constexpr = tl.constexpr(1.0 / LIFT)
_HALF_LIFT: tl.constexpr = tl.constexpr(LIFT**0.5)
_SCALES: tl.constexpr = tl.constexpr(SCALES_STREAM)


@triton.jit
def _address(row, COLUMN: tl.constexpr, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A pointer from the table. KIND: 0 float32, 1 the int16 pattern of bf16, 2 fp16, 8 int8, 9 uint8, 16 int16."""
    number = tl.load(row + COLUMN)
    if KIND == 0:
        pointer = number.to(tl.pointer_type(tl.float32))
    elif KIND == 1 or KIND == 16:  # Triton has no `in`
        pointer = number.to(tl.pointer_type(tl.int16))
    elif KIND == 2:
        pointer = number.to(tl.pointer_type(tl.float16))
    elif KIND == 8:
        pointer = number.to(tl.pointer_type(tl.int8))
    else:
        pointer = number.to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _read_weight(
    weight, residual, off, mask, KIND: tl.constexpr, MASTER: tl.constexpr, BITS: tl.constexpr, EXACT: tl.constexpr
):
    """(narrow weight, residual, the float32 weight)."""
    stored = tl.load(weight + off, mask=mask, other=0)
    code = stored
    if MASTER != 0:
        code = tl.load(residual + off, mask=mask, other=0)
    return stored, code, decode_weight(stored, code, KIND, MASTER, BITS, EXACT)


@triton.jit
def _read_moments(
    first,
    first_scale,
    second,
    second_scale,
    off,
    gid,
    mask,
    gmask,
    theta,
    RULE: tl.constexpr,
    FIRST: tl.constexpr,
    CODED: tl.constexpr,
    SCALES: tl.constexpr,
    EXACT: tl.constexpr,
):
    """(first moment, what stands for the second: its root, lifted, where it is kept as a root); theta if none."""
    m = theta
    if FIRST:
        m = tl.load(first + off, mask=mask, other=0)
        if CODED != 0:
            s = widen(tl.load(first_scale + gid, mask=gmask, other=0), SCALES, True)
            m = decode_momentum(m, s, CODED, SCALES, EXACT)
    r = theta
    if RULE == 0:
        r = tl.load(second + off, mask=mask, other=0)
        if CODED != 0:
            s = widen(tl.load(second_scale + gid, mask=gmask, other=0), SCALES, True)
            r = decode_root(r, s, CODED == 1, SCALES, EXACT)
    return m, r


@triton.jit(do_not_specialize=["step_key"])
def step_kernel(
    table_ptr,  # int64 [parameters, COLUMNS]
    chunk_ptr,  # int32 [chunks, 2]: which parameter, first group
    held_ptr,
    clip_ptr,
    step_key,
    decay,
    step,
    beta1,
    rest1,
    beta2,
    rest2,
    correction,
    eps,
    coupled,
    RULE: tl.constexpr,  # 0 AdamW, 1 Lion, 2 SGD
    NESTEROV: tl.constexpr,
    FIRST: tl.constexpr,  # there is a first moment
    KIND: tl.constexpr,  # of the weight: 0 fp32, 1 bf16, 2 fp16
    GRAD: tl.constexpr,  # of the gradient, likewise
    MASTER: tl.constexpr,  # 0 the weight itself, 1 ulp residual, 2 ordinal residual, 3 fp32 master
    BITS: tl.constexpr,  # of the residual
    STOCHASTIC: tl.constexpr,
    CODED: tl.constexpr,  # moments: 0 fp32, 1 companded, 2 linear
    SCALES: tl.constexpr,  # 0 fp32, 1 bf16, 2 fp16 as published
    FLOOR: tl.constexpr,
    ALIGNED: tl.constexpr,  # groups follow each other without gaps, at addresses that 16 divides
    CLIP: tl.constexpr,
    LARGEST: tl.constexpr,  # number of the weight's dtype
    EXACT: tl.constexpr,
    G: tl.constexpr,  # groups in a tile
    TILES: tl.constexpr,  # in a chunk
    STAGES: tl.constexpr,  # tiles on their way while one is computed, and that one
):
    """See above; the numbers are those of `rules.Numbers`, correction the reciprocal root of AdamW's bias."""
    program = tl.program_id(0)
    row = table_ptr + tl.load(chunk_ptr + 2 * program).to(tl.int64) * _COLUMNS
    begin = tl.load(chunk_ptr + 2 * program + 1)
    groups = tl.load(row + 7).to(tl.int32)
    per_row = tl.load(row + 8)
    cols = tl.load(row + 9)
    key = mixed(tl.load(row + 10).to(tl.int32) ^ step_key).to(tl.int32, bitcast=True)
    first_slot = tl.load(row + 11)

    RESIDUAL: tl.constexpr = 0 if MASTER == 3 else BITS
    weight = _address(row, 0, KIND, ALIGNED)
    residual = _address(row, 2, RESIDUAL, ALIGNED)
    grad = _address(row, 1, GRAD, ALIGNED)
    first = _address(row, 3, 0 if CODED == 0 else 8, ALIGNED)
    first_scale = _address(row, 4, SCALES, False)
    second = _address(row, 5, 0 if CODED == 0 else 9, ALIGNED)
    second_scale = _address(row, 6, SCALES, False)
    local = tl.arange(0, G)
    lane = tl.arange(0, _G)[None, :]
    if CLIP:
        clip = tl.load(clip_ptr)

    if ALIGNED:  # offsets stay small: the pointers move
        start = begin.to(tl.int64) * _G
        weight += start
        residual += start
        grad += start
        first += start
        second += start
        first_scale += begin
        second_scale += begin
        first_group = (first_slot // _G).to(tl.int32) + begin

    for tile in tl.range(0, tl.minimum(TILES, tl.cdiv(groups - begin, G)), num_stages=STAGES):
        if ALIGNED:
            gid = tile * G + local
            gmask = gid < groups - begin
            off = gid[:, None] * _G + lane
            mask = tl.broadcast_to(gmask[:, None], [G, _G])
            group = first_group + gid
            place = lane
        else:
            gid = begin.to(tl.int64) + tile * G + local
            gmask = gid < groups
            line = gid // per_row
            column = (gid - line * per_row)[:, None] * _G + lane
            off = line[:, None] * cols + column
            mask = gmask[:, None] & (column < cols)
            group = (first_slot // _G + gid).to(tl.int32)
            place = lane + (first_slot % _G).to(tl.int32)

        # decode
        g = widen(tl.load(grad + off, mask=mask, other=0), GRAD, EXACT)
        stored, code, theta = _read_weight(weight, residual, off, mask, KIND, MASTER, BITS, EXACT)
        m, r = _read_moments(
            first, first_scale, second, second_scale, off, gid, mask, gmask, theta, RULE, FIRST, CODED, SCALES, EXACT
        )
        if CLIP:
            g = g * clip

        # ordinary update; see `rules`
        new_m = m
        new_r = r
        watched = g
        if RULE == 0:
            new_m = m * beta1 + g * rest1
            x = r * r if CODED == 1 else r * _LIFT
            x = x * beta2 + square(g, EXACT) * (rest2 * _LIFT)
            watched = root(x, EXACT or CODED == 0)
            new_r = watched if CODED == 1 else x * _DROP
            new_theta = theta * decay - new_m * reciprocal(watched * correction + eps, EXACT) * step
        if RULE == 1:
            direction = m * beta1 + g * rest1
            direction = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
            new_theta = theta * decay - direction * step
            new_m = m * beta2 + g * rest2
            watched = new_m
        if RULE == 2:
            d = g + theta * coupled
            if FIRST:
                new_m = m * beta1 + d * rest1
                watched = new_m
                d = d + new_m * beta1 if NESTEROV else new_m
            new_theta = theta * decay - d * step

        # hold what is out of bounds
        BOUND: tl.constexpr = _LARGEST * _HALF_LIFT if RULE == 0 else _LARGEST
        top = tl.reduce(tl.abs(watched), 1, worse)
        top_theta = tl.reduce(tl.abs(new_theta), 1, worse)
        held = tl.max(tl.where((top <= BOUND) & (top_theta <= LARGEST), 0, 1), axis=0) > 0
        largest_m = tl.max(tl.abs(new_m), axis=1) if RULE == 0 else top
        largest_r = top if CODED == 1 else tl.max(new_r, axis=1)
        fine = mask
        if held:
            fine = (tl.abs(watched) <= BOUND) & (tl.abs(new_theta) <= LARGEST)
            old, old_code, old_theta = _read_weight(weight, residual, off, mask, KIND, MASTER, BITS, EXACT)
            old_m, old_r = _read_moments(
                first,
                first_scale,
                second,
                second_scale,
                off,
                gid,
                mask,
                gmask,
                old_theta,
                RULE,
                FIRST,
                CODED,
                SCALES,
                EXACT,
            )
            new_theta = tl.where(fine, new_theta, old_theta)
            new_m = tl.where(fine, new_m, old_m)
            new_r = tl.where(fine, new_r, old_r)
            largest_m = tl.max(tl.abs(new_m), axis=1)
            largest_r = tl.max(new_r, axis=1)
            tl.store(held_ptr, 1)

        # encode
        new_stored, new_code = encode_weight(new_theta, group, place, key, KIND, MASTER, BITS, STOCHASTIC, EXACT)
        if (
            MASTER == 1 and STOCHASTIC
        ):  # what did not move is not rounded anew; with an ordinal residual that changes nothing
            moved = new_theta != theta
            new_stored = tl.where(moved, new_stored, stored)
            new_code = tl.where(moved, new_code, code)
        if MASTER == 1 or MASTER == 3:
            if held:  # encoding what was decoded need not give the same bits
                old, old_code, old_theta = _read_weight(weight, residual, off, mask, KIND, MASTER, BITS, EXACT)
                new_stored = tl.where(fine, new_stored, old)
                new_code = tl.where(fine, new_code, old_code)
        tl.store(weight + off, new_stored, mask=mask)
        if MASTER != 0:
            tl.store(residual + off, new_code, mask=mask)
        if FIRST or RULE == 0:
            first_draw, second_draw = scale_draws(group, key ^ _SCALES)
        if FIRST:
            if CODED == 0:
                tl.store(first + off, new_m, mask=mask)
            else:
                codes, kept = encode_momentum(new_m, largest_m, first_draw, CODED, SCALES, STOCHASTIC, EXACT)
                tl.store(first + off, codes, mask=mask)
                tl.store(first_scale + gid, kept, mask=gmask)
        if RULE == 0:
            if CODED == 0:
                tl.store(second + off, new_r, mask=mask)
            else:
                codes, kept = encode_root(new_r, largest_r, second_draw, CODED == 1, FLOOR, SCALES, STOCHASTIC, EXACT)
                tl.store(second + off, codes, mask=mask)
                tl.store(second_scale + gid, kept, mask=gmask)
