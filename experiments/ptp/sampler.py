"""What a sampler behind the slots brings in a short training: every mode with one and without, on two small languages.

The languages: 48 tokens; what the last one asks for and what the one LAG back asks for add up in the logits. A language
of the last token alone would prove nothing: there the token before says all. With LAG 2 a chain could carry what it
needs; with LAG 4 it has to come from the text, through slots. One case trains the sampler alone, behind slots whose
adapter stays at its start: what the chain reaches without them. Base model, adapters, text and engine are those of
`agreement`, at temperature 1 without truncation.

    python experiments/ptp/sampler.py   # about 14 minutes on one core
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch

from agreement import base_model, decoded, train, write_text
from toy import save

SIZE, SPREAD, BASE_STEPS = 48, 1.7, 600
PRESET = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
DECODING = {"temperature": 1.0}
CASES: dict[str, dict[str, Any]] = {
    f"{mode}{label}": {"mode": mode, **options}
    for mode in ("mask", "categorical", "one_hot")
    for label, options in (("", {}), (", sampler", {"sampler": "chain"}))
} | {"categorical, sampler, bare slots too": {"mode": "categorical", "sampler": "chain", "bare": 0.5}}
ALONE = "mask, sampler alone"
LANGUAGES = {2: (*CASES, ALONE), 4: ("mask", "mask, sampler", "categorical, sampler", ALONE)}


@dataclass(frozen=True)
class Pairs:
    """A token has logits F[last] + G[the one `lag` back], normal numbers: law [V, V, V] float64."""

    law: torch.Tensor
    lag: int

    @classmethod
    def random(cls, size: int, spread: float, seed: int, lag: int) -> Pairs:
        """F and G of standard deviation `spread` each."""
        last, before = spread * torch.randn(2, size, size, generator=torch.Generator().manual_seed(seed)).double()
        return cls(torch.softmax(before[:, None] + last[None], -1), lag)

    def path(self, start: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Tokens [n, N] after starts [n], as if zeros had stood before them."""
        edges = self.law.cumsum(-1)
        tokens = [*([torch.zeros_like(start)] * (self.lag - 1)), start]
        for k in range(u.shape[1]):
            law = edges[tokens[-self.lag], tokens[-1]]
            tokens.append((law <= u[:, k, None]).sum(-1).clamp_max(SIZE - 1))
        return torch.stack(tokens[self.lag :], 1)


def run(steps: int) -> dict[str, Any]:
    """Every case of every language."""
    torch.set_num_threads(1)
    result: dict[str, Any] = {"steps": steps, "preset": PRESET, "languages": {}}
    for lag, names in LANGUAGES.items():
        target = base_model(Pairs.random(SIZE, SPREAD, 1, lag), steps=BASE_STEPS, size=SIZE)
        text, held_out = write_text(target, 2304, 1, DECODING), write_text(target, 128, 2, DECODING)
        cases: dict[str, Any] = {}
        for name in names:
            options = {**PRESET, **CASES["mask, sampler" if name == ALONE else name]}
            only = "sampler." if name == ALONE else ""
            found = train(target, text, held_out, options, steps=steps, every=max(1, steps // 10), only=only)
            drafter = found.pop("drafter")
            drafter.budget, drafter.min_gain = 36, 0.0
            found["decoded"] = decoded(target, drafter, [row[:1].tolist() for row in held_out[:64]], DECODING)
            cases[name] = found
            print(f"lag {lag}, {name}: {found['curve'][-1][1]:.2f}, decoded {found['decoded']}", flush=True)
        result["languages"][str(lag)] = cases
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    save("sampler", run(parser.parse_args().steps))
