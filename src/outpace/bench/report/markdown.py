"""A result as Markdown: the tables, and what has to be known to read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from outpace.bench.report import words


def render_markdown(result: Mapping[str, Any], *, level: int = 1) -> str:
    """The whole result; `level` is that of its heading."""
    base = result["methods"][0]["name"]
    lines = [f"{'#' * level} {words.target(result)} on {words.machine(result)}", ""]
    lines += [f"{line}" for line in words.conditions(result)]
    lines.append("")
    for cell in result["cells"]:
        lines += [f"{'#' * (level + 1)} {words.cell_name(cell).capitalize()}", ""]
        lines += headline_table(cell, base)
        lines += _notes(cell, base)
        lines += task_table(cell, base)
    lines += _published(result, level)
    machine = result["machine"]
    lines += [
        f"{result['started']}, outpace {machine['outpace']}, torch {machine['torch']}, transformers "
        f"{machine['transformers']}, Python {machine['python']}, {machine['platform']}. Command: `{result['command']}`",
        "",
    ]
    return "\n".join(lines)


def headline_table(cell: Mapping[str, Any], base: str) -> list[str]:
    """One row per method."""
    columns = ("", "speed", "tokens/s", "emitted/round", "round", "to first token", "same text", "verdict")
    rows = []
    for row in cell["methods"]:
        first = row["ttft_ms"]
        rows.append(
            (
                row["name"],
                words.ratio(row["headline"]),
                words.number(row["tokens_per_s"], 1),
                words.number(row["emitted_per_round"]),
                words.milliseconds(row["round_ms"]),
                words.milliseconds(first["p50"] if first else None),
                words.parity(row["parity"]),
                words.verdict(row, base),
            )
        )
    return _table(columns, rows)


def task_table(cell: Mapping[str, Any], base: str) -> list[str]:
    """Speed (and emitted per round) per task."""
    tasks = list(dict.fromkeys(task["task"] for row in cell["methods"] for task in row["tasks"]))
    if len(tasks) < 2:
        return []
    rows = []
    for row in cell["methods"]:
        found = {task["task"]: task for task in row["tasks"]}
        cells = []
        for task in tasks:
            one = found.get(task)
            speed = one["speedup"] if one and not row["refusal"] else None
            if row["name"] == base and one:
                cells.append(f"{words.number(one['tokens_per_s'], 1)} tok/s")
            else:
                emitted = f", {one['emitted_per_round']:.2f} per round" if one and one["emitted_per_round"] else ""
                cells.append(words.ratio(speed) + (emitted if speed else ""))
        rows.append((row["name"], *cells))
    return _table(("speed per task", *tasks), rows)


def _notes(cell: Mapping[str, Any], base: str) -> list[str]:
    notes = []
    if cell["looping"]:
        where, why = cell["looping_example"]
        notes.append(
            f"- {cell['looping']} of {cell['prompts']} texts loop and are no part of the speeds ({where}: {why})."
        )
    if cell["best_plain"] != base:
        notes.append(f"- The fastest plain decoding here was {cell['best_plain']}; against it:")
        notes += [
            f"  - {row['name']}: {words.ratio(row['speedup_over_best_plain'])}"
            for row in cell["methods"]
            if row["name"] not in (base, cell["best_plain"]) and not row["refusal"]
        ]
    for row in cell["methods"]:
        found = row["break_even"]
        if found and row["emitted_per_round"] and row["kind"] != "ceiling":
            needs = (
                "no acceptance would"
                if found["acceptance"] is None
                else f"an acceptance of {found['acceptance']:.2f} at every depth would"
            )
            notes.append(
                f"- {row['name']}: a round costs {found['emitted_per_round']:.2f} plain ones and emits "
                f"{row['emitted_per_round']:.2f}; {needs} pay for it."
            )
    return [*notes, ""] if notes else []


def _published(result: Mapping[str, Any], level: int) -> list[str]:
    found = result.get("published")
    if not found or not found.get("methods"):
        return []
    lines = [
        f"{'#' * (level + 1)} Counted as Spec-Bench publishes",
        "",
        f"Baseline {found['baseline']}; its tokens are counted from its re-encoded text, a method's as generated; "
        "speeds are means of per-question rates. For comparison with published tables only.",
        "",
    ]
    tasks = list(dict.fromkeys(task for figures in found["methods"].values() for task in figures))
    rows = []
    for name, figures in found["methods"].items():
        cells = [f"{figures[t]['speedup']:.2f}x" if t in figures else "-" for t in tasks]
        rows.append(
            (name, *cells, f"{figures['overall']['mean_accepted_tokens']:.2f}" if "overall" in figures else "-")
        )
    return lines + _table(("", *tasks, "MAT"), rows)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [*lines, ""]
