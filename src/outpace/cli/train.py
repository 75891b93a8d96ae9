"""`outpace train`: train a drafter on what its target wrote."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from outpace.cli.options import Debug, Device, Dtype, Json, TrustRemoteCode, load_target
from outpace.cli.render import console, tell, write_json
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from outpace.drafters.learning import LearnedDrafter
    from outpace.target import Target
    from outpace.train import Corpus, Trainer


def train(
    model: Annotated[str, typer.Argument(help="Alias (smollm2), hub name, directory or .gguf of the target.")],
    drafter: Annotated[
        str, typer.Option("--drafter", "-d", help="What to train: eagle3, 'eagle3:layers=2,vocabulary=16000', medusa.")
    ],
    corpus: Annotated[Path, typer.Option("--corpus", "-c", help="Folder written by outpace corpus for this target.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the drafter; a run in it is continued.")],
    begin_with: Annotated[
        str, typer.Option(help="Folder of a trained drafter, or the name of one that ships, to go on from.")
    ] = "",
    steps: Annotated[int, typer.Option(help="Optimiser steps; 0: by minutes or epochs.")] = 0,
    minutes: Annotated[float, typer.Option(help="Length of the run by the clock; the schedule ends with it.")] = 0.0,
    epochs: Annotated[float | None, typer.Option(help="Passes over the corpus.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the run the learning rate rises over.")] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine, linear or constant.")] = None,
    final_lr: Annotated[float | None, typer.Option(help="Share of the peak it ends at.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of AdamW.")] = None,
    clip: Annotated[float | None, typer.Option(help="Bound on the gradient's norm; 0: none.")] = None,
    tokens_per_step: Annotated[int | None, typer.Option(help="Tokens of a step, over all processes.")] = None,
    row_length: Annotated[int | None, typer.Option(help="Tokens of a packed row.")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of a batch on one device; the rest is accumulated.")] = None,
    loss: Annotated[
        str | None, typer.Option(help="soft, hard, kl, reverse_kl, total_variation, overlap, hybrid or race.")
    ] = None,
    depths: Annotated[int | None, typer.Option(help="Tokens ahead that are trained.")] = None,
    decay: Annotated[float | None, typer.Option(help="Weight of depth k is decay^k.")] = None,
    noise: Annotated[float | None, typer.Option(help="Amplitude of noise on features.")] = None,
    optimizer: Annotated[str, typer.Option(help="flash (8-bit moments) or adamw (float32).")] = "flash",
    parallel: Annotated[str, typer.Option(help="ddp or fsdp, under torchrun.")] = "ddp",
    eval_every: Annotated[int, typer.Option(help="Steps between runs of the decode loop; 0: at the end.")] = 500,
    eval_prompts: Annotated[int, typer.Option(help="Held-out prompts decoded; 0: never.")] = 32,
    eval_tokens: Annotated[int, typer.Option(help="Tokens of each.")] = 128,
    save_every: Annotated[int, typer.Option(help="Steps between states to resume from.")] = 500,
    keep_gib: Annotated[float, typer.Option(help="Memory to keep the target's states in for the next epoch.")] = 0.0,
    keep_disk_gib: Annotated[float, typer.Option(help="Disk for what finds no room there.")] = 0.0,
    limit: Annotated[int, typer.Option(help="Most documents of the corpus; 0: all.")] = 0,
    track: Annotated[str, typer.Option(help="none, tensorboard or trackio.")] = "none",
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not continue a run in the folder; replace it.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    seed: Annotated[int, typer.Option(help="Of initial weights and row order.")] = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train a drafter on what its target wrote.

    Killed at any moment and started again, it goes on from the last state. Several processes: torchrun -m outpace.cli
    train.
    """
    given = {
        "lr": lr, "warmup": warmup, "schedule": schedule, "final_lr": final_lr, "weight_decay": weight_decay,
        "clip": clip, "tokens_per_step": tokens_per_step, "row_length": row_length, "rows": rows, "loss": loss,
        "depths": depths, "decay": decay, "noise": noise, "epochs": epochs,
    }  # fmt: skip
    from outpace.train import Corpus, Trainer, TrainSettings
    from outpace.train.ranks import Ranks
    from outpace.train.show import Shown

    made = _make(drafter, {name: value for name, value in given.items() if value is not None})
    settings = TrainSettings(
        steps=steps, minutes=minutes, seed=seed, optimizer=cast("Any", optimizer), parallel=cast("Any", parallel),
        eval_every=eval_every, begin_with=begin_with,
        eval_prompts=eval_prompts, eval_tokens=eval_tokens, save_every=save_every, keep_gib=keep_gib,
        keep_disk_gib=keep_disk_gib,
    )  # fmt: skip
    documents = Corpus.load(corpus, limit=limit)
    with Ranks.joined() as ranks:
        where = f"cuda:{ranks.local}" if device is None and ranks.world > 1 and _has_cuda() else device
        target = load_target(model, dtype=dtype, device=where, trust_remote_code=trust_remote_code)
        on = console(story=True)
        with Shown(on, out, cast("Any", track if ranks.first else "none"), f"{made.name} {out.name}") as shown:
            trainer = Trainer(
                target, made, documents, out, settings, ranks=ranks, reporter=shown if ranks.first else None
            )
            if ranks.first:
                show_mask(documents, target, on)
                _tell_run(trainer)
            if dry_run:
                estimate = _estimate(trainer)
                if ranks.first:
                    _show_estimate(estimate, as_json=as_json)
                return
            if not fresh and trainer.resume():
                tell(f"continuing {out} at step {trainer.step}")
            trainer.run()
        if ranks.first:
            _close(trainer, out, as_json=as_json)


def _make(spec: str, changes: dict[str, Any]) -> LearnedDrafter:
    from outpace.drafters import make_drafter
    from outpace.drafters.learning import LearnedDrafter
    from outpace.drafters.losses import check_loss

    made = make_drafter(spec)
    if not isinstance(made, LearnedDrafter):
        raise ConfigError(f"drafter {spec!r} has nothing to train; name a learned one, e.g. --drafter eagle3")
    made.recipe = made.recipe.replace(**changes)
    check_loss(made.recipe.loss)
    return made


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def show_mask(corpus: Corpus, target: Target, on: Console, *, tokens: int = 160) -> None:
    """Print a document as training sees it: what was read is dim, what is learned is green."""
    from rich.text import Text

    if target.tokenizer is None or not len(corpus):
        return
    ids, prompt = next(corpus.documents())
    decode = target.tokenizer.decode
    text = Text("learned from, prompts dim: " if on.is_terminal else "learned from, in brackets: ", "bold")
    cut = max(0, prompt - tokens // 2)
    read = decode(ids[cut:prompt], skip_special_tokens=False)
    answer = decode(ids[prompt : prompt + tokens], skip_special_tokens=False)
    text.append(read, "dim")
    text.append(answer if on.is_terminal else f"[{answer}]", "green")
    on.print(text)


def _tell_run(trainer: Trainer) -> None:
    packing, corpus = trainer.packing, trainer.corpus
    used = packing.tokens / (len(packing.rows) * packing.length)
    trained = sum(p.numel() for p in trainer.objective.parameters() if p.requires_grad)
    length = f"{trainer.settings.minutes:g} minutes" if trainer.settings.minutes else f"{trainer.progress.steps} steps"
    tell(
        f"{len(corpus)} documents, {int(packing.answers.sum())} answer tokens in {len(packing.rows)} rows of "
        f"{packing.length} ({100 * used:.0f} % full; {packing.dropped}); {trained / 1e6:.2f} M parameters to train, "
        f"{length}, {trainer.steps_per_epoch} steps an epoch"
    )


def _estimate(trainer: Trainer) -> dict[str, Any]:
    """What a run costs, from three real steps on this device (nothing is kept)."""
    from outpace.train.loop import Clocked, Figures, _memory, _Prefetched

    device = trainer.target.device
    batches = _Prefetched(trainer._batches(0))
    times = []
    clock = Clocked(device)
    try:
        for _ in range(3):
            started = time.perf_counter()
            trainer._step(batches, Figures.none(trainer.recipe.depths, device), clock)
            trainer._synchronise()
            times.append(time.perf_counter() - started)
    finally:
        batches.close()
    step = min(times)
    steps = round(60 * trainer.settings.minutes / step) if trainer.settings.minutes else trainer.progress.steps
    weights = sum(p.numel() for p in trainer.objective.parameters())
    return {
        "step_seconds": round(step, 3),
        "tokens_per_second": round(trainer.rows_per_step * trainer.recipe.row_length / step),
        "feature_share": round(clock.feature_share(), 3),
        "steps": steps,
        "hours": round(steps * step / 3600, 3),
        "memory_gib": round(_memory(device), 2),
        "features_gib": round(trainer.features_bytes / 2**30, 3),
        "disk_mib": round(((2 + 14) * weights + (trainer.target.weight_bytes if trainer.served else 0)) / 2**20, 1),
        "recipe": dataclasses.asdict(trainer.recipe),
    }


def _show_estimate(estimate: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        write_json(estimate)
        return
    console().print("\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in estimate.items()), soft_wrap=True)


def _close(trainer: Trainer, out: Path, *, as_json: bool) -> None:
    evaluations = [point for point in trainer.curves if "emitted_per_round" in point]
    last = evaluations[-1] if evaluations else None
    losses = [point for point in trainer.curves if "loss" in point]
    drifts = [point for point in trainer.curves if "mean_kl" in point]
    tuned = trainer.served
    if as_json:
        document = {"out": str(out), "steps": trainer.step, "last": losses[-1:], "evaluation": last}
        write_json(document if tuned is None else {**document, "target": str(tuned), "drift": drifts[-1:]})
        return
    figure = f"emitted_per_round {last['emitted_per_round']:.3f} on held-out prompts" if last else "not evaluated"
    console().print(
        f"{trainer.drafter.name} trained for {trainer.step} steps, {figure}; saved to {out}. Use it: outpace generate "
        + (f"--model {tuned} " if tuned else "")
        + f'--drafter {out} "..."',
        soft_wrap=True,
    )
    if tuned is not None:
        moved = "how far was not measured (no held-out prompts)"
        if drifts:
            moved = (
                f"KL {drifts[-1]['mean_kl']:.4f} nats a token, the same greedy choice at "
                f"{100 * drifts[-1]['greedy_agreement']:.1f} % of {drifts[-1]['tokens']} held-out tokens"
            )
        console().print(
            f"The target was trained along: {tuned} says something else than before ({moved})", soft_wrap=True
        )
