"""Launching the fused step: tables in device memory that say where the parts of many parameters are."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from outpace.errors import UnsupportedError
from outpace.optim.fused.kernel import COLUMNS, step_kernel
from outpace.optim.reference import Stored, row_length
from outpace.optim.rules import LIFT, Numbers, Rule
from outpace.optim.settings import GROUP, Storage

# Of a program, chosen by `benchmarks/optim.py --section tune`: 16 groups are 16 elements a thread of one warp.
GROUPS = 16
WARPS = 1
TILES = 16
STAGES = 1
REGISTERS: int | None = None
EXACT = False  # the compiler's own division and root, to compare with; see `arithmetic`

_RULES: Final = {"adamw": 0, "lion": 1, "sgd": 2}
_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_VECTOR: Final = 16  # bytes a thread moves at once
POINTERS: Final = 7  # columns of the table that are addresses: weight, gradient, residual, then moments and scales


@dataclass(frozen=True, slots=True)
class Variant:
    """What the kernel is compiled for, beside rule and storage: parameters that differ in it are launched apart.

    kind, grad: of the weight and the gradient; master: see `kernel.step_kernel`; coded: moments are 8-bit codes;
    aligned: rows of whole groups at addresses that a thread can read 16 bytes at
    """

    kind: int
    grad: int
    master: int
    coded: int
    aligned: bool


def variant_of(stored: Stored, grad: torch.dtype, storage: Storage) -> Variant:
    """The kernel that can step this parameter."""
    weight = stored.weight
    master = 0
    if stored.residual is not None:
        master = 3 if stored.residual.dtype == torch.float32 else 2 if storage.residual == "ordinal" else 1
    row = row_length(weight, storage)
    whole = (row % GROUP == 0 or row == weight.numel()) and weight.numel() % GROUP == 0
    return Variant(
        kind=_KINDS[weight.dtype],
        grad=_KINDS[grad],
        master=master,
        coded=0 if stored.first_scale is None else 1 if storage.states == "companded8" else 2,
        aligned=whole and stored.first_slot % GROUP == 0,
    )


class Batch:
    """Parameters stepped by one launch: same device, rule, storage settings, variant and count of steps.

    It holds no parameter and no state, only where they were: an address that changed is written into a new table.
    """

    def __init__(
        self, rule: Rule, storage: Storage, variant: Variant, shapes: Sequence[Stored], keys: Sequence[int]
    ) -> None:
        if torch.version.hip is not None:
            raise UnsupportedError("the fused kernels are written for NVIDIA GPUs; use backend='reference'")
        self.device = shapes[0].weight.device
        self._rule, self._storage, self._variant = rule, storage, variant
        self._largest = torch.finfo(shapes[0].weight.dtype).max
        self._fixed: list[tuple[int, ...]] = []
        for stored, key in zip(shapes, keys, strict=True):
            row = row_length(stored.weight, storage)
            per_row = -(-row // GROUP)
            groups = stored.weight.numel() // row * per_row
            self._fixed.append((groups, per_row, row, key, stored.first_slot))
        self._size = 0  # groups in a chunk, as the chunk map has it
        self._chunks = self._table = torch.empty(0)
        self._known: list[int] = []

    def _chunk_map(self) -> Tensor:
        """Which parameter, and its first group, for every program; int32 [chunks, 2] on the device."""
        size = GROUPS * TILES
        if self._size != size:
            counts = torch.tensor([-(-groups // size) for groups, *_ in self._fixed])
            owner = torch.repeat_interleave(torch.arange(len(self._fixed)), counts)
            first = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
            self._chunks = torch.stack((owner, first * size), 1).to(self.device, torch.int32)
            self._size = size
        return self._chunks

    def _table_of(self, addresses: list[int]) -> Tensor:
        if addresses != self._known:
            flat = array("q")
            for index, fixed in enumerate(self._fixed):
                flat.extend(addresses[index * POINTERS : (index + 1) * POINTERS])
                flat.extend(fixed)
            # A fresh pinned buffer each time: the allocator keeps it until the copy is done, and nothing waits.
            self._table = torch.frombuffer(flat, dtype=torch.int64).pin_memory().to(self.device, non_blocking=True)
            self._known = addresses
        return self._table

    def run(self, addresses: list[int], held: Tensor, numbers: Numbers, step: int, scale: Tensor | None) -> None:
        """One step. addresses: POINTERS for each parameter, 0 where it has no such part; step: see `draws.step_key`."""
        variant, storage, rule = self._variant, self._storage, self._rule
        aligned = variant.aligned
        if aligned:
            combined = 0
            for address in addresses:
                combined |= address
            aligned = combined % _VECTOR == 0
        flag = held.view(torch.int8)
        options: dict[str, Any] = {"num_warps": WARPS, "enable_fp_fusion": False}
        if REGISTERS is not None:
            options["maxnreg"] = REGISTERS
        with torch.cuda.device(self.device):
            chunks, table = self._chunk_map(), self._table_of(addresses)
            step_kernel[(chunks.shape[0],)](
                table,
                chunks,
                flag,
                flag if scale is None else scale,
                step,
                numbers.decay,
                numbers.step,
                numbers.beta1,
                numbers.rest1,
                numbers.beta2,
                numbers.rest2,
                numbers.root / LIFT**0.5,
                numbers.eps,
                numbers.coupled,
                RULE=_RULES[rule.name],
                NESTEROV=rule.nesterov,
                FIRST=rule.first is not None,
                KIND=variant.kind,
                GRAD=variant.grad,
                MASTER=variant.master,
                BITS=storage.residual_bits if variant.master in (1, 2) else 8,
                STOCHASTIC=storage.rounding == "stochastic",
                CODED=variant.coded,
                SCALES={"fp32": 0, "bf16": 1, "fp16": 2}[storage.scales],
                FLOOR=storage.variance_floor,
                ALIGNED=aligned,
                CLIP=scale is not None,
                LARGEST=self._largest,
                EXACT=EXACT,
                G=GROUPS,
                TILES=TILES,
                STAGES=STAGES,
                **options,
            )
        assert POINTERS + len(self._fixed[0]) == COLUMNS
