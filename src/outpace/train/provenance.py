"""What made a drafter: command, commit, versions, corpus, recipe and curves, kept in its config."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import outpace
from outpace.target import tuned_by

if TYPE_CHECKING:
    from outpace.target import Target
    from outpace.train.corpus import Corpus

_POINTS = 200  # of a curve that are kept


def describe_run(
    *,
    target: Target,
    corpus: Corpus,
    recipe: Mapping[str, Any],
    settings: Mapping[str, Any],
    steps: int,
    seconds: float,
    device: torch.device,
    curves: Sequence[Mapping[str, Any]],
    drift: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """JSON data for `LearnedDrafter.provenance`; drift: how far a tuned target has moved, if that was measured."""
    import transformers

    tuned = tuned_by(target)

    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": {
            "outpace": outpace.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "target": target.name,
        **({} if tuned is None else {"tuned": {**tuned, **(drift or {})}}),
        "corpus": {
            "digest": corpus.digest,
            "documents": len(corpus),
            "tokens": len(corpus.tokens),
            "sampling": corpus.meta["sampling"],
            "temperatures": corpus.meta["temperatures"],
            "sources": corpus.meta["sources"],
        },
        "recipe": dict(recipe),
        "settings": dict(settings),
        "steps": steps,
        "seconds": round(seconds, 1),
        "curves": _thinned(curves),
    }


def _thinned(curves: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every evaluation, and about two hundred points of the rest."""
    losses = [point for point in curves if "loss" in point]
    every = max(1, len(losses) // _POINTS)
    kept = {id(point) for point in losses[::every]} | {id(point) for point in losses[-1:]}
    return [dict(point) for point in curves if "loss" not in point or id(point) in kept]


def _commit() -> str | None:
    """The commit of the source tree outpace runs from, or None outside one."""
    try:
        done = subprocess.run(  # noqa: S603  # fixed arguments
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],  # noqa: S607  # git where the user has it
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
