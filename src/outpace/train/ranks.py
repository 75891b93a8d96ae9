"""One process or many: who am I, gather, agree. Everything here is the identity when there is one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from outpace.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Parallel = Literal["ddp", "fsdp"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among all: `torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Join the group `torchrun` has prepared, or stand alone; leave it at the end."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 or not dist.is_available():
            yield cls()
            return
        ranks = cls(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available():
            torch.cuda.set_device(ranks.local)
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield ranks
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, value: float) -> float:
        """The first process's value, everywhere."""
        if self.world == 1:
            return value
        holder = torch.tensor([value], dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.broadcast(holder, 0)
        return float(holder)

    def wait(self) -> None:
        """Until all are here."""
        if self.world > 1:
            dist.barrier()

    def wrap(self, module: nn.Module, parallel: Parallel) -> nn.Module:
        """Data parallel, with whole weights (ddp) or weights and states cut into shards (fsdp, FSDP2).

        Raises:
            ConfigError: if sharding is asked for with one process.
        """
        if parallel not in ("ddp", "fsdp"):
            raise ConfigError(f"parallel must be ddp or fsdp, got {parallel!r}")
        if self.world == 1:
            if parallel == "fsdp":
                raise ConfigError("fsdp shards over processes and there is one; start it with torchrun, or drop it")
            return module
        if parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard

            fully_shard(module)
            return module
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)

    @contextmanager
    def quiet(self, module: Any, last: bool) -> Iterator[None]:
        """Exchange gradients in the last of several accumulated passes only."""
        if last or self.world == 1:
            with nullcontext():
                if hasattr(module, "set_requires_gradient_sync"):
                    module.set_requires_gradient_sync(True)
                yield
        elif hasattr(module, "set_requires_gradient_sync"):
            module.set_requires_gradient_sync(False)
            yield
        else:
            with module.no_sync():
                yield
