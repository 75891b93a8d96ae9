"""What a training step costs: tokens a second, share of the arithmetic peak, share of the step spent on features.

    python benchmarks/training.py --drafters eagle3 mtp medusa ptp ptp:mode=mask

Random weights in a real shape, random documents of a real size: nothing is learned, and a step costs what it costs.
Operations are counted in one step run uncompiled (products forward and backward; attention is left out, its counter
knows no grouped heads); the peak is a large bfloat16 product measured in the same run. A table shows where a step's
time goes, by device events around its parts, and a step is timed again with features kept from the epoch before. With
--profile the most expensive kernels of a step are listed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from outpace.drafters import make_drafter
from outpace.drafters.checkpoint import describe_target
from outpace.drafters.learning import LearnedDrafter
from outpace.target import Target
from outpace.train import Corpus, Trainer, TrainSettings
from outpace.train.loop import Clocked, Figures
from roofline import shape_model

RESULTS = Path(__file__).parent / "results"
INNER = {  # parts of some methods' objectives: functions of the module, by what they are called in the table
    "ptp": {"reading": "read", "numbers": "teacher_numbers", "slots forward": "run_behind", "loss": "_judge"},
}


def random_corpus(target: Target, documents: int, seed: int = 0) -> Corpus:
    """Documents of 60 to 500 tokens, the first quarter prompt; the ids of a real vocabulary are as skewed."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(60, 500, documents)
    tokens = np.minimum(rng.zipf(1.2, int(sizes.sum())), target.vocabulary - 1).astype(np.int32)
    sampling = {"seed": 0, "top_k": None, "top_p": None, "min_p": None}
    about = {"target": describe_target(target), "sampling": sampling, "held_out": []}
    return Corpus(
        tokens, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), (sizes // 4).astype(np.int64),
        np.arange(documents), np.ones(documents, np.float32), about, "random",
    )  # fmt: skip


def peak_rate() -> float:
    """Operations a second of a large product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        a @ b
    torch.cuda.synchronize()
    started = perf_counter()
    for _ in range(20):
        a @ b
    torch.cuda.synchronize()
    return 20 * 2 * 8192**3 / (perf_counter() - started)


def measure(target: Target, corpus: Corpus, spec: str, options: argparse.Namespace, peak: float) -> dict[str, Any]:
    """One drafter's steps."""
    drafter = make_drafter(spec)
    assert isinstance(drafter, LearnedDrafter), f"{spec} has nothing to train"
    drafter.recipe = drafter.recipe.replace(rows=options.rows)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainSettings(steps=1, optimizer="adamw", eval_every=0, keep_gib=options.keep_gib)
        trainer = Trainer(target, drafter, corpus, folder, settings)
        store, trainer.kept = trainer.kept, None
        batches = _cycle(trainer)
        figures = Figures.none(drafter.recipe.depths, target.device)
        operations = None if drafter.needs.scouts else _operations(trainer, batches, figures)
        warm = 3 * timed(trainer, batches, figures, 3)[0]
        torch.cuda.reset_peak_memory_stats()
        seconds, share = timed(trainer, batches, figures, options.steps)
        parts = where_time_goes(trainer, batches, figures, options.steps)
        if options.profile:
            _profile(trainer, batches, figures)
        kept = {}
        if store is not None:
            trainer.kept = store
            timed(trainer, batches, figures, 4)  # the three batches of a cycle, and one that finds its rows
            again, again_share = timed(trainer, batches, figures, options.steps)
            kept = {"kept_step_ms": 1e3 * again, "kept_feature_share": again_share}
    tokens = trainer.rows_per_step * drafter.recipe.row_length
    return {
        "drafter": spec, "tokens_per_step": tokens, "step_ms": 1e3 * seconds, "tokens_per_second": tokens / seconds,
        "operations_per_step": operations, "share_of_peak": operations and operations / seconds / peak,
        "feature_share": share, **kept, "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "warm_up_s": warm, "parts_ms": parts,
    }  # fmt: skip


def timed(trainer: Trainer, batches: Any, figures: Figures, steps: int) -> tuple[float, float]:
    """Seconds of a step, and the share of features in it."""
    clock = Clocked(trainer.target.device)
    torch.cuda.synchronize()
    started = perf_counter()
    for _ in range(steps):
        trainer._step(batches, figures, clock)
    torch.cuda.synchronize()
    return (perf_counter() - started) / steps, clock.feature_share()


class Stopwatch:
    """Time between calls and returns of functions, on the device where there is one."""

    def __init__(self, device: torch.device) -> None:
        self.clock = Clocked(device)
        self.names: list[str] = []

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, its calls marked."""

        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            before = Clocked(self.clock.device)
            before.mark()
            result = function(*args, **options)
            self.clock.marks += before.marks
            self.clock.mark()
            self.names.append(name)
            return result

        return run

    def read(self) -> dict[str, float]:
        """Milliseconds under each name."""
        found: dict[str, float] = defaultdict(float)
        for name, a, b in zip(self.names, self.clock.marks[::2], self.clock.marks[1::2], strict=True):
            found[name] += a.elapsed_time(b) if self.clock.device.type == "cuda" else 1e3 * (b - a)
        return found


def where_time_goes(trainer: Trainer, batches: Any, figures: Figures, steps: int) -> dict[str, float]:
    """Milliseconds of a step in each of its parts, in order; what is left of forward and of the step comes last."""
    drafter, watch = trainer.drafter, Stopwatch(trainer.target.device)
    inner = INNER.get(drafter.name, {})
    with ExitStack() as stack:
        for name, function in inner.items():
            module = importlib.import_module(f"outpace.drafters.{drafter.name}.objective")
            stack.enter_context(mock.patch.object(module, function, watch.timed(name, getattr(module, function))))
        stack.enter_context(mock.patch.object(drafter, "objective", watch.timed("forward", drafter.objective)))
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", watch.timed("backward", torch.Tensor.backward)))
        step = watch.timed("step", trainer._step)
        for _ in range(steps):
            step(batches, figures, Clocked(trainer.target.device))
        if trainer.target.device.type == "cuda":
            torch.cuda.synchronize()
    found = {name: total / steps for name, total in watch.read().items()}
    parts = {name: found[name] for name in inner if name in found}
    parts["rest of forward" if inner else "forward"] = found["forward"] - sum(parts.values())
    parts["backward"] = found["backward"]
    parts["features, optimiser"] = found["step"] - found["forward"] - found["backward"]
    print("\n".join(f"  {name:<20} {ms:8.1f} ms {ms / found['step']:6.1%}" for name, ms in parts.items()), flush=True)
    return {name: round(ms, 3) for name, ms in parts.items()}


def _cycle(trainer: Trainer) -> Any:
    """The same few steps again and again, assembled once: the loader runs beside training and is not what is timed."""
    source = trainer._batches(0)
    kept = [next(source) for _ in range(3)]
    while True:
        yield from kept


def _operations(trainer: Trainer, batches: Any, figures: Figures) -> int:
    """Of one step (not of scouts: their attention kernel runs compiled or not at all)."""
    attention = (torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(attention, lambda *_, **__: 0))
    with torch.compiler.set_stance("force_eager"), counter:
        trainer._step(batches, figures, Clocked(trainer.target.device))
    return int(counter.get_total_flops())


def _profile(trainer: Trainer, batches: Any, figures: Figures) -> None:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        trainer._step(batches, figures, Clocked(trainer.target.device))
        torch.cuda.synchronize()
    print(found.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def main() -> None:
    """Measure all, write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="135m", help="135m or 8b, random weights")
    parser.add_argument("--drafters", default=["eagle3"], nargs="+", metavar="SPEC")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--keep-gib", type=float, default=4.0, help="room for features kept from the epoch before")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "training.json")
    options = parser.parse_args()
    target = Target(shape_model(options.model), name=options.model)
    corpus = random_corpus(target, 4000)
    peak = peak_rate()
    rows = []
    for spec in options.drafters:
        rows.append(measure(target, corpus, spec, options, peak))
        print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}), flush=True)
    about = {"model": options.model, "device": torch.cuda.get_device_name(), "torch": torch.__version__, "peak": peak}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
