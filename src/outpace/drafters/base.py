"""The contract of a drafter: what it reads, and three verbs. Nothing else of it is known to the engine.

    start(context, request, taps)   a request's prompt is prefilled; its taps are at hand
    propose(context) -> Draft       guess; scouts(context, draft) may add rows that serve the next guess
    observe(context, walks, read)   learn from what was accepted

A drafter never changes a token. It sees committed tokens only, keeps what it likes per request, and may be wrong as
often as it wants to: that costs time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch

from outpace.errors import UnsupportedError
from outpace.laws import Draft, DraftKind, Sampler, Tree, Walk

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.contract import DeviceDraft
    from outpace.target import BlockCache, GatedLoRA, Readout, Scouts, Target
    from outpace.target.widen import Widening


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a drafter reads and rides.

    Attributes:
        taps: hidden states of the target to capture in prefill and rounds.
        scouts: it adds rows to the pass.
        noise: it reads the path's random numbers (allowed under rule="path" only).
        adapter: it brings a row-gated adapter for its scouts.
    """

    taps: frozenset[str] = frozenset()
    scouts: bool = False
    noise: bool = False
    adapter: bool = False


@dataclass(eq=False)
class RequestContext:
    """What a drafter may know of one request. Owned by the engine; drafters only read.

    Attributes:
        tokens: every committed token, prompt included; the last one is the root, not yet in the target's cache.
        prompt_length: how many of them are the prompt.
        sampler: the request's law and dice.
        remaining: tokens that may still be emitted; a draft deeper than remaining - 1 is cut.
        round_index: rounds this request has been through.
        speculate: False while the engine has stood down for this request: propose an empty tree.
        rest: for how many rounds behind the one under way it is sure to stand down too.
        scout_limit: rows that scouts may add to the round under way; with more, other kernels would run for the main
            rows. None: as many as one likes.
    """

    tokens: list[int]
    prompt_length: int
    sampler: Sampler
    remaining: int
    round_index: int = 0
    speculate: bool = True
    rest: int = 0
    scout_limit: int | None = None

    @property
    def root(self) -> int:
        """The last committed token."""
        return self.tokens[-1]

    @property
    def position(self) -> int:
        """Absolute position of the root."""
        return len(self.tokens) - 1

    @property
    def depth_limit(self) -> int:
        """Deepest draft that can still be useful."""
        return max(0, self.remaining - 1)


@dataclass(eq=False)
class Context:
    """The batch of a round: requests in slot order, the target and its cache."""

    target: Target
    cache: BlockCache
    requests: list[RequestContext] = field(default_factory=list)


class Drafter(ABC):
    """A guesser of tokens.

    Attributes:
        name: word for flags, logs and reports.
        needs: what it reads and rides.
        kind: how its drafts come about; the rejection rules accept sampled kinds only.
        adapter: the row-gated adapter of its scouts, if it needs one.
    """

    name: ClassVar[str]
    needs: Needs = Needs()
    kind: DraftKind = "deterministic"
    adapter: GatedLoRA | None = None

    def fit(self, target: Target) -> None:
        """Check that this drafter was made for that target; called once, when an engine takes it.

        Raises:
            CheckpointError: if it was not, saying what differs.
        """
        del target

    def forget(self) -> None:  # noqa: B027  # most drafters keep nothing between requests
        """Drop what earlier requests taught; weights stay."""

    def widened(self, widening: Widening, target: Target) -> Drafter:
        """This drafter, fitted to the small target, for the widened `target`; one that reads no features is its own.

        One with weights builds its module for `target` and fills it with `outpace.target.widen.widen_module`.

        Raises:
            UnsupportedError: if it reads features and does not say how it widens.
        """
        del target
        if self.needs.taps or self.adapter is not None:
            raise UnsupportedError(
                f"drafter {self.name!r} was trained on features of {widening.small.hidden_size} numbers and does not "
                f"say how it is {widening.label}; leave it out, or run it on the target as it is"
            )
        return self

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """A request joins: its prompt except the root is in the target's cache.

        taps: captured over those tokens, [1, L - 1, H] each.
        """
        del context, request, taps

    @abstractmethod
    def propose(self, context: Context) -> Draft:
        """One tree per request of the context, in its order; an empty tree where there is nothing to say.

        Not called in a round in which no request speculates.
        """

    def scouts(self, context: Context, draft: Draft) -> Scouts | None:
        """Rows to add to the pass that verifies `draft` (its width + 1 main rows: root first, then the nodes)."""
        del context, draft
        return None

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """The round's outcome: the accepted path of each request, taps and scout logits.

        Called after every round, before the emitted tokens join `request.tokens`. `walk.tokens` are cut at a stop;
        `walk.nodes` are nodes of this drafter's own trees.
        """
        del context, walks, read

    def device_draft(self) -> DeviceDraft | None:
        """How this drafter drafts in rounds that stay on the device; the same object until its shapes change.

        None, the default: the host calls `propose` between passes.
        """
        return None


def along_path(walks: Sequence[Walk], taps: Sequence[Tensor]) -> list[Tensor]:
    """Taps [B, R, H] at the rows of accepted paths, the root's first: [B, most, H] each, short ones padded."""
    most = max(len(walk.tokens) for walk in walks)
    rows = [[0, *(node + 1 for node in walk.nodes)] for walk in walks]
    index = torch.tensor([row + [0] * (most - len(row)) for row in rows], device=taps[0].device)[..., None]
    return [tap.gather(1, index.expand(-1, -1, tap.shape[2])) for tap in taps]


class TokenDrafter(Drafter):
    """A drafter that needs the tokens of one request at a time, and nothing else."""

    @abstractmethod
    def guess(self, request: RequestContext) -> Tree:
        """The tree for one request."""

    def propose(self, context: Context) -> Draft:
        """`guess` for each request that speculates."""
        return Draft.of([self.guess(r) if r.speculate else Tree() for r in context.requests])
