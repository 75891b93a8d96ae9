"""DDP and FSDP2 with two processes: the bits of one process, sharded, saved, resharded (1 to 2, 2 to 1) and resumed.

Here with gloo on the CPU; `tests/gpu/two_gpus.py` runs the same on two GPUs.
"""

import contextlib
import os
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from outpace.errors import UnsupportedError
from outpace.optim import FlashAdamW, release_gradients, save

pytestmark = pytest.mark.skipif(
    not dist.is_available() or sys.platform == "win32", reason="needs torch.distributed with gloo"
)


DEVICE = "cpu"


def build():
    """An uneven first dimension, an odd last one, a vector, and a frozen matrix."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 33), nn.Linear(33, 64, bias=False), nn.Linear(64, 64)).bfloat16().to(DEVICE)
    model[2].weight.requires_grad_(False)
    return model


def optimizer_of(model):
    return FlashAdamW(model.parameters(), lr=1e-2, small=100)


def step(model, optimizer, seed):
    """Every process sees the same batch, so that averaging gradients changes no bit."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 64, generator=generator).bfloat16().to(DEVICE)
    model(x).float().square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def assert_equal(sharded_model, sharded, model, optimizer):
    for p, q in zip(sharded_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), q.detach())
        assert sharded.state.get(p, {}).keys() == optimizer.state.get(q, {}).keys()
        for name, value in optimizer.state.get(q, {}).items():
            assert torch.equal(whole(sharded.state[p][name]), value), name


def shard(model, mesh=None):
    return fully_shard(model, mesh=mesh or init_device_mesh(DEVICE, (dist.get_world_size(),)))


def ddp(rank, folder):
    model, optimizer = (m := build()), optimizer_of(m)
    inner = build()
    parallel = DistributedDataParallel(inner)
    other = optimizer_of(parallel)
    for seed in range(3):
        step(model, optimizer, seed)
        step(parallel, other, seed)
    assert_equal(inner, other, model, optimizer)
    with pytest.raises(UnsupportedError, match="copies its buckets back"):
        release_gradients(parallel, other)


def fsdp(rank, folder):
    model, optimizer = (m := build()), optimizer_of(m)
    sharded = shard(build())
    other = optimizer_of(sharded)
    for seed in range(3):
        step(model, optimizer, seed)
        step(sharded, other, seed)
    assert_equal(sharded, other, model, optimizer)
    with pytest.raises(UnsupportedError, match=r"torch\.distributed\.checkpoint"):
        save(other, folder / "no.safetensors")
    keep(sharded, other, folder / "by-two")
    # resume with the same number of processes: three more steps are those of uninterrupted training
    again = shard(build())
    resumed = optimizer_of(again)
    restore(again, resumed, folder / "by-two")
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    assert_equal(again, resumed, model, optimizer)
    # a whole checkpoint into a sharded optimizer
    fresh = shard(build())
    whole_loaded = optimizer_of(fresh)
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
            p.copy_(shard_like(q.detach(), p))
    whole_loaded.load_state_dict(optimizer.state_dict())
    assert_equal(fresh, whole_loaded, model, optimizer)


def shard_like(tensor, param):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements)


def keep(model, optimizer, path, group=None):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=path, process_group=group)


def restore(model, optimizer, path):
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])


def one_to_two(rank, folder):
    """Two processes resume what a world of one saved, and train on as one process always had."""
    meshes = init_device_mesh(DEVICE, (dist.get_world_size(), 1), mesh_dim_names=("copies", "world"))
    model, optimizer = (m := build()), optimizer_of(m)
    mine = shard(build(), meshes["world"])
    other = optimizer_of(mine)
    for seed in range(3):
        step(model, optimizer, seed)
        step(mine, other, seed)
    keep(mine, other, folder / f"by-one-{rank}", meshes["world"].get_group())
    dist.barrier()
    again = shard(build())
    resumed = optimizer_of(again)
    restore(again, resumed, folder / "by-one-0")
    assert_equal(again, resumed, model, optimizer)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    assert_equal(again, resumed, model, optimizer)


def alone(rank, folder):
    """One process resumes what two saved, and trains on as one process always had."""
    model, optimizer = (m := build()), optimizer_of(m)
    for seed in range(3):
        step(model, optimizer, seed)
    for sharded in (True, False):
        again = shard(build()) if sharded else build()
        resumed = optimizer_of(again)
        restore(again, resumed, folder / "by-two")
        assert_equal(again, resumed, model, optimizer)
        twin_model = build()
        twin = optimizer_of(twin_model)
        twin_model.load_state_dict(model.state_dict())
        twin.load_state_dict(optimizer.state_dict())
        for seed in range(3, 6):
            step(twin_model, twin, seed)
            step(again, resumed, seed)
        assert_equal(again, resumed, twin_model, twin)


def fsdp_release(rank, folder):
    model, optimizer = (m := build()), optimizer_of(m)
    sharded = shard(build())
    other = optimizer_of(sharded)
    with pytest.raises(UnsupportedError, match="two_pass"):
        release_gradients(sharded, other, max_norm=1.0)
    handle = release_gradients(sharded, other)
    for seed in range(3):
        step(model, optimizer, seed)
        step(sharded, other, seed)
    assert_equal(sharded, other, model, optimizer)
    handle.remove()
    handle = release_gradients(sharded, other, max_norm=0.1, clip="two_pass")
    x = torch.ones(8, 64, dtype=torch.bfloat16, device=DEVICE)
    with handle.measure():
        sharded(x).float().square().mean().backward()
    sharded(x).float().square().mean().backward()
    other.step()
    model(x).float().square().mean().backward()
    norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
    torch.testing.assert_close(handle.norm(), norm, rtol=1e-4, atol=0)


def worker(rank, world, name, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{name}", rank=rank, world_size=world)
    try:
        globals()[name](rank, Path(folder))
    except BaseException:
        (Path(folder) / f"failed-{name}-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def together(name, world, folder):
    context = mp.spawn(worker, (world, name, str(folder)), nprocs=world, join=False)
    with contextlib.suppress(mp.ProcessRaisedException, mp.ProcessExitedException):
        while not context.join(timeout=100):
            pass
    failures = [path.read_text() for path in sorted(Path(folder).glob(f"failed-{name}-*"))]
    assert not failures, "\n".join(failures)


def two_processes(rank, folder):
    """All that two processes do, in one go: starting them takes longer than what they do."""
    ddp(rank, folder)
    fsdp(rank, folder)
    one_to_two(rank, folder)
    fsdp_release(rank, folder)


def test_two_processes_step_as_one_and_any_number_resumes(tmp_path):
    together("two_processes", 2, tmp_path)
    together("alone", 1, tmp_path)
