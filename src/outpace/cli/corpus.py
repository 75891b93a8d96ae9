"""`outpace corpus`: let the target answer prompts, for drafters to learn from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outpace.cli.options import Debug, Device, Dtype, Json, Seed, TrustRemoteCode, load_target
from outpace.cli.render import console, tell, write_json
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.target import Target
    from outpace.train import CorpusReport, CorpusSettings, PromptReport


def corpus(
    model: Annotated[str, typer.Argument(help="Alias (smollm2), hub name, directory or .gguf of the target.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the corpus; continued if it exists.")],
    prompts: Annotated[
        list[str],
        typer.Option("--prompts", "-p", help="A .jsonl or .txt file, a folder, or datasets:NAME[:SPLIT[:COLUMN]]."),
    ],
    exclude: Annotated[
        list[str] | None, typer.Option("--exclude", help="Evaluation prompts that must not be in it.")
    ] = None,
    wrap: Annotated[
        list[str] | None,
        typer.Option("--wrap", help="DOMAIN=TEXT with {prompt}: what prompts of a domain become."),
    ] = None,
    temperatures: Annotated[
        str, typer.Option("--temperatures", "-t", help="One answer per prompt at each.")
    ] = "0,0.7,1",
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens that hold this mass.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Longest answer.")] = 512,
    max_prompt: Annotated[int, typer.Option(help="Longest prompt, in tokens; others are left out.")] = 1024,
    limit: Annotated[int, typer.Option(help="Most prompts; 0 for all.")] = 0,
    minutes: Annotated[float, typer.Option(help="Stop after so long; 0: when done.")] = 0.0,
    max_batch: Annotated[int, typer.Option(help="Answers in one pass.")] = 64,
    shard: Annotated[int, typer.Option(help="Answers per file.")] = 1024,
    strict: Annotated[bool, typer.Option("--strict", help="Refuse malformed lines instead of counting them.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and stop.")] = False,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Let a target answer prompts, to train drafters on.

    Stopped and started again, it goes on where it was. Two in a hundred prompts are held out for evaluation.
    """
    from outpace.train import CorpusSettings, read_prompts

    settings = CorpusSettings(
        temperatures=_numbers(temperatures),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        max_new_tokens=max_new_tokens,
        max_prompt=max_prompt,
        seed=seed,
        shard=shard,
        max_batch=max_batch,
    )
    found = read_prompts(prompts, exclude=exclude or (), wrap=_wraps(wrap or []), strict=strict, limit=limit)
    _tell_prompts(found)
    target = load_target(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if dry_run:
        _estimate(target, found, settings, as_json=as_json)
        return
    report = _write(target, found, out, settings, minutes, [Path(p).name for p in prompts])
    document = {
        "out": str(out),
        "answers": report.answers,
        "tokens": report.tokens,
        "seconds": round(report.seconds, 1),
        "shards": {"found": report.found, "written": report.written, "left": report.left},
        "empty": report.empty,
        "long_prompts": report.long_prompts,
        "repeated_in_ids": report.repeated,
        "prompts": found.as_dict(),
    }
    if as_json:
        write_json(document)
        return
    console().print(
        f"{report.answers} answers, {report.tokens} tokens in {report.seconds:.0f} s "
        f"({report.tokens / max(report.seconds, 1e-9):.0f} tokens/s); shards: {report.found} were there, "
        f"{report.written} written, {report.left} left; {report.empty} empty answers and {report.long_prompts} prompts "
        f"of more than {max_prompt} tokens left out, {report.repeated} equal to another in ids",
        soft_wrap=True,
    )


def _write(
    target: Target, found: PromptReport, out: Path, settings: CorpusSettings, minutes: float, sources: list[str]
) -> CorpusReport:
    from rich.progress import BarColumn, Progress, TextColumn

    from outpace.train import write_corpus

    on = console(story=True)
    last = time.monotonic()
    with Progress(
        BarColumn(), TextColumn("{task.fields[text]}"), console=on, transient=True, disable=not on.is_terminal
    ) as bar:
        task = bar.add_task("corpus", total=1.0, text="")

        def show(report: CorpusReport, total: int) -> None:
            nonlocal last
            rate = report.tokens / max(report.seconds, 1e-9)
            left = (total - report.answers) * report.seconds / max(report.answers, 1)
            text = (
                f"{report.answers}/{total} answers | {rate:.0f} tokens/s | {left:.0f} s left | {report.written} shards"
            )
            bar.update(task, completed=report.answers / max(total, 1), text=text)
            if not on.is_terminal and time.monotonic() - last > 10:
                last = time.monotonic()
                tell(text)

        return write_corpus(target, found, out, settings, minutes=minutes, sources=sources, progress=show)


def _tell_prompts(found: PromptReport) -> None:
    for line in found.malformed[:5]:
        tell(f"malformed, left out: {line}")
    tell(
        f"{len(found.prompts)} prompts; {len(found.malformed)} lines malformed, {found.repeated} repeated, "
        f"{found.excluded} equal to evaluation prompts"
    )


def _estimate(target: Target, found: PromptReport, settings: CorpusSettings, *, as_json: bool) -> None:
    """Time from a short run at the asked batch size; answers as long as allowed, so all figures are upper bounds."""
    from outpace.engine import Engine, encode

    answers = len(found.prompts) * len(settings.temperatures)
    engine = Engine(target, None, max_batch=settings.max_batch)
    for line in found.prompts[: settings.max_batch]:
        ids = encode(target, line.content)[: settings.max_prompt]
        engine.submit(ids, settings.sampling(settings.temperatures[0], 0))
    engine.step()
    started, emitted = time.perf_counter(), 0
    for _ in range(8):
        emitted += sum(len(one.chunk.round.tokens) for one in engine.step() if one.chunk.round)
    rate = emitted / (time.perf_counter() - started)
    tokens = answers * settings.max_new_tokens
    document: dict[str, Any] = {
        "answers": answers,
        "tokens_at_most": tokens,
        "tokens_per_second": round(rate, 1),
        "hours_at_most": round(tokens / rate / 3600, 3),
        "disk_mib_at_most": round(8 * tokens / 2**20, 1),
        "cache_mib": round(engine._context.cache.bytes / 2**20, 1),
    }
    if as_json:
        write_json(document)
        return
    console().print("\n".join(f"{key.replace('_', ' ')}: {value}" for key, value in document.items()))


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"--temperatures takes numbers separated by commas, e.g. 0,0.7,1; got {text!r}") from error


def _wraps(items: list[str]) -> dict[str, str]:
    wraps = {}
    for item in items:
        domain, equals, text = item.partition("=")
        if not equals or "{prompt}" not in text:
            raise ConfigError(f"--wrap takes DOMAIN=TEXT with {{prompt}} in it, got {item!r}")
        wraps[domain] = text.replace("\\n", "\n")
    return wraps
