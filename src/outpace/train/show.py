"""What a run tells: a bar on a terminal, lines in a log, points for a tracker."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from outpace.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from rich.console import Console

Tracker = Literal["none", "tensorboard", "trackio"]
_LINE_EVERY = 10.0  # seconds, in logs


class Reporter(Protocol):
    """Is told of figures."""

    def point(self, point: Mapping[str, Any]) -> None:
        """A point of the loss curve."""

    def evaluation(self, point: Mapping[str, Any]) -> None:
        """A run of the decode loop."""

    def drift(self, point: Mapping[str, Any]) -> None:
        """How far a tuned target has moved."""


class Shown:
    """A bar on a terminal, else a line now and then; and a tracker, if one is named.

    Args:
        console: stderr. folder: where a tracker writes. tracker: which. name: of the run.

    Raises:
        MissingExtraError: if the tracker is not installed. ConfigError: if there is no such tracker.
    """

    def __init__(self, console: Console, folder: Path, tracker: Tracker, name: str) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.console = console
        self._write = _tracker(tracker, folder, name)
        self._bar = Progress(
            TextColumn("step {task.fields[step]}"), BarColumn(), TextColumn("{task.fields[text]}"), console=console,
            transient=True, disable=not console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=1.0, step=0, text="")
        self._told = 0.0

    def __enter__(self) -> Shown:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def point(self, point: Mapping[str, Any]) -> None:
        """See `Reporter`."""
        rates = " ".join(f"{100 * x:.0f}" for x in point["hit_rate"])
        extra = "".join(f", {name.replace('_', ' ')} {value:.4f}" for name, value in point.get("extra", {}).items())
        text = (
            f"loss {point['loss']:.3f}{extra} | hits % {rates} | {point['tokens_per_second'] / 1000:.1f}k tokens/s, "
            f"features {100 * point['feature_share']:.0f} % | {point['memory_gib']:.1f} GiB | "
            f"{point['seconds_left']:.0f} s left"
        )
        self._bar.update(self._task, completed=point["share"], step=point["step"], text=text)
        now = time.monotonic()
        if not self.console.is_terminal and (now - self._told > _LINE_EVERY or point["share"] >= 1):
            self._told = now
            self.console.print(f"step {point['step']} ({100 * point['share']:.0f} %): {text}", soft_wrap=True)
        self._write(point)

    def evaluation(self, point: Mapping[str, Any]) -> None:
        """See `Reporter`."""
        chain = " ".join(f"{100 * x:.0f}" for x in point["accept_given_reached"])
        self.console.print(
            f"step {point['step']}: emitted_per_round {point['emitted_per_round']:.3f} on held-out prompts, "
            f"accept_given_reached % {chain}",
            soft_wrap=True,
        )
        self._write(point)

    def drift(self, point: Mapping[str, Any]) -> None:
        """See `Reporter`."""
        self.console.print(
            f"the tuned target beside the original, {point['tokens']} tokens of held-out answers: KL "
            f"{point['mean_kl']:.4f} nats a token, the same greedy choice at {100 * point['greedy_agreement']:.1f} %",
            soft_wrap=True,
        )
        self._write(point)


def _tracker(tracker: Tracker, folder: Path, name: str) -> Any:
    """A function that takes points."""
    if tracker == "none":
        return lambda point: None
    if tracker == "tensorboard":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("tensorboard", "train", "--track tensorboard") from error
        writer: Any = SummaryWriter(folder / "tensorboard")

        def write(point: Mapping[str, Any]) -> None:
            for key, value in _flat(point).items():
                writer.add_scalar(key, value, point["step"])

        return write
    if tracker == "trackio":
        try:
            import trackio
        except ImportError as error:
            raise MissingExtraError("trackio", "train", "--track trackio") from error
        trackio.init(project="outpace", name=name)
        return lambda point: trackio.log(_flat(point), step=point["step"])
    raise ConfigError(f"unknown tracker {tracker!r}; known: none, tensorboard, trackio")


def _flat(point: Mapping[str, Any]) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in point.items():
        if isinstance(value, list):
            flat |= {f"{key}/{i}": float(x) for i, x in enumerate(value)}
        elif isinstance(value, Mapping):
            flat |= {f"{key}/{name}": float(x) for name, x in value.items()}
        elif key != "step":
            flat[key] = float(value)
    return flat
