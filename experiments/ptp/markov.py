"""A language in which independent prediction is provably capped: what do the numbers buy?

The next token is a random one of three, given the last; nothing else matters. Heads that predict several tokens
independently can at best know each one's marginal, and that optimum is computed, not trained. A student that is fed the
path's numbers has a function to learn instead.

    python experiments/ptp/markov.py            # trains (about 8 minutes on one core), writes the result and figure
    python experiments/ptp/markov.py --figure   # draws the figure from the result
"""

from __future__ import annotations

from typing import Any

import torch

from toy import COLOURS, Chain, command, independent_optimum, load, train

VOCABULARY, SUCCESSORS, SLOTS, SEED = 8, 3, 12, 1
CASES = [
    ("one_hot", "anchors"),
    ("one_hot", "digits"),
    ("one_hot", "float"),
    ("categorical", "anchors"),
    ("mask", "anchors"),
]


def chain() -> Chain:
    """The language of this experiment."""
    return Chain.random(VOCABULARY, SUCCESSORS, SEED)


def run(steps: int) -> dict[str, Any]:
    """Train every case."""
    torch.set_num_threads(1)
    language = chain()
    result: dict[str, Any] = {"slots": SLOTS, "optimum": independent_optimum(language, SLOTS), "cases": []}
    for mode, encoding in CASES:
        result["cases"].append(train(mode, language, slots=SLOTS, steps=steps, encoding=encoding, lr=6e-3))
        case = result["cases"][-1]
        print(f"{mode} {encoding}: {case['leading_correct']:.2f} of {SLOTS} ({case['seconds']} s)", flush=True)
    print(result["optimum"])
    return result


def draw(axes: Any) -> None:
    """Bars: tokens in a row that are right; lines: what no predictor without numbers can pass."""
    result = load("markov")
    names = {
        ("one_hot", "anchors"): "O-PTP (anchors)",
        ("one_hot", "digits"): "O-PTP (16 binary digits)",
        ("one_hot", "float"): "O-PTP (float32 bits)",
        ("categorical", "anchors"): "C-PTP (anchors)",
        ("mask", None): "mask tokens",
    }
    cases = result["cases"][::-1]
    for row, case in enumerate(cases):
        axes.barh(row, case["leading_correct"], color=COLOURS[case["mode"]], height=0.7)
        axes.text(case["leading_correct"] + 0.1, row, f"{case['leading_correct']:.1f}", va="center")
    axes.set_yticks(range(len(cases)), [names[case["mode"], case["encoding"]] for case in cases])
    optimum = result["optimum"]
    best = max(optimum["argmax"], optimum["pick"])
    axes.axvline(best, color=COLOURS["bound"], linestyle="--", linewidth=1)
    axes.text(best + 0.1, len(cases) - 0.45, f"optimum of independent heads: {best:.2f}", color=COLOURS["bound"])
    axes.set_xlabel(f"tokens in a row that are right, of {result['slots']} predicted in one call")
    axes.set_xlim(0, result["slots"])


if __name__ == "__main__":
    command(__doc__, "markov", run, draw)
