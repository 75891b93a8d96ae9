"""`outpace generate`: answer prompts, streamed, as a batch, or raced against plain decoding."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outpace.cli.options import (
    INTERRUPTED,
    Debug,
    Device,
    Dtype,
    Json,
    MaxNewTokens,
    Model,
    Noise,
    Seed,
    TrustRemoteCode,
    load_target,
)
from outpace.cli.render import tell, write, write_json
from outpace.errors import ConfigError

if TYPE_CHECKING:
    from outpace.engine import Engine, Output
    from outpace.laws import Settings
    from outpace.target import Target


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="What to answer; '-' reads one from stdin.")],
    model: Model = "smollm2",
    drafter: Annotated[
        str,
        typer.Option("--drafter", "-d", help="'suffix', 'prompt_lookup:draft_len=8', 'a+b' to merge, or 'none'."),
    ] = "prompt_lookup",
    max_new_tokens: MaxNewTokens = 256,
    temperature: Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy; above 0 samples.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(help="Keep the likeliest tokens that hold this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Keep tokens this likely relative to the likeliest.")] = None,
    repetition_penalty: Annotated[float, typer.Option(help="On tokens of prompt and output; 1.0 is none.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="Once per token of the output.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="Per occurrence in the output.")] = 0.0,
    seed: Seed = 0,
    noise: Noise = "gumbel",
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; may be given several times.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is: no chat template.")] = False,
    rule: Annotated[str, typer.Option(help="path (same tokens), or token, block, tree for sampled drafts.")] = "path",
    strict: Annotated[bool, typer.Option("--strict", help="Run every pass at one width. Slower; for audits.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Race plain decoding against the drafter.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Answer prompts, faster than one token at a time.

    stdout is the answer, stderr the story. One prompt is streamed; several are answered together, in order.
    """
    texts = [_read(prompt) for prompt in prompts]
    from outpace.drafters import make_drafter
    from outpace.engine import Engine, encode
    from outpace.laws import Settings, find_rule

    settings = Settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        noise=noise,  # type: ignore[arg-type]  # checked there
        stop=tuple(stop or ()),
    )
    find_rule(rule)
    made = make_drafter(drafter)
    if compare and made is None:
        raise ConfigError("--compare races plain decoding against a drafter; name one, e.g. --drafter prompt_lookup")
    target = load_target(model, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    ids = [encode(target, text, chat=not raw) for text in texts]
    engine = Engine(target, made, rule=rule, strict=strict)  # type: ignore[arg-type]
    about = {"model": target.name, "drafter": drafter, "rule": rule, "settings": _shown(settings)}
    if compare:
        from outpace.cli.compare import compare_prompts

        compare_prompts(target, engine, texts, ids, settings, about, as_json=as_json)
    elif as_json:
        _as_document(engine, ids, settings, about)
    elif len(ids) == 1:
        _streamed(engine, target, ids[0], settings)
    else:
        _batch(engine, texts, ids, settings)


def _read(prompt: str) -> str:
    """The prompt, from stdin for '-'.

    Raises:
        ConfigError: if there is nothing in it.
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        where = "stdin was empty" if prompt == "-" else "empty prompt"
        raise ConfigError(f'{where}: pass some text, e.g. outpace generate "Why is the sky blue?"')
    return text


def _shown(settings: Settings) -> dict[str, Any]:
    """The settings the command line can set, as plain data."""
    names = (
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "noise",
        "stop",
    )
    return {name: getattr(settings, name) for name in names}


def _streamed(engine: Engine, target: Target, ids: list[int], settings: Settings) -> None:
    """Write text as it becomes certain; an interrupt keeps what was decoded."""
    uid = engine.submit(ids, settings)
    written = ""
    output: Output | None = None
    try:
        while output is None:
            for progress in engine.step():
                write(progress.chunk.text)
                written += progress.chunk.text
                output = progress.chunk.output
    except KeyboardInterrupt:
        output = engine.cancel(uid)
        write(output.text[len(written) :] + "\n")
        _tell_about(output)
        raise typer.Exit(INTERRUPTED) from None
    except BaseException:
        write("\n" if written else "")
        raise
    write("\n")
    _tell_about(output)
    del target


def _batch(engine: Engine, texts: list[str], ids: list[list[int]], settings: Settings) -> None:
    """Answer several prompts at once and print them in order; headings go to stderr."""
    outputs, interrupted = _answers(engine, ids, settings)
    for index, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        tell(f"[{index + 1}/{len(texts)}] {_heading(text)}")
        write(output.text + "\n" + ("\n" if index + 1 < len(texts) else ""))
        _tell_about(output)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _as_document(engine: Engine, ids: list[list[int]], settings: Settings, about: dict[str, Any]) -> None:
    outputs, interrupted = _answers(engine, ids, settings)
    write_json({**about, "outputs": [output.as_dict() for output in outputs]})
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _answers(engine: Engine, ids: list[list[int]], settings: Settings) -> tuple[list[Output], bool]:
    """(one output per prompt, whether an interrupt cut them short)."""
    try:
        return engine.generate(ids, settings), False
    except KeyboardInterrupt as error:
        partial: list[Output] | None = getattr(error, "partial", None)
        if partial is None:
            raise
        tell("interrupted: this is what had been decoded")
        return partial, True


def _heading(text: str, width: int = 70) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def _tell_about(output: Output) -> None:
    stats = output.stats
    for note in output.notes:
        tell(note)
    tell(
        f"{stats.emitted} tokens in {stats.rounds} rounds ({stats.emitted_per_round:.2f} emitted per round), "
        f"{stats.tokens_per_second:.1f} tokens/s; ended by {output.finish_reason}; guarantee: {output.guarantee}"
    )
