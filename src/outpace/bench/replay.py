"""Chosen answers once more, untimed, with every draft written down: what a round guessed, what stood, what fell.

The path does not depend on who guesses, so an answer can be decoded again and is the same; recording drafts during a
timed run would cost time there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from outpace.drafters import Context, Drafter, RequestContext
from outpace.laws import Draft, IncrementalText, Tree, Walk

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.bench.methods import EngineMethod
    from outpace.bench.trials import Job
    from outpace.target import Readout, Scouts, Target

_MOST_PATHS = 6


class Recording(Drafter):
    """Another drafter, and a list of what it proposed: one entry per round, None where it was not asked."""

    name = "recording"

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.needs = inner.needs
        self.kind = inner.kind
        self.adapter = inner.adapter
        self.drafts: list[Tree | None] = []
        self._latest: Tree | None = None

    def fit(self, target: Target) -> None:
        """The inner one's, which may know only then what it reads."""
        self.inner.fit(target)
        self.needs, self.adapter = self.inner.needs, self.inner.adapter

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """The inner one's."""
        self.inner.start(context, request, taps)

    def propose(self, context: Context) -> Draft:
        """The inner one's, noted."""
        draft = self.inner.propose(context)
        self._latest = draft.trees()[0]
        return draft

    def scouts(self, context: Context, draft: Draft) -> Scouts | None:
        """The inner one's."""
        return self.inner.scouts(context, draft)

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """The inner one's; a round ends here, drafted or not."""
        self.inner.observe(context, walks, read)
        self.drafts.append(self._latest)
        self._latest = None


def replay(method: EngineMethod, target: Target, job: Job) -> dict[str, Any]:
    """Decode one prompt and cut the answer by round.

    Returns {"method", "tokens", "rounds": [{"accepted": text, "own": text, "drafted": [texts of paths], "nodes": n}]};
    the texts join to the answer, special tokens left out.
    """
    recorder: list[Recording] = []

    def wrap(drafter: Drafter) -> Drafter:
        recorder.append(Recording(drafter))
        return recorder[0]

    engine = method.build(wrap)
    try:
        output = engine.generate([list(job.ids)], job.settings)[0]
    finally:
        engine.close()
    tokenizer = target.tokenizer

    def decode(ids: Sequence[int]) -> str:
        return "" if tokenizer is None else tokenizer.decode(list(ids), skip_special_tokens=True)

    drafts = recorder[0].drafts if recorder else []
    growing = IncrementalText(decode)
    rounds: list[dict[str, Any]] = []
    for index, one in enumerate(output.rounds_detail):
        pieces = [growing.push(token) for token in one.tokens]
        tree = drafts[index] if index < len(drafts) else None
        paths = [] if tree is None else [decode(path) for path in tree.paths()[:_MOST_PATHS]]
        rounds.append(
            {
                "accepted": "".join(pieces[: one.accepted]),
                "own": "".join(pieces[one.accepted :]),
                "accepted_tokens": one.accepted,
                "nodes": one.drafted,
                "drafted": paths,
            }
        )
    if rounds:
        rounds[-1]["own"] += growing.flush()
    return {"method": method.name, "tokens": list(output.tokens), "rounds": rounds}
