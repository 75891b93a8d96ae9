"""FlashSGD: gradient descent with momentum in about 6 bytes a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from outpace.errors import ConfigError
from outpace.optim.base import Backend, FlashOptimizer, NonFinite, Params
from outpace.optim.rules import SGD_HEAVY, SGD_NESTEROV, SGD_PLAIN, Rule
from outpace.optim.settings import Layout, Master, Residual, Rounding, Scales, States


class FlashSGD(FlashOptimizer):
    """Stochastic gradient descent that stores little: drop-in for torch.optim.SGD.

    lr, momentum, dampening, weight_decay, nesterov, maximize: as in torch.optim.SGD, the first step undampened too
    decoupled_weight_decay: shrink the weight as AdamW does instead of adding the decay to the gradient
    All other arguments and errors: as for `FlashAdamW`. Without momentum only the residual is stored.
    """

    kind: ClassVar[str] = "sgd"

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
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
        numbers = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, numbers, paper=paper, storage=storage, nonfinite=nonfinite, backend=backend, seed=seed)

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """Plain, heavy-ball or Nesterov, as the group says."""
        if group["momentum"] == 0:
            return SGD_PLAIN
        return SGD_NESTEROV if group["nesterov"] else SGD_HEAVY

    @classmethod
    def check_numbers(cls, group: Mapping[str, Any]) -> None:
        """Refuse numbers that torch refuses, and settings without effect."""
        if not 0.0 <= group["momentum"] < 1.0:
            raise ConfigError(f"momentum={group['momentum']!r} must be in [0, 1)")
        if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
            raise ConfigError("nesterov=True needs momentum above 0 and dampening=0; set those, or leave it off")
        if group["dampening"] and group["momentum"] == 0:
            raise ConfigError(f"dampening={group['dampening']!r} has no effect without momentum; leave it at 0")
        if group["decoupled_weight_decay"] and group["weight_decay"] == 0:
            raise ConfigError("decoupled_weight_decay=True has no effect with weight_decay=0; set one, or leave it off")
