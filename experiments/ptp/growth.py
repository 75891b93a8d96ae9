"""How tokens per pass grow with the width of the model, the rank of the adapter and the text: three points, two seeds.

The pipeline of `agreement` (a base model that has learned a Markov language and stays frozen, an adapter that learns
from its text, the engine that decodes) with one thing changed at a time, from a width of 64, rank 32 and 2304 texts.
Larger base models learn the language better too, so a point's text is its own model's.

    python experiments/ptp/growth.py --steps 1200   # trains (20 to 25 minutes on two cores), writes result and figure
    python experiments/ptp/growth.py --figure       # draws the figure from the result
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from typing import Any, Final

import torch

from agreement import PRESET, SIZE, base_model, decoded, train, write_text
from toy import COLOURS, Chain, command, load

MIDDLE: Final = {"width": 64, "rank": 32, "texts": 2304}
POINTS: Final[dict[str, tuple[int, ...]]] = {"width": (32, 64, 128), "rank": (2, 8, 32), "texts": (64, 384, 2304)}
LABELS: Final = {"width": "width of the model", "rank": "rank of the adapter", "texts": "texts of 40 tokens"}
SEEDS: Final = (0, 1)


def measure(settings: dict[str, int], seed: int, steps: int) -> dict[str, Any]:
    """One point: train, decode, count."""
    torch.set_num_threads(1)
    target = base_model(Chain.random(SIZE, 3, seed=1), steps=400, width=settings["width"])
    text, held_out = write_text(target, settings["texts"], seed=1), write_text(target, 128, seed=2)
    options = {"rank": settings["rank"]}
    found = train(target, text, held_out, options, steps=steps, every=max(1, steps // 4), seed=seed)
    drafter = found.pop("drafter")
    drafter.budget, drafter.min_gain = 36, 0.0
    prompts = [row[:1].tolist() for row in held_out[:64]]
    return {**settings, "seed": seed, **found, "decoded": decoded(target, drafter, prompts)}


def run(steps: int) -> dict[str, Any]:
    """Every point, the one all series share once."""
    wanted = [MIDDLE] + [{**MIDDLE, name: v} for name, values in POINTS.items() for v in values if v != MIDDLE[name]]
    tasks = [(settings, seed, steps) for seed in SEEDS for settings in wanted]
    with ProcessPoolExecutor(2) as pool:
        points = list(pool.map(measure, *zip(*tasks, strict=True)))
    for point in points:
        print({name: point[name] for name in (*MIDDLE, "seed")}, point["decoded"], flush=True)
    return {"steps": steps, "preset": PRESET, "mode": "one_hot", "points": points}


def draw_points(axes: Any) -> None:
    """Tokens per pass over the factor by which one thing was changed."""
    points = load("growth")["points"]
    for name, colour in zip(POINTS, (COLOURS["one_hot"], COLOURS["categorical"], COLOURS["mask"]), strict=True):
        rest = {other: value for other, value in MIDDLE.items() if other != name}
        series = [p for p in points if all(p[o] == v for o, v in rest.items())]
        at = {v: [p["decoded"]["emitted_per_round"] for p in series if p[name] == v] for v in POINTS[name]}
        factors = [value / MIDDLE[name] for value in at]
        label = f"{LABELS[name]}: {', '.join(map(str, at))}"
        axes.plot(factors, [sum(found) / len(found) for found in at.values()], "-", color=colour, label=label)
        for factor, found in zip(factors, at.values(), strict=True):
            axes.plot([factor] * len(found), found, "o", color=colour, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("beside the middle point (width 64, rank 32, 2304 texts)")
    axes.set_ylabel("tokens per pass")
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    command(__doc__, "growth", run, draw_points)
