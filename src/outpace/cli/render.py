"""How things look on a terminal: the story on stderr, answers coloured by round, plain where nobody looks.

Knows no models. rich is imported by the functions that draw; most runs need none of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from outpace.engine import Finding, Output

ACCEPTED_STYLES: Final = ("green", "cyan")  # rounds alternate, so that one sees where each begins
OPEN, CLOSE = "«", "»"
WIDTH: Final = 120  # of tables where there is no terminal to ask


def console(*, story: bool = False) -> Console:
    """A console on the present stdout (`story`: stderr); colours only if that is a terminal."""
    from rich.console import Console

    stream = sys.stderr if story else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False, soft_wrap=True)


def tell(message: str) -> None:
    """One line of the story, on stderr."""
    _line(message, "2")


def complain(message: str) -> None:
    """An error, on stderr."""
    _line(f"outpace: {message}", "31")


def _line(message: str, code: str) -> None:
    coloured = sys.stderr.isatty()
    sys.stderr.write(f"\x1b[{code}m{message}\x1b[0m\n" if coloured else f"{message}\n")
    sys.stderr.flush()


def write(text: str) -> None:
    """A piece of the result, on stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_json(document: Any) -> None:
    """The one document of a --json run."""
    write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of an answer: its text, the round it came from, whether the draft held it."""

    text: str
    round_index: int
    accepted: bool


def segments(output: Output, decode: Callable[[Sequence[int]], str]) -> list[Segment]:
    """The answer's text cut by round and by who said it first: the draft (accepted) or the target alone.

    A character that takes several tokens belongs to the one that completes it; the pieces join to `output.text`.
    """
    from outpace.laws import IncrementalText

    growing = IncrementalText(decode)
    pieces: list[Segment] = []
    for index, one in enumerate(output.rounds_detail):
        for place, token in enumerate(one.tokens):
            pieces.append(Segment(growing.push(token), index, place < one.accepted))
    if pieces:
        last = pieces[-1]
        pieces[-1] = Segment(last.text + growing.flush(), last.round_index, last.accepted)
    merged: list[Segment] = []
    left = len(output.text)  # a stop string is cut off
    for piece in pieces:
        text = piece.text[:left]
        left -= len(text)
        if not text:
            continue
        if merged and (merged[-1].round_index, merged[-1].accepted) == (piece.round_index, piece.accepted):
            merged[-1] = Segment(merged[-1].text + text, piece.round_index, piece.accepted)
        else:
            merged.append(Segment(text, piece.round_index, piece.accepted))
    return merged


LEGEND_COLOUR: Final = "green / cyan: accepted draft tokens, round by round; bold: the target's own token"
LEGEND_PLAIN: Final = f"{OPEN}accepted draft tokens of a round{CLOSE}, the rest are the target's own"


def show_rounds(parts: Sequence[Segment], on: Console) -> None:
    """Print an answer with its rounds: in colour on a terminal, with markers elsewhere."""
    from rich.text import Text

    text = Text()
    for part in parts:
        if not on.is_terminal:
            text.append(f"{OPEN}{part.text}{CLOSE}" if part.accepted else part.text)
        elif part.accepted:
            text.append(part.text, ACCEPTED_STYLES[part.round_index % len(ACCEPTED_STYLES)])
        else:
            text.append(part.text, "bold")
    on.print(text)


def legend(on: Console) -> str:
    """How to read `show_rounds` on this console."""
    return LEGEND_COLOUR if on.is_terminal else LEGEND_PLAIN


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> RenderableType:
    """A small table, the first column to the left and the rest to the right."""
    from rich import box
    from rich.table import Table

    result = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        result.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        result.add_row(*row)
    return result


def verdict(finding: Finding, decode: Callable[[Sequence[int]], str] | None = None) -> str:
    """A finding of the audit in words; `decode` lets it show the two tokens."""
    if finding.difference is None:
        return f"same {finding.common} tokens as plain decoding"
    difference = finding.difference
    names = ""
    if decode is not None and difference.plain is not None and difference.other is not None:
        names = f" ({decode([difference.plain])!r} against {decode([difference.other])!r})"
    kind = "a near tie, decided by floating point" if finding.verdict == "near tie" else "NOT a near tie: a bug"
    return f"parts from plain decoding after {finding.common} tokens{names}, {kind}; {difference}"
