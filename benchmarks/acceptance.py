"""Tokens per pass of drafters on Spec-Bench's questions, per task: counts only, so batches and busy machines are fine.

    python benchmarks/acceptance.py --questions question.jsonl --drafters eagle3,medusa,ptp --temperatures 0,0.7,1

First turns, the model's own chat template, `--tokens` new tokens at most, no drafter ever stood down. The text of a run
is compared with plain decoding's under the same seed; where they part, the first difference is counted.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from outpace import Engine
from outpace.engine import encode, total
from outpace.laws import NOISES
from outpace.target import Target

RESULTS = Path(__file__).parent / "results"
TASKS = {"translation", "summarization", "qa", "math_reasoning", "rag"}


def questions(path: Path, per_task: int) -> list[tuple[str, str]]:
    """(task, first turn), evenly spread over tasks and over each task's file order."""
    by_task: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        one = json.loads(line)
        task = one["category"] if one["category"] in TASKS else "multi_turn"
        by_task[task].append(one["turns"][0])
    found = []
    for task, turns in by_task.items():
        step = max(1, len(turns) // per_task) if per_task else 1
        found += [(task, turn) for turn in turns[::step][: per_task or None]]
    return found


def decode(
    target: Target, drafter: str | None, asked: list[tuple[str, str]], temperature: float, options: argparse.Namespace
) -> tuple[list[Any], float]:
    """Outputs of all questions, and seconds."""
    engine = Engine(target, drafter, max_batch=options.batch, stand_down=False)
    started = perf_counter()
    try:
        prompts = [encode(target, turn) for _, turn in asked]
        found = engine.generate(
            prompts, max_new_tokens=options.tokens, temperature=temperature, seed=options.seed, noise=options.noise
        )
    finally:
        engine.close()
    return found, perf_counter() - started


def main() -> None:
    """Run all drafters at all temperatures and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--drafters", required=True, help="names=specs, e.g. eagle3=runs/eagle3,suffix=suffix")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--per-task", type=int, default=0, help="questions of each task; 0 for all")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", default="gumbel", choices=NOISES, help="uniform for ptp")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, default=RESULTS / "acceptance.json")
    options = parser.parse_args()
    dtype = None if options.dtype == "auto" else getattr(torch, options.dtype)
    target = Target.from_pretrained(options.model, dtype=dtype)
    asked = [one for one in questions(options.questions, options.per_task)
             if len(encode(target, one[1])) + options.tokens < target.context]  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    about = {
        "model": options.model, "device": device, "dtype": str(target.dtype), "torch": torch.__version__,
        "transformers": transformers.__version__, "questions": len(asked),
        "asked": {"temperatures": options.temperatures, "per_task": options.per_task, "tokens": options.tokens,
                  "batch": options.batch, "seed": options.seed, "noise": options.noise},
    }  # fmt: skip
    rows = []
    for temperature in map(float, options.temperatures.split(",")):
        plain, _ = decode(target, None, asked, temperature, options)
        for named in options.drafters.split(","):
            name, _, spec = named.partition("=")
            outputs, seconds = decode(target, spec or name, asked, temperature, options)
            by_task = defaultdict(list)
            for (task, _), output in zip(asked, outputs, strict=True):
                by_task[task].append(output.stats)
            whole = total([output.stats for output in outputs])
            row = {
                "drafter": name, "spec": spec or name, "temperature": temperature, "seconds": seconds,
                "emitted_per_round": whole.emitted_per_round, "accept_given_reached": whole.accept_given_reached,
                "accepted_per_drafted": whole.accepted_per_drafted, "rounds": whole.rounds, "emitted": whole.emitted,
                "per_task": {task: total(stats).emitted_per_round for task, stats in by_task.items()},
                "same_text": sum(a.tokens == b.tokens for a, b in zip(outputs, plain, strict=True)),
            }  # fmt: skip
            rows.append(row)
            print(json.dumps({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
