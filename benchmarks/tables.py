"""Write docs/benchmarks.md and the tables of other pages from result files, so that no figure is typed.

    python benchmarks/tables.py

docs/benchmarks.md holds every `benchmarks/results/bench_*.json` (written by `outpace bench --out ...`). In other pages,
what stands between `<!-- table:NAME -->` and `<!-- /table -->` is replaced by the tables of NAME.json. With --check
nothing is written, and the exit code says whether all pages are current.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from outpace.bench.report import load_result, render_markdown, words
from outpace.bench.report.markdown import task_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/fast.md",
    "docs/noise.md",
    "docs/training.md",
    "docs/methods/medusa.md",
    "docs/methods/ptp.md",
)
_SLOT = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)
_INTRODUCTION = """# Benchmarks

Written by `python benchmarks/tables.py` from the files in `benchmarks/results/`; do not edit.

How to read it: **speed** is the geometric mean, over prompts, of paired time-per-token ratios to plain decoding in the
same engine, with a 95 % bootstrap interval over prompts; a difference is claimed only where the interval excludes 1.
**emitted/round** is tokens per pass of the target, **round** the mean wall clock of one. **same text** is the audit of
the very answers that were timed: equal token for token, or parted at a near tie that floating point explains; anything
beyond withholds the figure, as do failures and texts that loop. Speeds do not transfer between machines: run the
command under a table on yours. `outpace bench` itself: [bench.md](bench.md).

"""


def readme_table(result: dict[str, Any]) -> str:
    """Speed per task of every cell, and the conditions in one paragraph."""
    base = result["methods"][0]["name"]
    lines: list[str] = []
    for cell in result["cells"]:
        lines += [f"{words.cell_name(cell).capitalize()}:", "", *task_table(cell, base)]
    lines += [f"{words.target(result)}, {words.machine(result)}. {' '.join(words.conditions(result))}"]
    return "\n".join(lines) + "\n"


def pass_table(result: dict[str, Any]) -> str:
    """One row per captured pass: milliseconds beside the floor and the model's own modules."""
    lines = [
        "| model | batch x rows, context | pass, ms | floor, ms | of the floor | through its modules, ms |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["pass"]:
        modules = "" if row["modules_ms"] is None else f"{row['modules_ms']:.1f}"
        lines.append(
            f"| {row['model']} | {row['batch']} x {row['rows']}, {row['context']} | {row['ms']:.2f} | "
            f"{row['floor_ms']:.2f} | {row['of_floor']:.2f}x | {modules} |"
        )
    about = result["about"]
    rates = [row.get("copy_bytes_per_second", about["copy_bytes_per_second"]) / 1e12 for row in result["pass"]]
    spread = f"{min(rates):.2f}" if min(rates) == max(rates) else f"{min(rates):.2f} to {max(rates):.2f}"
    lines.append("")
    lines.append(
        f"{about['device']}, bfloat16, random weights, medians of 30 replays; floor: bytes a pass must read over "
        f"{spread} TB/s, a copy's rate in the same run. torch {about['torch']}, transformers {about['transformers']}."
    )
    return "\n".join(lines) + "\n"


def _where(about: dict[str, Any]) -> str:
    return f"{about['device']}, bfloat16. torch {about['torch']}, transformers {about['transformers']}."


def rounds_table(result: dict[str, Any]) -> str:
    """One row per drafter, law and batch: milliseconds of a round's parts."""
    lines = [
        "| drafter | T | batch | draft | pass | walk | host | round, ms | outside the pass | tokens/round |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["round"]:
        parts = " | ".join(f"{max(0.0, row[part]):.2f}" for part in ("draft_ms", "pass_ms", "walk_ms", "host_ms"))
        lines.append(
            f"| `{row['drafter']}` | {row['law']} | {row['batch']} | {parts} | {row['round_ms']:.2f} | "
            f"{row['outside_pass']:.0%} | {row['emitted_per_round']:.2f} |"
        )
    lines += ["", f"{result['round'][0]['model']}, {_where(result['about'])}"]
    return "\n".join(lines) + "\n"


def cpu_table(result: dict[str, Any]) -> str:
    """Decoding of one request by several engines on a CPU."""
    lines = [
        "| engine | dtype | tokens/s | plain outpace against it (quartiles) | same text |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in result["decode_cpu"]:
        low, high = row["quartiles"]
        name = {"outpace": "outpace, plain", "transformers": "transformers.generate", "vllm": "vLLM's CPU build"}.get(
            row["engine"], row["engine"].replace("+", ", ")
        )
        lines.append(
            f"| {name} | {row['dtype']} | {row['tokens_per_second']:.1f} | {row['outpace_against_it']:.2f}x "
            f"({low:.2f} to {high:.2f}) | {row['equal']} of {row['answers']} |"
        )
    about = result["about"]
    lines += [
        "",
        f"{about['model']}, {about['cpu']}, {about['threads']} threads; greedy, one request, {about['tokens']} new "
        "tokens behind prompts of the mini suite, prefill included, engines in turns. "
        f"torch {about['torch']}, transformers {about['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


def decode_table(result: dict[str, Any]) -> str:
    """Plain decoding beside stock generate, and by batch size."""
    fastest = result["decode"][0]["tokens_per_second"]
    lines = ["| plain decoding of SmolLM2, batch 1 | tokens/s | outpace against it |", "| --- | --- | --- |"]
    for row in result["decode"]:
        speed = row["tokens_per_second"]
        lines.append(f"| {row['method']} | {speed:,.0f} | {fastest / speed:.1f}x |")
    lines += ["", "| model | batch | tokens/s | round, ms | floor, ms | share of the floor |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in result["batch"]:
        lines.append(
            f"| {row['model']} | {row['batch']} | {row['tokens_per_second']:,.0f} | {row['ms_per_round']:.2f} | "
            f"{row['floor_ms']:.2f} | {row['share_of_floor']:.0%} |"
        )
    lines += ["", f"{_where(result['about'])} Batches: the shapes with random weights, plain decoding."]
    return "\n".join(lines) + "\n"


def paired(one: list[list[int]], two: list[list[int]], resamples: int = 10_000) -> tuple[float, float, float]:
    """Tokens per round of `one` over those of `two`, with a 95 % bootstrap interval over their common questions.

    one, two: [emitted, rounds] of each question.
    """
    both = np.array([one, two], dtype=np.int64)  # [2, questions, 2]
    drawn = np.random.default_rng(0).integers(0, len(one), (resamples, len(one)))
    counts = np.stack([np.bincount(d, minlength=len(one)) for d in drawn])

    def ratio(sums: Any) -> Any:
        return (sums[..., 0, 0] * sums[..., 1, 1]) / (sums[..., 0, 1] * sums[..., 1, 0])

    low, high = np.percentile(ratio(np.einsum("rq,dqk->rdk", counts, both)), (2.5, 97.5))
    return float(ratio(both.sum(1))), float(low), float(high)


def acceptance_table(result: dict[str, Any]) -> str:
    """Tokens per pass of drafters, per task, a row per drafter and temperature.

    Where each question was kept, also times what the last drafter has on the same questions.
    """
    rows, about = result["rows"], result["about"]
    tasks = list(rows[0]["per_task"])
    named = " | ".join(task.replace("_", " ") for task in tasks)
    last = rows[-1]["drafter"] if all("per_question" in row for row in rows) else None
    over = f" over {last} |" if last else ""
    lines = [
        f"| drafter | T | all |{over} {named} | accepted, given that it was reached |",
        f"| --- | --- | --- |{' --- |' if last else ''} {' | '.join('---' for _ in tasks)} | --- |",
    ]
    beside = {row["temperature"]: row for row in rows if row["drafter"] == last}
    for row in rows:
        per_task = " | ".join(f"{row['per_task'][task]:.2f}" for task in tasks)
        rates = " ".join(f"{rate:.2f}" for rate in row["accept_given_reached"])
        over = ""
        if last:
            other = beside[row["temperature"]]
            ratio, low, high = paired(row["per_question"], other["per_question"])
            over = " |" if row is other else f" {ratio:.3f} ({low:.3f} to {high:.3f}) |"
        lines.append(
            f"| {row['drafter']} | {row['temperature']:g} | **{row['emitted_per_round']:.2f}** |{over} {per_task} | "
            f"{rates} |"
        )
    asked, dtype = about["asked"], about["dtype"].removeprefix("torch.")
    noises = {row.get("noise", asked.get("noise", "uniform")) for row in rows}
    lines += [
        "",
        f"{about['model']}, {about['device']}, {dtype}: {about['questions']} first "
        f"turns of Spec-Bench ({asked['per_task']} a task), {asked['tokens']} new tokens at most, "
        f"batch {asked['batch']}, seed {asked['seed']}, {' and '.join(sorted(noises))} noise. torch {about['torch']}, "
        f"transformers {about['transformers']}.",
    ]
    return "\n".join(lines) + "\n"


def prompt_table(result: dict[str, Any]) -> str:
    """Time to the first token, a row per drafter and way of reading, and its parts at the longest prompt."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in result["prompt"]:
        found.setdefault((row["drafter"], row["reading"]), {})[row["prompt"]] = row
    lengths = sorted({row["prompt"] for row in result["prompt"]})
    named = " | ".join(f"{length} tokens" for length in lengths)
    lines = [
        f"| drafter | its reading | {named} | of which reading, {lengths[0]} / {lengths[-1]} |",
        f"| --- | --- |{' --- |' * (len(lengths) + 1)}",
    ]
    for (drafter, reading), by_length in found.items():
        times = " | ".join(f"{by_length[length]['ttft_ms']:.1f}" for length in lengths)
        short, long = by_length[lengths[0]]["reading_ms"], by_length[lengths[-1]]["reading_ms"]
        lines.append(f"| {drafter} | {reading if short else '-'} | {times} | {short:.2f} / {long:.2f} |")
    lines += ["", f"Milliseconds until the first token, smollm2, one run. {_where(result['about'])}"]
    return "\n".join(lines) + "\n"


def noise_table(result: dict[str, Any]) -> str:
    """How often candidates hold the path's token, a row per temperature and kind of noise."""
    said = {"likeliest": "without the numbers", "uniform": "`uniform`, looked up", "gumbel": "`gumbel`"}
    counts = (1, 2, 4, 8)
    heads = " | ".join(f"{k} candidate{'s' if k > 1 else ''}" for k in counts)
    lines = [f"| T | {heads.join(('candidates chosen | ', ' |'))}", f"| --- | --- |{' --- |' * len(counts)}"]
    for row in result["rows"]:
        for way, name in said.items():
            hits = " | ".join(f"{100 * row[way][k - 1]:.0f} %" for k in counts)
            lines.append(f"| {row['temperature']:g} | {name} | {hits} |")
    about, rows = result["about"], result["rows"]
    heats = [f"T={row['temperature']:g}" for row in rows]
    apart = ", ".join(
        f"{r['distance']:.2f} at {t}, entropy {r['entropy']:.1f}" for r, t in zip(rows, heats, strict=True)
    )
    sure = ", ".join(f"{100 * row['sure']:.0f} % at {heat}" for row, heat in zip(rows, heats, strict=True))
    lines += [
        "",
        f"{about['model']}, {about['drafter']}, {rows[0]['places']} places of sampled answers to the mini suite, "
        f"{about['draws']} tokens drawn at each. Total variation of the two laws: {apart} nats. What the value of the "
        f"first candidate says of it under Gumbel noise: {sure}. torch {about['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def training_table(result: dict[str, Any]) -> str:
    """What a training step costs, a row per drafter."""
    kept = any("kept_step_ms" in row for row in result["rows"])
    lines = [
        "| drafter | step, ms | tokens/s | features' share | share of the arithmetic peak | peak memory |"
        + (" features kept: step, ms (their share) |" if kept else ""),
        "| --- | --- | --- | --- | --- | --- |" + (" --- |" if kept else ""),
    ]
    for row in result["rows"]:
        again = f"{row['kept_step_ms']:.0f} ({row['kept_feature_share']:.0%})" if "kept_step_ms" in row else ""
        share = f"{row['feature_share']:.0%}" if row["feature_share"] > 0.01 else "in the objective"
        peak = "not counted" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        speed = f"{row['tokens_per_second'] / 1e3:.0f} k"
        lines.append(
            f"| `{row['drafter']}` | {row['step_ms']:.0f} | {speed} | {share} | {peak} | {row['memory_gib']:.1f} GiB |"
            + (f" {again} |" if kept else "")
        )
    about = result["about"]
    lines += [
        "",
        f"{about['model']} shape, {about['device']}, {result['rows'][0]['tokens_per_step']} tokens a step, bfloat16 "
        f"products, float32 weights. torch {about['torch']}.",
    ]
    return "\n".join(lines) + "\n"


def table(name: str) -> str:
    """What stands in a slot: the tables of NAME.json, by what it holds."""
    file = RESULTS / f"{name}.json"
    plain = json.loads(file.read_text())
    if "pass" in plain:
        return pass_table(plain)
    if "round" in plain:
        return rounds_table(plain)
    if "prompt" in plain:
        return prompt_table(plain)
    if "decode_cpu" in plain:
        return cpu_table(plain)
    if "decode" in plain:
        return decode_table(plain)
    if "rows" in plain and "draws" in plain["about"]:
        return noise_table(plain)
    if "rows" in plain:
        return acceptance_table(plain) if "questions" in plain["about"] else training_table(plain)
    return readme_table(load_result(file))


def fill(text: str) -> str:
    """The page with its tables rendered anew."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- table:{match[1]} -->\n{table(match[1])}<!-- /table -->"

    return _SLOT.sub(replace, text)


def page() -> str:
    """docs/benchmarks.md."""
    files = sorted(RESULTS.glob("bench_*.json"))
    return _INTRODUCTION + "\n".join(render_markdown(load_result(file), level=2) for file in files)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    wanted = {ROOT / name: fill((ROOT / name).read_text()) for name in PAGES}
    wanted[ROOT / "docs" / "benchmarks.md"] = page()
    stale = 0
    for path, text in wanted.items():
        if not path.exists() or path.read_text() != text:
            stale += 1
            print(f"{path.name}: {'stale, run python benchmarks/tables.py' if check else 'written'}")
            if not check:
                path.write_text(text)
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
