"""A result as one HTML file that needs nothing else: no network, no other file, light and dark, phone and desk.

Everything that came from outside (prompts, answers, names, errors) is escaped on its way in.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final

from outpace.bench.report import words
from outpace.bench.report.figures import Style, figures, short, styles
from outpace.bench.report.tables import escaped, headline_table, latency_table, remarks, sign, task_table
from outpace.errors import MissingExtraError

_CAPTIONS: Final = {
    "tasks": (
        "Speed per task",
        "Geometric mean over prompts of paired time-per-token ratios; bars are 95 % bootstrap intervals. A difference "
        "is claimed only where the bar does not touch 1x.",
    ),
    "cost": (
        "What a round costs, and what it brings",
        "Dotted lines join equal speeds, prefill apart. Up is better, left is better; nothing can lie left of "
        "the floor.",
    ),
    "depth": (
        "Acceptance by depth",
        "Of the draft tokens that were put to the test at a depth, how many stood. Larger markers: more trials; depths "
        "with fewer than five are left out.",
    ),
    "split": (
        "Where a round's time goes",
        "Mean over rounds, prefill apart. The dashed line is the time it takes to read the weights once.",
    ),
}
_COLUMNS: Final = (("tasks", "split"), ("cost", "depth"))
_PAGE: Final = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="outpace">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{css}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{plotly}</script>
<script>{script}</script>
</body>
</html>
"""


def render_html(result: Mapping[str, Any]) -> str:
    """The whole page.

    Raises:
        MissingExtraError: without plotly.
    """
    if importlib.util.find_spec("plotly") is None:
        raise MissingExtraError("plotly", "bench", "the HTML report")
    from plotly.offline import get_plotlyjs

    base = result["methods"][0]["name"]
    style = styles(result["methods"])
    floor = (result.get("floor") or {}).get("ms")
    data = {
        "figures": [figures(cell, base, floor, style) for cell in result["cells"]],
        "replays": result["replays"],
        "pace": _paces(result),
        "base": base,
    }
    title = f"outpace bench: {result['target']['name']}"
    body = "\n".join(
        [
            _header(result),
            "<main>",
            _cells(result, base, style),
            _replay(result),
            _method(result),
            "</main>",
            _footer(result),
        ]
    )
    return _PAGE.format(
        title=escaped(title),
        css=_asset("page.css"),
        body=body,
        data=json.dumps(data, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028"),
        plotly=get_plotlyjs().replace("</script", "<\\/script"),
        script=_asset("page.js"),
    )


def _asset(name: str) -> str:
    return resources.files("outpace.bench.report").joinpath(name).read_text(encoding="utf-8")


def _paces(result: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds per round of every method at the smallest batch: the tempo of a replay."""
    cells = sorted(result["cells"], key=lambda cell: (cell["batch"], cell["temperature"]))
    found: dict[str, float] = {}
    for cell in cells[:1]:
        found.update({row["name"]: row["round_ms"] for row in cell["methods"] if row["round_ms"]})
    return found


def _header(result: Mapping[str, Any]) -> str:
    target = result["target"]
    name, _, origin = target["name"].partition(":") if ": " in target["name"] else (target["name"], "", "")
    facts = (origin.strip(), target.get("dtype"), words.machine(result), result["started"])
    under = ", ".join(str(fact) for fact in facts if fact)
    widened = (
        f'<p class="label">Widened: {escaped(target["widened"])}. Real text and acceptance of the small model, at the '
        "cost of the large shape.</p>"
        if target.get("widened")
        else ""
    )
    coverage = result["coverage"]
    part = "" if coverage["complete"] else f'<p class="label">{escaped(coverage["words"])}</p>'
    return f"""<header>
<div class="bar"><span class="brand">outpace <b>bench</b></span>
<button id="theme" type="button" aria-label="Switch between light and dark"><span aria-hidden="true">◐</span></button>
</div>
<h1>{escaped(name)}</h1>
<p class="sub">{escaped(under)}</p>
{widened}{part}
{_tiles(result)}
</header>"""


def _tiles(result: Mapping[str, Any]) -> str:
    """Four facts before anything else."""
    base = result["methods"][0]["name"]
    rows = [(cell, row) for cell in result["cells"] for row in cell["methods"]]
    real = [r for _, r in rows if r["headline"] and r["name"] != base and r["kind"] != "ceiling"]
    best = max(real, key=lambda row: row["headline"]["ratio"], default=None)
    engine = [row["parity"] for _, row in rows if row["kind"] == "engine" and row["name"] != base]
    total = {v: sum(p[v] for p in engine) for v in ("equal", "near tie", "differs", "not audited")}
    compared = sum(total.values())
    plain = next((row for _, row in rows if row["name"] == base), None)
    tiles = []
    if best is not None:
        found = best["headline"]
        span = "" if found["low"] is None else f" {found['low']:.2f} to {found['high']:.2f},"
        small = f"{best['name']},{span} {found['claim']}"
        tiles.append((f"{found['ratio']:.2f}x", small, "best speed over plain decoding"))
    if compared:
        odd = f"{total['near tie']} near ties, {total['differs']} beyond"
        tiles.append(
            (f"{total['equal']} / {compared}", odd, "answers with drafts equal plain decoding's, token for token")
        )
    if plain is not None and plain["tokens_per_s"]:
        share = f"a pass reaches {plain['floor_share']:.0%} of the floor" if plain["floor_share"] else ""
        tiles.append((f"{plain['tokens_per_s']:,.1f}", share, "tokens/s of plain decoding, prefill included"))
    coverage = result["coverage"]
    questions = f"{coverage['questions']} / {coverage['questions_of_suite']}"
    tiles.append((questions, f"{coverage['seconds']:,.0f} s of measuring", f"questions of {result['suite']['name']}"))
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span class="what">{escaped(what)}</span><strong>{escaped(big)}</strong>'
            f"<span>{escaped(small)}</span></div>"
            for big, small, what in tiles
        )
        + "</div>"
    )


def _cells(result: Mapping[str, Any], base: str, style: Mapping[str, Style]) -> str:
    """One section per cell, chosen by tabs where there are several."""
    cells = result["cells"]
    tabs = ""
    if len(cells) > 1:
        buttons = "".join(
            f'<button type="button" role="tab" id="tab{i}" aria-controls="cell{i}" '
            f'aria-selected="{str(i == 0).lower()}">'
            f"{escaped(words.cell_name(cell))}</button>"
            for i, cell in enumerate(cells)
        )
        tabs = f'<div class="tabs" role="tablist" aria-label="Conditions">{buttons}</div>'
    sections = [_cell(result, cell, index, base, style) for index, cell in enumerate(cells)]
    return tabs + "\n".join(sections) if cells else '<p class="label">Nothing was measured.</p>'


def _cell(result: Mapping[str, Any], cell: Mapping[str, Any], index: int, base: str, style: Mapping[str, Style]) -> str:
    floor = (result.get("floor") or {}).get("ms")
    drawn = figures(cell, base, floor, style)
    columns = "".join(
        f"<div>{''.join(_figure(index, name) for name in column if name in drawn)}</div>" for column in _COLUMNS
    )
    role = f'role="tabpanel" aria-labelledby="tab{index}"' if len(result["cells"]) > 1 else ""
    hidden = " hidden" if index else ""
    return f"""<section class="cell" id="cell{index}" {role}{hidden}>
<h2>{escaped(words.cell_name(cell).capitalize())}</h2>
{headline_table(cell, base, style)}
{remarks(cell, base)}
{_legend(cell, style)}
<div class="plots">{columns}</div>
{task_table(cell, base)}
{latency_table(cell)}
</section>"""


def _figure(index: int, name: str) -> str:
    head, text = _CAPTIONS[name]
    return (
        f'<figure class="card"><h3>{escaped(head)}</h3><div class="plot" data-cell="{index}" data-figure="{name}" '
        f'role="img" aria-label="{escaped(head)}"></div><figcaption>{escaped(text)}</figcaption></figure>'
    )


def _legend(cell: Mapping[str, Any], style: Mapping[str, Style]) -> str:
    """One legend for all figures of a cell."""
    keys = (f"<li>{sign(style[row['name']])}{escaped(short(row['name']))}</li>" for row in cell["methods"])
    return f'<ul class="legend" aria-label="Legend of the figures">{"".join(keys)}</ul>'


def _replay(result: Mapping[str, Any]) -> str:
    """A place for the replay; the script fills it."""
    if not any(replay["answers"] for replay in result["replays"]):
        return ""
    questions = "".join(f'<option value="{i}">{escaped(_name(r))}</option>' for i, r in enumerate(result["replays"]))
    return f"""<section id="replay" class="card">
<h2>Replay</h2>
<p class="sub">An answer, cut by round. Coloured text was drafted and accepted, underlined text is the target's own
token. Point at a round (or tap it) to see its drafts. Answers that show drafts at work were chosen; decoded once more
for this page, untimed; the text is that of the run.</p>
<div class="controls"><label>Prompt <select id="replay-question">{questions}</select></label>
<label>Drafter <select id="replay-method"></select></label>
<button type="button" id="replay-play">Play at measured speed</button></div>
<details><summary>The prompt</summary><pre id="replay-prompt"></pre></details>
<div id="replay-text" aria-live="off"></div>
<div id="replay-race" hidden><span>plain decoding</span><div class="track"><div id="race-plain"></div></div>
<span id="race-name"></span><div class="track"><div id="race-drafted"></div></div></div>
<p id="replay-round" class="note" aria-live="polite"></p>
</section>"""


def _name(replay: Mapping[str, Any]) -> str:
    heat = f", temperature {replay['temperature']:g}" if replay["temperature"] else ""
    return f"{replay['task']}: {replay['question']}{heat}"


def _method(result: Mapping[str, Any]) -> str:
    """Conditions, environment, config: what it takes to believe or to repeat."""
    conditions = "".join(f"<li>{escaped(line)}</li>" for line in words.conditions(result))
    machine = "".join(
        f"<tr><th scope=row>{escaped(key)}</th><td>{escaped(value)}</td></tr>"
        for key, value in {**result["target"], **result["machine"]}.items()
        if value is not None
    )
    state = json.dumps({"state": result.get("state"), "warm_up": result.get("warm_up")}, indent=1)
    config = json.dumps(result["config"], indent=1)
    return f"""<section class="card" id="method">
<h2>How this was measured</h2>
<ul>{conditions}
<li>Every prompt is answered by every method in random order in one process; repetitions are outermost. The baseline is
plain decoding in the same engine. Differences from it are audited token by token: a near tie is a difference that
floating point can explain, anything else withholds the figure.</li></ul>
<p>Run it again: <code>{escaped(result["command"])}</code></p>
<details><summary>Machine and model</summary><div class="scroll"><table class="plain">{machine}</table></div></details>
<details><summary>Configuration</summary><pre>{escaped(config)}</pre></details>
<details><summary>State and warm-up</summary><pre>{escaped(state)}</pre></details>
</section>"""


def _footer(result: Mapping[str, Any]) -> str:
    version = escaped(result["machine"]["outpace"])
    return f"<footer>outpace {version}. One file, no network; plotly.js (MIT) draws the figures.</footer>"
