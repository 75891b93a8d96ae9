"""Tokens per pass of drafters on Spec-Bench's questions, per task: counts only, so batches and busy machines are fine.

    python benchmarks/acceptance.py --questions question.jsonl --drafters eagle3 ptp=runs/ptp mask=runs/mask:budget=24

First turns, the model's own chat template, `--tokens` new tokens at most, no drafter ever stood down. Each drafter is
asked under the noise it wants (`--noise` gives all the same). Texts are compared with plain decoding's under the same
seed and noise. For drafters that add rows to the pass, the rows of a round are counted too.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from contextlib import closing
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers

from outpace import Engine
from outpace.drafters import Drafter, make_drafter
from outpace.drafters.learning import LearnedDrafter
from outpace.engine import encode, total
from outpace.laws import NOISES, Settings
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
    engine: Engine, asked: list[tuple[str, str]], temperature: float, noise: str, options: argparse.Namespace
) -> tuple[list[Any], float]:
    """Outputs of all questions, and seconds."""
    started = perf_counter()
    prompts = [encode(engine.target, turn) for _, turn in asked]
    found = engine.generate(
        prompts, max_new_tokens=options.tokens, temperature=temperature, seed=options.seed, noise=noise
    )
    return found, perf_counter() - started


def wanted_noise(drafter: Drafter | None) -> str:
    """What decides tokens where a drafter guesses best."""
    return (drafter.evaluation if isinstance(drafter, LearnedDrafter) else Settings()).noise


def counting(drafter: Drafter, rows: list[int]) -> None:
    """Note how many rows, the root left out, each pass has from now on."""
    scouts = drafter.scouts

    def counted(context: Any, draft: Any) -> Any:
        found = scouts(context, draft)
        rows.append(draft.width + (found.count if found is not None else 0))
        return found

    drafter.scouts = counted  # type: ignore[method-assign]


def main() -> None:
    """Run all drafters at all temperatures and write one result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--drafters", required=True, nargs="+", metavar="[NAME=]SPEC")
    parser.add_argument("--temperatures", default="0,1", help="separated by commas")
    parser.add_argument("--per-task", type=int, default=0, help="questions of each task; 0 for all")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", default="auto", choices=("auto", *NOISES))
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
    plain: dict[tuple[float, str], list[Any]] = {}
    for temperature in map(float, options.temperatures.split(",")):
        for named in options.drafters:
            name, spec = named.split("=", 1) if "=" in named.partition(":")[0] else (named, named)
            drafter, passes = make_drafter(spec), []
            with closing(Engine(target, drafter, max_batch=options.batch, stand_down=False)) as engine:
                noise = wanted_noise(drafter) if options.noise == "auto" else options.noise
                if drafter is not None and drafter.needs.scouts:
                    counting(drafter, passes)
                outputs, seconds = decode(engine, asked, temperature, noise, options)
            if (temperature, noise) not in plain:
                with closing(Engine(target, max_batch=options.batch)) as engine:
                    plain[temperature, noise], _ = decode(engine, asked, temperature, noise, options)
            by_task = defaultdict(list)
            for (task, _), output in zip(asked, outputs, strict=True):
                by_task[task].append(output.stats)
            whole = total([output.stats for output in outputs])
            row = {
                "drafter": name, "spec": spec, "temperature": temperature, "noise": noise, "seconds": seconds,
                "emitted_per_round": whole.emitted_per_round, "accept_given_reached": whole.accept_given_reached,
                "accepted_per_drafted": whole.accepted_per_drafted, "rounds": whole.rounds, "emitted": whole.emitted,
                "per_task": {task: total(stats).emitted_per_round for task, stats in by_task.items()},
                "per_question": [(output.stats.emitted, output.stats.rounds) for output in outputs],
                "same_text": sum(
                    a.tokens == b.tokens for a, b in zip(outputs, plain[temperature, noise], strict=True)
                ),
            }  # fmt: skip
            if passes:
                row["rows_per_round"] = 1 + sum(passes) / len(passes)
            rows.append(row)
            shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items() if k != "per_question"}
            print(json.dumps(shown), flush=True)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
