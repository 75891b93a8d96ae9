"""Prompts from files: JSONL or plain lines, checked, counted, without repetitions and without evaluation prompts.

A line of JSONL holds "prompt" (one user turn), "messages" (a conversation that ends with the user), "turns" (of which
the first is taken) or "tokens" (ids). "id", "domain" and "source" are kept; anything else is ignored.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from outpace.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from outpace.engine import Prompt

HELD_OUT_EVERY: Final = 50  # ids whose CRC-32 is a multiple of this are held out
DATASET: Final = "datasets:"


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt: its id (from the file, else file name and line), domain and content."""

    id: str
    domain: str
    content: Prompt

    @property
    def held_out(self) -> bool:
        """Whether it belongs to the fixed 2 % that are never trained on."""
        return zlib.crc32(self.id.encode()) % HELD_OUT_EVERY == 0


@dataclass(slots=True)
class PromptReport:
    """What became of the lines read.

    Attributes:
        prompts: those kept. malformed: "file:line: reason" of those that could not be read.
        repeated: lines equal to an earlier one. excluded: lines equal to an evaluation prompt.
    """

    prompts: list[PromptLine] = field(default_factory=list)
    malformed: list[str] = field(default_factory=list)
    repeated: int = 0
    excluded: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Counts, and the first malformed lines."""
        return {
            "prompts": len(self.prompts),
            "malformed": len(self.malformed),
            "malformed_first": self.malformed[:5],
            "repeated": self.repeated,
            "excluded": self.excluded,
        }


def read_prompts(
    sources: Sequence[str | Path],
    *,
    exclude: Sequence[str | Path] = (),
    wrap: Mapping[str, str] | None = None,
    strict: bool = False,
    limit: int = 0,
) -> PromptReport:
    """Read prompts from files, directories of .jsonl files, or "datasets:NAME[:SPLIT[:COLUMN]]".

    Args:
        sources: .jsonl or .txt files (one prompt per line), directories, or data sets of the `datasets` library.
        exclude: files of evaluation prompts; every turn in them is kept out of the corpus.
        wrap: {domain: text with {prompt}}: what prompts of a domain become, e.g. a request around raw code.
        strict: refuse malformed lines instead of counting them.
        limit: most prompts kept; 0 for all.

    Two prompts are equal if their lower-cased letters and digits are.

    Raises:
        ConfigError: if a source cannot be read, nothing is left, or (strict) a line is malformed.
    """
    report = PromptReport()
    banned = {key for path in exclude for key in _evaluation_keys(Path(path))}
    seen: set[str] = set()
    for where, text in _lines(sources):
        try:
            line = _parse(where, text, wrap or {})
        except ValueError as error:
            if strict:
                raise ConfigError(f"malformed prompt at {where}: {error}; mend it, or leave --strict away") from error
            report.malformed.append(f"{where}: {error}")
            continue
        keys = _keys(line.content)
        if any(key in banned for key in keys):
            report.excluded += 1
        elif keys[-1] in seen:
            report.repeated += 1
        else:
            seen.add(keys[-1])
            report.prompts.append(line)
    if limit:
        order = sorted(report.prompts, key=lambda line: (zlib.crc32(f"limit {line.id}".encode()), line.id))
        chosen = {line.id for line in order[:limit]}
        report.prompts = [line for line in report.prompts if line.id in chosen]
    if not report.prompts:
        raise ConfigError(
            f"no prompt left in {', '.join(map(str, sources))}: {len(report.malformed)} malformed "
            f"({'; '.join(report.malformed[:2]) or 'none'}), {report.excluded} equal to evaluation prompts"
        )
    return report


def _lines(sources: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(place, text) of every line that is not blank."""
    for source in sources:
        if str(source).startswith(DATASET):
            yield from _from_datasets(str(source).removeprefix(DATASET))
            continue
        path = Path(source)
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"no .jsonl file in {str(path)!r}; pass a folder or a file of prompts")
        for file in files:
            try:
                with file.open(encoding="utf-8", errors="replace") as lines:
                    for number, text in enumerate(lines, start=1):
                        if text.strip():
                            plain = file.suffix != ".jsonl"
                            yield f"{file.name}:{number}", json.dumps({"prompt": text.strip()}) if plain else text
            except OSError as error:
                raise ConfigError(f"cannot read prompts from {str(file)!r}: {error}") from error


def _from_datasets(spec: str) -> Iterator[tuple[str, str]]:
    name, _, rest = spec.partition(":")
    split, _, column = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "train", "reading prompts from a data set of the hub") from error
    rows: Iterable[Any] = datasets.load_dataset(name, split=split or "train")
    for number, row in enumerate(rows):
        yield f"{name}:{number}", json.dumps({"prompt": row[column]} if column else dict(row), default=str)


def _parse(where: str, text: str, wrap: Mapping[str, str]) -> PromptLine:
    """One line. Raises ValueError with the reason."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is wanted, found {type(row).__name__}")
    content = _content(row)
    domain = str(row.get("domain", ""))
    if isinstance(content, str) and domain in wrap:
        content = wrap[domain].replace("{prompt}", content).replace("{language}", str(row.get("language", "")))
    return PromptLine(str(row.get("id", where)), domain, content)


def _content(row: Mapping[str, Any]) -> Prompt:
    if "tokens" in row:
        ids = row["tokens"]
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) for i in ids):
            raise ValueError("'tokens' is no list of ids")
        return ids
    if "messages" in row:
        messages = row["messages"]
        good = isinstance(messages, list) and messages and all(
            isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str)
            for m in messages
        )  # fmt: skip
        if not good:
            raise ValueError("'messages' is no list of {role, content}")
        if messages[-1]["role"] != "user":
            raise ValueError("a conversation must end with the user's turn; the answer is the target's to write")
        return [{"role": m["role"], "content": m["content"]} for m in messages]
    text = row["turns"][0] if isinstance(row.get("turns"), list) and row["turns"] else row.get("prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no text in 'prompt', 'messages', 'turns' or 'tokens'")
    return text


def _key(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def _keys(content: Prompt) -> list[str]:
    """What a prompt is compared by: each user turn, then the whole."""
    if isinstance(content, str):
        return [_key(content)]
    items: list[Any] = list(content)
    if isinstance(items[0], int):
        return [" ".join(map(str, items))]
    turns = [_key(m["content"]) for m in items if m["role"] == "user"]
    return [*turns, "|".join(_key(m["content"]) for m in items)]


def _evaluation_keys(path: Path) -> Iterator[str]:
    """Every user turn of an evaluation file."""
    for where, text in _lines([path]):
        try:
            row = json.loads(text)
            turns = row.get("turns") or [row.get("prompt")] + [m["content"] for m in row.get("messages", ())]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ConfigError(f"cannot read evaluation prompts at {where}: {error}") from error
        yield from (_key(turn) for turn in turns if isinstance(turn, str))
