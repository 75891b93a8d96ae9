"""Networks that follow rows, on a CPU: a level of a draft in two compiled calls (`target/native/rows.c`).

`growth` and the networks themselves are the definition; what is here says to C where their weights, rows and cache are.
Weights are rounded to eight bits where they are large (`skinny.Eight`), the small ones are float32; rows, keys and
values are float32 whatever the target's dtype.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, Final, Self

import torch

from outpace.drafters.rowcache import bucket
from outpace.target.native.build import load, why_not
from outpace.target.native.structs import MOST_GROUP, Choice, Level, RowBlock, RowNetwork, Weight, place
from outpace.target.skinny import LEAST, Eight, takes_eight

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.device.plan import RowPlan
    from outpace.drafters.growth import Draws
    from outpace.drafters.rowcache import RowCache
    from outpace.drafters.rows import RowNet
    from outpace.target.fast.plan import Projection

_RESIDUALS: Final = {"joined": 0, "state": 1, "normed_state": 2}


class CompiledRows:
    """The compiled calls of one network; its weights are copied, so they are for what no longer learns.

    Args:
        net: the network. plan: its weights.
    """

    def __init__(self, net: RowNet, plan: RowPlan) -> None:
        self._library = load(torch.float32, "rows")
        self._kept: list[Any] = []  # what C is told the place of
        self._rotary = net.rotary
        self._angles = (torch.empty(0), torch.empty(0))
        self._space = torch.empty(0, dtype=torch.uint8)
        shape = net.shape
        self.hidden = shape.hidden
        blocks = [
            RowBlock(
                qkv=self._weight(block.qkv),
                out=self._weight(block.out),
                gate_up=self._weight(block.gate_up),
                down=self._weight(block.down),
                norm_attention=self._numbers(block.norm_attention),
                norm_mlp=self._numbers(block.norm_mlp),
            )
            for block in plan.blocks
        ]
        head = net.head
        if takes_eight(head.weight):
            head.eight = Eight(head.weight, None)
        self._net = RowNetwork(
            hidden=shape.hidden,
            inner=shape.intermediate,
            heads=shape.heads,
            key_heads=shape.key_heads,
            size=shape.head_size,
            layers=len(blocks),
            taps=len(net.taps),
            embedding_first=plan.embedding_first,
            residual=_RESIDUALS[plan.residual],
            feeds_normed=plan.feeds_normed,
            eps=plan.eps,
            scaling=shape.head_size**-0.5,
            tap_norms=self._pointers([self._numbers(norm) for norm in plan.tap_norms]),
            fuse_norm=self._numbers(plan.fuse_norm),
            norm_embedding=self._numbers(plan.norm_embedding),
            norm_state=self._numbers(plan.norm_state),
            norm=self._numbers(plan.norm),
            fuse=self._weight(plan.fuse),
            join=self._weight(plan.join),
            head=head.eight.weight if head.eight is not None else self._weight(plan.head),
            blocks=ctypes.addressof(self._keep((RowBlock * len(blocks))(*blocks))),
            offsets=None if plan.offsets is None else self._keep(plan.offsets.contiguous()).data_ptr(),
        )

    @classmethod
    def of(cls, net: RowNet) -> Self | None:
        """Those of a network on a CPU; None where there are none, and its modules decode."""
        shape = net.shape
        if net.head.weight.device.type != "cpu" or why_not(torch.float32, "rows") is not None:
            return None
        weights = (net.head.weight, *net.parameters())
        taken = all(p.dtype == torch.float32 or p.numel() < LEAST or takes_eight(p) for p in weights)
        if not taken or shape.heads // shape.key_heads > MOST_GROUP or shape.head_size % 2:
            return None
        plan = net.fused_plan()
        return None if plan is None else cls(net, plan)

    def read(
        self,
        cache: RowCache,
        embedded: Tensor,
        at: Tensor,
        width: int,
        *,
        features: Tensor | None = None,
        states: Tensor | None = None,
        sees: Tensor | None = None,
        ahead: int = 0,
        slots: Tensor | None = None,
    ) -> Tensor:
        """What the network makes of rows [B, R, H] float32; their keys and values are written behind `at` [B] int64.

        Rows of verified text bring `features` [B, R, taps * H], follow one another, and see those before. Rows of a
        draft bring the outputs their parents had, `states` [B, R, H]; they stand `ahead` positions behind the last row
        kept, in the last R of the S entries that `sees` [B, R, S] speaks of. embedded: [B, R, H]; width: entries
        attention may read; slots: [B] int64, None for the first B.
        """
        batch, rows = embedded.shape[:2]
        given = states if features is None else features
        assert given is not None
        given, embedded, at = given.float().contiguous(), embedded.float().contiguous(), at.contiguous()
        seen = None if sees is None else sees.contiguous().view(torch.uint8)
        out = torch.empty(batch, rows, self.hidden)
        cos, sin = self._turned(width)
        keys, values = (_places(list(whole.unbind())) for whole in (cache.keys, cache.values))
        level = Level(
            threads=torch.get_num_threads(),
            batch=batch,
            rows=rows,
            chain=sees is None,
            ahead=ahead,
            offset=0 if sees is None else sees.shape[2] - rows,
            scratch=0 if sees is None else sees.shape[2],
            capacity=cache.capacity,
            longest=width,
            at=at.data_ptr(),
            slots=place(slots),
            sees=place(seen),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            embedded=embedded.data_ptr(),
            features=None if features is None else given.data_ptr(),
            states=None if features is not None else given.data_ptr(),
            out=out.data_ptr(),
        )
        level.space = self._room(self._library.outpace_rows_space(self._net, level))
        self._library.outpace_rows(self._net, level)
        return out

    def best(self, y: Tensor, count: int, draws: Draws | None, depth: int) -> tuple[Tensor, Tensor]:
        """The `count` best next tokens behind outputs y [B, F, H]: (log probability, target id), [B, F, count] each.

        See `growth.children`; for draws that look no number up.
        """
        batch, rows = y.shape[:2]
        y = y.float().contiguous()
        values, ids = torch.empty(batch, rows, count), torch.empty(batch, rows, count, dtype=torch.int64)
        choice = Choice(
            threads=torch.get_num_threads(),
            rows=batch * rows,
            each=rows,
            count=count,
            y=y.data_ptr(),
            values=values.data_ptr(),
            ids=ids.data_ptr(),
        )
        if draws is not None:
            heat = draws.temperature.float().contiguous()
            choice.heat = heat.data_ptr()
            if draws.race is not None:
                race = draws.race.contiguous()
                choice.race, choice.stride = race[0, depth - 1].data_ptr(), race.stride(0)
        choice.space = self._room(self._library.outpace_best_space(self._net, choice))
        self._library.outpace_best(self._net, choice)
        return values, ids

    def _turned(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least so many positions, [P, head size / 2] each."""
        if self._angles[0].shape[0] < positions:
            self._angles = self._rotary.table(2 * bucket(positions))
        return self._angles

    def _room(self, size: int) -> int:
        if self._space.numel() < size:
            self._space = torch.empty(size, dtype=torch.uint8)
        return self._space.data_ptr()

    def _keep(self, what: Any) -> Any:
        self._kept.append(what)
        return what

    def _numbers(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else int(self._keep(tensor.detach().float().contiguous()).data_ptr())

    def _pointers(self, places: list[int | None]) -> int | None:
        return ctypes.addressof(self._keep((ctypes.c_void_p * len(places))(*places))) if places else None

    def _weight(self, projection: Projection | None) -> Weight:
        if projection is None:
            return Weight()
        weight, bias = projection.weight, projection.bias
        if takes_eight(weight):
            return self._keep(Eight(weight, bias)).weight  # type: ignore[no-any-return]
        width, depth = weight.shape
        return Weight(numbers=self._numbers(weight), bias=self._numbers(bias), width=width, depth=depth)


def _places(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
