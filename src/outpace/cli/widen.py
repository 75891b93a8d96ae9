"""`outpace widen`: write a model widened into a larger shape, so that small acceptance can be timed at large cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from outpace.cli.options import Debug, Dtype, Json, TrustRemoteCode, load_target
from outpace.cli.render import tell, write, write_json


def widen(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A Llama-type model, e.g. smollm2.")],
    like: Annotated[str, typer.Option(help="Shape to widen into, e.g. llama-3.1-8b.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write (default: MODEL-like-SHAPE).")] = None,
    seed: Annotated[int, typer.Option(help="Of the added weights.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be written, and leave.")] = False,
    dtype: Dtype = "bfloat16",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write MODEL widened into a larger shape: the same text, at the cost of the large model.

    On a GPU machine there is no need to write it: outpace bench MODEL --widen SHAPE builds it on the device.
    """
    from outpace.target.widen import find_shape, save_widened

    shape = find_shape(like)
    folder = out if out is not None else Path(f"{Path(model).name}-like-{like}")
    size = 4 if dtype == "float32" else 2
    about: dict[str, Any] = {
        "model": model, "like": like, "parameters": shape.parameters, "bytes": size * shape.parameters,
        "folder": str(folder),
    }  # fmt: skip
    if dry_run:
        text = f"{shape.parameters / 1e9:.2f}B parameters, {size * shape.parameters / 1e9:.1f} GB in {folder}\n"
        write_json(about) if as_json else write(text)
        return
    target = load_target(model, dtype=dtype, device="cpu", trust_remote_code=trust_remote_code)
    tell(f"writing {size * shape.parameters / 1e9:.1f} GB to {folder} ...")
    files = save_widened(target.model, like, folder, dtype=target.dtype, tokenizer=target.tokenizer, seed=seed)
    if as_json:
        write_json({**about, "files": [str(file) for file in files]})
    else:
        write(f"{folder}: {len(files)} files; the same text as {target.name}, at the cost of {like}\n")
