"""What is stored between steps, and how: the storage settings every parameter group carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args

import torch

from outpace.errors import ConfigError, suggestion

Master = Literal["bf16+8", "bf16+16", "fp16+8", "fp16+16", "fp32"]
States = Literal["companded8", "linear8", "fp32"]
Residual = Literal["ulp", "ordinal"]
Rounding = Literal["stochastic", "nearest"]
Scales = Literal["bf16", "fp16", "fp32"]
Layout = Literal["rows", "flat"]

GROUP: Final = 32  # consecutive elements that share one scale
FORMAT: Final = 1  # version of the stored layout, written into every param group


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How one parameter group is kept between steps. The defaults are the fixes; `PAPER` is the published scheme.

    master: narrow weight and width of its residual in bits, or "fp32" for an exact fp32 master
    states: "companded8" (8-bit codes through curves), "fp32" (exact), "linear8" (naive; it diverges, kept to show it)
    residual: "ordinal" (the low bits of the float32 pattern, of which bf16 is the upper half) or "ulp" (position inside
        half a unit in the last place, as published); None takes "ordinal" where weights are bf16, "ulp" where fp16
    rounding: how the residual code is rounded
    scales: "bf16" rounded up and used for normalising too; "fp32" likewise; "fp16" nearest, as published
    variance_floor: a positive variance never gets code 0
    layout: "rows" restarts the groups of 32 at every row, so a shard by rows never cuts one; "flat" does not
    small: parameters with fewer elements than this keep fp32 states
    """

    master: Master = "bf16+8"
    states: States = "companded8"
    residual: Residual | None = None
    rounding: Rounding = "stochastic"
    scales: Scales = "bf16"
    variance_floor: bool = True
    layout: Layout = "rows"
    small: int = 4096

    def __post_init__(self) -> None:
        if self.residual is None:
            object.__setattr__(self, "residual", "ordinal" if self.master in ("bf16+8", "bf16+16") else "ulp")
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise ConfigError(f"{name}={value!r} is no storage setting; {suggestion(str(value), get_args(kind))}")
        if not isinstance(self.small, int) or isinstance(self.small, bool) or self.small < 0:
            raise ConfigError(f"small={self.small!r} must be a count of elements, 0 or more")
        if self.residual == "ordinal" and not self.master.startswith("bf16"):
            raise ConfigError(
                f"residual='ordinal' needs a bf16 master, and master={self.master!r} "
                "is none; use residual='ulp', or master='bf16+8' or 'bf16+16'"
            )

    @property
    def narrow(self) -> torch.dtype | None:
        """The dtype whose parameters are split, or None where nothing is."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.master.split("+")[0])

    @property
    def residual_bits(self) -> int:
        """Width of the residual code: 8 or 16, and 0 where nothing is split."""
        return int(self.master.split("+")[1]) if "+" in self.master else 0

    @classmethod
    def of_group(cls, group: Mapping[str, Any]) -> Storage:
        """The settings a param group carries among its other keys."""
        return cls(**{field.name: group[field.name] for field in fields(cls)})


_CHOICES: Final[dict[str, Any]] = {
    "master": Master,
    "states": States,
    "residual": Residual,
    "rounding": Rounding,
    "scales": Scales,
    "layout": Layout,
}

PAPER: Final[dict[str, Any]] = {
    "residual": "ulp",
    "rounding": "nearest",
    "scales": "fp16",
    "variance_floor": False,
    "layout": "flat",
    "small": 0,
}
