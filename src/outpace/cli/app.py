"""The commands, and what becomes of errors: one message on stderr and an exit code."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from outpace import __version__
from outpace.cli.bench import bench
from outpace.cli.check import check
from outpace.cli.corpus import corpus
from outpace.cli.demo import demo
from outpace.cli.doctor import doctor
from outpace.cli.generate import generate
from outpace.cli.inspect import inspect
from outpace.cli.options import FAILED, INTERRUPTED, WRONG_USAGE, wants_traceback
from outpace.cli.render import complain
from outpace.cli.train import train
from outpace.cli.widen import widen
from outpace.errors import ConfigError, OutpaceError


class Commands(TyperGroup):
    """A group whose commands may raise any `OutpaceError`."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command; errors raised on purpose become one message (`--debug` lets them through)."""
        try:
            return super().invoke(ctx)
        except OutpaceError as error:
            if wants_traceback(ctx):
                raise
            complain(str(error))
            raise typer.Exit(WRONG_USAGE if isinstance(error, ConfigError) else FAILED) from error
        except KeyboardInterrupt as error:
            complain("interrupted")
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Several tokens per forward pass from any Hugging Face causal language model, without changing what it says.",
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"outpace {__version__}")
        raise typer.Exit


@app.callback()
def _outpace(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(generate)
app.command()(check)
app.command()(doctor)
app.command()(demo)
app.command()(corpus)
app.command()(train)
app.command()(inspect)
app.add_typer(bench, help="Measure drafters on your model, your machine, your prompts.")
app.command()(widen)
