"""Float splitting, exhaustive where the space is finite. Bounds are those of the format, not of what was observed."""

import pytest
import torch

from outpace.errors import UnsupportedError
from outpace.optim.draws import byte_draws, draw_key, parameter_key, step_key, uniforms
from outpace.optim.split import half_ulp, merge, merge_ordinal, split, split_ordinal

FIELDS = (0, 1, 2, 60, 127, 200, 254)  # exponent fields of fp32: subnormal, the two smallest, ordinary, the largest
ORDINARY = (60, 127, 200)
MANTISSAS = torch.arange(2**23, dtype=torch.int32)


def key_of(seed, parameter, step):
    return draw_key(parameter_key(seed, parameter), step_key(step))


def floats(field: int, step: int = 1, negative: bool = False) -> torch.Tensor:
    values = (MANTISSAS[::step] | (field << 23)).view(torch.float32)
    return -values if negative else values


def all_bf16() -> torch.Tensor:
    """All 65 280 finite bf16 numbers."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def ulp32(x: torch.Tensor) -> torch.Tensor:
    return (((x.view(torch.int32) & 0x7F800000).clamp_min(1 << 23)).view(torch.float32).double()) * 2.0**-23


def test_every_bf16_and_every_code_decodes_inside_half_a_unit_and_in_order():
    narrow = all_bf16()
    assert narrow.numel() == 65280
    bound = half_ulp(narrow).double()
    before = None
    for code in range(-127, 128):
        value = merge(narrow, torch.full(narrow.shape, code, dtype=torch.int8))
        assert value.isfinite().all() or code != 0
        # The largest number plus half a unit is just beyond fp32's range only at the very end of the codes.
        inside = value.isfinite()
        assert (~inside).sum() <= 2
        distance = (value.double() - narrow.double()).abs()[inside]
        assert (distance <= bound[inside] + 0.5 * ulp32(value)[inside]).all()
        if before is not None:
            assert (value >= before).all()
        before = value


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("negative", [False, True])
def test_every_mantissa_comes_back_within_half_a_code_step(field, negative):
    theta = floats(field, 1 if not negative else 7, negative)
    narrow, code = split(theta, torch.bfloat16, 8)
    back = merge(narrow, code)
    saturated = theta.abs() > torch.finfo(torch.bfloat16).max
    assert (code[theta.abs() >= 3.3962e38].abs() == 127).all()
    theta, back, narrow = theta[~saturated], back[~saturated], narrow[~saturated]
    error = (theta.double() - back.double()).abs()
    bound = half_ulp(narrow).double() / 254 + 0.5 * ulp32(theta)
    assert (error <= bound).all(), f"field {field}: {(error / bound).max().item()} of the bound"
    if field in ORDINARY and not negative:
        mean = (error / theta.double().abs()).mean().item()
        assert abs(mean - 5.345e-6) <= 0.01 * 5.345e-6
        assert (error / theta.double().abs()).max().item() <= 1.55e-5


@pytest.mark.parametrize("field", FIELDS)
def test_wider_residuals_err_less(field):
    theta = floats(field, 31)
    theta = theta[theta <= torch.finfo(torch.bfloat16).max]
    eight = (theta.double() - merge(*split(theta, torch.bfloat16, 8)).double()).abs()
    sixteen = (theta.double() - merge(*split(theta, torch.bfloat16, 16)).double()).abs()
    none = (theta.double() - theta.bfloat16().double()).abs()
    unit = ulp32(theta)
    assert (sixteen <= eight + unit).all()
    assert (eight <= none + half_ulp(theta.bfloat16()).double() / 254 + unit).all()
    # Where half a unit is 2^-133, the residual is itself a subnormal fp32 number of the sum's own grain, and ties.
    assert (sixteen == 0).double().mean().item() >= (0.74 if field == 2 else 0.997)


@pytest.mark.parametrize("field", FIELDS)
def test_the_ordinal_split_with_16_bits_loses_nothing(field):
    for theta in (floats(field), floats(field, 3, negative=True)):
        if field == 254:
            theta = theta[(theta.view(torch.int32) & 0x7FFFFFFF) <= 0x7F7F7FFF]  # beyond, it saturates
        narrow, low = split_ordinal(theta, 16)
        assert torch.equal(merge_ordinal(narrow, low).view(torch.int32), theta.view(torch.int32))


@pytest.mark.parametrize("field", ORDINARY)
def test_the_ordinal_split_with_8_bits_meets_its_table_row(field):
    theta = floats(field)
    error = (merge_ordinal(*split_ordinal(theta, 8)).double() - theta.double()).abs() / theta.double()
    assert abs(error.mean().item() - 5.288e-6) <= 0.01 * 5.288e-6
    assert error.max().item() <= 1.53e-5


def test_fp16_with_16_bits_is_exact_on_every_normal_number():
    for field in range(127 - 14, 127 + 16):
        theta = floats(field, 31)
        theta = theta[theta <= 65504]
        assert torch.equal(merge(*split(theta, torch.float16, 16)), theta)


@pytest.mark.parametrize(("bits", "bound"), [(8, 1.18e-10), (16, 4.6e-13)])
def test_fp16_below_its_normal_numbers_is_fixed_point(bits, bound):
    for field in (127 - 40, 127 - 31, 127 - 27, 127 - 24, 127 - 19, 127 - 15):
        theta = floats(field, 31)
        error = (merge(*split(theta, torch.float16, bits)).double() - theta.double()).abs().max().item()
        assert error <= bound


def test_what_bf16_can_hold_needs_no_residual():
    theta = all_bf16().float()
    for bits in (8, 16):
        for cut, join in ((split, merge), (split_ordinal, merge_ordinal)):
            narrow, code = cut(theta, torch.bfloat16, bits) if cut is split else cut(theta, bits)
            assert (code == 0).all()
            assert torch.equal(join(narrow, code), theta)


@pytest.mark.parametrize("bits", [8, 16])
def test_special_values(bits):
    full = 2 ** (bits - 1) - 1
    theta = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38, -3.4e38, 0.0, -0.0, 1e-41])
    for narrow, code in (split(theta, torch.bfloat16, bits), split_ordinal(theta, bits)):
        assert narrow[:2].tolist() == [float("inf"), -float("inf")]
        assert narrow[2].isnan()
        assert code[:3].tolist() == [0, 0, 0]
        assert narrow[3:5].float().tolist() == [torch.finfo(torch.bfloat16).max, -torch.finfo(torch.bfloat16).max]
        assert narrow.view(torch.int16)[5:7].tolist() == [0, -(2**15)]
    narrow, code = split(theta, torch.bfloat16, bits)
    assert code[3:5].tolist() == [full, -full]
    assert merge(narrow, code)[7].item() == pytest.approx(1e-41, rel=0.02)
    narrow, code = split(torch.tensor([65504.0, 65520.0, 1e6, -1e6]), torch.float16, bits)
    assert narrow.tolist() == [65504.0, 65504.0, 65504.0, -65504.0]
    assert code.tolist() == [0, full, full, -full]


def test_worked_values():
    narrow, code = split(torch.tensor([1 + 2.0**-9, 1 - 2.0**-11]), torch.bfloat16, 8)
    assert narrow.tolist() == [1.0, 1.0]
    assert code.tolist() == [64, -16]
    assert merge(narrow, code)[0].item() == pytest.approx(1.00196850, abs=1e-8)


def test_decoding_and_encoding_again_changes_only_interval_ends():
    narrow = all_bf16()[::16]
    changed = 0
    for code in range(-127, 128, 2):
        codes = torch.full(narrow.shape, code, dtype=torch.int8)
        value = merge(narrow, codes)
        fine = value.abs() <= torch.finfo(torch.bfloat16).max
        again = merge(*split(value[fine], torch.bfloat16, 8))
        different = again != value[fine]
        changed += int(different.sum())
        assert not different.any() or abs(code) in (63, 127), code
    assert changed <= 2 * narrow.numel() // 100


def test_other_dtypes_are_refused_in_words():
    with pytest.raises(UnsupportedError, match=r"bfloat16 or float16.*float64"):
        split(torch.zeros(3), torch.float64, 8)


def test_stochastic_codes_are_unbiased():
    # 10^5 encodings of each value: the mean's standard error is at most half a step / sqrt(10^5); four of them fail
    # by chance with odds 6e-5 per value.
    key = key_of(0, 0, 1)
    uniform, draws = uniforms(0, 100_000, key), byte_draws(0, 100_000, key)
    for value in (1.0 + 1e-5, 1.0 - 3e-6, 0.3, -1.7, 2.0**-20 * 1.234):
        theta = torch.full((100_000,), value)
        step = half_ulp(theta[:1].bfloat16()).double().item() / 127
        for back in (
            merge(*split(theta, torch.bfloat16, 8, uniform=uniform)),
            merge_ordinal(*split_ordinal(theta, 8, draws=draws)),
        ):
            bias = back.double().mean().item() - theta[0].double().item()
            assert abs(bias) <= 4 * 0.5 * step / 100_000**0.5 + 1e-12


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_ordinal_code_that_is_read_and_written_again_is_the_same(stochastic):
    """Whatever is drawn: the bits that are rounded away are zero. So weights at rest do not walk."""
    narrow = all_bf16()
    for code in range(-128, 128, 3):
        codes = torch.full(narrow.shape, code, dtype=torch.int8)
        theta = merge_ordinal(narrow, codes)
        fine = (theta.abs() <= torch.finfo(torch.bfloat16).max) & ((narrow != 0) | (code >= 0))
        draws = torch.full(theta.shape, 255, dtype=torch.int32) if stochastic else None
        again, low = split_ordinal(theta, 8, draws=draws)
        assert torch.equal(again[fine].view(torch.int16), narrow[fine].view(torch.int16))
        assert torch.equal(low[fine], codes[fine])


def test_draws_depend_on_the_place_alone_and_are_uniform():
    key = key_of(7, 3, 11)
    whole = uniforms(0, 1 << 16, key)
    assert torch.equal(whole[1000:2000], uniforms(1000, 1000, key))
    assert torch.equal(whole[1001:1500], uniforms(1001, 499, key))
    assert whole.min() >= 0
    assert whole.max() < 1
    # chi-square over 256 cells: mean 255, standard deviation 22.6; beyond 5 of them with odds below 1e-5
    counts = torch.histc(whole, 256, 0, 1)
    assert ((counts - 256) ** 2 / 256).sum().item() < 255 + 5 * 22.6
    assert abs(torch.corrcoef(torch.stack([whole[::2], whole[1::2]]))[0, 1].item()) < 5 / (1 << 15) ** 0.5
    codes = byte_draws(0, 1 << 16, key)
    assert torch.equal(codes[1001:1500], byte_draws(1001, 499, key))
    counts = torch.bincount(codes, minlength=256)
    assert ((counts - 256.0) ** 2 / 256).sum().item() < 255 + 5 * 22.6
    for shift in (1, 2, 3, 4):
        pair = torch.stack([codes[:-shift], codes[shift:]]).double()
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 5 / (1 << 16) ** 0.5
    assert key_of(7, 3, 11) != key_of(7, 3, 12) != key_of(7, 4, 12) != key_of(8, 4, 12)


@pytest.mark.parametrize(
    ("update", "bits", "stochastic", "low", "high"),
    [
        (1e-4, 8, False, 0.90, 0.96),
        (2e-5, 8, False, 1.4, 1.6),
        (1.2e-5, 8, False, 0.0, 0.0),
        (1e-6, 8, False, 0.0, 0.0),
        (1.2e-5, 8, True, 0.95, 1.05),
        (5e-6, 8, True, 0.95, 1.05),
        (1e-6, 8, True, 0.90, 1.05),
        (1e-6, 16, False, 0.90, 1.05),
    ],
)
def test_how_far_small_updates_move_a_weight(update, bits, stochastic, low, high):
    """400 equal steps on weights in [1, 2): nearest rounding of 8 bits stalls or overshoots, stochastic does not."""
    theta = torch.linspace(1.0, 1.9, 4000)
    narrow, code = split(theta, torch.bfloat16, bits)
    start = merge(narrow, code).double()
    for step in range(400):
        draws = uniforms(0, 4000, key_of(0, 0, step)) if stochastic else None
        narrow, code = split(merge(narrow, code) + update, torch.bfloat16, bits, uniform=draws)
    moved = ((merge(narrow, code).double() - start) / (400 * update)).mean().item()
    assert low - 1e-9 <= moved <= high + 1e-9


@pytest.mark.parametrize("update", [1e-4, 2e-5, 1.2e-5, 5e-6, 1e-6])
def test_ordinal_codes_move_with_every_small_update(update):
    narrow, code = split_ordinal(torch.linspace(1.0, 1.9, 4000), 8)
    start = merge_ordinal(narrow, code).double()
    for step in range(400):
        draws = byte_draws(0, 4000, key_of(0, 0, step))
        narrow, code = split_ordinal(merge_ordinal(narrow, code) + update, 8, draws=draws)
    moved = ((merge_ordinal(narrow, code).double() - start) / (400 * update)).mean().item()
    assert 0.95 <= moved <= 1.05
