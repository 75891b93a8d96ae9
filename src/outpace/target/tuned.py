"""A tuned target: another one's weights with an adapter merged in, a model of its own from then on.

It says something else than the target it came from, and says so: its config names the adapter by a hash, so that
drafters made for one of the two are told from those made for the other. Written, it is an ordinary folder of
transformers that anything can load.
"""

from __future__ import annotations

import copy
import hashlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError

from outpace.errors import CheckpointError
from outpace.target.adapters import check_adapter, whole
from outpace.target.loading import _Quiet
from outpace.target.model import Target

if TYPE_CHECKING:
    from outpace.target.adapters import GatedLoRA

MARK: Final = "outpace_tuned"  # of the model's config: {"from": name of the target, "adapter": hash}


@torch.no_grad()
def tuned_copy(target: Target, adapter: GatedLoRA, name: str) -> Target:
    """A target whose every row is what `target` makes of it under the adapter, up to rounding in the weights' dtype.

    The model is copied; sums are float32. All processes of a sharded adapter must ask at once.

    Raises:
        CheckpointError: if the adapter does not fit the model.
    """
    with torch.inference_mode(False):
        model = copy.deepcopy(target.model)
        digest = hashlib.sha256(target.name.encode())
        for layer, module in check_adapter(model, adapter).items():
            weight = module.weight
            weight.copy_((weight.float() + adapter.delta(layer)).to(weight.dtype))
            for tensor in adapter.tail(layer)[:2]:
                digest.update(whole(tensor.detach()).float().cpu().numpy().tobytes())
        setattr(model.config, MARK, {"from": target.name, "adapter": digest.hexdigest()[:16]})
        model.config._name_or_path = name
        return Target(model, target.tokenizer, name=name, path=target.path)


def tuned_by(target: Target) -> dict[str, Any] | None:
    """What a target was tuned from and by, {"from", "adapter"}; None for one that was not."""
    found: dict[str, Any] | None = getattr(target.config, MARK, None)
    return found


def save_target(target: Target, folder: Path) -> None:
    """Write model, config and tokenizer as transformers does; the folder appears whole, or stays what it was.

    Raises:
        CheckpointError: if it cannot be written.
    """
    import transformers

    made, before = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "old"))
    try:
        for left in (made, before):
            shutil.rmtree(left, ignore_errors=True)
        made.mkdir(parents=True)
        with _Quiet(transformers):
            target.model.save_pretrained(made)
        if target.tokenizer is not None:
            tokenizer: Any = target.tokenizer
            tokenizer.save_pretrained(made)
        if folder.exists():
            folder.replace(before)
        made.replace(folder)
        shutil.rmtree(before, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(made, ignore_errors=True)
        raise CheckpointError(
            f"cannot save the tuned target to {str(folder)!r}: {error}. Free some space, or pass another folder"
        ) from error
