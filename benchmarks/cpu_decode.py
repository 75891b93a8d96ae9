"""Decoding SmolLM2 on CPU: transformers.generate, plain decoding, and drafters, on real prompts of several kinds.

    python benchmarks/cpu_decode.py                         # about ten minutes on two cores
    python benchmarks/cpu_decode.py --repeats 1 --tokens 48 # a quick look

Regime: batch 1, greedy (and temperature 0.8 with --temperature), bfloat16 where the CPU multiplies in it, two threads.
Every repeat runs all arms on the same prompt one after the other, in an order that rotates, so that a machine whose
speed drifts slows all arms alike; the figure is the median of the per-pair ratios to plain decoding in the same
engine. Times are end to end (prefill included, tokenisation excluded), tokens are emitted ids, the stop rule is shared.
The last line is one JSON document; it is also written to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import outpace
import prompts
from outpace import Engine, Target
from outpace.engine import encode

ARMS = ["prompt_lookup", "suffix", "prompt_lookup+suffix", "lookahead", "layer_skip"]


def read_bandwidth() -> float:
    """GB/s of reading 256 MB, the best of five: the floor of a pass is weights divided by this."""
    data = torch.ones(64 << 20)
    best = 0.0
    for _ in range(6):
        started = time.perf_counter()
        data.sum()
        best = max(best, data.numel() * 4 / (time.perf_counter() - started) / 1e9)
    return best


def stock(target: Target, ids: list[int], tokens: int, temperature: float) -> tuple[tuple[int, ...], float]:
    """transformers.generate as it comes, same ids, dtype and stop rule."""
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    started = time.perf_counter()
    with torch.inference_mode():
        out = target.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=tokens,
            eos_token_id=list(target.eos), pad_token_id=target.eos[0], **sampling,
        )  # fmt: skip
    return tuple(out[0, len(ids) :].tolist()), time.perf_counter() - started


def run(arguments: argparse.Namespace) -> dict:
    """All arms on all prompts."""
    torch.set_num_threads(arguments.threads)
    target = Target.from_pretrained(arguments.model)
    engines = {"plain": Engine(target), **{arm: Engine(target, arm) for arm in arguments.drafters}}
    arms = ["transformers.generate", *engines]
    rows = []
    warm = encode(target, "Hello.")
    stock(target, warm, 4, 0.0)
    for engine in engines.values():
        engine.generate([warm], max_new_tokens=8)
    started = time.perf_counter()
    for repeat in range(arguments.repeats):
        for kind, texts in prompts.KINDS.items():
            for number, text in enumerate(texts):
                ids = encode(target, text)
                shift = (repeat + number) % len(arms)
                for arm in arms[shift:] + arms[:shift]:
                    row = {"kind": kind, "prompt": number, "repeat": repeat, "arm": arm}
                    if arm == "transformers.generate":
                        found, seconds = stock(target, ids, arguments.tokens, arguments.temperature)
                        row |= {"rounds": len(found)}
                    else:
                        engine = engines[arm]
                        before = (engine.timing.total_ms, engine.timing.pass_ms)
                        clock = time.perf_counter()
                        output = engine.generate(
                            [ids], max_new_tokens=arguments.tokens, temperature=arguments.temperature, seed=number
                        )[0]
                        seconds = time.perf_counter() - clock
                        found = output.tokens
                        total, passed = engine.timing.total_ms - before[0], engine.timing.pass_ms - before[1]
                        row |= {"rounds": output.rounds, "outside": 1 - passed / total, "notes": len(output.notes)}
                        row |= {"drafted": output.stats.drafted, "accepted": output.stats.accepted}
                    rows.append(row | {"seconds": seconds, "tokens": len(found), "ids": list(found)})
            print(
                f"repeat {repeat + 1}/{arguments.repeats}: {kind}, {time.perf_counter() - started:.0f} s",
                file=sys.stderr,
            )
    return summarise(rows, arms) | {"machine": machine(arguments, target), "command": " ".join(sys.argv)}


def machine(arguments: argparse.Namespace, target: Target) -> dict:
    """What the figures depend on."""
    bandwidth = read_bandwidth()
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(target.dtype).removeprefix("torch."),
        "model": target.name,
        "read_gb_per_s": round(bandwidth, 1),
        "floor_ms_per_pass": round(target.weight_bytes / bandwidth / 1e6, 1),
        "tokens": arguments.tokens,
        "temperature": arguments.temperature,
        "repeats": arguments.repeats,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "outpace": outpace.__version__,
    }


def summarise(rows: list[dict], arms: list[str]) -> dict:
    """Median ratios to plain decoding per arm and kind, with quartiles; equality of tokens; time outside the pass."""
    at = {(r["kind"], r["prompt"], r["repeat"], r["arm"]): r for r in rows}
    table = []
    for arm in arms:
        for kind in prompts.KINDS:
            mine = [r for r in rows if r["arm"] == arm and r["kind"] == kind]
            pairs = [(r, at[kind, r["prompt"], r["repeat"], "plain"]) for r in mine]
            ratios = sorted((r["tokens"] / r["seconds"]) / (p["tokens"] / p["seconds"]) for r, p in pairs)
            quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            table.append(
                {
                    "arm": arm,
                    "kind": kind,
                    "tokens_per_s": round(statistics.median(r["tokens"] / r["seconds"] for r in mine), 1),
                    "ratio": round(statistics.median(ratios), 2),
                    "ratio_quartiles": [round(quartiles[0], 2), round(quartiles[2], 2)],
                    "emitted_per_round": round(sum(r["tokens"] for r in mine) / sum(r["rounds"] for r in mine), 2),
                    "equal": f"{sum(r['ids'] == p['ids'] for r, p in pairs)}/{len(pairs)}",
                    "outside_pass": round(max((r.get("outside", 0.0) for r in mine), default=0.0), 3),
                }
            )
    return {"benchmark": "cpu_decode", "table": table}


def show(result: dict) -> None:
    """The table for people."""
    print(
        f"{'arm':24}{'kind':16}{'tok/s':>8}{'x plain':>9}{'quartiles':>14}{'tok/round':>11}{'equal':>8}{'outside':>9}"
    )
    for row in result["table"]:
        low, high = row["ratio_quartiles"]
        print(
            f"{row['arm']:24}{row['kind']:16}{row['tokens_per_s']:8.1f}{row['ratio']:9.2f}{f'{low:.2f}-{high:.2f}':>14}"
            f"{row['emitted_per_round']:11.2f}{row['equal']:>8}{row['outside_pass']:9.1%}"
        )
    m = result["machine"]
    print(
        f"\n{m['model']}, {m['dtype']}, {m['threads']} threads; reading {m['read_gb_per_s']} GB/s, so a pass cannot "
        f"take less than {m['floor_ms_per_pass']} ms ({1e3 / m['floor_ms_per_pass']:.0f} tokens/s plainly)"
    )


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--drafters", type=lambda text: text.split(","), default=ARMS, help="comma-separated specs")
    parser.add_argument("--tokens", type=int, default=96, help="most new tokens per answer")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_decode.json")
    arguments = parser.parse_args()
    result = run(arguments)
    show(result)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
