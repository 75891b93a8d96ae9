"""What a pass on a CPU costs by rows and by prompt: compiled (`target.native`) beside PyTorch's operations, in turns.

    python benchmarks/cpu_pass.py --dtypes float32 bfloat16 --rows 1 4 8 16 32 --prompts 64 256 512

Milliseconds, the best of `--repeats` each: timings of a shared machine are best compared within one run.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from outpace.bench.machine import describe_machine
from outpace.target import Block, Target

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = Path(__file__).parent / "results"


def in_turns(target: Target, repeats: int, run: Callable[[], float]) -> dict[str, float]:
    """Best milliseconds of `run` (which returns seconds), through PyTorch's operations and compiled."""
    fast: Any = target.fast
    native, best = fast.native, {"torch": float("inf"), "compiled": float("inf")}
    for _ in range(repeats):
        for name, way, switch in (("torch", None, "off"), ("compiled", native, "on")):
            fast.native, os.environ["OUTPACE_NATIVE"] = way, switch  # the latter for products outside of such a pass
            best[name] = min(best[name], 1e3 * run())
    return best


@torch.inference_mode()
def measure(target: Target, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Passes of some rows behind a context, and prompts read from nothing."""
    text = [1000 + i % 500 for i in range(max([options.context, *options.prompts]))]
    cache = target.new_cache()
    target.prefill(text[: options.context], cache)

    def rows(count: int) -> float:
        block = Block.chain([list(range(2000, 2000 + count))], cache.lengths[:1], target.device)
        started = time.perf_counter()
        target.run(block, cache)
        spent = time.perf_counter() - started
        cache.drop()
        return spent

    def prompt(count: int) -> float:
        empty = target.new_cache()
        started = time.perf_counter()
        target.prefill(text[:count], empty)
        return time.perf_counter() - started

    found = []
    for kind, counts, run in (("rows", options.rows, rows), ("prompt", options.prompts, prompt)):
        for count in counts:
            best = in_turns(target, options.repeats, lambda run=run, count=count: run(count))
            found.append({"kind": kind, "count": count, **best})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Measure each dtype and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtypes", default=["float32", "bfloat16"], nargs="+")
    parser.add_argument("--rows", type=int, default=[1, 4, 8, 16, 32], nargs="+")
    parser.add_argument("--prompts", type=int, default=[64, 256, 512], nargs="*")
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_pass.json")
    options = parser.parse_args()
    passes: dict[str, list[dict[str, Any]]] = {}
    for name in options.dtypes:
        target = Target.from_pretrained(options.model, dtype=getattr(torch, name), device="cpu")
        if not target.compiled:
            raise SystemExit(
                f"passes are not compiled here: {getattr(target.fast, 'native_reason', target.path_reason)}"
            )
        print(name)
        passes[name] = measure(target, options)
    about = {"model": options.model, "context": options.context, "machine": describe_machine(target.device)}
    options.out.write_text(json.dumps({"about": about, "passes": passes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
