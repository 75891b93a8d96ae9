"""The record of a run on disk: JSON lines, appended as trials end, read back to go on after an interruption.

    header      config, suite, target, environment: what two sessions of one run must share
    prompt      ids of a prompt, once
    trial       one method answering one batch once
    finding     the audit of one difference
    note        warm-up, overhead, replays: anything said once

A torn last line (power cut, full disk) is dropped; anything else that cannot be read is an error. Tables are derived
from this file and nothing else.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from outpace.bench.trials import FAILURES, Cell, Key, Record
from outpace.errors import ResultError

FORMAT: Final = 1


class Ledger:
    """Appends to a file, or keeps everything in memory (path None).

    Attributes:
        header: the first line; empty before `begin`. records: trials, in order. prompts, findings, notes: by name.

    Raises:
        ResultError: if the file exists and is not a ledger.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = Path(path) if path is not None else None
        self.header: dict[str, Any] = {}
        self.records: list[Record] = []
        self._by_key: dict[Key, Record] = {}
        self._by_place: dict[tuple[Cell, tuple[str, ...], int, str], list[Record]] = {}
        self._failures: dict[str, list[Record]] = {}
        self.prompts: dict[str, list[int]] = {}
        self.findings: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._found_parts = 1
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @classmethod
    def joined(cls, paths: Sequence[str | os.PathLike[str]]) -> Ledger:
        """What the parts of one run hold (see `BenchConfig.part`), in memory; what was said once is the first one's.

        Raises:
            ResultError: if one is no ledger, belongs to another run, or holds a trial that another one holds too.
        """
        parts = [cls(path) for path in paths]
        whole = cls()
        command = re.sub(r"--part(=| )\d+/", r"--part\1K/", parts[0].header["command"])
        whole.header, whole.notes = {**parts[0].header, "command": command}, dict(parts[0].notes)
        for path, part in zip(paths, parts, strict=True):
            different = _differences(part.header, whole.header)
            if part.parts[1] != parts[0].parts[1]:
                different = f"how many parts there are ({part.parts[1]} there, {parts[0].parts[1]} in the first)"
            if different:
                raise ResultError(
                    f"{str(path)!r} is no part of the run that {str(paths[0])!r} belongs to; it differs in {different}"
                )
            for record in part.records:
                if record.key in whole._by_key:
                    raise ResultError(
                        f"{str(path)!r} holds {record.method} on {record.prompt}, and so does another part; pass each "
                        "part of a run once"
                    )
                whole._index(record)
            whole.prompts.update(part.prompts)
            whole.findings.update(part.findings)
        whole._found_parts = len(parts)
        whole.notes["stop"] = _stopped([part.stop for part in parts])
        return whole

    def begin(self, header: Mapping[str, Any]) -> bool:
        """Start a run, or go on with the one in the file; returns whether it was there already.

        Raises:
            ResultError: if the file holds another run (saying what differs), or cannot be written.
        """
        line = {"kind": "header", "format": FORMAT, **header}
        if self.header:
            self._must_match(line)
            return True
        self._append(line)
        self.header = line
        return False

    def add(self, record: Record) -> None:
        """Append a trial."""
        line = record.as_dict()
        self._append(line)
        self._index(Record.from_dict(line))  # tables are made of what the file says, rounding included

    def find(self, key: Key) -> Record | None:
        """The record of a trial, or None."""
        return self._by_key.get(key)

    def repetitions(self, cell: Cell, unit: tuple[str, ...], turn: int, method: str) -> list[Record]:
        """All records of one method on one prompt, first repetition first."""
        return self._by_place.get((cell, unit, turn, method), [])

    def failures(self, method: str) -> list[Record]:
        """Trials of a method that crashed, were cut or never came back."""
        return self._failures.get(method, [])

    def _index(self, record: Record) -> None:
        self.records.append(record)
        self._by_key[record.key] = record
        self._by_place.setdefault((record.cell, record.unit, record.turn, record.method), []).append(record)
        if record.status in FAILURES:
            self._failures.setdefault(record.method, []).append(record)

    def add_prompt(self, name: str, ids: list[int]) -> None:
        """Append the ids of a prompt, unless they are there."""
        if name not in self.prompts:
            self._append({"kind": "prompt", "name": name, "ids": ids})
            self.prompts[name] = ids

    def add_finding(self, name: str, finding: Mapping[str, Any]) -> None:
        """Append an audit's finding."""
        self._append({"kind": "finding", "name": name, "finding": dict(finding)})
        self.findings[name] = dict(finding)

    def note(self, name: str, value: Any) -> None:
        """Append something said once; a later note of the same name takes its place."""
        self._append({"kind": "note", "name": name, "value": value})
        self.notes[name] = value

    @property
    def seconds(self) -> float:
        """Seconds of measuring in the file."""
        return max((record.at_s for record in self.records), default=0.0)

    @property
    def stop(self) -> dict[str, Any]:
        """How the run ended: reason, planned blocks and seconds; interrupted, where it did not say."""
        found: dict[str, Any] = self.notes.get("stop", {"reason": "interrupted", "blocks": 0, "seconds": self.seconds})
        return found

    @property
    def parts(self) -> tuple[int, int]:
        """How many parts of the run are in here, and of how many."""
        return self._found_parts, self.header["config"].get("part", (1, 1))[1]

    def _append(self, line: Mapping[str, Any]) -> None:
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ResultError(
                f"cannot write to {str(self.path)!r}: {error}. Everything before this trial is in that file; free some "
                "space and run the same command again to go on from there"
            ) from error

    def _read(self, path: Path) -> None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise ResultError(f"cannot read {str(path)!r}: {error}") from error
        lines = text.split(b"\n")
        torn = lines.pop()  # empty after a whole last line
        for number, line in enumerate(lines, 1):
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise ResultError(
                    f"line {number} of {str(path)!r} is not a benchmark's record ({error}); pass another --out, or "
                    "move that file away"
                ) from error
        if torn:
            with path.open("rb+") as file:
                file.truncate(len(text) - len(torn))
        if text and not self.header:
            raise ResultError(f"{str(path)!r} has no header; pass another --out, or move that file away")

    def _take(self, line: dict[str, Any]) -> None:
        kind = line["kind"]
        if kind == "header":
            if line["format"] != FORMAT:
                raise ValueError(f"format {line['format']}, this version reads {FORMAT}")
            self.header = line
        elif kind == "trial":
            self._index(Record.from_dict(line))
        elif kind == "prompt":
            self.prompts[line["name"]] = line["ids"]
        elif kind == "finding":
            self.findings[line["name"]] = line["finding"]
        elif kind == "note":
            self.notes[line["name"]] = line["value"]
        else:
            raise ValueError(f"unknown kind {kind!r}")

    def _must_match(self, line: Mapping[str, Any]) -> None:
        different = _differences(self.header, line)
        if different:
            raise ResultError(
                f"{str(self.path)!r} holds another run; it differs in {different}. Pass another --out, or "
                "--fresh to start anew (the old file is kept under another name)"
            )


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What makes two headers those of different runs, in words; empty if nothing does."""
    return ", ".join(
        f"{name} ({_short(there[part].get(name))} there, {_short(value)} now)"
        for part in ("identity", "suite", "target", "machine")
        for name, value in now[part].items()
        if there[part].get(name) != value
    )


def _stopped(stops: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How parts ended, as one: by the worst reason of any, with all of their blocks and seconds."""
    reasons = {stop["reason"] for stop in stops}
    worst = next(reason for reason in ("no baseline", "interrupted", "budget", "done") if reason in reasons)
    sums = {name: sum(stop.get(name, 0) for stop in stops) for name in ("blocks", "seconds", "block_seconds")}
    return {"reason": worst, **sums}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def set_aside(path: Path) -> Path | None:
    """Move an older ledger out of the way under a numbered name; None if there was none."""
    if not path.exists():
        return None
    number = next(n for n in range(1, 10_000) if not path.with_suffix(f".{n}{path.suffix}").exists())
    return path.rename(path.with_suffix(f".{number}{path.suffix}"))
