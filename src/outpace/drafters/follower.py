"""Drafters that follow the target's features row by row, with a cache of their own: EAGLE, sequential MTP.

Between rounds a request owes the drafter the rows of what was accepted: features the target has just computed, each
with the token behind it. They are read when a draft is wanted, all requests in one pass of static width, and the tree
grows from there. The inner part is tensors only (`growth`); this module feeds it and packs what comes out.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch

from outpace.drafters.ahead import draws_ahead
from outpace.drafters.base import Context, Needs, RequestContext, along_path
from outpace.drafters.growth import Draws, FixedTree, Plan, Ranks, born, extend, grow, grow_fixed
from outpace.drafters.learning import Batch, LearnedDrafter, Losses
from outpace.drafters.rowcache import RowCache, bucket
from outpace.drafters.rows import RowNet, unrolled_losses
from outpace.drafters.seats import Seats
from outpace.drafters.shapes import Grown, text_behind
from outpace.errors import ConfigError
from outpace.laws import Draft, Tree, Walk

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.following import FollowingDraft
    from outpace.target import Readout, Target

GuessMode = Literal["path", "greedy"]
Rows = tuple["Tensor", list[int]]
"""Features [n, taps * H], and the n tokens behind them."""
PREFILL_CHUNK = 512  # rows of one reading of a prompt


class FollowingDrafter(LearnedDrafter):
    """A drafter around a `RowNet`.

    Args:
        draft_len: deepest drafted token.
        branches: children per expanded node and nodes expanded per depth; 1 drafts a chain.
        nodes: most nodes of a draft.
        paths: rank tuples of a tree fixed in advance, which then replaces the three above.
        draw: "path" lets the path's own number choose among the drafter's tokens (at temperature > 0), "greedy" takes
            its most likely ones.
        coupling: under "path", how sure a token so drawn is to be the path's.
    """

    module: RowNet
    cpu_chain: ClassVar[int] = 3

    def __init__(
        self,
        *,
        draft_len: int,
        branches: int,
        nodes: int,
        paths: Sequence[Ranks] = (),
        draw: GuessMode = "path",
        coupling: float = 0.6,
    ) -> None:
        super().__init__()
        if draw not in ("path", "greedy"):
            raise ConfigError(f"draw must be path or greedy, got {draw!r}")
        if not 0 <= coupling < 1:
            raise ConfigError(f"coupling must be in [0, 1), got {coupling}")
        self.draft_len, self.branches, self.nodes = draft_len, branches, nodes
        self.paths = tuple(tuple(path) for path in paths)
        self.draw: GuessMode = draw
        self.coupling = coupling
        self.shape = self._tree("cpu")
        self._pending: WeakKeyDictionary[RequestContext, list[Rows]] = WeakKeyDictionary()
        self.needs = Needs(noise=draw == "path")  # and the taps, once the target is known

    def _tree(self, device: torch.device | str) -> Plan | FixedTree:
        if self.paths:
            return FixedTree(self.paths, device)
        return Plan(depth=self.draft_len, branches=self.branches, nodes=self.nodes)

    @classmethod
    def suited(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """On a CPU a short chain: a pass of four rows costs what one of one does, and more rows cost more."""
        if device.type != "cpu" or options.get("paths"):
            return dict(options)
        return {**options, "draft_len": cls.cpu_chain, "branches": 1, "nodes": cls.cpu_chain}

    @abstractmethod
    def build(self, target: Target) -> RowNet:
        """See `LearnedDrafter.build`."""

    @property
    def training_taps(self) -> frozenset[str]:
        """The network's features, and the states the target's head reads, for the teacher."""
        return self.needs.taps | {"post_norm"}

    @property
    def shifts(self) -> tuple[int, ...]:
        """Row t at step k is compared with token t + 2 + k."""
        return tuple(range(2, self.recipe.depths + 2))

    def objective(self, batch: Batch) -> Losses:
        """The training-time test."""
        return unrolled_losses(self.module, batch, self.recipe)

    def ready(self, target: Target) -> None:
        """Make the cache and the tree's tables."""
        net = self.module
        self.needs = Needs(taps=frozenset(net.taps), noise=self.draw == "path")
        dtype = next(net.parameters()).dtype if net.compiled is None else torch.float32
        self.cache = RowCache.empty(
            net.layers, net.shape.key_heads, net.shape.head_size, net.top_size, device=target.device, dtype=dtype
        )
        self.seats = Seats(self.cache)
        self.shape = self._tree(target.device)
        self._device: FollowingDraft | None = None

    def device_draft(self) -> FollowingDraft:
        """The same drafts in captured rounds."""
        if self._device is None or not self._device.holds():
            from outpace.drafters.device.fused import device_draft

            self._device = device_draft(self)
        return self._device

    def start(self, context: Context, request: RequestContext, taps: Mapping[str, Tensor]) -> None:
        """Read the prompt: features of all tokens but the root, each with the token behind it."""
        if context.target.captured is not None:
            self.device_draft().make_room(context.requests)  # all of it at once: what is captured holds for one place
        self.seats.update(context)
        seat = self.seats.requests.index(request)
        self.cache.truncate(seat, 0)
        self._pending[request] = []
        features = torch.cat([taps[name] for name in self.module.taps], -1)[0] if taps else None
        if features is None or not features.shape[0]:
            return  # a prompt of one token has no feature yet
        tokens = request.tokens[1:]
        for begin in range(0, len(tokens), PREFILL_CHUNK):
            rows = slice(begin, begin + PREFILL_CHUNK)
            self._read(context, {seat: (features[rows], tokens[rows])}, len(tokens[rows]), slots=[seat])

    def observe(self, context: Context, walks: Sequence[Walk], read: Readout) -> None:
        """Owe each request the rows of its accepted path."""
        taken = torch.cat(along_path(walks, [read.taps[name] for name in self.module.taps]), -1)
        for b, (request, walk) in enumerate(zip(context.requests, walks, strict=True)):
            self.owe(request, taken[b, : len(walk.tokens)], list(walk.tokens))

    def owe(self, request: RequestContext, features: Tensor, tokens: list[int]) -> None:
        """Rows to read before the next draft: features [n, taps * H], the n tokens behind them."""
        self._pending.setdefault(request, []).append((features, tokens))

    def propose(self, context: Context) -> Draft:
        """Read what is owed, grow a tree behind it."""
        width = self.catch_up(context)
        requests = self.seats.requests
        tokens, parents = self.grow(len(requests), width, self.draws(requests))
        return self._pack(context, tokens, parents)

    def catch_up(self, context: Context) -> int:
        """Seat the requests and read what is owed to them; entries of the cache that a growth may read."""
        self.seats.update(context)
        self.read_owed(context)
        width = bucket(max(self.cache.lengths[: len(self.seats.requests)]) + self.shape.scratch)
        self.cache.reserve(capacity=width)
        return width

    def read_owed(self, context: Context, *, beyond: int = 0) -> None:
        """Read what is owed to requests that sit, where it is more than `beyond` rows, in passes of static width."""
        requests = self.seats.requests
        owed = {seat: self.take_owed(request) for seat, request in enumerate(requests) if self.owes(request) > beyond}
        most = max((len(tokens) for _, tokens in owed.values()), default=0)
        static = self.shape.depth + 1
        if context.target.captured is not None:
            static = max(static, PREFILL_CHUNK // max(1, len(owed)))
        elif self.target.device.type == "cpu":
            static = max(1, min(static, most))  # where rows cost
        for begin in range(0, most, static):
            now = {s: (f[begin : begin + static], t[begin : begin + static]) for s, (f, t) in owed.items()}
            self._read(context, {s: row for s, row in now.items() if row[1]}, static, slots=range(len(requests)))

    def grow(self, batch: int, width: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
        """The tensor-only part of `propose`, after `growth.extend`: (tokens, parents) of the first `batch` seats."""
        embed = self.target.embed
        if isinstance(self.shape, FixedTree):
            return grow_fixed(self.module, embed, self.cache, self.shape, batch, width, draws)
        return grow(self.module, embed, self.cache, self.shape, batch, width, draws)

    @torch.no_grad()
    def grown(self, batch: Batch, start: int) -> list[Grown]:
        """See `LearnedDrafter.grown`: the fixed tree, or a chain and trees of up to `branches` branches."""
        net, embed, cache, tokens = self.module, self.target.embed, self.cache, batch.tokens
        features = torch.cat([batch.taps[name] for name in net.taps], -1).to(cache.top.dtype)
        end, shape = tokens.shape[1] - 2, self.shape
        branches = sorted({k for k in (1, 2, 4) if k < self.branches} | {self.branches})
        plans = [Plan(depth=self.draft_len, branches=k, nodes=self.nodes) for k in branches]
        fixed = isinstance(shape, FixedTree)
        scratch = max(plan.scratch for plan in ([shape] if fixed else plans))
        cache.reserve(slots=1, capacity=end + scratch)
        cache.truncate(0, 0)
        found: list[list[tuple[Tensor, ...]]] = []
        for place in range(start, end):
            rows = slice(0 if place == start else place, place + 1)
            behind = tokens[:, rows.start + 1 : place + 2]
            width = bucket(place + 1 + scratch)
            extend(net, embed, cache, features[:, rows], behind, torch.full_like(behind[:, 0], behind.shape[1]), width)
            if fixed:
                found.append([self.grow(1, width, None)])
            else:
                found.append([born(net, embed, cache, plan, 1, width) for plan in plans])
        cache.truncate(0, 0)
        following = text_behind(tokens[0], start, shape.depth)
        joined = [[torch.cat(parts) for parts in zip(*one, strict=True)] for one in zip(*found, strict=True)]
        if isinstance(shape, FixedTree):
            ((nodes, parents),) = joined
            return [
                Grown.of(
                    {}, nodes, parents, None, following=following, most=shape.width, paths=shape.paths, given=self.paths
                )
            ]
        return [
            Grown.of({"branches": k}, nodes, parents, value, following=following, most=self.nodes)
            for k, (nodes, parents, value) in zip(branches, joined, strict=True)
        ]

    def owes(self, request: RequestContext) -> int:
        """Rows that are owed to a request."""
        return sum(len(tokens) for _, tokens in self._pending.get(request, ()))

    def take_owed(self, request: RequestContext) -> Rows:
        """What is owed to a request, which is nothing afterwards; there has to be something."""
        parts = self._pending[request]
        self._pending[request] = []
        return torch.cat([features for features, _ in parts]), [token for _, tokens in parts for token in tokens]

    def _read(self, context: Context, rows: Mapping[int, Rows], static: int, *, slots: Sequence[int]) -> None:
        """Extend seats by the rows given, captured where the target's passes are.

        Elsewhere, all of `slots` (the first seats, or others) by `static` rows each, of which some may be padding.
        """
        if not rows:
            return
        fast = context.target.captured
        if fast is not None:
            self.device_draft().read(fast, rows)
            return
        cache, device, dtype = self.cache, self.cache.top.device, self.cache.top.dtype
        size = next(iter(rows.values()))[0].shape[-1]
        features = torch.zeros(len(slots), static, size, device=device, dtype=dtype)
        tokens = [[0] * static for _ in slots]
        counts = [0] * len(slots)
        for b, slot in enumerate(slots):
            if slot in rows:
                feature, ids = rows[slot]
                features[b, : len(ids)] = feature.to(dtype)
                tokens[b][: len(ids)] = ids
                counts[b] = len(ids)
        width = bucket(max(cache.lengths[slot] for slot in slots) + static)
        cache.reserve(capacity=width)
        first = list(slots) == list(range(len(slots)))
        extend(
            self.module, self.target.embed, cache, features, torch.tensor(tokens, device=device),
            torch.tensor(counts, device=device), width, None if first else torch.tensor(slots, device=device),
        )  # fmt: skip
        for slot, count in zip(slots, counts, strict=True):
            cache.lengths[slot] += count

    def draws(self, requests: Sequence[RequestContext]) -> Draws | None:
        """What decides the positions ahead, where somebody samples."""
        return draws_ahead(requests, self.shape.depth, self.module.head, self.coupling) if self.draw == "path" else None

    def _pack(self, context: Context, tokens: Tensor, parents: Tensor) -> Draft:
        """One tree per request in the context's order, its first path in one piece."""
        order = self.seats.order(context)
        nodes: list[Any] = list(zip(tokens.tolist(), parents.tolist(), strict=True))
        trees = []
        for request, seat in zip(context.requests, order, strict=True):
            read = self.cache.lengths[seat] > 0
            trees.append(Tree(*nodes[seat]).depth_first() if request.speculate and read else Tree())
        return Draft.of(trees)
