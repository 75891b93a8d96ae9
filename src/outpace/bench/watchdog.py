"""A limit on time that a hanging drafter cannot ignore.

What is guaranteed, in three steps:

1. Code that hangs in Python (a loop, a sleep, a lock, a socket) is cut by `Overdue`, raised by SIGALRM on the main
   thread, or asynchronously on any other thread (which cannot wake a sleep). The run goes on.
2. Code that swallows `Overdue` gets it again every few seconds until it gives up.
3. Code that hangs inside a native call and never returns to Python cannot be cut by anything in the process. If asked
   to (`last_resort`), the interpreter's own watchdog, which needs no lock, then writes a traceback to a file and ends
   the process. Everything measured is on disk by then, and the next session leaves that method out.

`Overdue` is no `Exception`, so that a drafter's own error handling does not swallow it by accident.
"""

from __future__ import annotations

import ctypes
import faulthandler
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TextIO

AGAIN_S: Final = 5.0  # between the first cut and the next, if the first was swallowed
GRACE_S: Final = 30.0  # between the limit and the last resort


class Overdue(BaseException):
    """A trial took longer than it may."""


@contextmanager
def deadline(seconds: float, *, last_resort: TextIO | None = None, grace_s: float = GRACE_S) -> Iterator[None]:
    """Raise `Overdue` inside the block once it has taken so long.

    last_resort: a file of the operating system; if the block has not ended `grace_s` seconds after its limit, every
    thread's traceback is written there and the process ends with code 1.
    """
    if last_resort is not None:
        faulthandler.dump_traceback_later(seconds + grace_s, exit=True, file=last_resort)
    on_main = threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")
    try:
        with _alarm(seconds) if on_main else _asynchronous(seconds):
            yield
    finally:
        if last_resort is not None:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    armed = True

    def ring(number: int, frame: Any) -> None:
        del number, frame
        if armed:
            raise Overdue

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    try:
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _asynchronous(seconds: float) -> Iterator[None]:
    thread = ctypes.c_ulong(threading.get_ident())
    done = threading.Event()

    def watch() -> None:
        wait = seconds
        while not done.wait(wait):
            ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, ctypes.py_object(Overdue))
            wait = AGAIN_S

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, None)  # one that was on its way


class LastResort:
    """The file the interpreter's watchdog writes to, and what it says after the process was ended.

    Before each trial the file holds one line naming it; if more lines follow, the trial never came back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found = self._read()
        self._file: TextIO | None = None

    def _read(self) -> tuple[str, str] | None:
        """(name of the trial that was stuck, the traceback), from an earlier session."""
        try:
            name, _, trace = self.path.read_text(encoding="utf-8").partition("\n")
        except OSError:
            return None
        return (name, trace.strip()) if trace.strip() else None

    def mark(self, name: str) -> TextIO:
        """Name the trial that is about to begin; returns the file to hand to `deadline`."""
        if self._file is None:
            self._file = self.path.open("w", encoding="utf-8")
        self._file.seek(0)
        self._file.truncate()
        self._file.write(f"{name}\n")
        self._file.flush()
        return self._file

    def close(self) -> None:
        """Take the file away: nothing was stuck."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self.path.unlink(missing_ok=True)
