"""The tables of a report as HTML. Everything that came from outside is escaped on its way in."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from outpace.bench.report import words
from outpace.bench.report.figures import Style


def escaped(text: Any) -> str:
    """Text as HTML, fit for attributes too."""
    return html.escape(str(text), quote=True)


def headline_table(cell: Mapping[str, Any], base: str, style: Mapping[str, Style]) -> str:
    """The table people came for."""
    ratios = [row["headline"] for row in cell["methods"] if row["headline"]]
    top = max([2.0, *((r["high"] or r["ratio"]) for r in ratios)])
    head = (
        ("method", "", ""),
        ("speed", "num", "geometric mean of paired ratios to plain decoding, 95 % interval"),
        ("", "", ""),
        ("tokens/s", "num", "all emitted tokens over all time, prefill included"),
        ("emitted / round", "num", "tokens per pass of the target"),
        ("cost", "num", "of a round, in plain rounds"),
        ("same text", "", "audit of the very answers that were timed"),
        ("verdict", "", ""),
    )
    rows = []
    for row in cell["methods"]:
        speed = row["headline"]
        bar = "" if speed is None else _interval(speed, top, style[row["name"]])
        shown = "-" if speed is None else f"<b>{speed['ratio']:.2f}x</b>"
        span = (
            f"<small>{speed['low']:.2f} to {speed['high']:.2f}</small>"
            if speed and speed["low"] is not None and row["name"] != base
            else ""
        )
        state = "bad" if row["refusal"] else (speed["claim"].split()[0] if speed and row["name"] != base else "base")
        bad = row["parity"]["differs"] > 0
        rows.append(
            f'<tr class="{state}"><th scope="row">{sign(style[row["name"]])}'
            f"{breakable(row['name'])}</th>"
            f'<td class="num" data-sort="{speed["ratio"] if speed else 0}">{shown}{span}</td>'
            f'<td class="range">{bar}</td>'
            f'<td class="num" data-sort="{row["tokens_per_s"] or 0}">{words.number(row["tokens_per_s"], 1)}</td>'
            f'<td class="num" data-sort="{row["emitted_per_round"] or 0}">{words.number(row["emitted_per_round"])}</td>'
            f'<td class="num" data-sort="{row["cost"] or 0}">{words.number(row["cost"])}</td>'
            f"<td{' class=wrong' if bad else ''}>{escaped(words.parity(row['parity']))}</td>"
            f'<td class="verdict">{escaped(words.verdict(row, base))}</td></tr>'
        )
    return _table(head, rows, "sortable", "Speed of every method")


def _interval(speed: Mapping[str, Any], top: float, style: Style) -> str:
    """A small picture of a ratio and its interval on a common linear scale from 0."""

    def at(value: float) -> float:
        return round(100 * min(value, top) / top, 2)

    low, high = speed["low"] or speed["ratio"], speed["high"] or speed["ratio"]
    return (
        '<svg viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true" class="interval">'
        f'<rect x="{min(at(1), at(speed["ratio"]))}" y="4.5" width="{abs(at(speed["ratio"]) - at(1)):.2f}" height="7" '
        f'class="gain" style="fill:var({style.variable})"/>'
        f'<line class="one" x1="{at(1)}" x2="{at(1)}" y1="0" y2="16"/>'
        f'<line x1="{at(low)}" x2="{at(high)}" y1="8" y2="8" style="stroke:var({style.variable})" class="whisker"/>'
        f'<rect x="{at(speed["ratio"]) - 1.2}" y="2.5" width="2.4" height="11" '
        f'style="fill:var({style.variable})"/></svg>'
    )


def sign(style: Style) -> str:
    """A method's mark, as in the figures."""
    return f'<i class="sign" style="color:var({style.variable})" aria-hidden="true">{style.sign}</i>'


def breakable(name: str) -> str:
    """A long spec may break behind its punctuation."""
    text = escaped(name)
    for mark in (":", ",", "=", "+"):
        text = text.replace(mark, f"{mark}<wbr>")
    return text


def remarks(cell: Mapping[str, Any], base: str) -> str:
    """What the table does not say by itself: loops, refusals, break-even, the best plain decoding."""
    items = []
    if cell["looping"]:
        where, why = cell["looping_example"]
        items.append(
            f"{cell['looping']} of {cell['prompts']} texts loop and are no part of the speeds; {where}: {why}."
        )
    if cell["best_plain"] != base:
        others = [
            f"{row['name']} {words.ratio(row['speedup_over_best_plain'])}"
            for row in cell["methods"]
            if row["drafts"] and not row["refusal"]
        ]
        items.append(f"The fastest decoding without drafts was {cell['best_plain']}. Against it: {'; '.join(others)}.")
    for row in cell["methods"]:
        found = row["break_even"]
        if found and row["emitted_per_round"] and row["kind"] != "ceiling":
            a = found["acceptance"]
            needs = (
                "no acceptance would pay for it"
                if a is None
                else f"an acceptance of {a:.0%} at every depth would pay for it"
            )
            items.append(
                f"{row['name']}: a round costs {found['emitted_per_round']:.2f} plain ones and emits "
                f"{row['emitted_per_round']:.2f} tokens; {needs} (drafts {found['mean_depth']:.1f} deep, in "
                f"{found['share_of_rounds_drafted']:.0%} of rounds)."
            )
        if row["notes"]["answers"]:
            items.append(f"{row['name']} in {row['notes']['answers']} answers: {row['notes']['example']}")
        for finding in row["parity"]["examples"]:
            items.append(f"{row['name']} on {finding['prompt']}, {finding['verdict']}: {_difference(finding)}")
    if not items:
        return ""
    listed = "".join(f"<li>{escaped(item)}</li>" for item in items)
    return f'<details class="card"><summary>{len(items)} remarks on this table</summary><ul>{listed}</ul></details>'


def _difference(finding: Mapping[str, Any]) -> str:
    found = finding["difference"]
    if found is None:
        return "equal"
    if found["test"] == "ending":
        return f"same tokens up to {found['position']}, another ending"
    return (
        f"token {found['position']} ({found['plain']} against {found['other']}), gap {found['gap']:.3g} where noise "
        f"may be {found['allowed']:.3g}, by {found['test']} in {found['reference']}"
    )


def task_table(cell: Mapping[str, Any], base: str) -> str:
    """Speed and emitted per round, by task."""
    tasks = list(dict.fromkeys(task["task"] for row in cell["methods"] for task in row["tasks"]))
    if len(tasks) < 2:
        return ""
    rows = []
    for row in cell["methods"]:
        found = {task["task"]: task for task in row["tasks"]}
        cells = []
        for task in tasks:
            one = found.get(task)
            speed = one["speedup"] if one and not row["refusal"] else None
            if row["name"] == base and one:
                cells.append(f'<td class="num">{words.number(one["tokens_per_s"], 1)} tok/s</td>')
            elif one is None or speed is None:
                cells.append('<td class="num">-</td>')
            else:
                emitted = words.number(one["emitted_per_round"])
                cells.append(
                    f'<td class="num {speed["claim"].split()[0]}" title="{escaped(words.ratio(speed))}" '
                    f'data-sort="{speed["ratio"]}">{speed["ratio"]:.2f}x<small>{emitted} / round</small></td>'
                )
        rows.append(f'<tr><th scope="row">{breakable(row["name"])}</th>{"".join(cells)}</tr>')
    head = (("method", "", ""), *((task, "num", "") for task in tasks))
    table = _table(head, rows, "sortable", "Speed per task")
    return f'<details class="card"><summary>Table: speed and emitted per round, by task</summary>{table}</details>'


def latency_table(cell: Mapping[str, Any]) -> str:
    """Latency, memory, drafting."""
    head = (
        ("method", "", ""), ("first token p50", "num", ""), ("p95", "num", ""), ("answer p50", "num", ""),
        ("p95", "num", ""), ("later token p50", "num", ""), ("round", "num", ""),
        ("of floor", "num", "floor of a pass over the time of one"), ("drafted / emitted", "num", ""),
        ("accepted / drafted", "num", ""), ("peak memory", "num", ""), ("guarantee", "", ""),
    )  # fmt: skip
    rows = []
    for row in cell["methods"]:
        first, whole, later = row["ttft_ms"] or {}, row["latency_ms"] or {}, row["ms_per_later_token"] or {}
        share = row["floor_share"]
        cells = [
            words.milliseconds(first.get("p50")),
            words.milliseconds(first.get("p95")),
            words.milliseconds(whole.get("p50")),
            words.milliseconds(whole.get("p95")),
            words.milliseconds(later.get("p50")),
            words.milliseconds(row["round_ms"]),
            "-" if share is None else f"{share:.0%}",
            words.number(row["drafted_per_emitted"]) if row["drafted_per_emitted"] else "-",
            words.number(row["accepted_per_drafted"]),
            words.gigabytes(row["peak_bytes"]),
        ]
        numbers = "".join(f'<td class="num">{escaped(value)}</td>' for value in cells)
        rows.append(
            f'<tr><th scope="row">{breakable(row["name"])}</th>{numbers}<td>{escaped(row["guarantee"])}</td></tr>'
        )
    table = _table(head, rows, "", "Latency and memory")
    return f'<details class="card"><summary>Table: latency, memory, drafting</summary>{table}</details>'


def _table(head: Sequence[tuple[str, str, str]], rows: Iterable[str], kind: str, label: str) -> str:
    cells = "".join(
        f'<th scope="col" class="{align}" title="{escaped(title)}">{escaped(name)}</th>' for name, align, title in head
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escaped(label)}"><table class="{kind}">'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
