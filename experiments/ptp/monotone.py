"""Sequences that can only rise: independent heads draw sequences that fall, because each forgets what the others drew.

A token stays or rises by one, with equal chances. Marginals many steps ahead are wide, and two draws from them
contradict each other; the joint law allows no fall. Counted: falls in drafts, and tokens in a row that are right.

    python experiments/ptp/monotone.py            # trains (about 5 minutes on one core), writes the result and figure
    python experiments/ptp/monotone.py --figure   # draws the figure from the result
"""

from __future__ import annotations

from typing import Any

import torch

from toy import COLOURS, Chain, command, independent_optimum, load, train

VOCABULARY, SLOTS = 16, 12


def fallen(tokens: torch.Tensor) -> float:
    """Share of drafts [n, N] that contain a fall."""
    return float((tokens[:, 1:] < tokens[:, :-1]).any(1).double().mean())


def independent_draws(chain: Chain, count: int, u: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """What perfect independent heads draw with the path's own numbers."""
    edges = chain.marginals(u.shape[1]).cumsum(-1)[start]
    return (edges <= u[:count, :, None]).sum(-1).clamp_max(chain.law.shape[0] - 1)


def run(steps: int) -> dict[str, Any]:
    """Train every mode; starts are the lowest token for the examples."""
    torch.set_num_threads(1)
    chain = Chain.rising(VOCABULARY)
    result: dict[str, Any] = {"slots": SLOTS, "optimum": independent_optimum(chain, SLOTS), "cases": []}
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(20_000, SLOTS, dtype=torch.float64, generator=generator)
    start = torch.zeros(20_000, dtype=torch.int64)
    result["independent_drafts_with_a_fall"] = fallen(independent_draws(chain, 20_000, u, start))
    for mode in ("one_hot", "categorical", "mask"):
        case = train(mode, chain, slots=SLOTS, steps=steps, lr=6e-3, examples=(start, u))
        case["drafts_with_a_fall"] = fallen(case.pop("examples"))
        result["cases"].append(case)
        share = 100 * case["drafts_with_a_fall"]
        print(f"{mode}: {case['leading_correct']:.2f} of {SLOTS}, {share:.1f} % of drafts fall ({case['seconds']} s)")
    print(result["optimum"], result["independent_drafts_with_a_fall"])
    return result


def draw(axes: Any) -> None:
    """Accuracy of each token ahead."""
    result = load("monotone")
    names = {"one_hot": "O-PTP", "categorical": "C-PTP", "mask": "mask tokens"}
    ahead = range(1, result["slots"] + 1)
    for case in result["cases"]:
        label = (
            f"{names[case['mode']]}: {case['leading_correct']:.1f} in a row, "
            f"{100 * case['drafts_with_a_fall']:.0f} % of drafts fall"
        )
        axes.plot(ahead, case["accuracy"], "o-", color=COLOURS[case["mode"]], label=label, markersize=3)
    axes.set_xlabel("tokens ahead")
    axes.set_ylabel("share that is right")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.25, 0.55))


if __name__ == "__main__":
    command(__doc__, "monotone", run, draw)
