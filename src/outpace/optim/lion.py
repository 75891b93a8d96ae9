"""FlashLion: Lion with decoupled weight decay in about 6 bytes a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from outpace.optim.adamw import check_betas
from outpace.optim.base import Backend, FlashOptimizer, NonFinite, Params
from outpace.optim.rules import LION, Rule
from outpace.optim.settings import Layout, Master, Residual, Rounding, Scales, States


class FlashLion(FlashOptimizer):
    """Lion (Chen et al. 2023) that stores little. Only the sign of a moving average moves a weight.

    lr, betas, weight_decay, maximize: as usual for Lion (a learning rate 3 to 10 times below AdamW's)
    All other arguments and errors: as for `FlashAdamW`. There is no variance, so no variance_floor.
    """

    kind: ClassVar[str] = "lion"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        master: Master | None = None,
        states: States | None = None,
        residual: Residual | None = None,
        rounding: Rounding | None = None,
        scales: Scales | None = None,
        layout: Layout | None = None,
        small: int | None = None,
        paper: bool = False,
        nonfinite: NonFinite = "hold",
        seed: int = 0,
        backend: Backend = "auto",
    ) -> None:
        storage = {
            "master": master,
            "states": states,
            "residual": residual,
            "rounding": rounding,
            "scales": scales,
            "layout": layout,
            "small": small,
        }
        numbers = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, numbers, paper=paper, storage=storage, nonfinite=nonfinite, backend=backend, seed=seed)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """Lion, whatever the group says."""
        return LION

    @classmethod
    def check_numbers(cls, group: Mapping[str, Any]) -> None:
        """Refuse averages that do not average."""
        check_betas(group["betas"])
