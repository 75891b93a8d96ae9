"""`outpace bench`: measure drafters against plain decoding, look at the result, compare two results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from outpace.cli.check import split_drafters
from outpace.cli.options import (
    DID_NOT_HOLD,
    INTERRUPTED,
    Debug,
    Device,
    Dtype,
    Json,
    Noise,
    Seed,
    TrustRemoteCode,
    load_target,
)
from outpace.cli.render import tell, write, write_json
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.bench import BenchConfig, Ledger, Suite, Widened
    from outpace.target import Target

QUICK: Final[dict[str, Any]] = {
    "per_task": 1,
    "repetitions": 1,
    "max_new_tokens": 32,
    "budget_s": 60.0,
    "warm_up_runs": 1,
    "replays": 1,
}
COMPAT: Final[dict[str, Any]] = {"template": "vicuna", "turns": "own", "max_new_tokens": 1024}


class RunUnlessNamed(TyperGroup):
    """A group in which `bench MODEL ...` runs, `bench compare ...` and `bench report ...` do what they say."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the first word as a command if it is one, and as the model of a run otherwise."""
        if not args or args[0] not in self.commands:
            args = ["run", *args]
        return super().parse_args(ctx, args)


bench = typer.Typer(
    cls=RunUnlessNamed, name="bench", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)


@bench.command(
    epilog="Also: outpace bench compare A.json B.json, and outpace bench report RESULT.json --out PAGE.html."
)
def run(
    model: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="Alias, hub name, directory or .gguf file.")
    ] = "smollm2",
    drafters: Annotated[
        str, typer.Option("--drafters", "-d", help="Specs separated by commas; plain decoding always runs.")
    ] = "prompt_lookup,suffix",
    suite: Annotated[str, typer.Option(help="mini, spec-bench:FILE, or a JSONL file of your own.")] = "mini",
    out: Annotated[Path, typer.Option(help="Report: .html (with .md, .json beside it), .md or .json.")] = Path(
        "outpace-bench.html"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A first look, under two minutes on two CPU cores.")] = False,
    stock: Annotated[
        str | None,
        typer.Option(help="transformers.generate beside it: 'none', or specs like transformers:assistant_model=NAME."),
    ] = None,
    ceilings: Annotated[
        bool, typer.Option("--ceilings", help="Also a drafter that is always right, and one that never is.")
    ] = False,
    temperatures: Annotated[str, typer.Option(help="Comma-separated; each is a table.")] = "0",
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated; each is a table.")] = "1",
    modes: Annotated[
        str, typer.Option(help="natural (ends at eos), fixed (exactly --max-new-tokens), or both.")
    ] = "natural",
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", help="Most tokens of an answer.")
    ] = None,
    repetitions: Annotated[int | None, typer.Option(help="Times each prompt is run with each method (3).")] = None,
    seed: Seed = 0,
    noise: Noise = "gumbel",
    tasks: Annotated[str, typer.Option(help="Only these tasks of the suite, comma-separated.")] = "",
    per_task: Annotated[int | None, typer.Option(help="At most so many questions of each task.")] = None,
    share: Annotated[float, typer.Option(help="Share of each task's questions, drawn by seed.")] = 1.0,
    budget_s: Annotated[
        float | None, typer.Option(help="Stop measuring after so many seconds, at a stratified subsample.")
    ] = None,
    part: Annotated[
        str, typer.Option(metavar="K/N", help="Only every N-th question, from the K-th; `bench report` joins parts.")
    ] = "1/1",
    limit_s: Annotated[float | None, typer.Option(help="Cut a trial after so many seconds.")] = None,
    state: Annotated[str, typer.Option(help="cold: drafters forget between prompts. warm: they learn.")] = "cold",
    template: Annotated[str | None, typer.Option(help="chat (the model's own), vicuna, or none.")] = None,
    turns: Annotated[
        str | None, typer.Option(help="Earlier answers in later turns: plain decoding's, or one's own.")
    ] = None,
    compat: Annotated[str | None, typer.Option(help="spec-bench: also count the way it publishes.")] = None,
    rule: Annotated[str, typer.Option(help="path (same tokens), or token, block, tree for sampled drafts.")] = "path",
    stand_down: Annotated[
        bool, typer.Option("--stand-down/--no-stand-down", help="Let the engine rest drafters that do not pay.")
    ] = True,
    warm_up_runs: Annotated[int | None, typer.Option(help="Most warm-up runs per method and prompt length.")] = None,
    replays: Annotated[int | None, typer.Option(help="Answers shown round by round in the report (3).")] = None,
    endpoint: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=URL[,MODEL] of an OpenAI-compatible server, instead of a model; the first is the baseline."
        ),
    ] = None,
    widen: Annotated[
        str | None, typer.Option(help="Widen the model into this shape first, e.g. llama-3.1-8b; figures say so.")
    ] = None,
    path: Annotated[str, typer.Option(help="How the engine's passes run: auto, readable or fast.")] = "auto",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew; an older run in --out is renamed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and leave.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure drafters on your model, your machine, your prompts.

    Paired and interleaved in one process, every answer compared with plain decoding's. An interrupted run goes on
    where it stopped when the same command is given again. Exit code 3 if a text differs beyond near ties.
    """
    from outpace.bench import STOCK, load_suite
    from outpace.bench.report.files import paths_for

    values: dict[str, Any] = {
        "drafters": () if endpoint else tuple(split_drafters(drafters)),
        "stock": () if endpoint else STOCK if stock is None else _stock(stock),
        "ceilings": ceilings,
        "temperatures": _numbers(temperatures, float, "--temperatures"),
        "batch_sizes": _numbers(batch_sizes, int, "--batch-sizes"),
        "modes": tuple(filter(None, modes.split(","))),
        "seed": seed,
        "noise": noise,
        "tasks": tuple(filter(None, (task.strip() for task in tasks.split(",")))),
        "share": share,
        "part": _numbers(part.replace("/", ","), int, "--part"),
        "limit_s": limit_s,
        "state": state,
        "compat": compat,
        "rule": rule,
        "stand_down": stand_down,
    }
    given = {
        "max_new_tokens": max_new_tokens, "repetitions": repetitions, "per_task": per_task, "budget_s": budget_s,
        "template": template, "turns": turns, "warm_up_runs": warm_up_runs, "replays": replays,
    }  # fmt: skip
    config = _config(values, given, quick=quick)
    loaded = load_suite(suite)
    paths = paths_for(out)
    if dry_run:
        _show_plan(config, loaded, paths)
        return
    ledger = _open(paths["ledger"], fresh=fresh)
    result = (
        _endpoints(endpoint, config, loaded, ledger)
        if endpoint
        else _model(
            model, config, loaded, ledger, paths["ledger"], widen=widen, path=path, dtype=dtype, device=device,
            trust_remote_code=trust_remote_code,
        )
    )  # fmt: skip
    _finish(result, out, as_json=as_json)


def _config(values: dict[str, Any], given: dict[str, Any], *, quick: bool) -> BenchConfig:
    """Defaults, then --quick, then --compat, then what was said outright."""
    from outpace.bench import BenchConfig

    chosen = {**values, **(QUICK if quick else {})}
    if values["compat"] == "spec-bench":
        chosen.update(COMPAT)
    return BenchConfig(**{**chosen, **{name: value for name, value in given.items() if value is not None}})


def _numbers(text: str, kind: type, flag: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r}: expected numbers separated by commas, e.g. {flag} 0,1") from error


def _stock(text: str) -> tuple[str, ...]:
    return () if text == "none" else tuple(split_drafters(text))


def _open(path: Path, *, fresh: bool) -> Ledger:
    from outpace.bench import Ledger, set_aside

    if fresh:
        aside = set_aside(path)
        if aside is not None:
            tell(f"the older run is kept as {aside}")
    ledger = Ledger(path)
    if ledger.records:
        tell(f"going on with {path}: {len(ledger.records)} trials are there")
    return ledger


def _model(
    model: str,
    config: BenchConfig,
    suite: Suite,
    ledger: Ledger,
    file: Path,
    *,
    widen: str | None,
    path: str,
    dtype: str,
    device: str | None,
    trust_remote_code: bool,
) -> dict[str, Any]:
    from outpace.bench import LastResort, bench
    from outpace.cli.live import LiveTable
    from outpace.drafters import make_drafter

    for spec in config.drafters:
        make_drafter(spec)  # a mistake here should not cost the loading of a model
    target = load_target(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    widened = None
    if widen is not None:
        target, widened = _widened(target, widen)
    target = target.through(path)  # type: ignore[arg-type]
    with LiveTable() as table:
        return bench(
            target, config, suite, ledger, watch=table.watch, last_resort=LastResort(file.with_suffix(".stuck")),
            widened=widened,
        )  # fmt: skip


def _widened(small: Target, shape: str) -> tuple[Target, Widened]:
    """A target in the larger shape, on the same device, and where it came from."""
    from outpace.bench import Widened
    from outpace.target import Target
    from outpace.target.widen import Widening, widen

    widening = Widening(small.model, shape)
    tell(f"widening to {shape}: {widening.shape.parameters / 1e9:.2f}B parameters on {small.device}")
    model = widen(small.model, shape, small.dtype, small.device)
    target = Target(model, small.tokenizer, name=f"{small.name}, {widening.label}")
    return target, Widened(small, widening)


def _endpoints(endpoints: list[str], config: BenchConfig, suite: Suite, ledger: Ledger) -> dict[str, Any]:
    from outpace.bench import bench_endpoints
    from outpace.cli.live import LiveTable

    with LiveTable() as table:
        return bench_endpoints(endpoints, config, suite, ledger, watch=table.watch)


def _finish(result: dict[str, Any], out: Path, *, as_json: bool) -> None:
    """Write the report, print the tables, and say by the exit code whether every text held."""
    from outpace.bench.report import render_markdown, write_report

    files = write_report(result, out)
    if as_json:
        write_json(result)
    else:
        write(render_markdown(result))
    tell(f"written: {', '.join(str(file) for file in files)}")
    if "interrupted" in result["coverage"]["words"]:
        tell("the same command goes on from here")
        raise typer.Exit(INTERRUPTED)
    if any(row["parity"]["differs"] for cell in result["cells"] for row in cell["methods"]):
        raise typer.Exit(DID_NOT_HOLD)


def _show_plan(config: BenchConfig, suite: Suite, paths: dict[str, Path]) -> None:
    """What a run would measure, without a model."""
    from outpace.bench import select
    from outpace.bench.runner import plan

    chosen = select(suite, tasks=config.tasks, per_task=config.per_task, share=config.share, seed=config.seed)
    blocks = plan(config, chosen)
    methods = 1 + len(config.drafters) + len(config.stock) + 2 * config.ceilings
    answers = sum(len(block.unit) * len(block.unit[0].turns) for block in blocks)
    lines = [
        f"suite {chosen.name}: {len(chosen.questions)} questions ({chosen.note})",
        f"{len(blocks)} blocks of up to {methods} methods, {answers * methods} answers of up to "
        f"{config.max_new_tokens} tokens: at most {answers * methods * config.max_new_tokens / 1e6:.2f} million tokens",
        f"budget: {'none' if config.budget_s is None else f'{config.budget_s:g} s of measuring'}",
        f"files: {', '.join(str(path) for path in paths.values())}",
    ]
    write("\n".join(lines) + "\n")


@bench.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another one.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare two results, prompt by prompt, and say what makes them incomparable."""
    from outpace.bench.report import compare as compare_results
    from outpace.bench.report import comparison_markdown, load_result

    found = compare_results(load_result(first), load_result(second))
    if as_json:
        write_json(found)
    else:
        write(comparison_markdown(found))


@bench.command()
def report(
    results: Annotated[
        list[Path],
        typer.Argument(
            metavar="RESULT", help="The .json or .jsonl of a run, finished or not, or all .jsonl of its parts."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Where to write it: .html, .md or .json.")],
    debug: Debug = False,
) -> None:
    """Write a run's report again, from its files and without its model; of several parts, one report."""
    from outpace.bench import Ledger, derive
    from outpace.bench.report import load_result, write_report
    from outpace.errors import ResultError

    ledgers = [result for result in results if result.suffix == ".jsonl"]
    missing = next((ledger for ledger in ledgers if not ledger.is_file()), None)
    if missing is not None:
        raise ResultError(f"no file {str(missing)!r}; pass the .jsonl or .json that a run has written")
    if len(results) > 1 and len(ledgers) < len(results):
        raise ResultError(f"parts of a run are joined from their .jsonl files; got {', '.join(map(str, results))}")
    if len(results) > 1:
        found = derive(Ledger.joined(results))
    elif ledgers:
        found = derive(Ledger(results[0]))
    else:
        found = load_result(results[0])
    tell(f"written: {', '.join(str(file) for file in write_report(found, out))}")
