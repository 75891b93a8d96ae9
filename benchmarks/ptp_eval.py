"""Parallel token prediction against its baseline: tokens per pass, per task and temperature, and what a round costs.

    python benchmarks/ptp_eval.py --questions question.jsonl --drafters ptp=runs/ptp mask=runs/mask eagle3=eagle3
    python benchmarks/ptp_eval.py --questions question.jsonl --drafters ptp=runs/ptp --budgets 8,16,32,64

--questions is a Spec-Bench file (one JSON object a line: question_id, category, turns); only first turns are asked.
Every prompt goes through all drafters and plain decoding one after the other, in an order that rotates, under the same
seed; drafting never stands down. emitted_per_round is the total of tokens over the total of rounds of a task. With
--budgets, every budget of slots is an arm of its own, and the one with most tokens per second is named: the budget to
keep in the checkpoint. The last line is one JSON document; it is also written to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

import outpace
from outpace import Engine, Target
from outpace.drafters import Drafter, make_drafter
from outpace.engine import encode

MT_BENCH = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}


def read_questions(path: Path, per_task: int) -> dict[str, list[str]]:
    """First turns by task, the first `per_task` of each; the eight categories of MT-bench are one task."""
    tasks: dict[str, list[str]] = defaultdict(list)
    for line in path.read_text().splitlines():
        question = json.loads(line)
        category = question["category"]
        tasks["mt_bench" if category in MT_BENCH else category].append(question["turns"][0])
    return {name: spread(texts, per_task) for name, texts in sorted(tasks.items())}


def spread(texts: list[str], count: int) -> list[str]:
    """`count` texts at equal distances."""
    return [texts[i * len(texts) // count] for i in range(min(count, len(texts)))]


def arms_of(arguments: argparse.Namespace) -> dict[str, str | None]:
    """Drafter specs by the name they are shown under."""
    arms: dict[str, str | None] = {"plain": None}
    for item in arguments.drafters:
        name, _, spec = item.partition("=")
        for budget in arguments.budgets or [0]:
            option = f"{',' if ':' in spec else ':'}budget={budget}" if budget else ""
            arms[f"{name}/{budget}" if budget else name] = spec + option
    return arms


def counting(drafter: Drafter, rows: list[int]) -> Drafter:
    """The drafter, noting how many rows each of its rounds adds."""
    scouts = drafter.scouts

    def counted(context: Any, draft: Any) -> Any:
        found = scouts(context, draft)
        rows.append(draft.width + (found.count if found is not None else 0))
        return found

    drafter.scouts = counted  # type: ignore[method-assign]
    return drafter


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All arms on all prompts at all temperatures."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    target = Target.from_pretrained(arguments.model, device=arguments.device)
    rows_added: dict[str, list[int]] = defaultdict(list)
    engines: dict[str, Engine] = {}
    for name, spec in arms_of(arguments).items():
        drafter = make_drafter(spec)
        if drafter is not None and drafter.needs.scouts:
            drafter = counting(drafter, rows_added[name])
        engines[name] = Engine(target, drafter, stand_down=False)
    tasks = read_questions(arguments.questions, arguments.per_task)
    for engine in engines.values():
        engine.generate(["Hello."], max_new_tokens=8, temperature=1.0, noise="uniform")
    table = []
    for temperature in arguments.temperatures:
        for task, texts in tasks.items():
            sums: dict[str, dict[str, float]] = {name: defaultdict(float) for name in engines}
            for number, text in enumerate(texts):
                ids = encode(target, text)[-arguments.context :]
                names = list(engines)
                shift = number % len(names)
                found: dict[str, tuple[int, ...]] = {}
                for name in names[shift:] + names[:shift]:
                    engine, added = engines[name], len(rows_added[name])
                    before = (engine.timing.draft_ms, engine.timing.pass_ms, engine.timing.total_ms)
                    started = time.perf_counter()
                    out = engine.generate(
                        [ids],
                        max_new_tokens=arguments.tokens,
                        temperature=temperature,
                        seed=number,
                        request=number,
                        noise="uniform",
                    )[0]
                    mine = sums[name]
                    mine["seconds"] += time.perf_counter() - started
                    mine["tokens"] += len(out.tokens)
                    mine["rounds"] += out.rounds
                    mine["drafted"] += out.stats.drafted
                    mine["draft_ms"] += engine.timing.draft_ms - before[0]
                    mine["pass_ms"] += engine.timing.pass_ms - before[1]
                    mine["round_ms"] += engine.timing.total_ms - before[2]
                    mine["rows"] += sum(rows_added[name][added:])
                    found[name] = out.tokens
                for name, tokens in found.items():
                    sums[name]["equal"] += tokens == found["plain"]
            for name, mine in sums.items():
                table.append({"temperature": temperature, "task": task, "arm": name, "prompts": len(texts), **mine})
            print(f"temperature {temperature:g}, {task}: done", file=sys.stderr, flush=True)
    result = {
        "benchmark": "ptp_eval",
        "table": table,
        "machine": {
            "model": target.name,
            "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
            "dtype": str(target.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "outpace": outpace.__version__,
            "weight_bytes": target.weight_bytes,
        },
        "command": " ".join(sys.argv),
    }
    if arguments.budgets:
        result["best"] = best_budget(table)
    return result


def best_budget(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The arm with most tokens per second over all tasks, at each temperature."""
    best: dict[str, Any] = {}
    for temperature in sorted({row["temperature"] for row in table}):
        speeds = {}
        for arm in {row["arm"] for row in table} - {"plain"}:
            mine = [r for r in table if r["arm"] == arm and r["temperature"] == temperature]
            speeds[arm] = sum(r["tokens"] for r in mine) / sum(r["seconds"] for r in mine)
        arm = max(speeds, key=lambda name: speeds[name])
        best[str(temperature)] = {"arm": arm, "tokens_per_s": round(speeds[arm], 1)}
    return best


def show(result: dict[str, Any]) -> None:
    """A table per temperature: emitted per round by task, then what a round is made of."""
    table = result["table"]
    tasks = list(dict.fromkeys(row["task"] for row in table))
    arms = list(dict.fromkeys(row["arm"] for row in table))
    for temperature in dict.fromkeys(row["temperature"] for row in table):
        print(f"\ntemperature {temperature:g}: emitted per round")
        print(f"{'arm':20}" + "".join(f"{task[:12]:>14}" for task in tasks) + f"{'all':>8}")
        for arm in arms:
            mine = {r["task"]: r for r in table if r["arm"] == arm and r["temperature"] == temperature}
            cells = [mine[task]["tokens"] / mine[task]["rounds"] for task in tasks]
            total = sum(r["tokens"] for r in mine.values()) / sum(r["rounds"] for r in mine.values())
            print(f"{arm:20}" + "".join(f"{cell:14.2f}" for cell in cells) + f"{total:8.2f}")
        print(f"{'':20}{'tok/s':>9}{'x plain':>9}{'ms/round':>10}{'draft':>8}{'pass':>8}{'rows':>7}{'same text':>11}")
        plain = sum(r["tokens"] for r in table if r["arm"] == "plain" and r["temperature"] == temperature) / sum(
            r["seconds"] for r in table if r["arm"] == "plain" and r["temperature"] == temperature
        )
        for arm in arms:
            mine = [r for r in table if r["arm"] == arm and r["temperature"] == temperature]
            total = {key: sum(r[key] for r in mine) for key in mine[0] if isinstance(mine[0][key], int | float)}
            speed, rounds = total["tokens"] / total["seconds"], total["rounds"]
            print(
                f"{arm:20}{speed:9.1f}{speed / plain:9.2f}{total['round_ms'] / rounds:10.2f}"
                f"{total['draft_ms'] / rounds:8.2f}{total['pass_ms'] / rounds:8.2f}{1 + total['rows'] / rounds:7.1f}"
                f"{total['equal']:8.0f}/{total['prompts']}"
            )
    if "best" in result:
        print(f"\nbest budget: {result['best']}")


def numbers(kind: type) -> Any:
    """A parser of comma-separated numbers."""
    return lambda text: [kind(part) for part in text.split(",") if part]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=Path, required=True, help="Spec-Bench question.jsonl")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--device")
    parser.add_argument("--drafters", nargs="+", required=True, metavar="NAME=SPEC")
    parser.add_argument("--budgets", type=numbers(int), default=[], help="slots per pass, to compare")
    parser.add_argument("--temperatures", type=numbers(float), default=[1.0, 0.7, 0.0])
    parser.add_argument("--per-task", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--context", type=int, default=1536, help="longest prompt; longer ones lose their beginning")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "ptp_eval.json")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="drafter 'ptp' was trained for sampling")
    result = run(arguments)
    show(result)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
