"""Which shape of draft gives the most tokens per second here: what is accepted, counted; what a round costs, measured.

    tokens per round    of every shape, walked over text the target writes now (`drafters.shapes`)
    a round's time      drafting (measured at both ends of each growth, a line between) + the target's pass over so many
                        rows (measured) + the law of each token emitted (measured)

Measured at temperature 0, one request at a time, interleaved so that a slow minute slows everything alike.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar, Final

from outpace.drafters.base import Drafter
from outpace.drafters.shapes import tried
from outpace.engine import Engine
from outpace.errors import ConfigError
from outpace.laws import Draft, Tree
from outpace.train.evaluate import decode, replay

if TYPE_CHECKING:
    from outpace.drafters.base import Context
    from outpace.drafters.learning import LearnedDrafter
    from outpace.drafters.shapes import Shape

_WARM: Final = 2  # rounds of each engine that are not counted


class _Filler(Drafter):
    """Drafts a chain of so many tokens that mean nothing: rounds cost what such a pass costs."""

    name: ClassVar[str] = "filler"

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self._ids = random.Random(nodes)  # noqa: S311  # no secret

    def propose(self, context: Context) -> Draft:
        """Any tokens."""
        vocabulary = context.target.vocabulary
        return Draft.of([Tree.chain([self._ids.randrange(vocabulary) for _ in range(self.nodes)])])


@dataclass(frozen=True, slots=True)
class Costs:
    """Milliseconds, measured.

    Attributes:
        law: of one token's law and draw. passes: of the target's pass, by drafted nodes (0: plain decoding's).
        drafting: (steps, ms) at the two ends of every growth. rest: of a plain round, beside pass and law.
    """

    law: float
    rest: float
    passes: Mapping[int, float]
    drafting: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def plain(self) -> float:
        """A round of plain decoding."""
        return self.passes[0] + self.law + self.rest

    def round(self, shape: Shape, emitted: float) -> float:
        """A round of a shape that emits so many tokens."""
        (low, cheap), (high, dear) = self.drafting[shape.growth]
        drafting = cheap + (dear - cheap) * (shape.steps - low) / max(high - low, 1)
        return self.passes[shape.nodes] + self.law * emitted + drafting


@dataclass(frozen=True, slots=True)
class Candidate:
    """A shape, what it emits, what it costs, and how many times plain decoding's speed that is."""

    options: Mapping[str, Any]
    nodes: int
    emitted_per_round: float
    round_ms: float
    speedup: float

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return asdict(self)


def tune_shapes(
    drafter: LearnedDrafter, prompts: Sequence[Sequence[int]], *, max_new_tokens: int = 64, rounds: int = 12
) -> list[Candidate]:
    """Every shape of a drafter that is fitted to its target, fastest first.

    Args:
        drafter: with the largest tree to be considered.
        prompts: token ids; the target answers them, greedily.
        max_new_tokens: of each answer.
        rounds: measured of every cost.

    Raises:
        UnsupportedError: if the drafter's drafts have no shape. ConfigError: without prompts.
    """
    if not prompts:
        raise ConfigError("nothing to tune on: give at least one prompt")
    said = decode(drafter, prompts, max_new_tokens=max_new_tokens).outputs
    copy = drafter.for_decoding()
    texts = [
        copy.grown(replay(copy, output), max(len(output.prompt_tokens) - 2, 0)) for output in said if output.tokens
    ]
    shapes = tried(texts)
    costs = measure(drafter, [shape for shape, _ in shapes], prompts[0], rounds)
    found = []
    for shape, emitted in shapes:
        ms = costs.round(shape, emitted)
        found.append(Candidate(shape.options, shape.nodes, emitted, ms, emitted * costs.plain / ms))
    return sorted(found, key=lambda one: -one.speedup)


def measure(drafter: LearnedDrafter, shapes: Sequence[Shape], prompt: Sequence[int], rounds: int) -> Costs:
    """What rounds of these shapes are made of, on the drafter's device."""
    target = drafter.target
    growths: dict[str, list[Shape]] = defaultdict(list)
    for shape in shapes:
        growths[shape.growth].append(shape)
    ends = {name: sorted(of, key=lambda s: (s.steps, s.nodes))[:: max(len(of) - 1, 1)] for name, of in growths.items()}
    ends = {name: [of[0], of[-1]] for name, of in ends.items()}
    engines: dict[Any, Engine] = {0: Engine(target, None, max_batch=1)}
    for nodes in sorted({shape.nodes for shape in shapes}):
        engines[nodes] = Engine(target, _Filler(nodes), max_batch=1, stand_down=False)
    for name, of in ends.items():
        for end, shape in enumerate(of):
            engines[name, end] = Engine(target, drafter.reshaped(shape.options), max_batch=1, stand_down=False)
    parts: dict[Any, list[tuple[float, float, float]]] = {key: [] for key in engines}
    try:
        for _ in range(_WARM + rounds):
            for key, engine in engines.items():
                if not engine.active:
                    engine.submit(list(prompt), max_new_tokens=4096, ignore_eos=True)
                timing = engine.timing
                before = (timing.pass_ms, timing.walk_ms, timing.draft_ms + timing.other_ms)
                engine.step()
                after = (timing.pass_ms, timing.walk_ms, timing.draft_ms + timing.other_ms)
                parts[key].append((after[0] - before[0], after[1] - before[1], after[2] - before[2]))
    finally:
        for engine in engines.values():
            engine.close()

    def typical(key: Any, part: int) -> float:
        return median(one[part] for one in parts[key][_WARM:])

    return Costs(
        law=typical(0, 1),
        rest=typical(0, 2),
        passes={key: typical(key, 0) for key in engines if isinstance(key, int)},
        drafting={
            name: [(shape.steps, typical((name, end), 2)) for end, shape in enumerate(of)] for name, of in ends.items()
        },
    )
