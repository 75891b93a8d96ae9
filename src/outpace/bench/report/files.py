"""Result files: written whole or not at all, read with a word on what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from outpace.bench.derive import FORMAT
from outpace.bench.report.html import render_html
from outpace.bench.report.markdown import render_markdown
from outpace.errors import ConfigError, ResultError

SUFFIXES: Final = (".html", ".md", ".json")


def paths_for(out: str | os.PathLike[str]) -> dict[str, Path]:
    """Files a run writes: "ledger" and those its --out asks for (.html: all three; .md: that and JSON; .json: JSON).

    Raises:
        ConfigError: on another suffix.
    """
    path = Path(out)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--out {str(out)!r} must end in {', '.join(SUFFIXES)}")
    wanted = SUFFIXES[SUFFIXES.index(path.suffix) :]
    return {"ledger": path.with_suffix(".jsonl"), **{suffix: path.with_suffix(suffix) for suffix in wanted}}


def write_report(result: Mapping[str, Any], out: str | os.PathLike[str]) -> list[Path]:
    """Write the result in every form `out` asks for; returns the files.

    Raises:
        ResultError: if a file cannot be written; older ones stay as they were. MissingExtraError: without plotly.
    """
    paths = paths_for(out)
    texts = {".json": json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n"}
    if ".md" in paths:
        texts[".md"] = render_markdown(result)
    if ".html" in paths:
        texts[".html"] = render_html(result)
    written = []
    for suffix, text in texts.items():
        write_whole(paths[suffix], text)
        written.append(paths[suffix])
    return written[::-1]


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then rename.

    Raises:
        ResultError: if that fails; the older file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ResultError(
            f"cannot write {str(path)!r}: {error}; what was there before is unchanged. Free some space, or pass "
            "another --out; the measurements are kept and the same command writes the report again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def load_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A result's JSON.

    Raises:
        ResultError: if it is none, or of another format.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"cannot read the result {str(path)!r}: {error}") from error
    if not isinstance(found, dict) or found.get("kind") != "outpace-bench":
        raise ResultError(f"{str(path)!r} is not a result of outpace bench; pass the .json beside the report")
    if found.get("format") != FORMAT:
        raise ResultError(f"{str(path)!r} has format {found.get('format')}, and this version reads {FORMAT}")
    return found
