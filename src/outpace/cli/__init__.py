"""The command line: `outpace generate | check | doctor | demo`.

Knows no methods. Nothing heavy is imported before a command needs it, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 fine, 1 failed, 2 wrong usage, 3 a check did not hold, 130 interrupted."""
    from outpace.cli.app import app

    app(args=list(arguments) if arguments is not None else None, prog_name="outpace")
