"""The command line, run in the process."""

import pytest
from typer.testing import CliRunner

from outpace.cli.app import app


@pytest.fixture
def outpace():
    """Run a command line: `outpace("generate", ...)` -> result with exit_code, stdout, stderr."""
    runner = CliRunner()

    def run(*arguments, stdin=None):
        return runner.invoke(app, [str(a) for a in arguments], input=stdin)

    return run
