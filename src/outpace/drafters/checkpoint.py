"""A learned drafter on disk: safetensors and a config.json that says which target it belongs to.

Knows no method: tensors and options go in and come out. Nothing is unpickled. A checkpoint that does not fit its target
is refused at load, in words; one made for other weights of the same shape is only warned about.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from outpace.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
_FORMAT: Final = 1


def describe_target(target: Target) -> dict[str, Any]:
    """What a drafter must agree on with its target, as plain data: shapes and hashes, no weights."""
    tokenizer = target.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    template = str(tokenizer.chat_template or "") if tokenizer is not None else ""
    return {
        "name": target.name,
        "model_type": target.config.model_type,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.layers_total,
        "vocab_size": target.vocabulary,
        "tokenizer_sha256": _sha256(json.dumps(vocabulary)) if vocabulary else None,
        "template_sha256": _sha256(template) if template else None,
        "embedding_norm": float(target.model.get_input_embeddings().weight.detach().float().norm()),
    }


def save_checkpoint(
    folder: str | os.PathLike[str], name: str, options: Mapping[str, Any], tensors: Mapping[str, Tensor], target: Target
) -> None:
    """Write a drafter's weights and config; an older checkpoint in the folder stays whole if anything fails.

    Args:
        folder: directory, created if missing.
        name: the drafter's registered name.
        options: its constructor options, JSON data.
        tensors: its weights.
        target: the target it was trained for.

    Raises:
        CheckpointError: if the files cannot be written (disk full, no permission).
    """
    path = Path(folder)
    config = {"format": _FORMAT, "drafter": name, "options": dict(options), "target": describe_target(target)}
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    writers: dict[str, Callable[[Path], object]] = {
        WEIGHTS: lambda file: save_file(plain, file, metadata={"drafter": name}),
        CONFIG: lambda file: file.write_text(json.dumps(config, indent=2) + "\n"),
    }
    temporary = {file: path / f".{file}.{os.getpid()}.tmp" for file in writers}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for file, write in writers.items():
            write(temporary[file])
        for file in writers:
            temporary[file].replace(path / file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot save drafter {name!r} to {str(path)!r}: {error}; what was there before is unchanged. Free some "
            "space, or pass another folder"
        ) from error
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)


def load_checkpoint(
    folder: str | os.PathLike[str], name: str, target: Target
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a drafter that fits the target.

    Raises:
        CheckpointError: if there is none, it is another drafter's, or it was made for another shape or tokenizer.
    """
    path = Path(folder)
    try:
        config = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no readable drafter in {str(path)!r}: {error}") from error
    if config.get("drafter") != name or config.get("format") != _FORMAT:
        raise CheckpointError(
            f"{str(path)!r} holds drafter {config.get('drafter')!r} (format {config.get('format')}), not {name!r} "
            f"(format {_FORMAT})"
        )
    _check_fit(str(path), config["target"], describe_target(target))
    return config["options"], tensors


def _check_fit(path: str, made_for: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    origin = made_for["name"]
    for key, words in (
        ("hidden_size", "hidden size"),
        ("num_hidden_layers", "number of layers"),
        ("vocab_size", "vocabulary size"),
    ):
        if made_for[key] != found[key]:
            raise CheckpointError(
                f"drafter {path!r} was trained for {origin!r} with {words} {made_for[key]}, but {found['name']!r} has "
                f"{found[key]}; train one for this target, or load {origin!r}"
            )
    hashes = (made_for["tokenizer_sha256"], found["tokenizer_sha256"])
    if None not in hashes and hashes[0] != hashes[1]:
        raise CheckpointError(
            f"drafter {path!r} was trained with the tokenizer of {origin!r}, and that of {found['name']!r} gives other "
            "ids; train one for this target"
        )
    if made_for["template_sha256"] != found["template_sha256"]:
        warnings.warn(
            f"drafter {path!r} was trained under another chat template than {found['name']!r} has; drafts will be "
            "accepted less often (the text is not affected)",
            stacklevel=3,
        )
    if abs(made_for["embedding_norm"] - found["embedding_norm"]) > 0.01 * abs(found["embedding_norm"]):
        warnings.warn(
            f"drafter {path!r} was trained for other weights ({origin!r}) than those of {found['name']!r}; drafts will "
            "be accepted less often (the text is not affected)",
            stacklevel=3,
        )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
