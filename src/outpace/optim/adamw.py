"""FlashAdamW: AdamW with decoupled weight decay in about 7 bytes a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from outpace.errors import ConfigError
from outpace.optim.base import Backend, FlashOptimizer, NonFinite, Params
from outpace.optim.rules import ADAMW, Rule
from outpace.optim.settings import Layout, Master, Residual, Rounding, Scales, States

SMALLEST_EPS = 1e-30


class FlashAdamW(FlashOptimizer):
    """AdamW (Loshchilov and Hutter 2019) that stores little: drop-in for torch.optim.AdamW.

    lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; each may differ per param group
    master, states, residual, rounding, scales, variance_floor, layout, small: see `outpace.optim.Storage`; None means
        the default, or with paper=True the published setting
    paper: store exactly as the published method does; single settings still override it
    nonfinite: "hold" leaves an element alone whose update is not finite (`take_held` tells); "raise" refuses the step
    seed: of the stochastic rounding; the same seed gives the same bits on any device, shard and chunk size
    backend: "auto" takes the fused kernel on CUDA and the reference elsewhere

    Raises ConfigError for a setting that cannot be or would do nothing, UnsupportedError for a dtype it cannot keep.

    Example:
        >>> model = torch.nn.Linear(256, 256).bfloat16()
        >>> optimizer = FlashAdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    """

    kind: ClassVar[str] = "adamw"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        master: Master | None = None,
        states: States | None = None,
        residual: Residual | None = None,
        rounding: Rounding | None = None,
        scales: Scales | None = None,
        variance_floor: bool | None = None,
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
            "variance_floor": variance_floor,
            "layout": layout,
            "small": small,
        }
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, numbers, paper=paper, storage=storage, nonfinite=nonfinite, backend=backend, seed=seed)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """AdamW, whatever the group says."""
        return ADAMW

    @classmethod
    def check_numbers(cls, group: Mapping[str, Any]) -> None:
        """Refuse averages that do not average, and an eps that would divide zero by zero."""
        check_betas(group["betas"])
        if not group["eps"] >= SMALLEST_EPS:
            raise ConfigError(
                f"eps={group['eps']!r} must be at least {SMALLEST_EPS}: where there never was a gradient, 0 is divided "
                "by it"
            )


def check_betas(betas: tuple[float, float]) -> None:
    """Raise ConfigError unless both are in [0, 1)."""
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ConfigError(f"betas={betas!r} must be two numbers in [0, 1)")
