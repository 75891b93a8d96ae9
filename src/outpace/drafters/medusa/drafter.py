"""Medusa's drafter: no cache, no second pass; the state of the last verified token is all it reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.ahead import draws_ahead
from outpace.drafters.base import Context, Needs, RequestContext
from outpace.drafters.calibrate import count_ranks, path_values
from outpace.drafters.follower import GuessMode
from outpace.drafters.growth import DEFAULT_PATHS, Draws, FixedTree, Ranks, grow_ranked
from outpace.drafters.heads import choose_ids, special_ids
from outpace.drafters.learning import Batch, LearnedDrafter, Losses, Recipe, Tuning
from outpace.drafters.losses import Teacher, head_loss
from outpace.drafters.medusa.device import MedusaDraft
from outpace.drafters.medusa.heads import MedusaHeads, Projection
from outpace.drafters.medusa.joint import HEAD_WEIGHT, TUNE_LR, Rise, check_tuning, joint_losses, risen
from outpace.drafters.shapes import Grown, text_behind
from outpace.errors import ConfigError
from outpace.laws import Draft, Tree, Walk
from outpace.target import GatedLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device import DeviceDraft
    from outpace.target import Readout, Target

_RANKS = 10  # of each head's list that calibration looks at


class Medusa(LearnedDrafter):
    """Heads on the target's top state, and a tree of rank tuples over their lists.

    Args:
        heads: how many, the deepest drafted token.
        nodes: most nodes of a draft. paths: rank tuples of the tree, () until it is calibrated (training does it).
        draw, coupling: see `FollowingDrafter`.
        layers, projection, rank: see `MedusaHeads`.
        vocabulary: tokens of the draft vocabulary, the most frequent of the corpus; 0: all.
        tune_rank: 0 for a frozen target (Medusa-1); otherwise it is trained along, by LoRA of that rank on every linear
            layer but the head (Medusa-2). It says something else afterwards: see `medusa.joint`.
        head_weight, rise: weight of the heads' loss beside the target's own, and how it comes to that over the run.
        tune_lr: learning rate of the LoRA, as a share of the heads'.
    """

    name: ClassVar[str] = "medusa"
    needs = Needs(taps=frozenset({"post_norm"}), noise=True)
    decoding: ClassVar[frozenset[str]] = frozenset({"nodes", "paths", "draw", "coupling"})
    default_recipe: ClassVar[Recipe] = Recipe(lr=1e-3, depths=4, decay=0.8)
    module: MedusaHeads

    def __init__(
        self,
        *,
        heads: int = 4,
        nodes: int = 24,
        paths: Sequence[Ranks] = (),
        draw: GuessMode = "path",
        coupling: float = 0.5,
        layers: int = 1,
        projection: Projection = "target",
        rank: int = 64,
        vocabulary: int = 32_768,
        tune_rank: int = 0,
        head_weight: float = HEAD_WEIGHT,
        rise: Rise = "constant",
        tune_lr: float = TUNE_LR,
    ) -> None:
        super().__init__()
        if min(heads, nodes, layers, rank) < 1:
            raise ConfigError("heads, nodes, layers and rank must be at least 1")
        if projection not in ("target", "low_rank", "own"):
            raise ConfigError(f"projection must be target, low_rank or own, got {projection!r}")
        if draw not in ("path", "greedy"):
            raise ConfigError(f"draw must be path or greedy, got {draw!r}")
        check_tuning(tune_rank, head_weight, rise, tune_lr)
        self.tune_rank, self.head_weight, self.tune_lr = tune_rank, head_weight, tune_lr
        self.rise: Rise = rise
        self.heads, self.nodes, self.layers, self.rank, self.vocabulary = heads, nodes, layers, rank, vocabulary
        self.projection: Projection = projection
        self.draw: GuessMode = draw
        self.coupling = coupling
        self.paths = tuple(tuple(path) for path in paths)
        self.recipe = self.recipe.replace(depths=heads)
        self.needs = Needs(taps=frozenset({"post_norm"}), noise=draw == "path")
        self._ids: Tensor | None = None
        self._states: WeakKeyDictionary[RequestContext, Tensor] = WeakKeyDictionary()

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Choose the draft vocabulary."""
        if 0 < self.vocabulary < target.vocabulary:
            self._ids = choose_ids(counts, self.vocabulary, special_ids(target))

    def build(self, target: Target) -> MedusaHeads:
        """The heads for a target."""
        return MedusaHeads(
            target,
            heads=self.heads,
            layers=self.layers,
            projection=self.projection,
            rank=self.rank,
            vocabulary=self.vocabulary,
            ids=self._ids,
        ).to(target.device)

    def tune(self, target: Target) -> Tuning | None:
        """Medusa-2: an adapter on every linear layer but the head, which heads share and embeddings may be tied to."""
        if not self.tune_rank:
            return None
        adapter = GatedLoRA.for_all_layers(target.model, self.tune_rank).to(target.device)
        return Tuning(adapter=adapter, lr=self.tune_lr)

    def ready(self, target: Target) -> None:
        """Lay out the tree."""
        paths = self.paths or DEFAULT_PATHS
        chosen = [path for path in paths if len(path) <= self.heads and max(path) < self.module.head.size]
        self.tree = FixedTree(chosen[: self.nodes], target.device)
        self._device: MedusaDraft | None = None

    @classmethod
    def suited(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """On a CPU three nodes: a pass of four rows costs what one of one does, and more rows cost more."""
        return {**options, "nodes": 3} if device.type == "cpu" else dict(options)

    # Training ------------------------------------------------------------------------------------------------------

    @property
    def shifts(self) -> tuple[int, ...]:
        """Head k (from 1) of slot t is compared with token t + 1 + k; a target trained along, with token t + 1."""
        return tuple(range(1 if self.tune_rank else 2, self.recipe.depths + 2))

    def objective(self, batch: Batch) -> Losses:
        """Medusa-1: the heads' losses; where the target is trained along, those and its own (`joint`)."""
        if self.recipe.depths > self.heads:
            raise ConfigError(f"depths={self.recipe.depths}, but there are {self.heads} heads")
        states = batch.taps["post_norm"].flatten(0, 1)
        if self.tuning is None:
            return self.head_losses(batch, states)
        weight = self.head_weight * risen(self.rise, batch.share)
        return joint_losses(batch, states, self.tuning.adapter, self.head_losses, weight)

    def head_losses(self, batch: Batch, states: Tensor) -> Losses:
        """Losses of the heads on states [B * T, H] of a target, whose law is their teacher.

        Heads learn beside one another; a head's logits are gone before the next. Gradients go into the states too, if
        they carry any, but not through the teacher.
        """
        recipe, net, tokens, laws = self.recipe, self.module, batch.tokens.flatten(), states.detach()
        sums, slots, hits = [], [], []
        for number in range(recipe.depths):
            where = batch.slots_before(number + 2)
            hidden, weight = net.states(number, states.index_select(0, where))
            label = tokens[where + number + 2]
            loss, hit = head_loss(
                recipe.loss, hidden, net.head, label, Teacher(laws, where + number + 1), weight=weight
            )
            sums.append(loss)
            slots.append(where)
            hits.append(hit)
        return Losses.of(batch, sums, slots, hits, recipe.weights)

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Batch]) -> None:
        """Count rank tuples on text the target wrote, and take the tree that holds the most of them."""
        count = min(_RANKS, self.module.head.size)
        ranks, usable = [], []
        for batch in batches:
            tokens, states = batch.tokens.flatten(), batch.taps["post_norm"].flatten(0, 1)
            found = torch.full((self.heads, tokens.numel()), count, device=tokens.device)
            there = torch.zeros_like(found, dtype=torch.bool)
            for number in range(self.heads):
                where = batch.slots_before(number + 2)
                hidden, weight = self.module.states(number, states[where].to(_dtype(self.module)))
                logits = torch.nn.functional.linear(hidden, weight.to(hidden.dtype))
                label = self.module.head.to_draft(tokens[where + number + 2])
                found[number, where] = count_ranks(logits, label, count)
                there[number, where] = True
            ranks.append(found)
            usable.append(there)
        values = path_values(torch.cat(ranks, 1), torch.cat(usable, 1), count, self.nodes)
        self.paths = tuple(path for path, _ in values)
        self.ready(self.target)

    @torch.no_grad()
    def grown(self, batch: Batch, start: int) -> list[Grown]:
        """See `LearnedDrafter.grown`: the tree in use."""
        tokens, parents = self.grow(batch.taps["post_norm"][0, start:-2].to(_dtype(self.module)), None)
        following = text_behind(batch.tokens[0], start, self.tree.depth)
        tree, given = self.tree, self.paths or DEFAULT_PATHS
        found = Grown.of({}, tokens, parents, None, following=following, most=tree.width, paths=tree.paths, given=given)
        return [found]

    # Decoding ------------------------------------------------------------------------------------------------------

    def device_draft(self) -> DeviceDraft:
        """The same drafts in captured rounds."""
        if self._device is None:
            self._device = MedusaDraft(self)
        return self._device

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Keep the state of the last token read."""
        if taps and taps["post_norm"].shape[1]:
            self.keep(request, taps["post_norm"][0, -1])

    def keep(self, request: RequestContext, state: Tensor) -> None:
        """The state [H] that the next draft of a request reads."""
        self._states[request] = state

    def states(self, requests: Sequence[RequestContext]) -> list[Tensor | None]:
        """The states kept, None where there is none yet."""
        return [self._states.get(request) for request in requests]

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Keep the state of the last accepted node."""
        last = [walk.nodes[-1] + 1 if walk.nodes else 0 for walk in walks]
        tap = read.taps["post_norm"]
        rows = tap[torch.arange(len(last), device=tap.device), torch.tensor(last, device=tap.device)]
        for request, row in zip(context.requests, rows, strict=True):
            self.keep(request, row)

    def propose(self, context: Context) -> Draft:
        """All heads at once, the tree over their lists."""
        requests = context.requests
        empty = torch.zeros(context.target.hidden_size, dtype=context.target.dtype, device=context.target.device)
        states = torch.stack([self._states.get(request, empty) for request in requests])
        tokens, parents = self.grow(states, self._draws(requests))
        nodes = list(zip(tokens.tolist(), parents.tolist(), strict=True))
        trees = [
            Tree(*nodes[b]).depth_first() if request.speculate and request in self._states else Tree()
            for b, request in enumerate(requests)
        ]
        return Draft.of(trees)

    def grow(self, states: Tensor, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """The tensor-only part: states [B, H] -> tokens, parents [B, nodes]."""
        return grow_ranked(self.module(states, self.tree.depth), self.module.head, self.tree, draws)

    def _draws(self, requests: Sequence[RequestContext]) -> Draws | None:
        return draws_ahead(requests, self.heads, self.module.head, self.coupling) if self.draw == "path" else None


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype
