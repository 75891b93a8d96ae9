"""Checkpoints: resuming is not noticed, settings convert, torch's dicts load, a broken save leaves the old file."""

import copy
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from optim.cases import IDS, RULES, assert_same, run, weights
from outpace.errors import CheckpointError
from outpace.optim import FlashAdamW, FlashLion, FlashSGD, export_portable, flatten, load, save, unflatten

SETTINGS = [
    {"master": "bf16+8"},
    {"master": "bf16+16"},
    {"master": "bf16+16", "residual": "ordinal"},
    {"master": "fp32", "states": "fp32"},
    {"states": "fp32"},
    {"paper": True},
    {"scales": "fp32", "layout": "flat"},
]


def clone(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize(("cls", "numbers"), RULES, ids=IDS)
@pytest.mark.parametrize("settings", [{}, {"paper": True}, {"master": "bf16+16", "residual": "ordinal"}])
@pytest.mark.parametrize("on_disk", [False, True])
def test_three_more_steps_are_those_of_uninterrupted_training(cls, numbers, settings, on_disk, tmp_path):
    params = weights((40, 33), (5, 64), (17,), ())
    optimizer = cls(params, lr=1e-2, small=100, **numbers, **settings)
    run(optimizer, params, 3)
    again = clone(params)
    resumed = cls(again, lr=0.5, small=100, seed=5, **numbers, **settings)
    if on_disk:
        save(optimizer, tmp_path / "optimizer.safetensors")
        load(resumed, tmp_path / "optimizer.safetensors")
    else:
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["lr"] == 1e-2
    run(optimizer, params, 3, seed=2)
    run(resumed, again, 3, seed=2)
    assert_same(optimizer, resumed)


@pytest.mark.parametrize(("saved", "wanted"), list(itertools.permutations(range(len(SETTINGS)), 2)))
def test_every_setting_loads_into_every_other(saved, wanted):
    """What is loaded is what was saved, to within the coarser of the two formats."""
    params = weights((40, 33), (64, 64))
    optimizer = FlashAdamW(params, lr=1e-2, **({"small": 100} | SETTINGS[saved]))
    run(optimizer, params, 3)
    again = clone(params)
    other = FlashAdamW(again, **({"small": 100} | SETTINGS[wanted]))
    other.load_state_dict(optimizer.state_dict())
    eight = any(SETTINGS[i].get("master", "bf16+8") == "bf16+8" for i in (saved, wanted))
    for before, after in zip(optimizer.master_weights(), other.master_weights(), strict=True):
        torch.testing.assert_close(after, before, rtol=1.6e-5 if eight else 1.2e-7, atol=0)
    before, after = export_portable(optimizer)["state"], export_portable(other)["state"]
    for key in before:
        for name, most in (("exp_avg", 0.015), ("exp_avg_sq", 0.02)):
            top = before[key][name].abs().max()
            assert ((after[key][name] - before[key][name]).abs().max() / top).item() < most
        assert after[key]["step"] == before[key]["step"] == 3
    run(other, again, 1)
    assert other.param_groups[0]["master"] == SETTINGS[wanted].get("master", "bf16+8")


@pytest.mark.parametrize(
    ("ours", "theirs", "numbers"),
    [
        (FlashAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
        (FlashSGD, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9}),
    ],
)
def test_torch_and_back_without_loss(ours, theirs, numbers):
    plain = weights((40, 33), (64, 64), dtype=torch.float32)
    reference = theirs(plain, **numbers)
    run(reference, plain, 3)
    params = [nn.Parameter(p.detach().bfloat16()) for p in plain]
    optimizer = ours(params, master="bf16+16", residual="ordinal", states="fp32")
    optimizer.load_state_dict(reference.state_dict())
    optimizer.load_masters([p.detach() for p in plain])
    for mine, theta in zip(optimizer.master_weights(), plain, strict=True):
        assert torch.equal(mine, theta.detach())
    back = theirs(clone(plain), lr=5.0)
    back.load_state_dict(export_portable(optimizer))
    for key, state in reference.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(back.state_dict()["state"][key][name]), torch.as_tensor(value)), name
    assert back.param_groups[0]["lr"] == 1e-2
    # The same three gradients, exact in bf16, take both to the same place.
    for seed in range(3):
        torch.manual_seed(seed)
        for p, q in zip(params, plain, strict=True):
            p.grad = torch.randn(p.shape).bfloat16()
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
    for mine, theta in zip(optimizer.master_weights(), plain, strict=True):
        torch.testing.assert_close(mine, theta.detach(), rtol=1e-6, atol=1e-7)


def test_a_checkpoint_without_residuals_keeps_those_that_are_there():
    plain = weights((64, 64), dtype=torch.float32)
    reference = torch.optim.AdamW(plain)
    run(reference, plain, 2)
    for first in ("masters", "states"):
        params = [nn.Parameter(p.detach().bfloat16()) for p in plain]
        optimizer = FlashAdamW(params, master="bf16+16", residual="ordinal")
        if first == "masters":
            optimizer.load_masters([p.detach() for p in plain])
        optimizer.load_state_dict(reference.state_dict())
        if first == "states":
            optimizer.load_masters([p.detach() for p in plain])
        assert torch.equal(optimizer.master_weights()[0], plain[0].detach())


def test_a_model_loaded_in_float32_gets_its_masters_from_the_residuals():
    params = weights((64, 64))
    optimizer = FlashAdamW(params, lr=1e-2)
    run(optimizer, params, 3)
    wide = [nn.Parameter(p.detach().float()) for p in params]
    other = FlashAdamW(wide, master="fp32", states="fp32")
    other.load_state_dict(optimizer.state_dict())
    assert torch.equal(wide[0].detach(), optimizer.master_weights()[0])


def test_what_does_not_fit_is_refused_and_nothing_changes():
    params = weights((40, 33), (64, 64))
    optimizer = FlashAdamW(params, lr=1e-2, small=100)
    run(optimizer, params, 2)
    twin = copy.deepcopy(optimizer)
    good = optimizer.state_dict()

    def broken(**changes):
        bad = copy.deepcopy(good)
        for path, value in changes.items():
            place, name = path.split("__")
            (bad["param_groups"][0] if place == "group" else bad["state"][0])[name] = value
        return bad

    lion = FlashLion(weights((40, 33), (64, 64)))
    for p in lion.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    lion.step()
    sgd = FlashSGD(clone(params), momentum=0.9)
    run(sgd, sgd.param_groups[0]["params"], 1)
    cases = {
        "state format 2": broken(group__format=2),
        "amsgrad": broken(group__amsgrad=True),
        "storage settings are not known": broken(group__scales="fp8"),
        "has shape": broken(state__exp_avg=torch.zeros(3, 3)),
        "cannot be decoded|has shape|size": broken(
            state__exp_avg_scale=torch.zeros(7, dtype=torch.float16), group__scales="fp16"
        ),
        "saved by another optimizer": sgd.state_dict(),
        "lacks 'exp_avg_sq'": {
            "state": {k: {n: v for n, v in e.items() if "sq" not in n} for k, e in good["state"].items()},
            "param_groups": good["param_groups"],
        },
        "param groups hold": FlashAdamW(weights((2, 2))).state_dict(),
        "in none of its param groups": good | {"state": good["state"] | {77: {}}},
    }
    for message, bad in cases.items():
        with pytest.raises(CheckpointError, match=message):
            optimizer.load_state_dict(bad)
        assert_same(optimizer, twin)
    with pytest.raises(CheckpointError, match="saved by another optimizer"):
        lion.load_state_dict(good)


def test_the_file_is_safetensors_and_holds_each_byte_once(tmp_path):
    params = weights((64, 256), (5,))
    optimizer = FlashAdamW(params, lr=1e-2)
    run(optimizer, params, 2)
    path = tmp_path / "optimizer.safetensors"
    save(optimizer, path)
    tensors, metadata = flatten(optimizer.state_dict())
    theirs = load_file(path)
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == metadata
    assert path.stat().st_size < 64 * 256 * 3.2 + 2000
    # and the other way round: what safetensors writes, we read
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    resumed = FlashAdamW(clone(params))
    load(resumed, tmp_path / "theirs.safetensors")
    run(optimizer, params, 2, seed=4)
    run(resumed, resumed.param_groups[0]["params"], 2, seed=4)
    assert_same(optimizer, resumed)
    assert unflatten(tensors, metadata)["param_groups"][0]["betas"] == (0.9, 0.999)
    assert json.loads(metadata["param_groups"])[0]["format"] == 1


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    params = weights((64, 64))
    optimizer = FlashAdamW(params, lr=1e-2)
    run(optimizer, params, 1)
    path = tmp_path / "optimizer.safetensors"
    save(optimizer, path)
    old = path.read_bytes()
    run(optimizer, params, 1)

    def broken(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(KeyboardInterrupt):
        save(optimizer, path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_file_is_refused_in_words(tmp_path):
    params = weights((64, 64))
    optimizer = FlashAdamW(params, lr=1e-2)
    run(optimizer, params, 1)
    path: Path = tmp_path / "optimizer.safetensors"
    save(optimizer, path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        b"abc",
        whole[:5],
        whole[:100],
        whole[:-1],
        b"\xff" * 8 + whole[8:],
        whole[:8] + b"x" * 50 + whole[58:],
    ):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
            load(optimizer, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(optimizer, tmp_path / "missing")
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no optimizer checkpoint"):
        load(optimizer, path)
