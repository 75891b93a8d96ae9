"""Plotly figures as plain data. Colours are names ("@m0", "@text") that the page resolves to its theme's values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

Figure = dict[str, Any]

PALETTE: Final = 8  # "@m0" to "@m7": one for each method, the baseline is "@base"
_SYMBOLS: Final = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("cross", "✚"),
    ("star", "★"),
    ("triangle-down", "▼"),
    ("pentagon", "⬟"),
)
_PARTS: Final = (("draft", "@part0"), ("pass", "@part1"), ("walk", "@part2"), ("other", "@part3"))
_LABEL: Final = 24  # characters of a method's name inside a figure


@dataclass(frozen=True, slots=True)
class Style:
    """How one method looks, in every figure and table of a report: nothing is told by colour alone.

    Attributes:
        colour: "@base" or "@m0" to "@m7". symbol: Plotly's word for its marker. sign: the same as a character.
    """

    colour: str
    symbol: str
    sign: str

    @property
    def variable(self) -> str:
        """The page's custom property of the colour."""
        return f"--{self.colour.removeprefix('@')}"


def styles(methods: Sequence[Mapping[str, Any]]) -> dict[str, Style]:
    """{method: how it looks}."""
    found = {}
    for index, method in enumerate(methods):
        colour = "@base" if index == 0 else f"@m{(index - 1) % PALETTE}"
        found[method["name"]] = Style(colour, *_SYMBOLS[index % len(_SYMBOLS)])
    return found


def figures(
    cell: Mapping[str, Any], base: str, floor_ms: float | None, style: Mapping[str, Style]
) -> dict[str, Figure]:
    """The figures of one cell, by name; one that would be empty is left out."""
    found = {
        "tasks": speed_per_task(cell, base, style),
        "depth": acceptance_by_depth(cell, style),
        "split": round_split(cell, floor_ms),
        "cost": cost_against_tokens(cell, base, floor_ms, style),
    }
    return {name: figure for name, figure in found.items() if figure is not None}


def short(name: str) -> str:
    """A method's name, cut for a legend."""
    return name if len(name) <= _LABEL else name[: _LABEL - 1] + "…"


def speed_per_task(cell: Mapping[str, Any], base: str, style: Mapping[str, Style]) -> Figure | None:
    """Speed over the baseline per task, with 95 % intervals; a row per task, methods side by side in it."""
    rows = [row for row in cell["methods"] if row["name"] != base and not row["refusal"]]
    tasks = list(dict.fromkeys(task["task"] for row in rows for task in row["tasks"] if task["speedup"]))
    if not tasks:
        return None
    traces = []
    for index, row in enumerate(rows):
        found = {task["task"]: task["speedup"] for task in row["tasks"] if task["speedup"]}
        offset = 0.7 * ((index + 0.5) / len(rows) - 0.5)
        mine = [task for task in tasks if task in found]
        ratios = [found[task]["ratio"] for task in mine]
        highs = [(found[task]["high"] or r) - r for task, r in zip(mine, ratios, strict=True)]
        lows = [r - (found[task]["low"] or r) for task, r in zip(mine, ratios, strict=True)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": short(row["name"]),
                "x": ratios,
                "y": [len(tasks) - 1 - tasks.index(task) - offset for task in mine],
                "customdata": [[row["name"], task, found[task]["prompts"]] for task in mine],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": highs,
                    "arrayminus": lows,
                    "thickness": 1.6,
                    "width": 0,
                },
                "marker": {"color": style[row["name"]].colour, "size": 9, "symbol": style[row["name"]].symbol},
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}: %{x:.2f}x over %{customdata[2]} prompts"
                "<extra></extra>",
            }
        )
    layout = {
        "xaxis": {"title": {"text": "times plain decoding"}, "type": "log", **_log_ticks(traces)},
        "yaxis": {
            "tickvals": list(range(len(tasks))),
            "ticktext": tasks[::-1],
            "range": [-0.6, len(tasks) - 0.4],
            "showgrid": False,
            "zeroline": False,
        },
        "shapes": [_line(x0=1, x1=1, y0=-0.6, y1=len(tasks) - 0.4, dash="solid")]
        + [_line(x0=0, x1=1, y0=i + 0.5, y1=i + 0.5, dash="dot", xref="paper") for i in range(len(tasks) - 1)],
        "height": 130 + max(46, 17 * len(rows)) * len(tasks),
    }
    return {"data": traces, "layout": layout}


def _log_ticks(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Readable ticks of a logarithmic axis of ratios, and a range around all intervals."""
    low = min([1.0, *(x - e for t in traces for x, e in zip(t["x"], t["error_x"]["arrayminus"], strict=True))])
    high = max([1.0, *(x + e for t in traces for x, e in zip(t["x"], t["error_x"]["array"], strict=True))])
    steps = [0.125, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    ticks = [step for step in steps if low / 1.3 <= step <= high * 1.3]
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick:g}x" for tick in ticks],
        "range": [math.log10(max(low, 0.05) / 1.1), math.log10(high * 1.1)],
    }


def acceptance_by_depth(cell: Mapping[str, Any], style: Mapping[str, Style]) -> Figure | None:
    """Share of draft tokens accepted at each depth, given that it was reached; larger markers for more trials."""
    rows = [row for row in cell["methods"] if row["accept_given_reached"] and row["kind"] == "engine"]
    if not rows:
        return None
    most = max(row["reached"][0] for row in rows)
    traces = []
    for row in rows:
        kept = [i for i, trials in enumerate(row["reached"]) if trials >= 5]  # fewer say nothing
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": short(row["name"]),
                "x": [i + 1 for i in kept],
                "y": [row["accept_given_reached"][i] for i in kept],
                "customdata": [[row["name"], row["reached"][i]] for i in kept],
                "line": {"color": style[row["name"]].colour, "width": 1.8},
                "marker": {
                    "color": style[row["name"]].colour,
                    "symbol": style[row["name"]].symbol,
                    "size": [5 + 9 * math.sqrt(row["reached"][i] / most) for i in kept],
                },
                "hovertemplate": "%{customdata[0]}<br>depth %{x}: %{y:.0%} of %{customdata[1]} trials<extra></extra>",
            }
        )
    layout = {
        "xaxis": {
            "title": {"text": "depth of the draft token"},
            "dtick": 1 if max(map(len, (t["x"] for t in traces))) <= 12 else 4,
        },
        "yaxis": {"title": {"text": "accepted, given reached"}, "range": [0, 1.03], "tickformat": ".0%"},
        "height": 400,
    }
    return {"data": traces, "layout": layout}


def round_split(cell: Mapping[str, Any], floor_ms: float | None) -> Figure | None:
    """Milliseconds of a mean round by what they were spent on; stock decoding is one piece."""
    rows = [row for row in cell["methods"] if row["round_ms"]][::-1]
    if not rows:
        return None
    names = [short(row["name"]) for row in rows]
    traces = []
    for part, shade in _PARTS:
        values = [row["split_ms_per_round"].get(part) for row in rows]
        if any(values):
            traces.append(_bar(names, values, part, shade))
    rest = [
        row["round_ms"]
        if not row["split_ms_per_round"]
        else max(0.0, row["round_ms"] - sum(row["split_ms_per_round"].values()))
        for row in rows
    ]
    traces.append(_bar(names, rest, "not split", "@part4"))
    shapes = []
    if floor_ms:
        line = _line(x0=floor_ms, x1=floor_ms, y0=-0.5, y1=len(rows) - 0.5, dash="dash")
        shapes.append({**line, "layer": "above"})
    layout: dict[str, Any] = {
        "showlegend": True,
        "legend": {"traceorder": "normal"},
        "barmode": "stack",
        "bargap": 0.35,
        "xaxis": {"title": {"text": "milliseconds per round"}, "rangemode": "tozero"},
        "yaxis": {"showgrid": False, "automargin": True},
        "shapes": shapes,
        "height": 150 + 34 * len(rows),
    }
    if floor_ms:
        layout["annotations"] = [
            _note(floor_ms, len(rows) - 0.5, f"floor of a pass {floor_ms:.1f} ms", "left", "bottom")
        ]
    return {"data": traces, "layout": layout}


def _bar(names: Sequence[str], values: Sequence[float | None], part: str, shade: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "orientation": "h",
        "name": part,
        "y": list(names),
        "x": [value or 0.0 for value in values],
        "marker": {"color": shade},
        "hovertemplate": f"%{{y}}<br>{part}: %{{x:.2f}} ms<extra></extra>",
    }


def cost_against_tokens(
    cell: Mapping[str, Any], base: str, floor_ms: float | None, style: Mapping[str, Style]
) -> Figure | None:
    """What a round costs (in plain rounds) against what it emits; on a line through zero, speed is the same."""
    rows = [row for row in cell["methods"] if row["cost"] and row["emitted_per_round"]]
    if len(rows) < 2:
        return None
    right = 1.15 * max(row["cost"] for row in rows)
    top = 1.15 * max(row["emitted_per_round"] for row in rows)
    traces: list[dict[str, Any]] = []
    notes = []
    for speed in (0.5, 1, 1.5, 2, 3, 4, 6):
        if speed * right < 0.5 or speed > 1.5 * top:
            continue
        x = min(right, top / speed)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [0, x],
                "y": [0, speed * x],
                "line": {
                    "color": "@grid2" if speed != 1 else "@muted",
                    "width": 1 if speed != 1 else 1.6,
                    "dash": "dot" if speed != 1 else "solid",
                },
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
        notes.append(_note(x, speed * x, f"{speed:g}x", "right" if x == right else "center", "bottom"))
    for row in rows:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": short(row["name"]),
                "x": [row["cost"]],
                "y": [row["emitted_per_round"]],
                "customdata": [[row["name"], row["emitted_per_round"] / row["cost"]]],
                "marker": {
                    "color": style[row["name"]].colour, "size": 13, "symbol": style[row["name"]].symbol,
                    "line": {"color": "@card", "width": 1},
                },
                "hovertemplate": "%{customdata[0]}<br>a round costs %{x:.2f} plain ones<br>and emits %{y:.2f} tokens: "
                "%{customdata[1]:.2f}x, prefill apart<extra></extra>",
            }
        )  # fmt: skip
    plain = next(row["round_ms"] for row in rows if row["name"] == base)
    shapes = []
    if floor_ms and plain:
        shapes.append(_line(x0=floor_ms / plain, x1=floor_ms / plain, y0=0, y1=top, dash="dash"))
        notes.append(_note(floor_ms / plain, top, "floor", "left", "top"))
    layout = {
        "xaxis": {"title": {"text": "cost of a round, in plain rounds"}, "range": [0, right], "zeroline": False},
        "yaxis": {"title": {"text": "tokens emitted per round"}, "range": [0, top], "zeroline": False},
        "shapes": shapes,
        "annotations": notes,
        "height": 440,
    }
    return {"data": traces, "layout": layout}


def _line(*, x0: float, x1: float, y0: float, y1: float, dash: str, xref: str = "x") -> dict[str, Any]:
    line = {"color": "@muted" if xref == "x" else "@grid", "width": 1.3 if xref == "x" else 1, "dash": dash}
    return {"type": "line", "xref": xref, "x0": x0, "x1": x1, "y0": y0, "y1": y1, "layer": "below", "line": line}


def _note(x: float, y: float, text: str, xanchor: str, yanchor: str) -> dict[str, Any]:
    font = {"size": 11, "color": "@muted"}
    return {"x": x, "y": y, "text": text, "showarrow": False, "xanchor": xanchor, "yanchor": yanchor, "font": font}
