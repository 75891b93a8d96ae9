"""`outpace inspect`: what a trained drafter is, what it was made for, and how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outpace.cli.options import Debug, Device, Dtype, Json, TrustRemoteCode, load_target
from outpace.cli.render import console, table, tell, write_json
from outpace.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from outpace.target import Target


def inspect(
    drafter: Annotated[str, typer.Argument(help="Folder of a trained drafter, or the name of one that ships.")],
    tune: Annotated[
        str | None,
        typer.Option(
            "--tune", metavar="MODEL", help="Measure with this target which shape of draft pays here; keep it."
        ),
    ] = None,
    suite: Annotated[str, typer.Option(help="What the target answers for that: mini, or a JSONL file.")] = "mini",
    questions: Annotated[int, typer.Option(help="How many of it.")] = 6,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens of each answer.")] = 64,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what a trained drafter is and where it comes from. Loads no model, unless it is tuned for one."""
    document = describe(drafter)
    if tune is not None:
        target = load_target(tune, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        tuned = keep_fastest(Path(document["folder"]), target, suite, questions, max_new_tokens)
        if as_json:
            write_json(tuned)
        else:
            _show_tuned(tuned, console())
        return
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


def keep_fastest(folder: Path, target: Target, suite: str, questions: int, max_new_tokens: int) -> dict[str, Any]:
    """Measure the shapes of a checkpoint's drafts on a target, and keep the fastest for this device.

    Returns plain data: options chosen, what they should bring, every shape tried, where the choice is kept.
    """
    from outpace.bench.suites import load_suite
    from outpace.drafters.learning import LearnedDrafter
    from outpace.drafters.registry import find_drafter
    from outpace.drafters.shapes import device_name, keep_shape
    from outpace.engine import encode
    from outpace.train.tune import tune_shapes

    cls = find_drafter(describe(str(folder))["drafter"])
    assert issubclass(cls, LearnedDrafter)  # only such have a folder
    made = cls.as_stored(folder)
    made.fit(target)
    chosen = load_suite(suite).questions
    picked = chosen[:: max(1, len(chosen) // max(questions, 1))][:questions]
    prompts = [encode(target, question.turns[0]) for question in picked]
    tell(f"answering {len(prompts)} questions, then timing rounds on {device_name(target)} ...")
    tried = tune_shapes(made, prompts, max_new_tokens=max_new_tokens)
    document: dict[str, Any] = {
        "options": dict(tried[0].options),
        "target": target.name,
        "device": device_name(target),
        "suite": suite,
        "questions": len(prompts),
        "speedup": tried[0].speedup,
        "tried": [one.as_dict() for one in tried],
    }
    kept = keep_shape(folder, target, document)
    return {**document, "kept": None if kept is None else str(kept)}


def _show_tuned(tuned: dict[str, Any], on: Any) -> None:
    rows = [
        (
            ", ".join(f"{k}={_short(v)}" for k, v in one["options"].items()),
            str(one["nodes"]),
            f"{one['emitted_per_round']:.3f}",
            f"{one['round_ms']:.2f}",
            f"{one['speedup']:.3f}",
        )
        for one in tuned["tried"][:8]
    ]
    on.print(table(("options", "nodes", "emitted_per_round", "round, ms", "times plain decoding"), rows))
    if tuned["speedup"] < 1:
        on.print("No shape pays on this device: rounds with drafts will be stood down.")
    where = (
        f"kept in {tuned['kept']}, used from now on" if tuned["kept"] else "not kept (OUTPACE_CACHE=off, or no room)"
    )
    on.print(f"{len(tuned['tried'])} shapes tried on {tuned['device']}; the first is {where}", soft_wrap=True)


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
    tuned = made.get("tuned")
    if tuned is not None:
        moved = f", KL {tuned['mean_kl']:.4f} nats a token from it on held-out answers" if "mean_kl" in tuned else ""
        on.print(f"its target was trained along, from {tuned['from']}{moved}: {made['target']}", soft_wrap=True)
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
