"""The multi-token prediction module that a model's own checkpoint holds, in DeepSeek-V3's form.

transformers ignores these tensors at load. Their names, with L the number of layers (released checkpoints, and
`transformers.modeling_layers.MtpLayer`, whose order and norms these are):

    model.layers.L.{enorm, hnorm, eh_proj, shared_head.norm}       the joint and the last norm
    model.layers.L.{input_layernorm, self_attn.*, mlp.*, ...}      a block of the target's kind
    model.layers.L.{embed_tokens, shared_head.head}                copies of the target's own, where stored

The module reads the state behind the target's final norm. What is no such module of a plain block is refused in words.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open

from outpace.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

_OTHER: Final = re.compile(r"^(model\.)?(language_model\.)?mtp(_layers|_block|_dspark)?\.")
_NAMES: Final = {"shared_head.norm.weight": "norm.weight"}
_COPIES: Final = ("embed_tokens.weight", "shared_head.head.weight")
_BLOCK: Final = ("input_layernorm.", "post_attention_layernorm.", "self_attn.", "mlp.")


def shipped_module(target: Target) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(options that shape an `MTPNet`, its tensors), or None if the target's files hold no such weights.

    Raises:
        CheckpointError: if they hold some of a form that `MTPNet` is not, or that cannot be read.
    """
    root = _folder(target)
    where = {} if root is None else _keys(root)
    layers = target.layers_total
    behind = {int(m[1]) for key in where if (m := re.match(r"model\.layers\.(\d+)\.", key))}
    modules = sorted(number for number in behind if number >= layers)
    other = next((key for key in where if _OTHER.match(key)), None)
    if not modules and other is None:
        return None
    if target.family is None:
        raise _unfit(target, f"whose blocks, of model type {target.config.model_type!r}, are outside the family table")
    if not modules:
        raise _unfit(target, f"of a form that is not supported ({other}, ...)")
    if modules != [layers]:
        raise _unfit(target, f"in {len(modules)} modules, one per token ahead, and this drafter applies one to all")
    prefix = f"model.layers.{layers}."
    tensors = {key.removeprefix(prefix): _read(where[key], key) for key in where if key.startswith(prefix)}
    own = {_COPIES[0]: target.model.get_input_embeddings(), _COPIES[1]: target.model.get_output_embeddings()}
    for name, module in own.items():
        copy = tensors.pop(name, None)
        if copy is not None and not torch.equal(copy.to(module.weight.dtype), module.weight.detach().cpu()):
            raise _unfit(target, f"with a {name.removesuffix('.weight')} that is not the target's own")
    hidden_first = bool(getattr(target.config, "mtp_hidden_states_first", False))
    options = {
        "tap": "post_norm",
        "order": "hidden_embed" if hidden_first else "embed_hidden",
        "chain_norm": "shared",
        "head": "target",
        "vocabulary": 0,
    }
    return options, {_NAMES.get(k, f"block.{k}" if k.startswith(_BLOCK) else k): v for k, v in tensors.items()}


def check_module(target: Target, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Refuse tensors that are not those of an `MTPNet` for the target.

    Raises:
        CheckpointError: saying which ones are missing, unknown, or of another shape.
    """
    unknown, missing = sorted(tensors.keys() - wanted.keys()), sorted(wanted.keys() - tensors.keys())
    if unknown or missing:
        few = ", ".join([*unknown[:3], *(["..."] if len(unknown) > 3 else [])])
        raise _unfit(
            target,
            f"whose block is not a plain one (it has {few or 'nothing more'}; not {', '.join(missing[:3]) or 'less'}); "
            "experts, biases, norms of queries and latent attention are not supported",
        )
    bad = next((name for name, value in tensors.items() if value.shape != wanted[name].shape), None)
    if bad is not None:
        raise _unfit(target, f"whose {bad} is {tuple(tensors[bad].shape)}, where {tuple(wanted[bad].shape)} would fit")


def _unfit(target: Target, what: str) -> CheckpointError:
    return CheckpointError(
        f"{target.name} ships weights for multi-token prediction {what}; train a module instead (outpace train "
        "--drafter mtp)"
    )


def _folder(target: Target) -> Path | None:
    """Where the target's files lie, if it came from a folder or the hub's cache."""
    name = getattr(target.config, "_name_or_path", "")
    if not name:
        return None
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def _keys(root: Path) -> dict[str, Path]:
    """The file of every tensor."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"the weights in {str(path)!r} cannot be read: {error}") from error
    return found


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, "pt") as file:
        value: Tensor = file.get_tensor(key)
    return value
