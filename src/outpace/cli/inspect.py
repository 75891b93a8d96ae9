"""`outpace inspect`: what a trained drafter is, what it was made for, and how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outpace.cli.options import Debug, Json
from outpace.cli.render import console, table, write_json
from outpace.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence


def inspect(
    drafter: Annotated[str, typer.Argument(help="Folder of a trained drafter, or the name of one that ships.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a trained drafter is and where it comes from. Loads no model."""
    document = describe(drafter)
    if as_json:
        write_json(document)
        return
    on = console()
    made_for = document["target"]
    on.print(
        f"{document['drafter']}: {document['parameters'] / 1e6:.2f} M parameters, {document['mib']:.1f} MiB, in "
        f"{document['folder']}",
        soft_wrap=True,
    )
    on.print(
        f"made for {made_for['name']}: {made_for['num_hidden_layers']} layers of {made_for['hidden_size']}, vocabulary "
        f"{made_for['vocab_size']}",
        soft_wrap=True,
    )
    on.print("options: " + ", ".join(f"{k}={_short(v)}" for k, v in document["options"].items()), soft_wrap=True)
    on.print(table(("tensor", "shape", "dtype"), document["tensors"]))
    _show_provenance(document["provenance"], on)


def describe(name: str) -> dict[str, Any]:
    """A checkpoint as plain data.

    Raises:
        CheckpointError: if there is none.
    """
    from safetensors import SafetensorError, safe_open

    from outpace.drafters.checkpoint import WEIGHTS, ZOO, read_config

    folder = Path(name).expanduser()
    if not folder.is_dir():
        shipped = sorted(ZOO.glob(f"*/{name}"))
        if not shipped:
            names = sorted(str(path.relative_to(ZOO)) for path in ZOO.glob("*/*") if path.is_dir())
            raise CheckpointError(
                f"no drafter {name!r}: neither a folder nor one that ships ({', '.join(names) or 'none does'})"
            )
        folder = shipped[0]
    config = read_config(folder)
    rows: list[tuple[str, str, str]] = []
    parameters = 0
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(key)
                shape = part.get_shape()
                size = 1
                for length in shape:
                    size *= length
                parameters += size if part.get_dtype() != "I64" else 0
                rows.append((key, "x".join(map(str, shape)), part.get_dtype()))
        size_mib = (folder / WEIGHTS).stat().st_size / 2**20
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
    return {
        "folder": str(folder),
        "drafter": config["drafter"],
        "options": config["options"],
        "target": config["target"],
        "parameters": parameters,
        "mib": size_mib,
        "tensors": rows,
        "provenance": config.get("provenance", {}),
    }


def _show_provenance(made: dict[str, Any], on: Any) -> None:
    if not made:
        on.print("provenance: none recorded")
        return
    on.print(
        f"made by: {made['command']} (commit {str(made['commit'])[:12]}, {made['device']}, {made['steps']} steps, "
        f"{made['seconds']:.0f} s)",
        soft_wrap=True,
    )
    corpus = made["corpus"]
    on.print(
        f"corpus {corpus['digest']}: {corpus['documents']} documents, {corpus['tokens']} tokens, temperatures "
        f"{corpus['temperatures']}, from {', '.join(corpus['sources'])}",
        soft_wrap=True,
    )
    losses = [point for point in made["curves"] if "loss" in point]
    shown = losses[:: max(1, len(losses) // 8)]
    if losses and shown[-1] is not losses[-1]:
        shown.append(losses[-1])
    on.print(
        table(
            ("step", "loss", "hit rate by depth, %"),
            [(str(p["step"]), f"{p['loss']:.3f}", " ".join(f"{100 * x:.0f}" for x in p["hit_rate"])) for p in shown],
        )
    )
    for point in (p for p in made["curves"] if "emitted_per_round" in p):
        rates = " ".join(f"{100 * x:.0f}" for x in point["accept_given_reached"])
        on.print(
            f"step {point['step']}: emitted_per_round {point['emitted_per_round']:.3f}, accepted by depth % {rates}"
        )


def _short(value: Any) -> str:
    """Options as they are, long lists by their length."""
    if isinstance(value, list) and len(value) > 6:
        items: Sequence[Any] = value
        return f"({len(items)} entries)"
    return str(value)
