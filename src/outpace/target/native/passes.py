"""Passes of few rows through the compiled function: what of the plan, the block and the cache it is told.

The arithmetic is in `pass.c`. Rows keep their bits whatever stands beside them, in trees as in chains.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch

from outpace.errors import UnsupportedError
from outpace.target.block import Block, Readout
from outpace.target.masks import block_visibility
from outpace.target.native.build import load
from outpace.target.native.structs import MOST_GROUP, MOST_PARTS, MOST_ROWS, Layer, Model, Product, Run, place

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.adapters import GatedLoRA
    from outpace.target.cache import BlockCache
    from outpace.target.fast.plan import Joined, LayerPlan, Plan, Projection


class NativePass:
    """The passes of one plan.

    Args:
        plan: the model. names: which modules a joined product stands for.

    Raises:
        UnsupportedError: if nothing could be compiled, or not for this model.
    """

    def __init__(self, plan: Plan, names: list[dict[str, Joined]]) -> None:
        self.plan, self.names = plan, names
        self._library = load(plan.dtype)
        if plan.groups > MOST_GROUP:
            raise UnsupportedError(f"{plan.groups} query heads share a key head, compiled passes take {MOST_GROUP}")
        self._kinds = sorted({layer.kind for layer in plan.layers})
        self._model = Model(
            hidden=plan.hidden,
            inner=plan.inner,
            heads=plan.heads,
            key_heads=plan.key_heads,
            size=plan.head_size,
            gelu=plan.activation == "gelu_tanh",
            norm_all=plan.query_key_norm == "all",
            eps=plan.eps,
            shift=plan.norm_shift,
            scaling=plan.scaling,
            norm=self._address(plan.norm),
            head=self._product(plan.head),
        )
        self._layers = [self._layer(layer) for layer in plan.layers]
        self._adapted: WeakKeyDictionary[GatedLoRA, tuple[int, list[Layer] | None]] = WeakKeyDictionary()
        self._space = torch.empty(0, dtype=torch.uint8)

    def fits(self, block: Block) -> bool:
        """Whether a block can take this way: an adapter of the weights' dtype, no gradients, not too many rows."""
        scouts = block.scouts
        rows = block.tokens.shape[0] * (block.rows + (scouts.count if scouts else 0))
        if torch.is_grad_enabled() or not 0 < rows <= MOST_ROWS:
            return False
        return self._layers_with(scouts.adapter if scouts is not None else None) is not None

    def run(
        self,
        hidden: Tensor,
        block: Block,
        cache: BlockCache,
        *,
        layer_ids: tuple[int, ...],
        taps: Collection[str],
        logits: bool,
    ) -> Readout:
        """See `Target.run`, for a block that fits; hidden: embeddings of its rows, scouts included, [B, R + S, H]."""
        plan, scouts = self.plan, block.scouts
        batch, main = block.tokens.shape
        rows = hidden.shape[1]
        cache.prepare(plan.key_heads, plan.head_size, plan.dtype, plan.device)
        cache.open(block.first, batch, rows)
        lengths = torch.tensor(cache.lengths[block.first : block.first + batch])
        sees, positions = block_visibility(block)
        seen = None if sees is None else sees.contiguous().view(torch.uint8)
        positions = positions.contiguous()
        angles = [[t[positions].float() for t in plan.rotary[kind]] for kind in self._kinds]
        adapter = scouts.adapter if scouts is not None else None
        layers = self._layers_with(adapter)
        assert layers is not None  # it fits
        stream = hidden.to(torch.float32, copy=True)
        found = {name: torch.empty_like(hidden) for name in taps if name != "embed"}
        if "embed" in taps:
            found["embed"] = hidden
        wants_scouts = scouts is not None and scouts.logits
        span = (0 if logits else main, rows if wants_scouts else main)
        out = hidden.new_empty(batch, max(0, span[1] - span[0]), plan.vocabulary)
        entries = cache.tensors()
        tables: dict[str, list[int | None]] = {
            "layer": [ctypes.addressof(layers[i]) for i in layer_ids],
            "keys": [entries[i][0].data_ptr() for i in layer_ids],
            "values": [entries[i][1].data_ptr() for i in layer_ids],
            "before": [place(found.get(f"in:{i}")) for i in layer_ids],
            "behind": [place(found.get(f"out:{i}")) for i in layer_ids],
        }
        arrays = {name: (ctypes.c_void_p * len(layer_ids))(*values) for name, values in tables.items()}
        run = Run(
            threads=torch.get_num_threads(),
            batch=batch,
            main=main,
            rows=rows,
            first=block.first,
            capacity=cache.capacity,
            layers=len(layer_ids),
            longest=max(cache.lengths[block.first : block.first + batch]) + rows,
            lengths=lengths.data_ptr(),
            positions=positions.data_ptr(),
            sees=place(seen),
            hidden=stream.data_ptr(),
            pre_norm=place(found.get("pre_norm")),
            post_norm=place(found.get("post_norm")),
            logits=place(out) if out.shape[1] else None,
            head_from=span[0],
            head_to=span[0] + out.shape[1],
            ranks=0 if adapter is None else adapter.rank,
            **{name: ctypes.addressof(array) for name, array in arrays.items()},
        )
        for at, (cos, sin) in enumerate(angles):
            run.cos[at], run.sin[at] = cos.data_ptr(), sin.data_ptr()
        needed = int(self._library.outpace_space(self._model, run))
        if self._space.numel() < needed + 64:
            self._space = torch.empty(2 * needed + 64, dtype=torch.uint8)
        run.space = -(-self._space.data_ptr() // 64) * 64
        self._library.outpace_pass(self._model, run)
        middle = main if logits else 0
        return Readout(out[:, :middle] if logits else None, out[:, middle:] if wants_scouts else None, found)

    def _address(self, value: Tensor | None) -> int | None:
        if value is None:
            return None
        if not value.is_contiguous() or value.dtype != self.plan.dtype:
            raise UnsupportedError("a weight is not contiguous or of another dtype than the others")
        return value.data_ptr()

    def _product(self, projection: Projection) -> Product:
        width, depth = projection.weight.shape
        return Product(
            weight=self._address(projection.weight), bias=self._address(projection.bias), width=width, depth=depth
        )

    def _layer(self, layer: LayerPlan) -> Layer:
        products = {name: self._product(getattr(layer, name)) for name in ("qkv", "out", "gate_up", "down")}
        norms = {
            f"norm_{name}": self._address(getattr(layer, f"norm_{name}"))
            for name in ("attention", "mlp", "attention_out", "mlp_out", "query", "key")
        }
        window = self.plan.window if layer.kind == "sliding_attention" else None
        return Layer(**products, **norms, window=window or 0, kind=self._kinds.index(layer.kind))

    def _layers_with(self, adapter: GatedLoRA | None) -> list[Layer] | None:
        """The layers with an adapter's tails, made again if its weights have moved; None if they cannot be read so."""
        if adapter is None:
            return self._layers
        where = next(adapter.parameters()).data_ptr()
        known = self._adapted.get(adapter)
        if known is None or known[0] != where:
            read = all(p.dtype == self.plan.dtype and p.is_contiguous() for p in adapter.parameters())
            made = [self._tailed(i, adapter) for i in range(len(self.names))] if read else None
            self._adapted[adapter] = known = (where, made)
        return known[1]

    def _tailed(self, index: int, adapter: GatedLoRA) -> Layer:
        layer = self._layer(self.plan.layers[index])
        for name, joined in self.names[index].items():
            product = getattr(layer, name)
            end = 0
            for at in range(MOST_PARTS):
                module, width = joined[at] if at < len(joined) else (None, 0)
                end += width
                part = product.parts[at]
                part.end = end
                if module in adapter.names:
                    down, up, part.scale = adapter.tail(str(module))
                    part.down, part.up, part.rank = down.data_ptr(), up.data_ptr(), adapter.rank
        return layer
