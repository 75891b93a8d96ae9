"""A run on disk, so that it continues as if it had never stopped: weights, optimiser states, place in the corpus.

One safetensors file per process and one JSON file, in a folder that is renamed into place when it is whole; the one
before stays until then. Killing the process at any moment leaves a state that can be continued from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from outpace.errors import CheckpointError
from outpace.optim.shards import local

if TYPE_CHECKING:
    from torch import nn

    from outpace.train.ranks import Ranks

FOLDER: Final = "resume"
STATE: Final = "state.json"


def save_state(
    out: Path, module: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], ranks: Ranks
) -> None:
    """Write a state to out/resume/step-N and forget older ones.

    Raises:
        CheckpointError: if it cannot be written; the one before is still there.
    """
    final = out / FOLDER / f"step-{int(state['step']):08d}"
    partial = final.with_name(f".{final.name}.tmp")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        save_file(_collect(module, optimizer), partial / f"rank{ranks.rank}.safetensors")
        ranks.wait()
        if ranks.first:
            (partial / STATE).write_text(json.dumps({**state, "world": ranks.world}) + "\n")
            if final.exists():
                shutil.rmtree(final)
            partial.replace(final)
            for old in sorted((out / FOLDER).glob("step-*"))[:-1]:
                shutil.rmtree(old)
            for left in (out / FOLDER).glob(".step-*.tmp"):
                shutil.rmtree(left)
        ranks.wait()
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save the run to {str(final)!r}: {error}; the state before is unchanged. Free some space and "
            "start it again: it continues from there"
        ) from error


def latest_state(out: Path) -> Path | None:
    """The newest whole state of a run, or None."""
    found = [path for path in sorted((out / FOLDER).glob("step-*")) if (path / STATE).is_file()]
    return found[-1] if found else None


def read_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a state."""
    try:
        state: dict[str, Any] = json.loads((folder / STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the state in {str(folder)!r} is damaged ({error}); delete it to start anew") from error
    return state


@torch.no_grad()
def load_state(folder: Path, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Put weights and optimiser states back, bit for bit.

    Raises:
        CheckpointError: if it was written by another number of processes, or does not fit.
    """
    world = read_state(folder)["world"]
    if world != ranks.world:
        raise CheckpointError(
            f"the run in {str(folder)!r} was made by {world} processes, and there are {ranks.world}; continue it with "
            "as many, or start anew in another folder"
        )
    try:
        saved = load_file(folder / f"rank{ranks.rank}.safetensors")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the state in {str(folder)!r} is damaged ({error}); delete it to start anew") from error
    _materialise(optimizer)
    there = _places(module, optimizer)
    differ = there.keys() ^ saved.keys()
    if differ:
        raise CheckpointError(
            f"the state in {str(folder)!r} is of another drafter or optimiser ({sorted(differ)[0]!r} does not match); "
            "start anew in another folder"
        )
    for name, place in there.items():
        place.copy_(saved[name])


def _collect(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {name: place.detach().cpu().contiguous().clone() for name, place in _places(module, optimizer).items()}


def _places(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of a run by name, this process's part of it."""
    found = {f"module/{name}": local(value) for name, value in module.state_dict().items()}
    numbers = {p: i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    for parameter, states in optimizer.state.items():
        for name, value in states.items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer/{numbers[parameter]}/{name}"] = local(value)
    return found


def _materialise(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser create its states: a step of nothing, whose traces are overwritten."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
