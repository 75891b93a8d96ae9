"""The optimizers: equal to torch where nothing is coded, defined where torch is vague, refused where nothing can be."""

import copy
import io
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from optim.cases import IDS, RULES, assert_same, bits, run, weights
from outpace.errors import ConfigError, UnsupportedError
from outpace.optim import FlashAdamW, FlashLion, FlashSGD
from outpace.optim import reference as reference_module

# Against torch --------------------------------------------------------------------------------------------------------

LOSSLESS = {"states": "fp32", "residual": "ordinal", "master": "bf16+16"}
TORCH = [
    (FlashAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (FlashAdamW, torch.optim.AdamW, {"lr": 1e-2, "maximize": True, "betas": (0.8, 0.95)}),
    (FlashSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (FlashSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    (FlashSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "dampening": 0.3}),
    (FlashSGD, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1}),
]


@pytest.mark.parametrize(("ours", "theirs", "numbers"), TORCH)
@pytest.mark.parametrize("storage", [LOSSLESS, {"states": "fp32", "master": "fp32"}], ids=["ordinal16", "fp32"])
def test_without_coding_it_is_torch(ours, theirs, numbers, storage):
    params = weights((40, 33), (17,))
    plain = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, reference = ours(params, **numbers, **storage), theirs(plain, **numbers)
    for step in range(100):
        torch.manual_seed(step)
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for mine, q in zip(optimizer.master_weights(), plain, strict=True):
        torch.testing.assert_close(mine, q.detach(), rtol=1e-6, atol=2e-6)


def test_lion_is_its_ten_lines():
    (p,) = weights((40, 33))
    optimizer = FlashLion([p], lr=1e-3, weight_decay=0.1, **LOSSLESS)
    theta, m = p.detach().float(), torch.zeros(40, 33)
    for step in range(100):
        torch.manual_seed(step)
        p.grad = torch.randn(p.shape).bfloat16()
        g = p.grad.float()
        theta = theta * (1 - 1e-3 * 0.1) - 1e-3 * torch.sign(0.9 * m + 0.1 * g)
        m = 0.99 * m + 0.01 * g
        optimizer.step()
    torch.testing.assert_close(optimizer.master_weights()[0], theta, rtol=1e-6, atol=1e-6)


def test_fp32_parameters_pass_through_and_keep_coded_states():
    params = weights((64, 64), dtype=torch.float32) + weights((64, 64))
    optimizer = FlashAdamW(params, lr=1e-3, small=0)
    run(optimizer, params, 3)
    assert "residual" not in optimizer.state[params[0]]
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.int8
    assert optimizer.master_weights()[0].equal(params[0].detach())


@pytest.mark.parametrize("magnitude", [1e-5, 1e-3, 1e-1])
def test_paper_mode_against_numpy(magnitude):
    """Five steps of 2000 elements against a transcription of the published method that shares no code with ours."""
    f = np.float32
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(2000).bfloat16())
    optimizer = FlashAdamW([p], lr=1e-3, weight_decay=0.0, paper=True)
    n, rho = p.detach().float().numpy(), np.zeros(2000, f)
    mq, vq = np.zeros(2016, f), np.zeros(2016, f)
    ms, vs = np.zeros(63, np.float16), np.zeros(63, np.float16)
    for t in range(1, 6):
        p.grad = (torch.randn(2000) * magnitude).bfloat16()
        g = np.zeros(2016, f)
        g[:2000] = p.grad.float().numpy()
        optimizer.step()
        unit = (2.0 ** (np.floor(np.log2(np.abs(n).astype(np.float64))) - 8)).astype(f)
        theta = n + rho / f(127) * unit
        z = mq / f(127)
        m = z / (f(2) - np.abs(z)) * np.repeat(ms.astype(f), 32)
        r = vq / f(255) * np.repeat(vs.astype(f), 32)
        v = r * r
        m = f(0.9) * m + f(1 - 0.9) * g
        v = f(0.999) * v + f(1 - 0.999) * (g * g)
        mhat, vhat = m / f(1 - 0.9**t), v / f(1 - 0.999**t)
        theta = theta - f(1e-3) * (mhat / (np.sqrt(vhat) + f(1e-8)))[:2000]
        n = torch.from_numpy(theta).bfloat16().float().numpy()
        unit = (2.0 ** (np.floor(np.log2(np.abs(n).astype(np.float64))) - 8)).astype(f)
        place = np.clip((theta - n) / unit, -1, 1)
        rho = np.sign(place) * np.floor(np.abs(place) * f(127) + f(0.5))
        a = np.maximum(np.abs(m).reshape(-1, 32).max(1), f(1e-12))
        y = m / np.repeat(a, 32)
        mq, ms = np.floor(f(127) * (f(2) * y / (f(1) + np.abs(y))) + f(0.5)), a.astype(np.float16)
        r = np.sqrt(v)
        a = np.maximum(r.reshape(-1, 32).max(1), f(1e-12))
        vq, vs = np.floor(f(255) * (r / np.repeat(a, 32)) + f(0.5)), a.astype(np.float16)
        state = optimizer.state[p]
        assert (state["exp_avg"].numpy() == mq[:2000]).all()
        assert (state["exp_avg_sq"].numpy() == vq[:2000]).all()
        assert (state["exp_avg_scale"].numpy() == ms).all()
        assert (state["exp_avg_sq_scale"].numpy() == vs).all()
        # Weights may part by a rounding of the last float32 bit: the order of the bias corrections is not stated.
        assert (np.abs(state["residual"].numpy() - rho) > 1).mean() < 2e-3
        n, rho = p.detach().float().numpy(), state["residual"].numpy().astype(f)


# Bytes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "bytes_per_parameter"),
    [
        (lambda p: FlashAdamW(p), 5.125),
        (lambda p: FlashAdamW(p, master="bf16+16"), 6.125),
        (lambda p: FlashLion(p), 4.0625),
        (lambda p: FlashSGD(p, momentum=0.9), 4.0625),
        (lambda p: FlashSGD(p), 3.0),
    ],
)
def test_memory_report_is_what_is_allocated(make, bytes_per_parameter):
    params = [nn.Parameter(torch.zeros(1000, 2048, dtype=torch.bfloat16)) for _ in range(5)]
    optimizer = make(params)
    optimizer.prepare()
    report = optimizer.memory_report()
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for p in params
        for t in (p, *state_of(optimizer, p))
    }
    assert report["total"] == sum(held.values())
    assert report["total"] / 10_240_000 == pytest.approx(bytes_per_parameter, rel=0.001)
    for p in params:
        p.grad = torch.zeros_like(p)
    assert optimizer.memory_report()["total"] / 10_240_000 == pytest.approx(bytes_per_parameter + 2, rel=0.001)


def state_of(optimizer, param):
    return [t for name, t in optimizer.state[param].items() if name != "step"]


# Independence of what must not matter ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "numbers"), RULES, ids=IDS)
def test_chunks_do_not_matter(cls, numbers, monkeypatch):
    results = []
    for chunk in (1 << 18, 64):
        monkeypatch.setattr(reference_module, "CHUNK", chunk)
        params = weights((40, 33), (7, 5, 64), (1000,))
        optimizer = cls(params, lr=1e-2, small=0, **numbers)
        run(optimizer, params, 3)
        results.append(optimizer)
    assert_same(*results)


def test_memory_layout_does_not_matter():
    plain = weights((48, 40))
    strided = [nn.Parameter(plain[0].detach().t().contiguous().t())]
    assert not strided[0].is_contiguous()
    results = [FlashAdamW(p, lr=1e-2, small=0) for p in (plain, strided)]
    for optimizer, params in zip(results, (plain, strided), strict=True):
        run(optimizer, params, 3)
    assert_same(*results)


@pytest.mark.parametrize("paper", [False, True])
def test_every_shape_steps(paper):
    params = weights((), (1,), (31,), (33,), (3, 5), (4, 1, 33), (0,), (3, 0), (2, 2, 2, 40))
    optimizer = FlashAdamW(params, lr=1e-2, small=0, paper=paper)
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 2)
    for p, old in zip(params, before, strict=True):
        assert p.isfinite().all()
        assert p.numel() == 0 or not torch.equal(p, old)


def test_a_step_with_nothing_to_do_changes_no_bit():
    params = weights((64, 64))
    optimizer = FlashAdamW(params, lr=1e-2, small=0, weight_decay=0.0)
    run(optimizer, params, 3)
    rows = nn.Parameter(torch.randn(64, 64).bfloat16())
    fresh = FlashAdamW([rows], lr=1e-2, small=0, weight_decay=0.0)
    before, residual = bits(params[0]).clone(), optimizer.state[params[0]]["residual"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    run(optimizer, params, 3)
    assert torch.equal(bits(params[0]), before)
    assert torch.equal(optimizer.state[params[0]]["residual"], residual)
    # and rows of an embedding that never had a gradient do not walk randomly
    before = rows.detach().clone()
    for _ in range(3):
        rows.grad = torch.zeros_like(rows)
        rows.grad[:5] = 1.0
        fresh.step()
    assert torch.equal(rows[5:], before[5:])
    assert not torch.equal(rows[:5], before[:5])


# Trouble --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "numbers"), RULES, ids=IDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_an_element_with_a_bad_gradient_is_held_and_its_neighbours_are_not(cls, numbers, bad):
    good, hurt = weights((4, 64)), weights((4, 64))
    results = [cls(p, lr=1e-2, small=0, **numbers) for p in (good, hurt)]
    for optimizer, params in zip(results, (good, hurt), strict=True):
        run(optimizer, params, 2)
    before = results[1].master_weights()[0]
    moment = results[1].rule(results[1].param_groups[0]).first
    good[0].grad = torch.ones_like(good[0])
    hurt[0].grad = torch.ones_like(hurt[0])
    hurt[0].grad[1, 7] = bad
    assert not results[1].take_held()
    for optimizer in results:
        optimizer.step()
    after = [optimizer.master_weights()[0] for optimizer in results]
    assert after[1][1, 7] == before[1, 7]
    after[0][1, 7] = after[1][1, 7]
    assert torch.equal(*after)
    assert results[1].take_held()
    assert not results[1].take_held()
    assert not results[0].take_held()
    if moment:
        assert results[1].state[hurt[0]][moment].float().isfinite().all()


def test_a_bad_gradient_can_be_refused():
    params = weights((4, 64), (3,))
    optimizer = FlashAdamW(params, nonfinite="raise")
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    params[1].grad[2] = float("nan")
    with pytest.raises(ConfigError, match=r"shape \(3,\).*NaN or infinity"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_weights_that_are_not_finite_stay_and_do_not_spread():
    (p,) = weights((2, 64))
    with torch.no_grad():
        p[0, 0], p[0, 1] = float("nan"), float("inf")
    optimizer = FlashAdamW([p], lr=1e-2, small=0)
    run(optimizer, [p], 2)
    assert p[0, 0].isnan()
    assert p[0, 1].isinf()
    assert p.isfinite().sum() == 126


def test_frozen_shared_and_empty():
    shared = weights((8, 8))[0]
    frozen = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16), requires_grad=False)
    optimizer = FlashAdamW([{"params": [shared, frozen]}, {"params": []}], lr=1e-2)
    (shared.float() @ shared.float()).sum().backward()  # used twice, stepped once
    optimizer.step()
    assert int(optimizer.state[shared]["step"]) == 1
    assert frozen not in optimizer.state
    assert torch.equal(frozen, torch.ones_like(frozen))
    optimizer.prepare()
    assert frozen not in optimizer.state
    with pytest.raises(ValueError, match="more than one parameter group"):
        FlashAdamW([{"params": [shared]}, {"params": [shared]}])
    with pytest.raises(ValueError, match="empty parameter list"):
        FlashAdamW([])


def test_what_cannot_be_kept_is_refused_in_words():
    bf16, fp16 = weights((2, 2)), weights((2, 2), dtype=torch.float16)
    fp32, fp64 = weights((2, 2), dtype=torch.float32), weights((2, 2), dtype=torch.float64)
    with pytest.raises(UnsupportedError, match=r"float64.*bfloat16, float16 or float32"):
        FlashAdamW(fp64)
    with pytest.raises(UnsupportedError, match="complex64"):
        FlashAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(ConfigError, match=r"no effect.*from_fp32"):
        FlashAdamW(fp32)
    FlashAdamW(fp32, master="fp32")
    with pytest.raises(ConfigError, match=r"master='fp16\+8'"):
        FlashAdamW(fp16)
    FlashAdamW(fp16, master="fp16+8")
    for setting, value in (("master", "bf16+4"), ("states", "int4"), ("rounding", "up"), ("scales", "fp8")):
        with pytest.raises(ConfigError, match=f"{setting}="):
            FlashAdamW(bf16, **{setting: value})
    with pytest.raises(ConfigError, match="ordinal"):
        FlashAdamW(fp16, master="fp16+8", residual="ordinal")
    with pytest.raises(ConfigError, match=r"'weigth_decay'.*did you mean 'weight_decay'"):
        FlashAdamW([{"params": bf16, "weigth_decay": 0.1}])
    for numbers in (
        {"lr": -1.0},
        {"lr": float("nan")},
        {"betas": (1.0, 0.9)},
        {"eps": 0.0},
        {"lr": torch.tensor(1e-3)},
    ):
        with pytest.raises(ConfigError):
            FlashAdamW(bf16, **numbers)
    for numbers in ({"nesterov": True}, {"dampening": 0.1}, {"momentum": 1.0}, {"decoupled_weight_decay": True}):
        with pytest.raises(ConfigError):
            FlashSGD(bf16, **numbers)
    with pytest.raises(UnsupportedError, match="backend='triton' runs on CUDA"):
        run(FlashAdamW(bf16, backend="triton"), bf16, 1)
    embedding = nn.Embedding(10, 4, sparse=True, dtype=torch.bfloat16)
    optimizer = FlashAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(UnsupportedError, match="sparse=False"):
        optimizer.step()


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    optimizer = FlashAdamW(weights((2, 2)))
    with pytest.raises(UnsupportedError):
        optimizer.add_param_group({"params": weights((2, 2), dtype=torch.float64)})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": weights((3, 3), dtype=torch.float32), "states": "fp32", "lr": 0.5})
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_parameters_without_a_gradient_wait_and_keep_their_own_count():
    """What steps together shares work between steps; the result is that of stepping each parameter alone."""
    present = [(0, 1, 2), (0, 1, 2), (1,), (0, 2), (0, 1, 2), (), (0, 1, 2)]
    together, apart = weights((8, 64), (4, 64), (70,)), weights((8, 64), (4, 64), (70,))
    one = FlashAdamW(together, lr=1e-2, small=0)
    many = FlashAdamW([{"params": [p]} for p in apart], lr=1e-2, small=0)
    for step, indices in enumerate(present):
        for optimizer, params in ((one, together), (many, apart)):
            for index in indices:
                generator = torch.Generator().manual_seed(10 * step + index)
                params[index].grad = torch.randn(params[index].shape, generator=generator).bfloat16()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(one, many)
    assert [int(one.state[p]["step"]) for p in together] == [5, 5, 5]
    # counts that part again after a load are again their own
    state = one.state_dict()
    state["state"][1] = state["state"][1] | {"step": torch.tensor(9)}
    one.load_state_dict(state)
    run(one, together, 1)
    assert [int(one.state[p]["step"]) for p in together] == [6, 10, 6]


def test_a_setting_that_changes_between_steps_is_checked_and_taken():
    params, others = weights((8, 64)), weights((8, 64))
    optimizer, twin = FlashAdamW(params, lr=1e-2, small=0), FlashAdamW(others, lr=1e-2, small=0)
    run(optimizer, params, 2)
    run(twin, others, 2)
    assert_same(optimizer, twin)
    optimizer.param_groups[0]["lr"] = 1e-3
    run(optimizer, params, 1)
    run(twin, others, 1)
    assert not torch.equal(params[0], others[0])
    for name, bad in (("lr", -1.0), ("betas", (0.9, 1.0)), ("rounding", "up"), ("backend", "cuda")):
        before, kept = params[0].detach().clone(), optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = bad
        with pytest.raises(ConfigError, match=name):
            run(optimizer, params, 1)
        assert torch.equal(params[0], before)
        optimizer.param_groups[0][name] = kept
    run(optimizer, params, 1)


def test_states_put_in_by_hand_are_taken():
    """Offloading swaps a state's tensors, or its whole entry; the next step uses what is there then."""
    params, others = weights((8, 64), (4, 64)), weights((8, 64), (4, 64))
    optimizer, twin = FlashAdamW(params, lr=1e-2, small=0), FlashAdamW(others, lr=1e-2, small=0)
    run(optimizer, params, 2)
    run(twin, others, 2)
    state = optimizer.state[params[0]]
    for name, tensor in state.items():
        state[name] = tensor.clone()
    optimizer.state[params[1]] = {name: tensor.clone() for name, tensor in optimizer.state[params[1]].items()}
    run(optimizer, params, 2, seed=5)
    run(twin, others, 2, seed=5)
    assert_same(optimizer, twin)


# The rest of the interface --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cls", "numbers"), RULES, ids=IDS)
def test_copies_and_pickles_go_on_as_the_original(cls, numbers):
    model = nn.Linear(64, 80, dtype=torch.bfloat16)
    optimizer = cls(model.parameters(), lr=1e-2, small=0, **numbers)
    run(optimizer, list(model.parameters()), 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    buffer = io.BytesIO()
    pickle.dump((list(model.parameters()), optimizer), buffer)
    buffer.seek(0)
    params, pickled = pickle.load(buffer)  # noqa: S301 - our own bytes
    run(optimizer, list(model.parameters()), 3, seed=2)
    run(twin, list(twin_model.parameters()), 3, seed=2)
    run(pickled, params, 3, seed=2)
    assert_same(optimizer, twin)
    assert_same(optimizer, pickled)


def test_schedulers_closures_and_hooks():
    params = weights((8, 8))
    optimizer = FlashAdamW(params, lr=1.0)
    schedulers = [
        torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, 2),
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10),
    ]
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure():
        optimizer.zero_grad()
        loss = params[0].float().square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    for scheduler in schedulers:
        scheduler.step()
    assert optimizer.step(closure).item() < first
    assert seen == ["before", "after"] * 2
    optimizer.load_state_dict(optimizer.state_dict())  # with the schedulers' own keys in the groups
    assert "initial_lr" in optimizer.param_groups[0]


def test_accumulated_gradients_are_one_gradient():
    one, two = weights((8, 64)), weights((8, 64))
    optimizers = [FlashAdamW(p, lr=1e-2, small=0) for p in (one, two)]
    (one[0].float() * 3).sum().backward()
    for _ in range(3):
        two[0].float().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(*optimizers)


def test_inside_a_compiled_step():
    def train(model, optimizer, x):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(64, 64, dtype=torch.bfloat16)
        optimizer = FlashAdamW(model.parameters(), lr=1e-2, small=0)
        step = torch.compile(train, backend="eager") if compiled else train
        for _ in range(3):
            step(model, optimizer, torch.ones(4, 64, dtype=torch.bfloat16))
        results.append(optimizer)
    assert_same(*results)


def test_the_tail_of_fp32_weights_is_kept_before_the_first_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    before = [p.detach().clone() for p in model.parameters()]
    norm = list(model[1].parameters())
    optimizer = FlashAdamW.from_fp32(model.parameters(), keep=norm, lr=1e-3, master="bf16+16")
    assert model[0].weight.dtype == torch.bfloat16
    assert model[1].weight.dtype == torch.float32
    for mine, theta in zip(optimizer.master_weights(), before, strict=True):
        torch.testing.assert_close(mine, theta, rtol=1.2e-7, atol=1e-10)
    named = FlashAdamW(model.named_parameters())
    named.load_masters({name: theta for (name, _), theta in zip(model.named_parameters(), before, strict=True)})
    for mine, theta in zip(named.master_weights(), before, strict=True):
        torch.testing.assert_close(mine, theta, rtol=1.6e-5, atol=1e-10)
    with pytest.raises(ConfigError, match="float32 weights for"):
        named.load_masters(before[:1])
    with pytest.raises(ConfigError, match="no float32 weight for"):
        named.load_masters({})


def test_importing_it_pulls_in_nothing_else():
    script = (
        "import sys, torch, torch._dynamo, torch.distributed.tensor\n"
        "before = set(sys.modules)  # torch imports Triton itself where it is installed\n"
        "import outpace.optim\n"
        "new = set(sys.modules) - before\n"
        "bad = [m for m in new if m.split('.')[0] in ('triton', 'transformers', 'safetensors')]\n"
        "bad += [m for m in sys.modules if m.startswith('outpace.') and m.split('.')[1] not in ('optim', 'errors')]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
