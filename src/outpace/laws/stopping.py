"""When a text ends: one function over emitted tokens, whoever emitted them and however many came at once.

Knows no model. Tokens are fed in order and looked at one by one, so the earliest stop wins wherever it falls inside a
block, and nothing after it leaks into tokens, text or counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

Decode = Callable[[Sequence[int]], str]
"""Token ids -> text."""

StopReason = Literal["eos", "stop", "length"]

_REPLACEMENT: Final = "\ufffd"  # what a decoder shows for a character whose bytes are not complete yet


class IncrementalText:
    """Text of a growing token sequence, in pieces that never have to be taken back.

    A character may take several tokens, and a token may decode differently behind another one; so each step decodes a
    short window twice and releases the difference once it is complete.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # window start: text before it is settled
        self._read = 0  # tokens before it have been released

    def push(self, token: int) -> str:
        """Text that became certain with this token (may be empty)."""
        self._ids.append(token)
        return self._release(final=False)

    def flush(self) -> str:
        """What is left when no token follows, incomplete characters included."""
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        if not final and now.endswith(_REPLACEMENT):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return now[len(before) :]


class FinalText:
    """Text of a finished token sequence: decoded once, at the end, where nobody reads along."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []

    def push(self, token: int) -> str:
        """Nothing yet."""
        self._ids.append(token)
        return ""

    def flush(self) -> str:
        """All of it."""
        return self._decode(self._ids)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What of a block of tokens stands.

    Attributes:
        kept: number of leading tokens that belong to the output.
        text: text that is certain now and not yet handed out.
        reason: why the sequence ended with the last kept token, or None.
    """

    kept: int
    text: str
    reason: StopReason | None


class Stopping:
    """The stop conditions of one request, and the text up to them.

    Args:
        decode: token ids to text (special tokens skipped).
        eos: ids that end the sequence.
        stop: strings that end it; the text is cut before the first one completed.
        max_tokens: most tokens to keep (the smaller of max_new_tokens and what the context leaves).
        streamed: whether text is wanted while the sequence grows; without it, and without stop strings, text is
            decoded once at the end (decoding costs tens of microseconds a token).
    """

    def __init__(
        self, decode: Decode, *, eos: Sequence[int], stop: Sequence[str], max_tokens: int, streamed: bool = True
    ) -> None:
        self._text = IncrementalText(decode) if streamed or stop else FinalText(decode)
        self._eos = frozenset(eos)
        self._stop = tuple(stop)
        self._left = max_tokens
        self._held = ""  # certain text that could still turn out to be the start of a stop string
        self.reason: StopReason | None = None

    @property
    def remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self._left if self.reason is None else 0

    def feed(self, tokens: Sequence[int]) -> Verdict:
        """Take emitted tokens in order; the first condition met ends the sequence."""
        pieces: list[str] = []
        for count, token in enumerate(tokens, start=1):
            self._left -= 1
            self._held += self._text.push(token)
            cut = self._first_stop()
            if cut is not None:
                self.reason = "stop"
                pieces.append(self._held[:cut])
            elif token in self._eos:
                self.reason = "eos"
            elif self._left <= 0:
                self.reason = "length"
            if self.reason is not None:
                if self.reason != "stop":
                    pieces.append(self._finish())
                self._held = ""
                return Verdict(count, "".join(pieces), self.reason)
            certain = len(self._held) - self._overlap()
            pieces.append(self._held[:certain])
            self._held = self._held[certain:]
        return Verdict(len(tokens), "".join(pieces), None)

    def close(self) -> str:
        """Text still held back, for a request that is ended from outside."""
        held, self._held = self._finish(), ""
        return held

    def _finish(self) -> str:
        """Held text plus what the decoder still kept; a stop string completed by it counts as one."""
        self._held += self._text.flush()
        cut = self._first_stop()
        if cut is None:
            return self._held
        if self.reason == "length":
            self.reason = "stop"
        return self._held[:cut]

    def _first_stop(self) -> int | None:
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        return min(found) if found else None

    def _overlap(self) -> int:
        """Length of the longest suffix of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=0) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
