"""What can go wrong, in a small tree. Every message says what was asked, what was found and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class OutpaceError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        partial: what had been produced before the error, so that nothing is lost (for `Engine.generate`, a list of
            `Output`, one per prompt); empty where there was nothing.
    """

    partial: list[Any]

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.partial = []


class ConfigError(OutpaceError, ValueError):
    """A setting that cannot be, or that would have no effect."""


class CheckpointError(OutpaceError):
    """A model or drafter that cannot be loaded, or does not fit what it is to be used with."""


class ResultError(OutpaceError):
    """A result that cannot be written or read, or that belongs to another run."""


class LawError(OutpaceError, ValueError):
    """A tensor that should be a probability law and is not."""


class DraftError(OutpaceError, ValueError):
    """A drafter handed over something that is not a draft: a bad token id, a child before its parent."""


class UnsupportedError(OutpaceError):
    """Something that cannot work here, with the reason."""


class OutOfMemoryError(OutpaceError, MemoryError):
    """The device has no room for what was asked; says how much that was and what to lower."""


class MissingExtraError(OutpaceError, ImportError):
    """An optional dependency is missing; the message carries the exact install line."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: pip install 'outpace[{extra}]'")


def suggestion(asked: str, known: Iterable[str]) -> str:
    """A sentence naming the closest known word and all known ones, to end an error message with."""
    names = sorted(known)
    close = difflib.get_close_matches(asked, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
