"""A learned drafter on disk: safetensors and a config.json that says which target it belongs to.

Knows no method: tensors and options go in and come out. Nothing is unpickled. A checkpoint that does not fit its target
is refused at load, in words; one made for other weights of the same shape is only warned about. Drafters that ship with
outpace are such folders too, inside the package: zoo/<target>/<drafter>/.
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
from outpace.target.tuned import tuned_by

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Target

WEIGHTS: Final = "model.safetensors"
CONFIG: Final = "config.json"
ZOO: Final = Path(__file__).resolve().parents[1] / "zoo"
_FORMAT: Final = 1
_PROBE: Final = (
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
)


def describe_target(target: Target) -> dict[str, Any]:
    """What a drafter must agree on with its target, as plain data: shapes and hashes, no weights."""
    tokenizer = target.tokenizer
    vocabulary = sorted(tokenizer.get_vocab().items()) if tokenizer is not None else []
    tuned = tuned_by(target)
    return {
        "name": target.name,
        "model_type": target.config.model_type,
        "hidden_size": target.hidden_size,
        "num_hidden_layers": target.layers_total,
        "vocab_size": target.vocabulary,
        "tokenizer_sha256": _sha256(json.dumps(vocabulary)) if vocabulary else None,
        "template_sha256": _template_hash(tokenizer),
        "embedding_norm": float(target.model.get_input_embeddings().weight.detach().float().norm()),
        **({} if tuned is None else {"tuned": tuned}),
    }


def save_checkpoint(
    folder: str | os.PathLike[str],
    name: str,
    options: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    target: Target,
    *,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a drafter's weights and config; an older checkpoint in the folder stays whole if anything fails.

    Args:
        folder: directory, created if missing.
        name: the drafter's registered name.
        options: its constructor options, JSON data.
        tensors: its weights.
        target: the target it was trained for.
        provenance: what made the weights, JSON data.

    Raises:
        CheckpointError: if the files cannot be written (disk full, no permission).
    """
    path = Path(folder)
    config = {
        "format": _FORMAT,
        "drafter": name,
        "options": dict(options),
        "target": describe_target(target),
        "provenance": dict(provenance or {}),
    }
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


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's config, without its weights.

    Raises:
        CheckpointError: if there is none, or it is of another format.
    """
    path = Path(folder)
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no readable drafter in {str(path)!r}: {error}") from error
    missing = {"format", "drafter", "options", "target"} - config.keys()
    if missing or config["format"] != _FORMAT:
        raise CheckpointError(
            f"no readable drafter in {str(path)!r}: its {CONFIG} is none of a drafter of outpace (format {_FORMAT})"
        )
    return config


def load_checkpoint(
    folder: str | os.PathLike[str], name: str, target: Target, *, force: bool = False
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of a drafter that fits the target.

    force: load even where tokenizer or chat template differ; shapes must fit all the same.

    Raises:
        CheckpointError: if there is none, it is another drafter's, or it was made for another shape, tokenizer or
            chat template.
    """
    path = Path(folder)
    config = read_config(path)
    try:
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"no readable drafter in {str(path)!r}: {error}") from error
    if config["drafter"] != name:
        raise CheckpointError(f"{str(path)!r} holds drafter {config['drafter']!r}, not {name!r}")
    _check_fit(str(path), config["target"], describe_target(target), force)
    return config["options"], tensors


def find_shipped(name: str, target: Target) -> Path | None:
    """The folder of a drafter that ships with outpace and was trained for such a target, or None."""
    keys = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "tokenizer_sha256", "template_sha256")
    found = sorted(ZOO.glob(f"*/{name}/{CONFIG}"))
    description = describe_target(target) if found else {}
    for path in found:
        made_for = read_config(path.parent)["target"]
        if all(made_for[key] == description[key] for key in keys):
            return path.parent
    return None


def _check_fit(path: str, made_for: Mapping[str, Any], found: Mapping[str, Any], force: bool) -> None:
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
    for key, words in (
        ("tokenizer_sha256", "the tokenizer of {0}, and that of {1} gives other ids"),
        ("template_sha256", "the chat template of {0}, and that of {1} writes conversations differently"),
    ):
        if None not in (made_for[key], found[key]) and made_for[key] != found[key] and not force:
            told = words.format(repr(origin), repr(found["name"]))
            raise CheckpointError(
                f"drafter {path!r} was trained with {told}: its drafts would be accepted less often. Train one for "
                "this target, or load it all the same with force=true (the text is never affected)"
            )
    if abs(made_for["embedding_norm"] - found["embedding_norm"]) > 0.01 * abs(found["embedding_norm"]):
        warnings.warn(
            f"drafter {path!r} was trained for other weights ({origin!r}) than those of {found['name']!r}; drafts will "
            "be accepted less often (the text is not affected)",
            stacklevel=3,
        )
        return
    if made_for.get("tuned") != found.get("tuned"):
        warnings.warn(
            f"drafter {path!r} was trained for {_said(made_for)}, and this is {_said(found)}, with other weights; "
            "drafts will be accepted less often (the text is not affected)",
            stacklevel=3,
        )


def _said(target: Mapping[str, Any]) -> str:
    """A target by name and by what it was tuned from."""
    tuned = target.get("tuned")
    return repr(target["name"]) + ("" if tuned is None else f", tuned from {tuned['from']!r}")


def _template_hash(tokenizer: Any) -> str | None:
    """Hash of what the template makes of a conversation: two spellings of one template are the same."""
    if tokenizer is None or not tokenizer.chat_template:
        return None
    render = getattr(tokenizer, "apply_chat_template", None)
    if render is None:
        return _sha256(str(tokenizer.chat_template))
    today: dict[str, Any] = {"date_string": "today", "strftime_now": lambda _: "today"}  # or tomorrow it would not fit
    return _sha256(str(render(list(_PROBE), add_generation_prompt=True, tokenize=False, **today)))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
