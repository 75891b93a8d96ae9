"""How often a drafter's candidates hold the path's token, by what it does with the path's noise.

    python benchmarks/noise.py [--model smollm2] [--drafter eagle3] [--answers 12] [--tokens 64]

Texts the target wrote, one reading each; at every place of an answer the drafter's law for the next token but one
stands beside the target's own, and fresh noise decides the token many times over. Candidates are those of
`growth.children`: without noise (the likeliest ones), with the number looked up in the drafter's law, and with Gumbel
noise. Counts alone: no decode loop, and any machine will do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from outpace import Engine, Target
from outpace.bench import load_suite
from outpace.drafters import make_drafter
from outpace.drafters.follower import FollowingDrafter
from outpace.drafters.growth import Draws, children
from outpace.drafters.rows import shifted
from outpace.drafters.unroll import Unrolled
from outpace.engine import Output
from outpace.train.evaluate import replay

RESULT = Path(__file__).parent / "results" / "noise.json"
MOST = 8  # candidates
CHUNK = 64  # places at once
WAYS = ("likeliest", "uniform", "gumbel")


def laws(drafter: FollowingDrafter, output: Output, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """At every place of an answer: the target's logits over temperature [n, V], and the drafter's logits [n, Vd]."""
    net, target = drafter.module, drafter.target
    batch = replay(drafter, output, temperature=temperature)
    features = torch.cat([batch.taps[name] for name in net.taps], -1).to(next(net.parameters()).dtype)
    cos, sin = net.rotary(batch.positions)
    y = net(target.embed(shifted(batch.tokens, 1)), net.fuse(features), cos, sin, Unrolled(batch).attend)
    start, end = len(output.prompt_tokens) - 1, len(output.prompt_tokens) + len(output.tokens) - 2
    mine = net.head(net.readout(y[0, start:end]))  # row t speaks of token t + 2
    theirs = F.linear(batch.taps["post_norm"][0, start + 1 : end + 1].float(), net.head.teacher_full.float())
    return theirs / temperature, mine.float()


def count(
    drafter: FollowingDrafter, theirs: torch.Tensor, mine: torch.Tensor, heat: float, draws: int
) -> dict[str, Any]:
    """Which share of `draws` tokens at each place is among the first k candidates, k = 1 to MOST, by way.

    And "sure": the mean of what the first candidate's value says of it, under Gumbel noise.
    """
    ids, generator = drafter.module.head.ids, torch.Generator().manual_seed(0)
    hits, sure = {way: torch.zeros(MOST) for way in WAYS}, 0.0
    for part, own in zip(theirs.split(CHUNK), mine.split(CHUNK), strict=True):
        p = torch.softmax(part, -1).double().cumsum(-1)
        warm = torch.full((len(part),), heat)
        for _ in range(draws):
            race = -torch.empty_like(part).exponential_(generator=generator).log()
            u = torch.rand(len(part), generator=generator)
            looked_up = torch.searchsorted(p, (u.double() * p[:, -1])[:, None], right=True).clamp_max(p.shape[1] - 1)
            tokens = {"gumbel": (part + race).argmax(-1, keepdim=True), "uniform": looked_up, "likeliest": looked_up}
            told = {
                "likeliest": None,
                "uniform": Draws(warm, None, u[:, None], warm, drafter.coupling),
                "gumbel": Draws(warm, race[:, None, ids], None, torch.zeros_like(warm), drafter.coupling),
            }
            for way in WAYS:
                values, found = children(own[:, None], MOST, told[way])
                sure += float(values[:, 0, 0].exp().sum()) if way == "gumbel" else 0.0
                hits[way] += (ids[found[:, 0]] == tokens[way]).float().cumsum(-1).sum(0)
    total = len(theirs) * draws
    shares = {way: [round(float(hit) / total, 4) for hit in found] for way, found in hits.items()}
    return {**shares, "sure": round(sure / total, 4)}


@torch.inference_mode()
def main() -> None:
    """Write the texts, count, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--drafter", default="eagle3", help="one that follows the target's features")
    parser.add_argument("--answers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--temperatures", type=float, nargs="*", default=[1.0, 0.7])
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    target = Target.from_pretrained(options.model)
    drafter = make_drafter(options.drafter)
    if not isinstance(drafter, FollowingDrafter):
        raise SystemExit(f"--drafter must follow features (eagle, eagle2, eagle3, mtp), got {options.drafter}")
    drafter.fit(target)
    questions = load_suite("mini").questions
    prompts = [q.turns[0] for q in questions[:: max(1, len(questions) // options.answers)]][: options.answers]
    rows = []
    for temperature in options.temperatures:
        outputs = Engine(target, None, max_batch=8).generate(
            prompts, max_new_tokens=options.tokens, temperature=temperature, seed=0
        )
        pairs = [laws(drafter, output, temperature) for output in outputs if len(output.tokens) > 2]
        theirs, mine = (torch.cat(part) for part in zip(*pairs, strict=True))
        p, q = torch.softmax(theirs, -1), torch.zeros_like(theirs)
        q[:, drafter.module.head.ids] = torch.softmax(mine / temperature, -1)
        distance = float((p - q).abs().sum(-1).mean() / 2)
        rows.append(
            {"temperature": temperature, "places": len(p), "distance": round(distance, 4),
             "entropy": round(float(-(p * p.clamp_min(1e-30).log()).sum(-1).mean()), 3),
             **count(drafter, theirs, mine, temperature, options.draws)}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)
    about = {"model": options.model, "drafter": options.drafter, "draws": options.draws, "torch": torch.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
