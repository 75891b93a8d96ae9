"""The table that grows while a benchmark runs: on a terminal in place, elsewhere a line now and then; all on stderr."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from outpace.cli.render import table, tell

if TYPE_CHECKING:
    from outpace.bench import Ledger, Watch

_EVERY_S: Final = 30.0  # between lines where there is no terminal
_REDRAW_S: Final = 1.0
_COLUMNS: Final = ("", "trials", "speed so far", "tokens/s", "emitted/round", "other tokens", "failed")


class LiveTable:
    """Shows how a run stands; `watch` is what the runner talks to."""

    def __init__(self) -> None:
        from outpace.bench import Watch

        self._live: Any = None
        self._started = time.perf_counter()
        self._shown = 0.0
        self.watch: Watch = Watch(tell=self._tell, block=self._block)

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(file=sys.stderr), auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def _tell(self, message: str) -> None:
        if self._live is not None:
            self._live.console.print(message, style="dim", highlight=False, markup=False)
        else:
            tell(message)

    def _block(self, done: int, of: int, ledger: Ledger) -> None:
        now = time.perf_counter()
        if now - self._shown < (_REDRAW_S if self._live is not None else _EVERY_S) and done < of:
            return
        self._shown = now
        from outpace.bench.live import standings

        cell = ledger.records[-1].cell
        found = standings(ledger, cell)
        if self._live is None:
            pairs = (f"{one.method} {one.speed:.2f}x" for one in found[1:] if one.speed is not None)
            tell(f"{done}/{of} blocks, {now - self._started:.0f} s; {cell}: {', '.join(pairs)}")
            return
        rows = [
            [
                one.method,
                str(one.trials),
                "-" if one.speed is None else f"{one.speed:.2f}x",
                "-" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}",
                "-" if one.emitted_per_round is None else f"{one.emitted_per_round:.2f}",
                str(one.differing) if one.differing else "",
                str(one.failures) if one.failures else "",
            ]
            for one in found
        ]
        title = f"{cell}: {done} of {of} blocks, {now - self._started:.0f} s"
        self._live.update(table(_COLUMNS, rows, title=title), refresh=True)
