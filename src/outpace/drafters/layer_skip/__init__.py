"""Layer skipping: the target drafts for itself with some of its layers left out.

Source: Zhang et al. 2023, "Draft & Verify"; Elhoushi et al. 2024, "LayerSkip". No second model and no training; the
view shares weights and cache with the target, and what it writes there is scratch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from outpace.drafters.ahead import DrawMode, chain_of, check_draw, kind_of, pick
from outpace.drafters.base import Context, Drafter, Needs
from outpace.errors import ConfigError
from outpace.laws import Draft
from outpace.target import Block, Target

if TYPE_CHECKING:
    from torch import Tensor


class LayerSkip(Drafter):
    """Draft a chain with a shallower view of the target.

    Args:
        draft_len: tokens per draft.
        skip: indices of layers to leave out; () leaves out every second layer of the middle half.
        draw: how the view's law becomes a token, as for `draft_model`.
    """

    name: ClassVar[str] = "layer_skip"

    def __init__(self, *, draft_len: int = 4, skip: tuple[int, ...] = (), draw: DrawMode = "path") -> None:
        if draft_len < 1:
            raise ConfigError(f"draft_len must be at least 1, got {draft_len}")
        check_draw(draw)
        self.draft_len = draft_len
        self.skip = skip
        self.draw: DrawMode = draw
        self.kind = kind_of(draw)
        self.needs = Needs(noise=draw == "path")

    def fit(self, target: Target) -> None:
        """Choose the layers of the view."""
        total = target.layers_total
        skip = self.skip or tuple(range(total // 4, total - total // 4, 2))
        unknown = [layer for layer in skip if not 0 <= layer < total]
        if unknown:
            raise ConfigError(f"layer_skip cannot skip layers {unknown}: {target.name} has layers 0 to {total - 1}")
        self.view = target.view([layer for layer in range(total) if layer not in skip])

    def propose(self, context: Context) -> Draft:
        """Decode ahead behind the target's own cache, on scratch entries."""
        requests = context.requests
        depths = [min(self.draft_len, r.depth_limit) if r.speculate else 0 for r in requests]
        chains: list[list[int]] = [[] for _ in requests]
        laws: list[list[Tensor]] = [[] for _ in requests]
        last = [r.root for r in requests]
        with context.cache.scratch():
            for step in range(max(depths, default=0)):
                lengths = context.cache.lengths[: len(requests)]
                block = Block.chain([[token] for token in last], lengths, self.view.device)
                logits = self.view.run(block, context.cache).logits
                assert logits is not None  # asked for
                context.cache.commit([range(1) for _ in requests])
                for b, request in enumerate(requests):
                    if step < depths[b]:
                        token, q = pick(self.draw, logits[b, 0], request, [*request.tokens, *chains[b]])
                        chains[b].append(token)
                        last[b] = token
                        if q is not None:
                            laws[b].append(q)
        return Draft.of([chain_of(chain, law) for chain, law in zip(chains, laws, strict=True)])
