"""Write the tables of README.md and docs/ from result files, so that no figure is typed.

    python benchmarks/tables.py

A file holds `<!-- table:NAME -->` and `<!-- /table -->`; what stands between is replaced by the rendering of
benchmarks/results/NAME.json. With --check nothing is written, and the exit code says whether all tables are current.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/log.md", "docs/fast.md")
_SLOT = re.compile(r"<!-- table:(\w+) -->\n(.*?)<!-- /table -->", re.DOTALL)


def render(result: dict) -> str:
    """The table of a result file, by what it holds."""
    return render_passes(result) if "pass" in result else render_decoding(result)


def render_passes(result: dict) -> str:
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
    lines.append("")
    lines.append(
        f"{about['device']}, bfloat16, random weights, medians of 30 replays; floor: bytes a pass must read over "
        f"{about['copy_bytes_per_second'] / 1e12:.2f} TB/s, a copy's rate in the same run. torch {about['torch']}, "
        f"transformers {about['transformers']}."
    )
    return "\n".join(lines) + "\n"


def render_decoding(result: dict) -> str:
    """One row per arm, one column per kind: ratio to plain decoding (emitted per round)."""
    table = result["table"]
    kinds = list(dict.fromkeys(row["kind"] for row in table))
    arms = list(dict.fromkeys(row["arm"] for row in table))
    cell = {(row["arm"], row["kind"]): row for row in table}
    lines = [
        "| | " + " | ".join(kinds) + " | same tokens |",
        "| --- |" + " --- |" * (len(kinds) + 1),
    ]
    for arm in arms:
        rows = [cell[arm, kind] for kind in kinds]
        if arm == "plain":
            cells = [f"{row['tokens_per_s']:.0f} tok/s" for row in rows]
        elif arm == "transformers.generate":
            cells = [f"{row['ratio']:.2f}x" for row in rows]
        else:
            cells = [f"{row['ratio']:.2f}x ({row['emitted_per_round']:.2f})" for row in rows]
        equal = [tuple(map(int, row["equal"].split("/"))) for row in rows]
        lines.append(f"| {arm} | {' | '.join(cells)} | {sum(a for a, _ in equal)}/{sum(b for _, b in equal)} |")
    m = result["machine"]
    lines.append("")
    lines.append(
        f"{m['model'].split(':')[0]}, {m['dtype']}, temperature {m['temperature']:g}, {m['threads']} threads of a "
        f"shared {m['cores']}-core machine, {m['repeats']} interleaved repeats of up to {m['tokens']} tokens, prefill "
        f"included. Times plain decoding (emitted tokens per round). Floor of a pass: {m['floor_ms_per_pass']} ms "
        f"({m['read_gb_per_s']} GB/s). torch {m['torch']}, transformers {m['transformers']}."
    )
    return "\n".join(lines) + "\n"


def fill(text: str) -> str:
    """The page with its tables rendered anew."""

    def replace(match: re.Match[str]) -> str:
        result = json.loads((ROOT / "benchmarks" / "results" / f"{match[1]}.json").read_text())
        return f"<!-- table:{match[1]} -->\n{render(result)}<!-- /table -->"

    return _SLOT.sub(replace, text)


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for name in PAGES:
        page = ROOT / name
        before = page.read_text()
        after = fill(before)
        if before != after:
            stale += 1
            print(f"{name}: {'stale, run python benchmarks/tables.py' if check else 'written'}")
            if not check:
                page.write_text(after)
    return int(check and stale > 0)


if __name__ == "__main__":
    raise SystemExit(main())
