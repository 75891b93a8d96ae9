"""Several drafters, one tree: what any of them guesses is tried. Lossless for the same reason each one is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from outpace.drafters.base import Context, Drafter, Needs, RequestContext, along_path
from outpace.errors import ConfigError
from outpace.laws import Draft, Tree, Walk
from outpace.target import Readout

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target import Scouts, Target
    from outpace.target.widen import Widening


class Merged(Drafter):
    """The union of several drafters' trees; earlier drafters have precedence in the node budget.

    A merged draft is deterministic (pruned samples are no samples), so it is verified under rule="path".

    Args:
        drafters: at least two; at most one of them may bring scouts.
        max_nodes: nodes of the merged tree.
    """

    name: ClassVar[str] = "merged"

    def __init__(self, drafters: Sequence[Drafter], *, max_nodes: int = 32) -> None:
        if len(drafters) < 2:
            raise ConfigError(f"merging needs at least two drafters, got {len(drafters)}")
        scouting = [d.name for d in drafters if d.needs.scouts]
        if len(scouting) > 1:
            raise ConfigError(f"only one merged drafter may bring scouts, but {' and '.join(scouting)} all do")
        self.drafters = tuple(drafters)
        self.max_nodes = max_nodes
        self._gather()
        self._own: list[list[Tree]] = []

    def _gather(self) -> None:
        """What all of them read and ride."""
        self.needs = Needs(
            taps=frozenset().union(*(d.needs.taps for d in self.drafters)),
            scouts=any(d.needs.scouts for d in self.drafters),
            noise=any(d.needs.noise for d in self.drafters),
            adapter=any(d.needs.adapter for d in self.drafters),
        )
        self.adapter = next((d.adapter for d in self.drafters if d.adapter is not None), None)

    def fit(self, target: Target) -> None:
        """Fit each; those with weights know only then what they read."""
        for drafter in self.drafters:
            drafter.fit(target)
        self._gather()

    def forget(self) -> None:
        """Forget with each."""
        for drafter in self.drafters:
            drafter.forget()

    def widened(self, widening: Widening, target: Target) -> Merged:
        """Each widened."""
        return Merged([drafter.widened(widening, target) for drafter in self.drafters], max_nodes=self.max_nodes)

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Start each."""
        for drafter in self.drafters:
            drafter.start(context, request, taps)

    def propose(self, context: Context) -> Draft:
        """The union of the trees, one node per distinct path."""
        self._own = [drafter.propose(context).trees() for drafter in self.drafters]
        merged = []
        for trees in zip(*self._own, strict=True):
            paths = [path for tree in trees for path in tree.paths()]
            merged.append(Tree.merge(paths, self.max_nodes))
        return Draft.of(merged)

    def scouts(self, context: Context, draft: Draft) -> Scouts | None:
        """Those of the one drafter that brings any."""
        found = [drafter.scouts(context, draft) for drafter in self.drafters if drafter.needs.scouts]
        return found[0] if found else None

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Each drafter hears which of its own nodes were accepted; one that reads states gets those of the path."""
        proposed = self._own or [[Tree() for _ in walks] for _ in self.drafters]
        self._own = []
        # the same round as if the draft had been the accepted path alone
        chains = [Walk(tuple(range(len(walk.tokens) - 1)), walk.tokens) for walk in walks]
        taps = dict(zip(read.taps, along_path(walks, list(read.taps.values())), strict=True)) if read.taps else {}
        path = Readout(read.logits, read.scout_logits, taps)
        for drafter, trees in zip(self.drafters, proposed, strict=True):
            if drafter.needs.taps:
                # states of scouts are no part of the path: who brings scouts gets the pass as it was
                given = (walks, read) if drafter.needs.scouts else (chains, path)
                drafter.observe(context, *given)
                continue
            own = [Walk(_follow(tree, walk.tokens), walk.tokens) for tree, walk in zip(trees, walks, strict=True)]
            drafter.observe(context, own, read)


def _follow(tree: Tree, tokens: Sequence[int]) -> tuple[int, ...]:
    """Nodes of a tree that spell the emitted tokens, less the last one, which the target emitted itself."""
    children = tree.children()
    nodes: list[int] = []
    node = -1
    for token in tokens[:-1]:
        node = next((child for child in children[node + 1] if tree.tokens[child] == token), -1)
        if node < 0:
            break
        nodes.append(node)
    return tuple(nodes)
