"""Drafts through fused kernels: what makes a level of a growing tree cheap.

    rows owed   [fuse], enter, block, top, head, children
    each depth  expand, block, head, children              block: qkv, attention (two), output, gate-up, down
    at the end  keep

Nine launches a level for one block, against sixty of `growth`, which stays the definition. What does not fit (options a
plan cannot say, trees fixed in advance, many rows at once) is drafted by the captured functions of `growth`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import triton
from torch import nn

from outpace.drafters.device import kernels
from outpace.drafters.device.following import Ear, FollowingDraft, Owed
from outpace.drafters.device.plan import rounded
from outpace.drafters.device.reading import kernel_halves, read_rows
from outpace.drafters.growth import Plan
from outpace.target.fast.graphs import bucket
from outpace.target.fast.launch import dependent_launch, launch_options
from outpace.target.fast.linear import Follow, Scaled, choose_tile, gated_linear, is_float, linear, query_key_value
from outpace.target.fast.tree_attention import Workspace, splits_for, tree_attention

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.contract import DraftKey
    from outpace.drafters.device.plan import BlockPlan, RowPlan
    from outpace.drafters.follower import FollowingDrafter
    from outpace.drafters.growth import Draws

_LOG: Final = logging.getLogger("outpace")
_MOST_ROWS: Final = 128  # rows of one level of all requests; above, arithmetic is no longer free
_MOST_TAPS: Final = 4
_MOST_BRANCHES: Final = 16
_MOST_BORN: Final = 1024
_POSITIONS: Final = 1 << 17  # most that tables of angles hold
_STEP: Final = 16  # values compared at once with all others


@dataclass(frozen=True, slots=True)
class Ready:
    """What of owed rows the first product reads: rows [B * W, taps * H], squares [B * W, taps] or None."""

    rows: Tensor
    squares: Tensor | None


def device_draft(drafter: FollowingDrafter) -> FollowingDraft:
    """How a drafter drafts on the device: through fused kernels where they fit."""
    reason = _unfit(drafter)
    if reason is None:
        plan = drafter.module.fused_plan()
        if plan is not None:
            return FusedDraft(drafter, plan)
        reason = f"the network of {drafter.name} has no plan"
    _LOG.info("drafts of %s take captured torch functions: %s", drafter.name, reason)
    return FollowingDraft(drafter)


def _unfit(drafter: FollowingDrafter) -> str | None:
    """Why fused kernels cannot draft for this drafter, whatever its network."""
    net, shape, target = drafter.module, drafter.shape, drafter.target
    kinds = {p.dtype for p in net.parameters()} | {drafter.cache.top.dtype, net.head.weight.dtype}
    if not isinstance(shape, Plan):
        return "its tree is fixed in advance"
    if shape.branches > _MOST_BRANCHES or shape.born > _MOST_BORN or shape.branches > net.head.size:
        return f"its tree has {shape.branches} branches and {shape.born} births"
    if len(net.taps) > _MOST_TAPS:
        return f"it reads {len(net.taps)} taps"
    if kinds != {target.dtype} or not is_float(target.dtype):
        return "its weights differ in dtype from the target's"
    if type(target.model.get_input_embeddings()) is not nn.Embedding:
        return "the target scales its embeddings"
    if net.shape.hidden != target.hidden_size:
        return "it is of another width than the target"
    return None


class FusedDraft(FollowingDraft):
    """Drafts of a `FollowingDrafter` whose network has a plan.

    Attributes:
        plan: its weights, which prompts are read with. drafted: the same as drafts read them, large ones in eight bits.
    """

    def __init__(self, drafter: FollowingDrafter, plan: RowPlan) -> None:
        super().__init__(drafter)
        assert isinstance(drafter.shape, Plan)
        self.tree, self.plan = drafter.shape, plan
        with torch.inference_mode(False), torch.no_grad():
            self.drafted = rounded(plan)
        target, net = drafter.target, drafter.module
        self.device = target.device
        self.pdl = dependent_launch(self.device)
        self.table = target.model.get_input_embeddings().weight.detach()
        positions = bucket(min(target.context, _POSITIONS))
        with torch.inference_mode(False), torch.no_grad():
            cos, sin = net.rotary.table(positions)
            self.rotary = cos.to(target.dtype), sin.to(target.dtype)
            self.slots = torch.arange(_MOST_ROWS, device=self.device)
            self.arrived = torch.zeros(_MOST_ROWS, dtype=torch.int32, device=self.device)  # tiles of a row's logits
        self._ready: dict[int, Ready] = {}

    def extend(self, features: Tensor, tokens: Tensor, counts: Tensor, slots: Tensor, reach: int) -> None:
        """See `FollowingDraft`; where tables of angles end, by the functions of `growth`."""
        if reach > self.rotary[0].shape[0]:
            super().extend(features, tokens, counts, slots, reach)
        else:
            read_rows(self, features, tokens, counts, slots, reach)

    def fused(self, batch: int) -> bool:
        """Whether drafts of that many requests take the fused kernels."""
        return batch * max(self.rows, self.tree.branches) <= _MOST_ROWS

    def ready(self, batch: int) -> Ready:
        """Where `collect` leaves rows for the first product; the owed rows themselves where no norm is in front."""
        if batch not in self._ready:
            owed, plan = self.owed(batch), self.plan
            rows = batch * self.rows
            normed = bool(plan.tap_norms) or plan.fuse_norm is not None
            with torch.inference_mode(False):
                squares = torch.zeros(rows, len(self.drafter.module.taps), dtype=torch.float32, device=self.device)
                features = owed.features.view(rows, -1)
                self._ready[batch] = Ready(
                    torch.zeros_like(features) if normed else features, squares if plan.fuse_norm is not None else None
                )
        return self._ready[batch]

    def collect(
        self, taps: Mapping[str, Tensor], path: Tensor, emitted: Tensor, counts: Tensor, *, warm: bool = False
    ) -> None:
        """See `DeviceDraft`."""
        batch = path.shape[0]
        if not self.fused(batch):
            super().collect(taps, path, emitted, counts, warm=warm)
            return
        owed, ready, plan = self.owed(batch), self.ready(batch), self.plan
        if warm:
            owed = Owed(owed.features.clone(), owed.tokens.clone(), owed.counts.clone())
            squares = None if ready.squares is None else ready.squares.clone()
            ready = Ready(ready.rows.clone(), squares)
        names = self.drafter.module.taps
        read = [taps[name] for name in names]
        read += read[:1] * (_MOST_TAPS - len(read))
        size = read[0].shape[2]
        gammas: list[Tensor | None] = list(plan.tap_norms)
        if plan.fuse_norm is not None:
            gammas = list(plan.fuse_norm.view(-1, size).unbind())
        gammas += (gammas[:1] or [None]) * (_MOST_TAPS - len(gammas))
        kernels.collect_kernel[(batch * self.rows, len(names))](
            *read, *gammas, path, emitted, counts, owed.features, ready.rows, ready.squares, owed.tokens, owed.counts,
            path.shape[1], read[0].shape[1], emitted.stride(0), self.rows, plan.eps, TAPS=len(names), SIZE=size,
            BLOCK=triton.next_power_of_2(size), EACH=bool(plan.tap_norms), ALL=plan.fuse_norm is not None, PDL=self.pdl,
            num_warps=4, **launch_options(self.pdl),
        )  # fmt: skip

    def draft(self, key: DraftKey, batch: int, draws: Draws | None, *, warm: bool = False) -> tuple[Tensor, Tensor]:
        """See `DeviceDraft`."""
        if not self.fused(batch):
            return super().draft(key, batch, draws, warm=warm)
        tokens, parents, _ = self._drafted(_Run(self, key, batch, draws), warm=warm)
        return tokens, parents

    def draft_hearing(
        self, key: DraftKey, batch: int, draws: Draws | None, ear: Ear, *, warm: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FollowingDraft`."""
        if not self.fused(batch):
            return super().draft_hearing(key, batch, draws, ear, warm=warm)
        return self._drafted(_Run(self, key, batch, draws, ear), warm=warm)

    def _drafted(self, run: _Run, *, warm: bool) -> tuple[Tensor, Tensor, Tensor]:
        owed = self.owed(run.batch)
        run.read(owed.tokens, self.ready(run.batch), torch.zeros_like(owed.counts) if warm else owed.counts)
        return run.grow()


class _Run:
    """One draft: what its levels share."""

    def __init__(
        self, draft: FusedDraft, key: DraftKey, batch: int, draws: Draws | None, ear: Ear | None = None
    ) -> None:
        self.draft, self.plan, self.tree, self.batch, self.draws = draft, draft.drafted, draft.tree, batch, draws
        self.cache, self.net, self.ear = draft.drafter.cache, draft.drafter.module, ear
        self.top = self.cache.top[:batch]  # what the root's children are drafted from
        shape, device = self.net.shape, draft.device
        self.size, self.pdl = shape.hidden, draft.pdl
        self.block = triton.next_power_of_2(shape.hidden)
        self.halves = kernel_halves(draft.plan, shape.hidden)
        self.at = self.cache.at[:batch]
        self.slots = draft.slots[:batch]
        rows = batch * max(draft.rows, self.tree.branches)
        self.workspace = Workspace(rows, shape.heads, shape.head_size, splits_for(key.reach), device)
        born = self.tree.born
        self.tokens = torch.empty(batch, born, dtype=torch.int64, device=device)
        self.parents = torch.empty(batch, born, dtype=torch.int32, device=device)
        self.values = torch.empty(batch, born, dtype=torch.float32, device=device)

    def room(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this draft, in the weights' dtype unless told."""
        return torch.empty(shape, dtype=dtype or self.cache.top.dtype, device=self.draft.device)

    def read(self, tokens: Tensor, ready: Ready, counts: Tensor) -> None:
        """Keep the rows owed; the tree begins with the children of each request's last row."""
        plan, count = self.plan, self.draft.rows
        rows = self.batch * count
        state = ready.rows
        if plan.fuse is not None:
            source = ready.rows if ready.squares is None else Scaled(ready.rows, ready.squares)
            state, _ = linear(source, plan.fuse, tile=choose_tile(plan.fuse.weight, rows=rows), eps=plan.eps)
        both, residual, positions = self.room(rows, 2 * self.size), self.kept_rows(rows), self.longs(rows)
        kernels.enter_rows_kernel[(rows,)](
            self.draft.table, state, both, residual, plan.norm_embedding, plan.norm_state, plan.norm, tokens, self.at,
            positions, count, plan.eps, **self.halves, **self.early(self.pdl and plan.fuse is not None),
        )  # fmt: skip
        y, _ = self.blocks(both, residual, positions, self.at, None)
        top = self.top
        scaled = Scaled(self.room(self.batch, self.size), self.room(self.batch, 1, dtype=torch.float32))
        kernels.top_kernel[(self.batch,)](
            y, top, scaled.rows, scaled.squares, plan.norm, counts, self.at, count, SIZE=self.size, BLOCK=self.block,
            NORMED=plan.norm is not None, num_warps=4, **self.early(),
        )  # fmt: skip
        heard: Scaled | None = scaled if plan.norm is not None else None
        if self.ear is not None:
            self.top, heard = self.ear.fused(top, 1, plan.norm)
        self.children(self.logits(heard if heard is not None else self.top), None, None, 1)

    def grow(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tree: tokens, parents [B, width] int64, values [B, width] float32."""
        tree, plan, batch = self.tree, self.plan, self.batch
        k, words = tree.branches, max(1, -(-tree.scratch // 32))
        rows = batch * k
        y, above = self.top, self.at  # of the depth before; what the root's children read is no bits
        for depth in range(1, tree.depth):
            count = k if depth == 1 else k * k
            both, residual, positions = self.room(rows, 2 * self.size), self.kept_rows(rows), self.longs(rows)
            values, births = self.room(rows, dtype=torch.float32), self.room(rows, dtype=torch.int32)
            entries, bits = self.longs(batch), self.room(rows, words, dtype=torch.int32)
            choices = triton.next_power_of_2(count)
            kernels.expand_kernel[(rows,)](
                self.draft.table, y, both, residual, plan.norm_embedding, plan.norm_state, plan.norm, self.tokens,
                self.values, self.at, above, values, births, positions, entries, bits, tree.born, self.start(depth),
                count, depth, plan.eps, K=k, WORDS=words, CHOICES=choices, STEP=min(choices, _STEP), FIRST=depth == 1,
                OUT_NORMED=plan.feeds_normed and plan.norm is not None, **self.halves, **self.early(),
            )  # fmt: skip
            y, scaled = self.blocks(both, residual, positions, entries, bits, span=depth * k)
            if self.ear is not None:
                y, scaled = self.ear.fused(y, depth + 1, plan.norm)
            self.children(self.logits(scaled if scaled is not None else y), values, births, depth + 1)
            above = bits
        tokens, parents = self.longs(batch, tree.width), self.longs(batch, tree.width)
        kept_values = self.room(batch, tree.width, dtype=torch.float32)
        kernels.keep_kernel[(batch,)](
            self.tokens, self.parents, self.values, self.at, torch.empty_like(self.parents), tokens, parents,
            kept_values, tree.born, tree.width, BLOCK=triton.next_power_of_2(tree.born), STEP=_STEP,
            num_warps=4 if tree.born <= 128 else 8, **self.early(),
        )  # fmt: skip
        return tokens, parents, kept_values

    def blocks(
        self,
        both: Tensor,
        residual: Tensor | None,
        positions: Tensor,
        entries: Tensor,
        bits: Tensor | None,
        span: int = 0,
    ) -> tuple[Tensor, Scaled | None]:
        """The network behind its halves: y [M, H], and the same scaled for the norm in front of the head."""
        plan = self.plan
        source: Tensor | Scaled = both
        if plan.join is not None:
            gamma = plan.blocks[0].norm_attention
            joined, scaled = linear(
                both, plan.join, tile=choose_tile(plan.join.weight, rows=both.shape[0]), eps=plan.eps, pdl=self.pdl,
                follow=_follow(gamma),
            )  # fmt: skip
            source = scaled if scaled is not None else joined
            residual = joined if residual is None else residual
        assert residual is not None  # the state, or what the join made
        following = [block.norm_attention for block in plan.blocks[1:]] + [plan.norm]
        for layer, (block, gamma) in enumerate(zip(plan.blocks, following, strict=True)):
            residual, scaled = self.layer(layer, block, source, residual, positions, entries, bits, span, gamma)
            source = scaled if scaled is not None else residual
        return residual, source if isinstance(source, Scaled) else None

    def layer(
        self,
        layer: int,
        block: BlockPlan,
        source: Tensor | Scaled,
        residual: Tensor,
        positions: Tensor,
        entries: Tensor,
        bits: Tensor | None,
        span: int,
        following: Tensor | None,
    ) -> tuple[Tensor, Scaled | None]:
        """One block; rows are written at `entries` and read what is kept and, of `span` entries behind, their bits."""
        shape, eps = self.net.shape, self.plan.eps
        rows = positions.shape[0]
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        query = self.room(rows, shape.heads, shape.head_size)
        query_key_value(
            source, block.qkv, query, keys, values, self.draft.rotary, positions, entries, self.slots,
            tile=choose_tile(block.qkv.weight, 2, rows=rows), eps=eps, pdl=self.pdl,
        )  # fmt: skip
        attended = tree_attention(
            query, keys, values, lengths=self.at, slots=self.slots, positions=positions, bits=bits,
            scaling=shape.head_size**-0.5, window=None, workspace=self.workspace, span=span or None, pdl=self.pdl,
        )  # fmt: skip
        hidden, scaled = linear(
            attended.view(rows, -1), block.out, tile=choose_tile(block.out.weight, rows=rows), residual=residual,
            follow=_follow(block.norm_mlp), eps=eps, pdl=self.pdl,
        )  # fmt: skip
        assert scaled is not None  # a norm follows
        inner = gated_linear(
            scaled, block.gate_up, tile=choose_tile(block.gate_up.weight, 2, rows=rows), gelu=False, eps=eps,
            pdl=self.pdl,
        )  # fmt: skip
        return linear(
            inner, block.down, tile=choose_tile(block.down.weight, rows=rows), residual=hidden,
            follow=_follow(following), eps=eps, pdl=self.pdl,
        )  # fmt: skip

    def logits(self, source: Tensor | Scaled) -> Tensor:
        """What the head says of each row, [M, Vd]."""
        head, rows = self.plan.head, (source.rows if isinstance(source, Scaled) else source).shape[0]
        return linear(source, head, tile=choose_tile(head.weight, rows=rows), eps=self.plan.eps, pdl=self.pdl)[0]

    def children(self, logits: Tensor, values: Tensor | None, births: Tensor | None, depth: int) -> None:
        """The best children of each row; values, births: of the rows' own nodes, None for the root."""
        plan, k, draws = self.plan, self.tree.branches, self.draws
        rows, vocabulary = logits.shape
        tile = 1024 if vocabulary <= 32768 else 4096
        tiles = triton.cdiv(vocabulary, tile)
        peaks, sums = (self.room(rows, tiles, dtype=torch.float32) for _ in range(2))
        best = self.longs(rows, tiles, k)
        looked_up = draws.looked_up if draws is not None else None
        u, race = (draws.u, draws.race) if draws is not None else (None, None)
        kernels.children_kernel[(rows, tiles)](
            logits, peaks, sums, best, self.draft.arrived, draws.temperature if draws is not None else None, race,
            looked_up, u, plan.offsets, values, births, self.tokens, self.parents, self.values, rows // self.batch,
            vocabulary, tiles, self.tree.born, self.start(depth), depth - 1, self.tree.depth,
            race.shape[1] if race is not None else 0,
            draws.coupling if draws is not None else 0.0, K=k,
            PLACES=triton.next_power_of_2(k), BLOCK=tile, WIDTH=triton.next_power_of_2(tiles),
            CHOICES=triton.next_power_of_2(tiles * k + (u is not None)), FIRST=values is None, SAMPLED=u is not None,
            RACED=race is not None, REDUCED=plan.offsets is not None, num_warps=4, **self.early(),
        )  # fmt: skip

    def start(self, depth: int) -> int:
        """Births of smaller depth."""
        k = self.tree.branches
        return 0 if depth == 1 else k + (depth - 2) * k * k

    def kept_rows(self, rows: int) -> Tensor | None:
        """Room for the residual, where it is not made by the join."""
        return None if self.plan.residual == "joined" else self.room(rows, self.size)

    def longs(self, *shape: int) -> Tensor:
        """A tensor of int64."""
        return self.room(*shape, dtype=torch.int64)

    def early(self, pdl: bool | None = None) -> dict[str, Any]:
        """Options of a kernel that may start while the one before it drains; the first of a graph must not."""
        pdl = self.pdl if pdl is None else pdl
        return {"PDL": pdl, **launch_options(pdl)}


def _follow(gamma: Tensor | None) -> Follow | None:
    return Follow(gamma, 0.0) if gamma is not None else None
