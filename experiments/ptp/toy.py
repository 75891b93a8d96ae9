"""What the toy experiments share: chains whose future can be computed, a small student, and one training loop.

No language model here: the student is a causal transformer that reads a start token and one slot per number.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from outpace.drafters.ptp import NumberEmbedding

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
FIGURES = HERE.parents[1] / "docs" / "methods" / "assets"
COLOURS = {"one_hot": "#1f6f8b", "categorical": "#e07a3f", "mask": "#8a8a8a", "bound": "#333333"}


@dataclass(frozen=True)
class Chain:
    """A Markov chain over `law.shape[0]` tokens: law[s] is the law of the token after s, [V, V] float64."""

    law: Tensor

    @classmethod
    def random(cls, size: int, successors: int, seed: int) -> Chain:
        """Each state has a few successors, with Dirichlet(1) probabilities."""
        generator = torch.Generator().manual_seed(seed)
        law = torch.zeros(size, size, dtype=torch.float64)
        for state in range(size):
            weights = -torch.rand(successors, dtype=torch.float64, generator=generator).log()
            law[state, torch.randperm(size, generator=generator)[:successors]] = weights / weights.sum()
        return cls(law)

    @classmethod
    def rising(cls, size: int) -> Chain:
        """A token stays or rises by one, with equal chances; the highest stays."""
        stay = torch.eye(size, dtype=torch.float64)
        step = torch.roll(stay, 1, 1)
        law = (stay + step) / 2
        law[-1] = stay[-1]
        return cls(law)

    def pick(self, state: Tensor, u: Tensor) -> Tensor:
        """The token after each state that u decides: inverse CDF, [...] -> [...]."""
        edges = self.law.cumsum(-1)[state]
        return (edges <= u[..., None]).sum(-1).clamp_max(self.law.shape[0] - 1)

    def path(self, start: Tensor, u: Tensor) -> Tensor:
        """Tokens [n, N] after starts [n] decided by u [n, N] float64."""
        tokens, state = [], start
        for k in range(u.shape[1]):
            state = self.pick(state, u[:, k])
            tokens.append(state)
        return torch.stack(tokens, 1)

    def marginals(self, length: int) -> Tensor:
        """[V, length, V]: from each start, the law of the token k + 1 steps ahead. What independent heads can know."""
        powers, law = [], torch.eye(self.law.shape[0], dtype=torch.float64)
        for _ in range(length):
            law = law @ self.law
            powers.append(law)
        return torch.stack(powers, 1)

    def best_fixed_draft(self, length: int) -> float:
        """Expected leading-correct tokens of the best draft that sees no number, averaged over starts (exact).

        More than independent heads: this one may plan its tokens together.
        """
        value = torch.zeros(self.law.shape[0], dtype=torch.float64)
        for _ in range(length):
            value = (self.law * (1 + value)).max(-1).values
        return float(value.mean())


def leading(right: Tensor) -> float:
    """Mean number of leading correct tokens of right [n, N]."""
    return float(right.to(torch.float64).cumprod(1).sum(1).mean())


class Student(nn.Module):
    """A causal pre-norm transformer over [start token, slot, slot, ...].

    Args:
        vocabulary: tokens. slots: N. encoding: of the numbers; None for constant slots.
    """

    def __init__(
        self, vocabulary: int, slots: int, encoding: str | None, *, size: int = 64, layers: int = 2, heads: int = 4
    ) -> None:
        super().__init__()
        self.start = nn.Embedding(vocabulary, size)
        self.numbers = NumberEmbedding(size, encoding)
        self.place = nn.Parameter(torch.randn(slots + 1, size))
        self.heads = heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(size),
                    "qkv": nn.Linear(size, 3 * size),
                    "out": nn.Linear(size, size),
                    "norm2": nn.LayerNorm(size),
                    "up": nn.Linear(size, 4 * size),
                    "down": nn.Linear(4 * size, size),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(size)
        self.head = nn.Linear(size, vocabulary)

    def forward(self, start: Tensor, u: Tensor) -> Tensor:
        """Logits [n, N + 1, V] for start [n] int64 and u [n, N] float64; row 0 is the start token's."""
        x = torch.cat([self.start(start)[:, None], self.numbers(u)], 1) + self.place[: u.shape[1] + 1]
        n, rows, size = x.shape
        for layer in self.layers:
            qkv = layer["qkv"](layer["norm1"](x)).view(n, rows, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + layer["out"](seen.transpose(1, 2).reshape(n, rows, size))
            x = x + layer["down"](F.gelu(layer["up"](layer["norm2"](x))))
        return self.head(self.norm(x))


def loss_and_guesses(mode: str, chain: Chain, student: Student, start: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of a batch, and the tokens [n, N] the student guesses. Modes as in outpace.drafters.ptp."""
    tokens = chain.path(start, u)
    if mode == "one_hot":
        logits = student(start, u)[:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten()), logits.argmax(-1)
    logits = student(start, u[:, :-1])  # the row before carries the number before
    if mode == "categorical":
        before = torch.cat([start[:, None], tokens[:, :-1]], 1)
        teacher = chain.law[before].float()
        loss = F.kl_div(logits.log_softmax(-1), teacher, reduction="none").sum(-1).mean()
    else:
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    edges = logits.double().softmax(-1).cumsum(-1)
    return loss, (edges <= u[..., None]).sum(-1).clamp_max(logits.shape[-1] - 1)


def train(
    mode: str,
    chain: Chain,
    *,
    slots: int,
    steps: int,
    encoding: str = "anchors",
    batch: int = 128,
    lr: float = 1e-3,
    seed: int = 0,
    examples: tuple[Tensor, Tensor] | None = None,
    keep: bool = False,
) -> dict[str, Any]:
    """Train a student and measure it on fresh numbers: leading-correct tokens, accuracy per slot, seconds.

    examples: (start, u) at which its guesses are wanted too. keep: hand over the student.
    """
    torch.manual_seed(seed)
    size = chain.law.shape[0]
    student = Student(size, slots, None if mode == "mask" else encoding)
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=0.0)
    started = time.perf_counter()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss, _ = loss_and_guesses(
            mode, chain, student, torch.randint(size, (batch,)), torch.rand(batch, slots, dtype=torch.float64)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def guess(start: Tensor, u: Tensor) -> Tensor:
        pieces = zip(start.split(2000), u.split(2000), strict=True)
        return torch.cat([loss_and_guesses(mode, chain, student, s, v)[1] for s, v in pieces])

    generator = torch.Generator().manual_seed(seed + 1)
    start = torch.randint(size, (20_000,), generator=generator)
    u = torch.rand(20_000, slots, dtype=torch.float64, generator=generator)
    right = guess(start, u) == chain.path(start, u)
    return {
        "mode": mode,
        "encoding": None if mode == "mask" else encoding,
        "leading_correct": leading(right),
        "accuracy": right.double().mean(0).tolist(),
        "steps": steps,
        "seconds": round(time.perf_counter() - started, 1),
        **({"examples": guess(*examples)} if examples is not None else {}),
        **({"student": student} if keep else {}),
    }


def independent_optimum(chain: Chain, slots: int, count: int = 200_000, seed: int = 1) -> dict[str, float]:
    """Leading-correct tokens of perfect independent heads: exact marginals, read by arg-max or with the numbers."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(chain.law.shape[0], (count,), generator=generator)
    u = torch.rand(count, slots, dtype=torch.float64, generator=generator)
    tokens, marginals = chain.path(start, u), chain.marginals(slots)
    edges = marginals.cumsum(-1)
    drawn = (edges[start] <= u[..., None]).sum(-1).clamp_max(chain.law.shape[0] - 1)
    return {
        "argmax": leading(marginals.argmax(-1)[start] == tokens),
        "pick": leading(drawn == tokens),
        "best_fixed_draft": chain.best_fixed_draft(slots),
    }


def save(name: str, result: dict[str, Any]) -> Path:
    """Write results/NAME.json."""
    path = HERE / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def load(name: str) -> dict[str, Any]:
    """Read results/NAME.json."""
    return json.loads((HERE / "results" / f"{name}.json").read_text())


def plot(name: str, draw: Callable[[Any], None], size: Sequence[float] = (6.4, 3.2)) -> Path:
    """Draw onto matplotlib axes and save docs/methods/assets/NAME.svg, the same bytes for the same results."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=tuple(size), layout="constrained")
    draw(axes)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    FIGURES.mkdir(parents=True, exist_ok=True)
    path = FIGURES / f"{name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def command(about: str | None, name: str, run: Callable[[int], dict[str, Any]], draw: Callable[[Any], None]) -> None:
    """What every experiment does when it is called: run, keep results/NAME.json, draw ptp_NAME.svg."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--figure", action="store_true", help="only draw the figure")
    asked = parser.parse_args()
    if not asked.figure:
        save(name, run(asked.steps))
    print(plot(f"ptp_{name}", draw))
