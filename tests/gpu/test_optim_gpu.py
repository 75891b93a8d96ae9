"""The fused optimizer kernels on a GPU: the bits of the reference, on every storage setting, shape and special value.

Every failure prints how many elements differ and the first of them with their bits, so that one run tells enough.
"""

import copy
import time

import pytest
import torch
from torch import nn

from outpace.optim import FlashAdamW, FlashLion, FlashSGD, release_gradients
from outpace.optim.compand import exact_sqrt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CASES = {
    "adamw": (FlashAdamW, {}),
    "adamw-small-eps": (FlashAdamW, {"eps": 1e-15}),
    "adamw-paper": (FlashAdamW, {"paper": True}),
    "adamw-16": (FlashAdamW, {"master": "bf16+16"}),
    "adamw-16-nearest": (FlashAdamW, {"master": "bf16+16", "rounding": "nearest"}),
    "adamw-ordinal": (FlashAdamW, {"residual": "ordinal"}),
    "adamw-ordinal-16": (FlashAdamW, {"residual": "ordinal", "master": "bf16+16"}),
    "adamw-ordinal-nearest": (FlashAdamW, {"residual": "ordinal", "rounding": "nearest"}),
    "adamw-fp32-master": (FlashAdamW, {"master": "fp32"}),
    "adamw-fp32-states": (FlashAdamW, {"states": "fp32"}),
    "adamw-linear": (FlashAdamW, {"states": "linear8"}),
    "adamw-paper-linear": (FlashAdamW, {"states": "linear8", "paper": True}),
    "adamw-fp32-scales": (FlashAdamW, {"scales": "fp32"}),
    "adamw-maximize": (FlashAdamW, {"maximize": True, "rounding": "nearest"}),
    "adamw-no-floor": (FlashAdamW, {"variance_floor": False}),
    "adamw-flat": (FlashAdamW, {"layout": "flat"}),
    "adamw-fp16": (FlashAdamW, {"master": "fp16+8"}),
    "adamw-fp16-16": (FlashAdamW, {"master": "fp16+16"}),
    "adamw-fp32-weights": (FlashAdamW, {"master": "fp32", "dtype": torch.float32}),
    "lion": (FlashLion, {"weight_decay": 0.1}),
    "lion-paper": (FlashLion, {"paper": True}),
    "sgd": (FlashSGD, {"momentum": 0.9, "weight_decay": 0.01}),
    "sgd-nesterov": (FlashSGD, {"momentum": 0.9, "nesterov": True}),
    "sgd-decoupled": (
        FlashSGD,
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "sgd-plain": (FlashSGD, {}),
    "sgd-paper": (FlashSGD, {"momentum": 0.9, "paper": True}),
}
SHAPES = [(256, 512), (70, 96), (5, 37), (33,), (4096,), (3, 5, 65), ()]


def bits(tensor):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().cpu().contiguous().view(-1).view(sizes[tensor.element_size()]).to(torch.int64)


def differences(name, left, right):
    a, b = bits(left), bits(right)
    wrong = (a != b).nonzero()[:, 0]
    if not len(wrong):
        return []
    show = [(int(i), left.flatten()[i].item(), right.flatten()[i].item(), int(a[i]), int(b[i])) for i in wrong[:6]]
    return [f"{name}: {len(wrong)} of {a.numel()} differ; (index, left, right, bits): {show}"]


def compare(left, right, label):
    found = []
    for (_, p, _), (_, q, _) in zip(left._places(), right._places(), strict=True):
        found += differences(f"{label} {tuple(p.shape)} weight", p, q)
        for name in left.state[p]:
            found += differences(f"{label} {tuple(p.shape)} {name}", left.state[p][name], right.state[q][name])
    return found


def trained(case, device, backend, monkeypatch, exact=False, steps=6, shapes=SHAPES, spread=3.0):
    cls, settings = CASES[case]
    settings = {"lr": 1e-2, "small": 0} | settings
    dtype = settings.pop("dtype", torch.float16 if settings.get("master", "").startswith("fp16") else torch.bfloat16)
    if exact:
        monkeypatch.setattr("outpace.optim.fused.launch.EXACT", True)
    generator = torch.Generator().manual_seed(0)

    def numbers(shape, by):
        wild = torch.exp(by * torch.randn(shape, generator=generator))
        return (torch.randn(shape, generator=generator) * wild).to(dtype)

    params = [nn.Parameter(numbers(shape, spread).to(device)) for shape in shapes]
    optimizer = cls(params, backend=backend, **settings)
    for step_number in range(steps):
        for p in params:
            grad = numbers(p.shape, spread + 1)
            if step_number == 2 and p.numel() > 8:
                grad.view(-1)[3], grad.view(-1)[5], grad.view(-1)[7] = float("nan"), float("inf"), -float("inf")
            if step_number == 3:
                grad.zero_()
            if step_number == 4:
                grad = grad * 1e-6
            p.grad = grad.to(device)
        optimizer.step()
    assert optimizer.take_held()
    monkeypatch.undo()
    return optimizer


@pytest.mark.parametrize("case", CASES)
def test_kernel_is_reference_bit_for_bit(case, monkeypatch):
    on_cpu = trained(case, "cpu", "reference", monkeypatch)
    on_gpu = trained(case, "cuda", "reference", monkeypatch)
    fused = trained(case, "cuda", "triton", monkeypatch)
    exact = trained(case, "cuda", "triton", monkeypatch, exact=True)
    found = compare(on_cpu, on_gpu, "cpu reference / cuda reference")
    found += compare(on_gpu, exact, "cuda reference / kernel with the compiler's division")
    found += compare(on_gpu, fused, "cuda reference / kernel")
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("case", ["adamw", "lion", "sgd"])
def test_ten_million_elements_for_ten_steps(case, monkeypatch):
    """Enough elements that a rounding error in one of a million divisions would show."""
    shapes = [(2500, 4096), (1, 65)]
    found = []
    for spread in (0.0, 4.0):
        left = trained(case, "cuda", "reference", monkeypatch, steps=10, shapes=shapes, spread=spread)
        right = trained(case, "cuda", "triton", monkeypatch, steps=10, shapes=shapes, spread=spread)
        found += compare(left, right, f"spread {spread}")
    assert not found, "\n" + "\n".join(found)


def test_reciprocal_root_and_codes_for_every_operand():
    """The short sequences against torch's IEEE operations: every mantissa, at exponents from end to end; every code."""
    import triton
    import triton.language as tl

    from outpace.optim.fused import arithmetic

    @triton.jit
    def one_over(a_ptr, out_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, arithmetic.reciprocal(tl.load(a_ptr + i), False))

    @triton.jit
    def root(a_ptr, out_ptr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + i, arithmetic.root(tl.load(a_ptr + i), False))

    @triton.jit
    def codes(signed_ptr, unsigned_ptr, unit_ptr, place_ptr, product_ptr, plain_ptr, rows: tl.constexpr):
        row, column = tl.arange(0, rows), tl.arange(0, 256)
        i = row[:, None] * 256 + column[None, :]
        q, u = tl.load(signed_ptr + i), tl.load(unsigned_ptr + i)
        tl.store(place_ptr + i, arithmetic.place_of(q, 8, False))
        tl.store(product_ptr + i, arithmetic.times_unsigned(u, tl.load(unit_ptr + row), False))
        tl.store(plain_ptr + i, arithmetic.signed(q, False))

    wrong = []
    mantissas = torch.arange(2**23, dtype=torch.int32, device="cuda")
    for field in (27, 28, 60, 119, 120, 126, 127, 128, 133, 134, 150, 190, 227):
        b = (mantissas | (field << 23)).view(torch.float32)
        out = torch.empty_like(b)
        one_over[(b.numel() // 1024,)](b, out, BLOCK=1024, enable_fp_fusion=False)
        wrong += differences(f"1 / b, field {field}", out, b.reciprocal())
    for field in (25, 26, 60, 61, 126, 127, 128, 180, 251, 252):  # 2^-102 to 2^126
        x = (mantissas | (field << 23)).view(torch.float32)
        out = torch.empty_like(x)
        root[(x.numel() // 1024,)](x, out, BLOCK=1024, enable_fp_fusion=False)
        wrong += differences(f"root, field {field}", out, exact_sqrt(x))
    out = torch.empty(1024, device="cuda")
    root[(1,)](torch.zeros(1024, device="cuda"), out, BLOCK=1024, enable_fp_fusion=False)
    wrong += differences("root of 0", out, torch.zeros_like(out))

    q = torch.arange(-128, 128, device="cuda").to(torch.int8).repeat(64, 1)
    u = torch.arange(256, device="cuda").to(torch.uint8).repeat(64, 1)
    unit = torch.rand(64, device="cuda") * torch.exp2(torch.arange(-60, 68, 2, device="cuda"))
    place, product, plain = (torch.empty(64, 256, device="cuda") for _ in range(3))
    codes[(1,)](q, u, unit, place, product, plain, rows=64, enable_fp_fusion=False)
    wrong += differences("q / 127", place, q.float() / torch.full((), 127.0, device="cuda"))
    wrong += differences("u * unit", product, u.float() * unit[:, None])
    wrong += differences("q", plain, q.float())
    assert not wrong, "\n" + "\n".join(wrong[:20])


def test_one_launch_for_many_parameters_is_one_launch_for_each(monkeypatch):
    """Small and large, ragged and even, at odd addresses, with and without gradients, across a change of the set."""

    def build():
        torch.manual_seed(0)
        flat = torch.randn(200_000, device="cuda").bfloat16()
        shapes = [(256, 256), (256,), (65,), (128, 300), (4096,), (33, 64), (1,), (40, 32)] * 3
        params, start = [], 0
        for shape in shapes:
            count = torch.Size(shape).numel()
            if start + count > flat.numel():
                params.append(nn.Parameter(torch.randn(shape, device="cuda").bfloat16()))
            else:
                params.append(nn.Parameter(flat[start : start + count].view(shape)))
            start += count
        return params

    params, others = build(), build()
    together = FlashAdamW(params, lr=1e-2, small=64)
    groups = [{"params": [p]} for p in others]  # a group of its own is a launch of its own
    apart = FlashAdamW(groups, lr=1e-2, small=64)
    for step in range(4):
        for index, (p, q) in enumerate(zip(params, others, strict=True)):
            grad = torch.randn(
                p.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(100 * step + index)
            )
            p.grad = None if step == 2 and index % 3 == 0 else grad.bfloat16()
            q.grad = None if p.grad is None else p.grad.clone()
        together.step()
        apart.step()
    found = compare(together, apart, "together / apart")
    assert not found, "\n" + "\n".join(found)


def test_a_strided_view_and_a_second_gradient_dtype(monkeypatch):
    plain = nn.Parameter(torch.randn(96, 64, device="cuda").bfloat16())
    turned = nn.Parameter(plain.detach().t().contiguous().t())
    optimizers = [FlashAdamW([p], lr=1e-2, small=0) for p in (plain, turned)]
    for _ in range(3):
        grad = torch.randn(96, 64, device="cuda").bfloat16()
        for p, optimizer in zip((plain, turned), optimizers, strict=True):
            p.grad = grad.clone()
            optimizer.step()
    assert not compare(*optimizers, "contiguous / strided")


def test_moving_between_devices_by_checkpoint(monkeypatch):
    one = trained("adamw", "cuda", "triton", monkeypatch)
    params = [nn.Parameter(p.detach().cpu()) for _, p, _ in one._places()]
    other = FlashAdamW(params, lr=1e-2, small=0)
    other.load_state_dict(one.state_dict())
    for _ in range(3):
        for (_, p, _), q in zip(one._places(), params, strict=True):
            q.grad = torch.randn(q.shape).bfloat16()
            p.grad = q.grad.cuda()
        one.step()
        other.step()
    found = compare(one, other, "cuda / cpu")
    assert not found, "\n" + "\n".join(found)


def test_release_frees_gradients_and_gives_the_same_bits():
    def build():
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(8)]).cuda().bfloat16()
        return model, FlashAdamW(model.parameters(), lr=1e-2)

    (model, plain), (released_model, released) = build(), build()
    release_gradients(released_model, released)
    peaks = []
    for m, optimizer in ((model, plain), (released_model, released)):
        optimizer.prepare()
        for seed in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            x = torch.randn(16, 1024, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)).bfloat16()
            m(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() - before)
    assert not compare(plain, released, "plain / released")
    weight_bytes = 1024 * 1024 * 2
    assert max(peaks[4:]) < min(peaks[1:3]) - 5 * weight_bytes, peaks


def test_bytes_from_the_allocator():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    params = [nn.Parameter(torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(6)]
    optimizer = FlashAdamW(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    per_parameter = (torch.cuda.memory_allocated() - before) / (6 * 4096**2)
    assert per_parameter <= 7.13, per_parameter


def test_no_temporary_and_no_wait():
    """A step allocates nothing that grows with the parameter, and returns before the GPU is done."""
    p = nn.Parameter(torch.zeros(16384, 16384, device="cuda", dtype=torch.bfloat16))
    optimizer = FlashAdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(20):
        optimizer.step()
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    done = time.perf_counter() - start
    assert torch.cuda.max_memory_allocated() - before < 1 << 20
    assert issued < 0.5 * done, (issued, done)


def test_copies_go_on_as_the_original(monkeypatch):
    one = trained("adamw", "cuda", "triton", monkeypatch)
    two = copy.deepcopy(one)
    for optimizer in (one, two):
        for index, p, _ in optimizer._places():
            p.grad = torch.full_like(p, 0.1 * (index + 1))
        optimizer.step()
    assert not compare(one, two, "original / copy")


def test_offsets_beyond_32_bits():
    """More than 2^31 elements in one parameter: its last rows move as the same rows alone do."""
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GB of GPU memory")
    rows, cols = 131072 + 64, 16384
    p = nn.Parameter(torch.ones(rows, cols, device="cuda", dtype=torch.bfloat16))
    optimizer = FlashLion([p], lr=0.5)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(p[-64:], torch.full((64, cols), 0.5, device="cuda", dtype=torch.bfloat16))
    assert torch.equal(p[:64], torch.full((64, cols), 0.5, device="cuda", dtype=torch.bfloat16))
