"""Dense copies of GGUF models in the user's cache: reading a GGUF file takes half a minute, a copy two seconds.

A copy is a folder as `save_pretrained` writes it, named by a hash of the file's content, the dtype and the version of
transformers. It appears whole or not at all, can be deleted at any time, and is never needed: where it cannot be
written, the file is read again. `OUTPACE_CACHE` names another folder for them; `OUTPACE_CACHE=off` keeps none.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError

from outpace.caches import cache_folder

if TYPE_CHECKING:
    import torch

_LOG: Final = logging.getLogger("outpace")
_CONFIG: Final = "config.json"


def copy_of(file: Path, dtype: torch.dtype, version: str) -> Path | None:
    """Where the copy of a file's model in some dtype is, or would be; None if none is kept."""
    folder = cache_folder()
    if folder is None:
        return None
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
    digest.update(f"{dtype} {version}".encode())
    return folder / "gguf" / f"{file.stem}-{digest.hexdigest()[:16]}"


def is_whole(copy: Path | None) -> bool:
    """Whether a copy is there."""
    return copy is not None and (copy / _CONFIG).is_file()


def keep(copy: Path | None, model: Any, tokenizer: Any) -> None:
    """Write a copy, if there is room for it; whoever comes second leaves the first one's."""
    if copy is None or is_whole(copy):
        return
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    temporary = None
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(copy.parent).free < 4 * size:
            _LOG.info("no dense copy of the model is kept: less than %d MB are free", 4 * size >> 20)
            return
        temporary = Path(tempfile.mkdtemp(dir=copy.parent))
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.rename(copy)
    except (OSError, SafetensorError) as error:
        _LOG.info("no dense copy of the model is kept: %s", error)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
