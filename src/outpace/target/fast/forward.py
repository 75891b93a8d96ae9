"""One pass over a block of rows with fused kernels: the same layers as the model's own modules, in fewer steps.

Two ways through a layer, chosen by the number of rows:

- few (`few_rows`): product, rotation and cache write in one kernel; attention, and its pieces added up; product and
  residual; two products and activation; product and residual. Norms are folded into the products around them.
- above: cuBLAS products with row kernels between them; there the arithmetic is no longer free.

Knows no graphs: `graphs` captures it. It runs eagerly as well, which is how the tests compare it with the modules.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch

from outpace.target.fast.linear import TILE_ROWS, Follow, Scaled, choose_tile, gated_linear, linear, query_key_value
from outpace.target.fast.rows import activate_rows, norm_rows, place_heads
from outpace.target.fast.tails import TailRows, make_tails
from outpace.target.fast.tree_attention import Workspace, tree_attention

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.fast.plan import Joined, LayerPlan, Plan, Projection
    from outpace.target.fast.tails import Tail

Place = tuple[int, str]
"""Which product: the layer's index, and its name in `plan.joined_names`."""
FEW_ROWS: Final = 64
_LARGE: Final = 2048  # hidden size from which arithmetic on more than one tile of rows is no longer free


def few_rows(plan: Plan) -> int:
    """Rows up to which a pass takes the fused kernels; a row's bits do not depend on others beside it there."""
    return TILE_ROWS if plan.hidden >= _LARGE else FEW_ROWS


@dataclass(frozen=True, slots=True)
class Inputs:
    """The rows of a pass, in tensors that keep their place: B requests of N rows, M = B * N.

    Attributes:
        tokens: [B, R] int64, the main rows. embeds: [B, S, H] rows behind them given as embeddings, or None.
        positions: [M] int64. lengths, slots: [B] int64. bits: [M, ceil(N / 32)] int32, or None for a chain.
        parents: [B, R] int64, the row each main row hangs on (-2: none); passes do not read it, walks do.
        flat: the one int64 tensor that all of these but `embeds` are views of, in the order of `offsets`.
        offsets: where tokens, parents, positions, lengths, slots and bits begin in it, and its end.
    """

    tokens: Tensor
    positions: Tensor
    lengths: Tensor
    slots: Tensor
    bits: Tensor | None
    parents: Tensor
    flat: Tensor
    offsets: tuple[int, ...]
    embeds: Tensor | None = None

    @classmethod
    def empty(cls, batch: int, main: int, device: torch.device, *, chain: bool, embeds: Tensor | None = None) -> Inputs:
        """Inputs of a shape, all zero, no row with a parent, request b in slot b."""
        rows = main + (embeds.shape[1] if embeds is not None else 0)
        words = -(-rows // 32)
        sizes = [batch * main, batch * main, batch * rows, batch, batch, 0 if chain else -(-batch * rows * words // 2)]
        offsets = tuple(sum(sizes[:i]) for i in range(len(sizes) + 1))
        flat = torch.zeros(offsets[-1], dtype=torch.int64, device=device)
        tokens, parents, positions, lengths, slots, bits = torch.split(flat, sizes)
        parents.fill_(-2)
        slots.copy_(torch.arange(batch))
        return cls(
            tokens=tokens.view(batch, main),
            positions=positions,
            lengths=lengths,
            slots=slots,
            bits=None if chain else bits.view(torch.int32)[: batch * rows * words].view(batch * rows, words),
            parents=parents.view(batch, main),
            flat=flat,
            offsets=offsets,
            embeds=embeds,
        )

    @property
    def batch(self) -> int:
        """Requests."""
        return int(self.tokens.shape[0])

    @property
    def main(self) -> int:
        """Main rows per request."""
        return int(self.tokens.shape[1])

    @property
    def main_positions(self) -> Tensor:
        """[B * R] int64, of the main rows alone (a copy where scouts stand between them)."""
        return self.positions.view(self.batch, self.rows)[:, : self.main].reshape(-1)

    @property
    def rows(self) -> int:
        """Rows per request, scouts included."""
        return self.main + (int(self.embeds.shape[1]) if self.embeds is not None else 0)


@dataclass(frozen=True, slots=True)
class Outputs:
    """logits: [B, R, V]; scout_logits: [B, S, V]; taps by name [B, N, H]; None or absent where not asked for."""

    logits: Tensor | None
    scout_logits: Tensor | None
    taps: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class _Stream:
    """The residual stream [M, H], and the same scaled for the norm that comes next (where it was folded)."""

    hidden: Tensor
    scaled: Scaled | None


class Forward:
    """Runs passes of one plan.

    Args:
        plan: the model.
        embed: token ids -> embeddings, the model's own module.
        names: for adapters, which modules a joined product stands for: names[i]["qkv"] and so on.
        pdl: start kernels early (Hopper and later).
    """

    def __init__(self, plan: Plan, embed: torch.nn.Module, names: list[dict[str, Joined]], pdl: bool) -> None:
        self.plan = plan
        self.embed = embed
        self.names = names
        self.pdl = pdl
        self._tails: WeakKeyDictionary[GatedLoRA, list[dict[str, Tail]] | None] = WeakKeyDictionary()

    def tails(self, adapter: GatedLoRA | None) -> list[dict[str, Tail]] | None:
        """An adapter's tails as the kernels of few rows take them, by layer and product; None if they cannot."""
        if adapter is None:
            return [{} for _ in self.names]
        if adapter not in self._tails:
            self._tails[adapter] = make_tails(adapter, self.names, self.plan)
        return self._tails[adapter]

    def __call__(
        self,
        inputs: Inputs,
        cache: list[tuple[Tensor, Tensor]],
        *,
        splits: int,
        layer_ids: tuple[int, ...],
        taps: Collection[str] = (),
        logits: bool = True,
        scout_logits: bool = False,
        adapter: GatedLoRA | None = None,
    ) -> Outputs:
        """Run the pass; cache[i] holds keys and values of layer i, [slots, key heads, capacity, size].

        splits: pieces of keys (`tree_attention.splits_for` of what may be read). adapter: its tails join scout rows.
        """
        plan = self.plan
        batch, per_request = inputs.batch, inputs.rows
        hidden = self.embed(inputs.tokens)
        if inputs.embeds is not None:
            hidden = torch.cat([hidden, inputs.embeds.to(hidden.dtype)], 1)
        hidden = hidden.reshape(batch * per_request, plan.hidden)
        found: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> None:
            if name in taps:
                found[name] = value.view(batch, per_request, -1).clone()

        note("embed", hidden)
        workspace = Workspace(hidden.shape[0], plan.heads, plan.head_size, splits, hidden.device)
        run = _LayerRun(self, inputs, workspace, adapter)
        gammas = [plan.layers[layer].norm_attention for layer in layer_ids[1:]]
        stream = run.begin(hidden, plan.layers[layer_ids[0]].norm_attention)
        for layer, following in zip(layer_ids, [*gammas, plan.norm], strict=True):
            note(f"in:{layer}", stream.hidden)
            stream = run.layer(layer, stream, cache[layer], following)
            note(f"out:{layer}", stream.hidden)
        note("pre_norm", stream.hidden)
        if "post_norm" in taps:
            note("post_norm", run.normed(stream.hidden, plan.norm))
        if not logits and not scout_logits:
            return Outputs(None, None, found)
        main = inputs.main
        if not scout_logits:
            out = run.product(run.main_rows(stream), plan.norm, plan.head)
            return Outputs(out.view(batch, main, plan.vocabulary), None, found)
        out = run.product(stream, plan.norm, plan.head).view(batch, per_request, plan.vocabulary)
        return Outputs(out[:, :main] if logits else None, out[:, main:], found)


class _LayerRun:
    """The layers of one pass: what they share, and how each is run."""

    def __init__(self, forward: Forward, inputs: Inputs, workspace: Workspace, adapter: GatedLoRA | None) -> None:
        self.plan = forward.plan
        self.names = forward.names
        self.pdl = forward.pdl
        self.inputs = inputs
        self.workspace = workspace
        self.adapter = adapter
        self.few = inputs.batch * inputs.rows <= few_rows(self.plan)
        tails = forward.tails(adapter)  # by every pass: making them moves weights that later ones have captured
        self.tails = tails if self.few else None
        self.folds = self.tails is not None

    def begin(self, hidden: Tensor, gamma: Tensor | None) -> _Stream:
        """The stream as it enters the first layer."""
        if not self.folds or gamma is None:
            return _Stream(hidden, None)
        plan = self.plan
        out = torch.empty_like(hidden)
        scaled = norm_rows(hidden, None, out, eps=plan.eps, shift=plan.norm_shift, follow=gamma, pdl=self.pdl)
        return _Stream(hidden, scaled)

    def layer(self, index: int, stream: _Stream, cache: tuple[Tensor, Tensor], following: Tensor | None) -> _Stream:
        """One layer; `following` is the gamma of the norm behind it."""
        plan, inputs = self.plan, self.inputs
        layer = plan.layers[index]
        rows = stream.hidden.shape[0]
        query = stream.hidden.new_empty(rows, plan.heads, plan.head_size)
        keys, values = cache
        rotary = plan.rotary[layer.kind]
        place = (inputs.positions, inputs.lengths, inputs.slots)
        if self.folds and plan.query_key_norm == "none":
            query_key_value(
                self.taken(stream, layer.norm_attention), layer.qkv, query, keys, values, rotary, *place,
                tile=choose_tile(layer.qkv.weight, 2), eps=plan.eps, tailed=self.tailed(index, "qkv"), pdl=self.pdl,
            )  # fmt: skip
        else:
            joined = self.product(stream, layer.norm_attention, layer.qkv, (index, "qkv"))
            norms = (layer.norm_query, layer.norm_key)
            if plan.query_key_norm == "all":
                self.norm_all(joined, layer)
            place_heads(
                joined, query, keys, values, rotary, *place, eps=plan.eps, shift=plan.norm_shift, pdl=self.pdl,
                norms=norms if plan.query_key_norm == "head" else None,  # type: ignore[arg-type]
            )  # fmt: skip
        attended = tree_attention(
            query, keys, values, lengths=inputs.lengths, slots=inputs.slots, positions=inputs.positions,
            bits=inputs.bits, scaling=plan.scaling, window=plan.window if layer.kind == "sliding_attention" else None,
            workspace=self.workspace, pdl=self.pdl,
        ).view(rows, -1)  # fmt: skip
        stream = self.joins(attended, layer.out, layer.norm_attention_out, stream, layer.norm_mlp, (index, "out"))
        inner = self.gated(stream, layer, (index, "gate_up"))
        return self.joins(inner, layer.down, layer.norm_mlp_out, stream, following, (index, "down"))

    def tailed(self, index: int, part: str) -> TailRows | None:
        """The tail of a layer's product, for the scouts of every request."""
        tail = None if self.tails is None else self.tails[index].get(part)
        return None if tail is None else TailRows(tail, self.inputs.rows, self.inputs.main)

    def normed(self, hidden: Tensor, gamma: Tensor) -> Tensor:
        """RMS norm of every row, as a tensor of its own."""
        out = torch.empty_like(hidden)
        norm_rows(hidden, gamma, out, eps=self.plan.eps, shift=self.plan.norm_shift, pdl=self.pdl)
        return out

    def taken(self, stream: _Stream, gamma: Tensor | None) -> Tensor | Scaled:
        """What a product behind the norm `gamma` (None: no norm) reads of the stream."""
        if gamma is None:
            return stream.hidden
        return stream.scaled if stream.scaled is not None else self.normed(stream.hidden, gamma)

    def main_rows(self, stream: _Stream) -> _Stream:
        """Without the scouts."""
        if self.inputs.embeds is None:
            return stream

        def narrow(value: Tensor) -> Tensor:
            return value.view(self.inputs.batch, self.inputs.rows, -1)[:, : self.inputs.main].flatten(0, 1)

        scaled = stream.scaled
        return _Stream(
            narrow(stream.hidden), None if scaled is None else Scaled(narrow(scaled.rows), narrow(scaled.squares))
        )

    def product(
        self, stream: _Stream, gamma: Tensor | None, projection: Projection, place: Place | None = None
    ) -> Tensor:
        """norm(stream) @ weight.T + bias, with the adapter's tails; place: which product of which layer it is."""
        source = self.taken(stream, gamma)
        if self.few:
            tailed = self.tailed(*place) if place is not None else None
            out, _ = linear(
                source, projection, tile=choose_tile(projection.weight), eps=self.plan.eps, tailed=tailed, pdl=self.pdl
            )  # fmt: skip
        else:
            assert not isinstance(source, Scaled)  # folded for few rows only
            out = torch.nn.functional.linear(source, projection.weight, projection.bias)
        if self.adapter is not None and self.tails is None and place is not None:
            assert not isinstance(source, Scaled)
            self.add_tails(source, out, self.names[place[0]][place[1]])
        return out

    def gated(self, stream: _Stream, layer: LayerPlan, place: Place) -> Tensor:
        """The activated inner state of the feed-forward part."""
        gelu = self.plan.activation == "gelu_tanh"
        if self.folds:
            return gated_linear(
                self.taken(stream, layer.norm_mlp), layer.gate_up, tile=choose_tile(layer.gate_up.weight, 2),
                gelu=gelu, eps=self.plan.eps, tailed=self.tailed(*place), pdl=self.pdl,
            )  # fmt: skip
        both = self.product(stream, layer.norm_mlp, layer.gate_up, place)
        return activate_rows(both, both.new_empty(both.shape[0], self.plan.inner), gelu=gelu, pdl=self.pdl)

    def joins(
        self,
        x: Tensor,
        projection: Projection,
        gamma: Tensor | None,
        stream: _Stream,
        following: Tensor | None,
        place: Place,
    ) -> _Stream:
        """The stream behind a block: residual + [norm gamma of] x @ weight.T, scaled for the norm that follows."""
        plan = self.plan
        if gamma is None and self.folds:
            follow = Follow(following, plan.norm_shift) if following is not None else None
            out, scaled = linear(
                x, projection, tile=choose_tile(projection.weight), residual=stream.hidden, follow=follow,
                eps=plan.eps, tailed=self.tailed(*place), pdl=self.pdl,
            )  # fmt: skip
            return _Stream(out, scaled)
        if gamma is None and self.adapter is None and projection.bias is None:
            return _Stream(torch.addmm(stream.hidden, x, projection.weight.T), None)
        added = self.product(_Stream(x, None), None, projection, place)
        if gamma is None:
            return _Stream(stream.hidden + added, None)
        out = torch.empty_like(stream.hidden)
        scaled = norm_rows(
            added, gamma, out, eps=plan.eps, shift=plan.norm_shift, residual=stream.hidden,
            follow=following if self.folds else None, pdl=self.pdl,
        )  # fmt: skip
        return _Stream(out, scaled)

    def add_tails(self, source: Tensor, out: Tensor, names: Joined) -> None:
        """Add the adapter's low-rank tails to the scout rows, which stand behind the main ones."""
        assert self.adapter is not None
        inputs = self.inputs
        rows = source.view(inputs.batch, inputs.rows, -1)
        whole = out.view(inputs.batch, inputs.rows, -1)
        at = 0
        for name, width in names:
            if name in self.adapter.names:
                self.adapter.add(name, rows, whole[..., at : at + width], inputs.main)
            at += width

    def norm_all(self, joined: Tensor, layer: LayerPlan) -> None:
        """Norm all query heads together, and all key heads together (OLMo 2), in place."""
        plan = self.plan
        at = plan.heads * plan.head_size
        end = at + plan.key_heads * plan.head_size
        for part, gamma in ((joined[:, :at], layer.norm_query), (joined[:, at:end], layer.norm_key)):
            norm_rows(part, gamma, part, eps=plan.eps, shift=plan.norm_shift, pdl=self.pdl)
