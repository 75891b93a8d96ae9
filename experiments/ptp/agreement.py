"""The whole pipeline on a small language: does the adapter learn what its numbers decide, and what does it cost not to?

A small base model learns a Markov language, writes text under a sampling preset, and stays frozen. Adapters of every
mode then learn from that text, and agreement with the teacher under the same fresh numbers is measured as training
proceeds: drafts in a row that are right, of 8, averaged over all places. Then the engine decodes with each, within a
budget of rows. One drafter is trained under another preset than the text's, on purpose; its numbers mean other tokens.

    python experiments/ptp/agreement.py            # trains (about 12 minutes on one core), writes the result and figure
    python experiments/ptp/agreement.py --figure   # draws the figure from the result
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import transformers as hf
from torch.nn import functional as F

from outpace import Engine
from outpace.drafters.ptp import Ptp
from outpace.laws import Noise, Settings, draw, warp
from outpace.target import Target
from outpace.train.packing import Document, assemble
from outpace.train.schedule import rate
from toy import COLOURS, Chain, command, load

SIZE = 8
PRESET = {"temperature": 0.8, "top_k": 6, "top_p": 0.95}
LENGTH = 40
CASES: dict[str, dict[str, Any]] = {
    "one_hot": {},
    "categorical": {"mode": "categorical"},
    "mask": {"mode": "mask"},
    "one_hot, trained for temperature 1": {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
    "categorical, without a teacher": {"mode": "categorical", "inverse": True},
}


class Language(Protocol):
    """What a base model learns."""

    def path(self, start: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Tokens [n, N] after starts [n] decided by u [n, N]."""


def base_model(chain: Language, steps: int, size: int = SIZE, width: int = 64) -> Target:
    """A small Llama that has learned the chain, of `size` tokens."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = hf.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        start = torch.randint(size, (64,))
        tokens = chain.path(start, torch.rand(64, LENGTH, dtype=torch.float64))
        logits = model(tokens).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    return Target(model.requires_grad_(False).eval(), name="markov")


def write_text(target: Target, count: int, seed: int, preset: Mapping[str, Any] = PRESET) -> torch.Tensor:
    """[count, LENGTH] tokens the base model wrote under the preset, each after one random token."""
    generator = torch.Generator().manual_seed(seed)
    noise = Noise(seed)
    tokens = torch.randint(target.vocabulary, (count, 1), generator=generator)
    with torch.inference_mode():
        while tokens.shape[1] < LENGTH:
            law = warp(target.model(tokens).logits[:, -1], Settings(**preset))
            u = noise.grid(torch.arange(count), torch.tensor(tokens.shape[1]))
            chosen = [draw(row, float(x)) for row, x in zip(law, u, strict=True)]
            tokens = torch.cat([tokens, torch.tensor(chosen)[:, None]], 1)
    return tokens.clone()


def train(
    target: Target,
    text: torch.Tensor,
    held_out: torch.Tensor,
    options: dict[str, Any],
    *,
    steps: int,
    every: int,
    only: str = "",
    seed: int = 0,
) -> dict[str, Any]:
    """Train one drafter; the curve holds (step, drafts in a row that are right on held-out text).

    only: the part of the module that learns; all of it unless said. seed: of weights and of the order of texts.
    """
    drafter = Ptp(**{"slots": 9, "rank": 32, **PRESET, **options})
    drafter.recipe = drafter.recipe.replace(lr=4e-3, decay=1.0)
    drafter.initialise(target, seed=seed)
    recipe = drafter.recipe
    for name, parameter in drafter.module.named_parameters():
        parameter.requires_grad_(name.startswith(only))
    learned = [parameter for parameter in drafter.module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)

    def batch(rows: torch.Tensor) -> Any:
        return assemble([[Document(row.numpy(), 1)] for row in rows], LENGTH, target)

    generator = torch.Generator().manual_seed(3 + seed)
    curve, started = [], time.perf_counter()
    for step in range(steps + 1):
        if step % every == 0:
            with torch.no_grad():
                drafter.ready(target)
                found = drafter.objective(batch(held_out))
            curve.append((step, float(found.extra["right_in_a_row"])))
        for group in optimizer.param_groups:
            group["lr"] = rate(recipe, step / steps)
        losses = drafter.objective(batch(text[torch.randint(len(text), (32,), generator=generator)]))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(drafter.module.parameters(), recipe.clip)
        optimizer.step()
    drafter.calibrate(batch(row[None]) for row in held_out[64:])  # the engine decodes others
    return {"curve": curve, "seconds": round(time.perf_counter() - started), "drafter": drafter}


def decoded(
    target: Target, drafter: Ptp, prompts: list[list[int]], preset: Mapping[str, Any] = PRESET
) -> dict[str, float]:
    """Emitted tokens per round through the engine, and whether every text equals plain decoding's."""
    options = {"max_new_tokens": 30, "seed": 11, "noise": "uniform", **preset}
    plain = Engine(target).generate(prompts, **options)
    engine = Engine(target, drafter.for_decoding(), stand_down=False)
    ours = engine.generate(prompts, **options)
    engine.close()
    rounds = sum(o.rounds for o in ours)
    return {
        "emitted_per_round": sum(len(o.tokens) for o in ours) / rounds,
        "same_text": sum(a.tokens == b.tokens for a, b in zip(ours, plain, strict=True)),
        "texts": len(plain),
    }


def run(steps: int) -> dict[str, Any]:
    """Every case."""
    torch.set_num_threads(1)
    target = base_model(Chain.random(SIZE, 3, seed=1), steps=400)
    text, held_out = write_text(target, 2304, seed=1), write_text(target, 128, seed=2)
    result: dict[str, Any] = {"steps": steps, "preset": PRESET, "cases": {}}
    for name, options in CASES.items():
        found = train(target, text, held_out, options, steps=steps, every=max(1, steps // 20))
        drafter = found.pop("drafter")
        drafter.budget, drafter.min_gain = 36, 0.0
        found["decoded"] = decoded(target, drafter, [row[:1].tolist() for row in held_out[:64]])
        result["cases"][name] = found
        print(f"{name}: {found['curve'][-1][1]:.2f} ({found['seconds']} s), decoded {found['decoded']}", flush=True)
    return result


def draw_curves(axes: Any) -> None:
    """Curves of agreement."""
    result = load("agreement")
    styles = {
        "one_hot": (COLOURS["one_hot"], "-", "O-PTP"),
        "categorical": (COLOURS["categorical"], "-", "C-PTP"),
        "categorical, without a teacher": (COLOURS["categorical"], ":", "C-PTP, learned without a teacher"),
        "mask": (COLOURS["mask"], "-", "mask tokens, no numbers"),
        "one_hot, trained for temperature 1": ("none", "-", "O-PTP, trained for temperature 1"),
    }
    for name, (colour, line, label) in styles.items():
        case = result["cases"][name]
        steps, correct = zip(*case["curve"], strict=True) if colour != "none" else ((), ())
        told = f"{label}: decodes {case['decoded']['emitted_per_round']:.1f} tokens per pass"
        axes.plot(steps, correct, line, color=colour, label=told)
    axes.set_xlabel("training steps")
    axes.set_ylabel("drafts in a row that are right, of 8")
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    axes.set_ylim(0, 8)


if __name__ == "__main__":
    command(__doc__, "agreement", run, draw_curves)
