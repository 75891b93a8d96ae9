"""How figures are written: one way, in HTML, Markdown and on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def ratio(found: Mapping[str, Any] | None) -> str:
    """A speed with its interval: "1.52x (1.40 to 1.66)"; "-" without one."""
    if found is None:
        return "-"
    low, high = found["low"], found["high"]
    if low == high == 1.0:
        return "1.00x"  # something against itself
    interval = f" ({low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    return f"{found['ratio']:.2f}x{interval}"


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    """A number, or "-"."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}{unit}"


def milliseconds(value: float | None) -> str:
    """Milliseconds to three figures."""
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.1f} ms" if value >= 10 else f"{value:.2f} ms"


def gigabytes(value: float | None) -> str:
    """Bytes as GB."""
    return "-" if value is None else f"{value / 1e9:.2f} GB"


def cell_name(cell: Mapping[str, Any]) -> str:
    """Batch, temperature and mode of a table."""
    length = "ends at eos" if cell["mode"] == "natural" else "fixed length"
    return f"batch {cell['batch']}, temperature {cell['temperature']:g}, {length}"


def parity(found: Mapping[str, Any]) -> str:
    """What the audit of the timed answers says, in a few words."""
    compared = sum(found[verdict] for verdict in ("equal", "near tie", "differs", "not audited"))
    if not compared and found["same text"] + found["other text"]:
        return f"{found['same text']}/{found['same text'] + found['other text']} same text"
    if not compared:
        return "not comparable"
    if found["equal"] == compared:
        return f"all {compared} equal"
    parts = [f"{found['equal']}/{compared} equal"]
    if found["near tie"]:
        parts.append(f"{found['near tie']} near ties" if found["near tie"] != 1 else "1 near tie")
    if found["differs"]:
        parts.append(f"{found['differs']} DIFFER")
    if found["not audited"]:
        parts.append(f"{found['not audited']} not audited")
    return ", ".join(parts)


def verdict(row: Mapping[str, Any], base: str) -> str:
    """One honest word on a method."""
    if row["name"] == base:
        return "baseline"
    if row["refusal"]:
        return f"no figure: {row['refusal']}"
    words = {"faster": "faster", "slower": "slower", "no difference shown": "no difference shown"}
    return words[row["headline"]["claim"]]


def machine(result: Mapping[str, Any]) -> str:
    """The device in words."""
    found = result["machine"]
    if found["gpu"]:
        return str(found["gpu"])
    return f"{found['cpu']}, {found['threads']} threads"


def target(result: Mapping[str, Any]) -> str:
    """The model in words, with its label if it was widened."""
    found = result["target"]
    if found.get("widened"):
        return f"{found['name']} (WIDENED: real text at the cost of a larger shape), {found['dtype']}"
    return f"{found['name']}, {found['dtype']}" if "dtype" in found else str(found["name"])


def _times(repetitions: int) -> str:
    return "once" if repetitions == 1 else f"up to {repetitions} times, interleaved"


def conditions(result: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before reading a table."""
    config, coverage = result["config"], result["coverage"]
    standing = "standing down where drafts do not pay" if config["stand_down"] else "never standing down"
    lines = [
        f"Suite {result['suite']['name']} ({result['suite']['note']}): {coverage['questions']} of "
        f"{coverage['questions_of_suite']} questions measured, {_times(config['repetitions'])}, "
        f"up to {config['max_new_tokens']} new tokens; {coverage['words']}.",
        f"Drafters {config['state']}, {standing}, rule {config['rule']}, seed {config['seed']}. Times are wall clock "
        "from submission to the last token, prefill included, tokenisation excluded.",
    ]
    if result["target"].get("path"):
        lines.append(f"Passes of the engine run through the path: {result['target']['path']}.")
    floor = result.get("floor")
    if floor:
        lines.append(
            f"Floor of a pass on this machine: {floor['ms']:.2f} ms ({floor['weight_bytes'] / 1e9:.2f} GB of weights "
            f"at a measured {floor['gb_per_s']:.0f} GB/s)."
        )
    harness = result.get("harness")
    if harness:
        lines.append(
            f"Keeping the books costs {harness['bookkeeping_us_per_round']:.1f} us a round inside the timed windows "
            f"({harness['share_of_timed']:.4%} of them)."
        )
        if harness.get("retakes"):
            lines.append(
                f"{harness['retakes']} takes in which CUDA graphs were captured were thrown away and taken again; "
                f"{harness['capturing']} of those that count still hold a capture."
            )
    before = (result.get("state") or {}).get("before") or {}
    after = (result.get("state") or {}).get("after") or {}
    if before.get("load"):
        loads = [f"{state['load'][0]:.1f}" for state in (before, after) if state.get("load")]
        lines.append(f"Load of the machine, before and after: {', '.join(loads)} ({result['machine']['cores']} cores).")
    return lines
