"""Flags that several commands share, each equal to the setting it stands for, and the exit codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from outpace.errors import ConfigError, suggestion

if TYPE_CHECKING:
    import torch

    from outpace.target import Target

FAILED: Final = 1
WRONG_USAGE: Final = 2
DID_NOT_HOLD: Final = 3
INTERRUPTED: Final = 130

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")

_DEBUG: Final = "outpace.debug"


def _remember_debug(ctx: typer.Context, asked: bool) -> bool:
    if asked:
        ctx.meta[_DEBUG] = True
    return asked


def wants_traceback(ctx: typer.Context) -> bool:
    """Whether --debug was given to the command in flight."""
    return bool(ctx.meta.get(_DEBUG))


Model = Annotated[
    str, typer.Option("--model", "-m", help="Alias (smollm2), hub name, local directory or .gguf file of the target.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to emit.")]
Noise = Annotated[
    str, typer.Option(help="What decides tokens at a temperature: gumbel, or uniform (for ptp, which reads numbers).")
]
Seed = Annotated[int, typer.Option(help="Seed of the noise: same seed, same text, with any drafter.")]
Dtype = Annotated[str, typer.Option(help=f"Dtype of the weights: {', '.join(DTYPES)} (auto: what the device likes).")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA if there is one.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show tracebacks instead of messages.", callback=_remember_debug, is_eager=True)
]


def load_target(model: str, *, dtype: str, device: str | None, trust_remote_code: bool) -> Target:
    """Load the target, with a word on stderr.

    Raises:
        ConfigError: on an unknown dtype or device. CheckpointError: if there is no such model.
    """
    from outpace.cli.render import tell

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; {suggestion(dtype, DTYPES)}")
    tell(f"loading {model} ...")
    from outpace.target import Target

    target = Target.from_pretrained(
        model, dtype=_torch_dtype(dtype), device=_torch_device(device), trust_remote_code=trust_remote_code
    )
    tell(f"target: {target.name}, {_short(target.dtype)} on {target.device}")
    return target


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype | None:
    import torch

    found: Any = None if name == "auto" else getattr(torch, name)
    return found  # type: ignore[no-any-return]


def _torch_device(name: str | None) -> torch.device | None:
    import torch

    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"device {name!r} cannot be used here ({reason}); try --device cpu, or outpace doctor"
        ) from error
    return device
