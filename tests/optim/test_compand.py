"""8-bit states: properties of the codes, the scales and the groups."""

import numpy as np
import pytest
import torch

from outpace.optim.compand import (
    SMALLEST_SCALE,
    decode_momentum,
    decode_variance,
    encode_momentum,
    encode_variance,
    exact_ratio,
    exact_sqrt,
)
from outpace.optim.draws import draw_key, parameter_key, scale_draws, step_key
from outpace.optim.transfer import from_groups, to_groups

SCALES = ("bf16", "fp32", "fp16")


def spread(rows=500, seed=0):
    """Groups whose magnitudes differ by many orders, between and within."""
    torch.manual_seed(seed)
    return torch.randn(rows, 32) * torch.exp(2 * torch.randn(rows, 32)) * torch.exp(3 * torch.randn(rows, 1))


@pytest.mark.parametrize("states", ["companded8", "linear8"])
@pytest.mark.parametrize("scales", SCALES)
def test_zero_stays_zero_and_signs_stay(states, scales):
    zero = torch.zeros(3, 32)
    assert (decode_momentum(*encode_momentum(zero, states, scales), states) == 0).all()
    assert (decode_variance(*encode_variance(zero, states, scales, True), states) == 0).all()
    m = spread()
    code, scale = encode_momentum(m, states, scales)
    back = decode_momentum(code, scale, states)
    assert (back * m >= 0).all()
    assert code.min() >= -127
    if scales != "fp16":  # as published, the scale may be rounded below the largest element
        slack = 1 + 2.0**-23 if scales == "fp32" else 1.0  # 127 times a full fp32 scale has to be rounded
        assert (back.abs() <= scale.float()[:, None] * slack).all()
        assert ((scale.float() / m.abs().amax(-1) - 1).abs() <= 2.0**-8).all()


@pytest.mark.parametrize("states", ["companded8", "linear8"])
def test_encoding_again_changes_nothing_where_a_code_is_full(states):
    """For every bf16 scale mantissa and every code: decoding and encoding gives the same code and the same scale."""
    scale = (torch.arange(128, dtype=torch.int32) * 65536 + (127 << 23)).view(torch.float32).bfloat16()
    codes = torch.arange(-127, 128)
    for start in range(-127, 128, 31):
        part = codes[codes >= start][:31].to(torch.int8)
        group = torch.full((128, 32), 127, dtype=torch.int8)
        group[:, : part.numel()] = part
        code, again = encode_momentum(decode_momentum(group, scale, states), states, "bf16")
        assert torch.equal(code, group)
        assert torch.equal(again, scale)
    for start in range(0, 256, 31):
        part = torch.arange(start, min(start + 31, 256)).to(torch.uint8)
        group = torch.full((128, 32), 255, dtype=torch.uint8)
        group[:, : part.numel()] = part
        code, again = encode_variance(decode_variance(group, scale, states), states, "bf16", True)
        assert torch.equal(code, group)
        assert torch.equal(again, scale)


def test_round_trip_errors_stay_within_half_a_step():
    m = spread()
    scale = m.abs().amax(-1, keepdim=True)
    y = m / scale
    back = decode_momentum(*encode_momentum(m, "companded8", "fp32"), "companded8") / scale
    # the curve's inverse z / (2 - |z|) is steepest towards the code further out
    z = (2 * y / (1 + y.abs())).abs() + 0.5 / 127
    assert ((back - y).abs() <= 0.5 / 127 * 2 / (2 - z.clamp(max=1.0)) ** 2 + 1e-6).all()
    v = m.square()
    code, scale = encode_variance(v, "companded8", "fp32", True)
    root = decode_variance(code, scale, "companded8").sqrt()
    step = scale.float()[:, None] / 255
    raised = (code == 1) & (v.sqrt() < step / 2)  # by the rule that a positive variance is never zero
    assert ((root - v.sqrt()).abs()[~raised] <= (0.5001 * step).expand_as(v)[~raised]).all()


def test_gaussian_groups_keep_their_direction():
    torch.manual_seed(0)
    m = torch.randn(2000, 32)
    back = decode_momentum(*encode_momentum(m, "companded8", "bf16"), "companded8")
    assert torch.cosine_similarity(m, back).min().item() > 0.9998
    assert torch.cosine_similarity(m.flatten(), back.flatten(), dim=0).item() > 0.9999
    v = m.square()
    back = decode_variance(*encode_variance(v, "companded8", "bf16", True), "companded8")
    assert torch.cosine_similarity(v.flatten(), back.flatten(), dim=0).item() > 0.9999


@pytest.mark.parametrize(
    "scales",
    [
        "bf16",
        "fp32",
        pytest.param("fp16", marks=pytest.mark.xfail(reason="fp16 scales lose small groups, as published")),
    ],
)
def test_codes_do_not_depend_on_the_magnitude(scales):
    torch.manual_seed(0)
    m = torch.randn(200, 32)
    code = encode_momentum(m, "companded8", scales)[0]
    back = decode_momentum(*encode_momentum(m, "companded8", scales), "companded8")
    squares = encode_variance(m.square(), "companded8", scales, True)[0]
    for power in range(-60, 61, 4):
        c = 2.0**power
        assert torch.equal(encode_momentum(m * c, "companded8", scales)[0], code)
        assert torch.equal(decode_momentum(*encode_momentum(m * c, "companded8", scales), "companded8"), back * c)
        assert torch.equal(encode_variance(m.square() * c, "companded8", scales, True)[0], squares)


@pytest.mark.parametrize("magnitude", [1e-3, 1e-7, 1e-9])
def test_small_gradients_keep_their_precision(magnitude):
    torch.manual_seed(0)
    m = torch.randn(500, 32) * magnitude
    back = decode_momentum(*encode_momentum(m, "companded8", "bf16"), "companded8")
    assert ((back - m).square().sum() / m.square().sum()).sqrt().item() < 0.006
    root = decode_variance(*encode_variance(m.square(), "companded8", "bf16", True), "companded8").sqrt()
    assert ((root - m.abs()).square().sum() / m.square().sum()).sqrt().item() < 0.004


def test_a_positive_variance_never_gets_code_zero():
    v = spread().square()
    v[:, ::5] = 0
    v[0, 0], v[0, 1] = 1e-44, 1.0  # a subnormal number beside a large one
    code, _ = encode_variance(v, "companded8", "bf16", True)
    assert torch.equal(code > 0, v > 0)
    assert (encode_variance(v, "companded8", "bf16", False)[0][v > 0] == 0).any()


def test_the_first_group_of_the_published_hazard():
    """One noisy element beside 31 small steady ones: without the floor their update overshoots, with it never."""
    torch.manual_seed(0)
    largest = {}
    for floor in (True, False):
        m, v = torch.zeros(1, 32), torch.zeros(1, 32)
        worst = 0.0
        for step in range(1, 1001):
            g = torch.full((1, 32), 1e-3)
            g[0, 0] = 1.0 if torch.rand(()) < 0.5 else -1.0
            m = 0.9 * m + 0.1 * g
            v = 0.999 * v + 0.001 * g * g
            update = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-12)
            worst = max(worst, update[0, 1:].abs().max().item())
            m = decode_momentum(*encode_momentum(m, "companded8", "bf16"), "companded8")
            v = decode_variance(*encode_variance(v, "companded8", "bf16", floor), "companded8")
        largest[floor] = worst
    assert largest[True] <= 1.01
    assert largest[False] > 15


@pytest.mark.parametrize(("scales", "stochastic", "low", "high"), [("bf16", True, 0.9, 1.1), ("bf16", False, 2.5, 2.8)])
def test_the_variance_of_an_idle_group_decays(scales, stochastic, low, high):
    """A thousand steps without a gradient at beta2 = 0.999 shrink a variance by e. bf16 steps are eight times wider
    than a step's decay: rounding to nearest would keep it for ever, rounding stochastically is right on average."""
    v = torch.rand(500, 32, generator=torch.Generator().manual_seed(0)) + 0.5
    start = v.clone()
    for step in range(1000):
        draws = scale_draws(0, 500, draw_key(parameter_key(0, 0), step_key(step)))[1] if stochastic else None
        v = decode_variance(*encode_variance(v * 0.999, "companded8", scales, True, draws), "companded8")
    ratio = (v / (start * 0.999**1000)).mean().item()
    assert low < ratio < high


@pytest.mark.parametrize("length", [1, 31, 32, 33, 1000, 1025])
def test_padding_never_changes_a_scale(length):
    torch.manual_seed(length)
    rows = torch.randn(3, length) - 5
    groups = to_groups(rows, length)
    code, scale = encode_momentum(groups, "companded8", "bf16")
    assert torch.equal(from_groups(groups, rows, length), rows)
    per_row = -(-length // 32)
    for r in range(3):
        for c in range(per_row):
            part = rows[r, c * 32 : (c + 1) * 32]
            alone_code, alone_scale = encode_momentum(part[None], "companded8", "bf16")
            assert alone_scale[0] == scale[r * per_row + c]
            assert torch.equal(alone_code[0], code[r * per_row + c, : part.numel()])


def test_a_shard_by_rows_encodes_as_the_whole_does():
    torch.manual_seed(0)
    whole = torch.randn(12, 70)
    code, scale = encode_momentum(to_groups(whole, 70), "companded8", "bf16")
    for start, stop in ((0, 5), (5, 12)):
        part_code, part_scale = encode_momentum(to_groups(whole[start:stop], 70), "companded8", "bf16")
        assert torch.equal(part_code, code[start * 3 : stop * 3])
        assert torch.equal(part_scale, scale[start * 3 : stop * 3])


def test_huge_and_tiny_groups_stay_finite():
    for value in (3e38, 1e30, 1e-30, 1e-44, 0.0):
        m = torch.full((1, 32), value)
        for scales in SCALES:
            code, scale = encode_momentum(m, "companded8", scales)
            assert scale.isfinite().all()
            assert decode_momentum(code, scale, "companded8").isfinite().all()
            assert encode_variance(m, "companded8", scales, True)[1].isfinite().all()
    assert encode_momentum(torch.zeros(1, 32), "companded8", "bf16")[1].item() == SMALLEST_SCALE


def test_the_published_codes_against_numpy():
    """An independent transcription of the published scheme in NumPy gives the same codes, scales and values."""
    m = spread(300, 3)
    x = m.numpy()
    a = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-12))
    y = x / a
    q = np.floor(np.float32(127) * (np.float32(2) * y / (np.float32(1) + np.abs(y))) + np.float32(0.5))
    code, scale = encode_momentum(m, "companded8", "fp16")
    assert (code.numpy() == q).all()
    kept = np.minimum(a, 65504).astype(np.float16)
    assert (scale.numpy() == kept[:, 0]).all()
    z = q / np.float32(127)
    assert (decode_momentum(code, scale, "companded8").numpy() == z / (2 - np.abs(z)) * kept.astype(np.float32)).all()
    r = np.sqrt(x * x)
    a = np.maximum(r.max(1, keepdims=True), np.float32(1e-12))
    code, scale = encode_variance(m.square(), "companded8", "fp16", False)
    assert (code.numpy() == np.floor(r / a * np.float32(255) + np.float32(0.5))).all()


def test_division_and_root_are_correctly_rounded():
    """Every mantissa of two binades for the root; exact rational arithmetic is what NumPy's IEEE operations give."""
    for field in (127, 128):
        x = (torch.arange(0, 2**23, 3, dtype=torch.int32) | (field << 23)).view(torch.float32)
        assert (exact_sqrt(x).numpy() == np.sqrt(x.numpy())).all()
    assert (exact_ratio(x, 127.0).numpy() == x.numpy() / np.float32(127)).all()
