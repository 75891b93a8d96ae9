"""Two results side by side: what changed, on the prompts both have, and what makes them incomparable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from outpace.bench.report import words
from outpace.bench.statistics import estimate
from outpace.errors import ResultError


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of every method in every cell that both results have.

    `speed` is the second's speedup over its own baseline divided by the first's, prompt by prompt, with an interval:
    what is left after a faster or slower machine has been divided out. `tokens_per_s` are as measured.

    Raises:
        ResultError: if the two have no cell in common.
    """
    cells = []
    for cell in first["cells"]:
        twin = next((c for c in second["cells"] if words.cell_name(c) == words.cell_name(cell)), None)
        if twin is None:
            continue
        others = {row["name"]: row for row in twin["methods"]}
        rows = [_row(row, others[row["name"]]) for row in cell["methods"] if row["name"] in others]
        cells.append(
            {"batch": cell["batch"], "temperature": cell["temperature"], "mode": cell["mode"], "methods": rows}
        )
    if not cells:
        kinds = [", ".join(words.cell_name(c) for c in result["cells"]) or "nothing" for result in (first, second)]
        raise ResultError(f"the two results have nothing in common: one measured {kinds[0]}; the other {kinds[1]}")
    return {"kind": "outpace-bench-comparison", "differences": _differences(first, second), "cells": cells}


def _row(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    both = [prompt for prompt in first["units"] if prompt in second["units"]]
    change = estimate([second["units"][p] / first["units"][p] for p in both], seed=0, resamples=10_000)
    keys = ("tokens_per_s", "emitted_per_round", "round_ms", "headline", "refusal")
    return {
        "name": first["name"],
        "speed": None if change is None else change.as_dict(),
        "first": {key: first[key] for key in keys},
        "second": {key: second[key] for key in keys},
    }


def _differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing a change."""
    found = []
    for part in ("target", "machine", "config"):
        for name in sorted({*first[part], *second[part]}):
            a, b = first[part].get(name), second[part].get(name)
            if a != b:
                found.append(f"{part}.{name}: {a} / {b}")
    if first["suite"]["sha256"] != second["suite"]["sha256"]:
        found.append(f"suite: {first['suite']['name']} / {second['suite']['name']}, other questions")
    return found


def comparison_markdown(document: Mapping[str, Any]) -> str:
    """The comparison as Markdown."""
    lines = ["# Comparison of two benchmark results", ""]
    if document["differences"]:
        lines += ["They differ in more than the code:", "", *(f"- {line}" for line in document["differences"]), ""]
    for cell in document["cells"]:
        lines += [f"## {words.cell_name(cell).capitalize()}", ""]
        lines += [
            "| | speed, first | speed, second | second / first | tokens/s | emitted/round |",
            "| --- |" + " ---: |" * 5,
        ]
        for row in cell["methods"]:
            one, two = row["first"], row["second"]
            claim = f", {row['speed']['claim']}" if row["speed"] else ""
            lines.append(
                f"| {row['name']} | {words.ratio(one['headline'])} | {words.ratio(two['headline'])} | "
                f"{words.ratio(row['speed'])}{claim} | {words.number(one['tokens_per_s'], 1)} / "
                f"{words.number(two['tokens_per_s'], 1)} | {words.number(one['emitted_per_round'])} / "
                f"{words.number(two['emitted_per_round'])} |"
            )
        lines.append("")
    return "\n".join(lines)
