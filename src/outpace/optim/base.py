"""The optimizer class the three rules share: param groups, states, steps. See `settings` and `rules`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any, ClassVar, Final, Literal, TypeAlias, cast, overload

import torch
from torch import Tensor

from outpace.errors import ConfigError, UnsupportedError
from outpace.optim import shards
from outpace.optim.reference import row_length
from outpace.optim.rules import Rule
from outpace.optim.settings import FORMAT, GROUP, PAPER, Storage
from outpace.optim.split import CODES
from outpace.optim.stepping import gradient_of, step_parameters

Backend = Literal["auto", "reference", "triton"]
NonFinite = Literal["hold", "raise"]
Group: TypeAlias = dict[str, Any]
Params: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

STORAGE_KEYS: Final = tuple(field.name for field in fields(Storage))
# Keys of a param group that say how this process stores and computes; loading a checkpoint never changes them.
OWN_KEYS: Final = (*STORAGE_KEYS, "backend", "nonfinite", "format")
_WEIGHT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


class FlashOptimizer(torch.optim.Optimizer):
    """Base of FlashAdamW, FlashLion and FlashSGD; not for direct use.

    It knows no rule and no file format. A step is `reference_step` or the fused kernel that equals it.
    """

    kind: ClassVar[str]  # "adamw", "lion" or "sgd"; written into portable files

    def __init__(
        self,
        params: Params,
        defaults: dict[str, Any],
        *,
        paper: bool,
        storage: Mapping[str, Any],
        nonfinite: NonFinite,
        backend: Backend,
        seed: int,
    ) -> None:
        chosen = Storage(**((PAPER if paper else {}) | {k: v for k, v in storage.items() if v is not None}))
        own = {name: getattr(chosen, name) for name in STORAGE_KEYS}
        if storage.get("residual") is None and not paper:
            own["residual"] = None  # each param group takes what suits its master
        own |= {"backend": backend, "nonfinite": nonfinite, "format": FORMAT, "seed": seed}
        super().__init__(params, defaults | own)
        self._refuse_idle_master()

    # Param groups ------------------------------------------------------------------------------------------------

    @classmethod
    def rule(cls, group: Mapping[str, Any]) -> Rule:
        """The rule this group asks for."""
        raise NotImplementedError

    @classmethod
    def check_numbers(cls, group: Mapping[str, Any]) -> None:
        """Raise ConfigError if a number of the rule cannot be."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group, with any setting of the constructor in it.

        Raises ConfigError for an unknown or impossible setting, UnsupportedError for a dtype that cannot be kept.
        """
        known = {*self.defaults, "params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum"}
        known |= {"base_momentum", "swa_lr", "name"}
        for key in param_group:
            if key not in known:
                from outpace.errors import suggestion

                raise ConfigError(f"a param group carries {key!r}, which is no setting; {suggestion(key, known)}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _settings_of(self, group: Group) -> tuple[Rule, Storage]:
        """The rule and storage of a group, checked when the group is new and whenever one of its settings changed."""
        checked: dict[int, tuple[list[Any], tuple[Rule, Storage]]] = self.__dict__.setdefault("_checked", {})
        now = [group.get(name) for name in self.defaults]
        known = checked.get(id(group))
        if known is None or known[0] != now:
            self._check_settings(group)
            known = checked[id(group)] = (now, (self.rule(group), Storage.of_group(group)))
        return known[1]

    def _check_settings(self, group: Group) -> None:
        Storage.of_group(group)
        for name in ("lr", "weight_decay"):
            value = group[name]
            if isinstance(value, Tensor):
                raise ConfigError(f"{name} is a tensor; give a Python number (schedulers set it in place as usual)")
            if not (isinstance(value, int | float) and 0.0 <= value < math.inf):
                raise ConfigError(f"{name}={value!r} must be a finite number, 0 or more")
        if group["backend"] not in ("auto", "reference", "triton"):
            raise ConfigError(f"backend={group['backend']!r} must be 'auto', 'reference' or 'triton'")
        if group["nonfinite"] not in ("hold", "raise"):
            raise ConfigError(f"nonfinite={group['nonfinite']!r} must be 'hold' or 'raise'")
        if not isinstance(group["seed"], int):
            raise ConfigError(f"seed={group['seed']!r} must be an integer")
        self.check_numbers(group)

    def _check_group(self, group: Group) -> None:
        self._check_settings(group)
        storage = Storage.of_group(group)
        group["residual"] = storage.residual
        for param in group["params"]:
            if param.dtype not in _WEIGHT_DTYPES:
                raise UnsupportedError(
                    f"a parameter of shape {tuple(param.shape)} is {param.dtype}; weights can be kept in bfloat16, "
                    "float16 or float32: cast it, or give it to torch.optim in an optimizer of its own"
                )
            if storage.narrow is not None and param.dtype not in (storage.narrow, torch.float32):
                other = "fp16+8" if param.dtype == torch.float16 else "bf16+8"
                raise ConfigError(
                    f"master={storage.master!r} splits {storage.narrow} weights, and a parameter of shape "
                    f"{tuple(param.shape)} is {param.dtype}; use master={other!r} in its param group, or cast it"
                )
            if storage.layout == "flat" and shards.cuts_groups(param, "flat"):
                raise UnsupportedError(
                    f"layout='flat' lets groups of {GROUP} run across rows, and the sharding of a parameter of shape "
                    f"{tuple(param.shape)} cuts one; use layout='rows'"
                )

    def _refuse_idle_master(self) -> None:
        params = [(p, Storage.of_group(g)) for g in self.param_groups for p in g["params"]]
        asked = {storage.master for _, storage in params if storage.narrow is not None}
        if asked and not any(p.dtype == storage.narrow for p, storage in params):
            master = sorted(asked)[0]
            raise ConfigError(
                f"master={master!r} has no effect: every parameter is float32 and nothing is split; cast the model "
                f"(`{type(self).__name__}.from_fp32` does it without losing the float32 tail), or say master='fp32'"
            )

    def _places(self) -> Iterator[tuple[int, Tensor, Group]]:
        """Every parameter with its position, the identity its random draws are keyed by."""
        position = 0
        for group in self.param_groups:
            for param in group["params"]:
                yield position, param, group
                position += 1

    # States ------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Create the states of every trainable parameter now instead of at the first step. Changes no weight."""
        for _, param, group in self._places():
            if param.requires_grad:
                self._state_of(param, group)

    def quantised(self, param: Tensor, group: Mapping[str, Any]) -> bool:
        """Whether the moments of this parameter are kept in 8 bits.

        Raises UnsupportedError if they should be and the sharding of a matrix cuts its groups.
        """
        if group["states"] == "fp32" or param.numel() < max(1, group["small"]):
            return False
        if not shards.cuts_groups(param, group["layout"]):
            return True
        if param.ndim < 2:  # a vector is one row: every uneven shard cuts it, and it is small beside the matrices
            return False
        raise UnsupportedError(
            f"a parameter of shape {tuple(param.shape)} is sharded along its last dimension into parts that are no "
            f"multiple of {GROUP}; shard it along another dimension, or put it in a param group with states='fp32'"
        )

    def _state_of(self, param: Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        state = cast(dict[str, Any], self.state[param])
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.int64)
        storage, rule = Storage.of_group(group), self.rule(group)
        if param.dtype != torch.float32 and "residual" not in state and "master" not in state:
            if storage.master == "fp32":
                state["master"] = _filled(param, torch.float32)
                shards.local(state["master"]).copy_(shards.local(param))
            else:
                state["residual"] = _filled(param, CODES[storage.residual_bits])
        for name, code in ((rule.first, torch.int8), (rule.second, torch.uint8)):
            if name is None or name in state:
                continue
            if self.quantised(param, group):
                state[name] = _filled(param, code)
                state[f"{name}_scale"] = _scales(param, storage)
            else:
                state[name] = _filled(param, torch.float32)
        return state

    def memory_report(self) -> dict[str, int]:
        """Bytes this process holds, by kind: weights, residuals, moments, scales, gradients, and their total.

        Counts the states that exist (see `prepare`) and the gradients that are alive.
        """
        report = dict.fromkeys(("weights", "residuals", "moments", "scales", "gradients"), 0)
        for _, param, _group in self._places():
            report["weights"] += _bytes(param)
            report["gradients"] += 0 if param.grad is None else _bytes(param.grad)
            for name, value in self.state.get(param, {}).items():
                if name in ("residual", "master"):
                    report["residuals"] += _bytes(value)
                elif name != "step":
                    report["scales" if name.endswith("_scale") else "moments"] += _bytes(value)
        report["total"] = sum(report.values())
        return report

    def load_masters(self, masters: Iterable[Tensor] | Mapping[str, Tensor]) -> None:
        """Set every weight to a float32 value, keeping what its 16-bit form cannot hold in the residual.

        masters: float32 tensors (whole or sharded as the parameters are), in the order of the parameters, or by name
        if the optimizer was built from `named_parameters()`.
        Raises ConfigError if their number, names or shapes do not fit.
        """
        from outpace.optim.transfer import write_master

        places = list(self._places())
        if isinstance(masters, Mapping):
            names = [name for group in self.param_groups for name in group.get("param_names", ())]
            if len(names) != len(places):
                raise ConfigError(
                    "masters are given by name, and this optimizer has none; build it from named_parameters()"
                )
            missing = [name for name in names if name not in masters]
            if missing:
                raise ConfigError(f"no float32 weight for {missing[0]!r} (and {len(missing) - 1} more)")
            values = [masters[name] for name in names]
        else:
            values = list(masters)
        if len(values) != len(places):
            raise ConfigError(f"{len(values)} float32 weights for {len(places)} parameters; give one each, in order")
        for (_, param, _), value in zip(places, values, strict=True):
            if tuple(value.shape) != tuple(param.shape):
                raise ConfigError(
                    f"a float32 weight has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}"
                )
        for (_, param, group), value in zip(places, values, strict=True):
            write_master(self, param, group, shards.part_of(param, value))

    def master_weights(self) -> list[Tensor]:
        """The float32 values of all weights, decoded, in the order of the parameters; sharded ones stay sharded."""
        from outpace.optim.transfer import read_master

        return [
            shards.like(p, read_master(shards.local(p), self.state.get(p, {}), Storage.of_group(g)), tuple(p.shape))
            for _, p, g in self._places()
        ]

    @classmethod
    def from_fp32(cls, params: Params, *, keep: Iterable[Tensor] = (), **settings: Any) -> FlashOptimizer:
        """Narrow float32 parameters to 16 bits in place, and build the optimizer without losing the float32 tail.

        params: as for the constructor, float32; keep: those that stay float32 (norms, say)
        settings: of the constructor. Raises ConfigError if master="fp32", with which nothing would be narrowed.
        """
        narrow = Storage(master=settings.get("master", "bf16+8")).narrow
        if narrow is None:
            raise ConfigError(
                "from_fp32 narrows parameters, and master='fp32' asks for none to be; use the constructor"
            )
        listed: list[Any] = list(params)
        kept = {id(p) for p in keep}
        flat: list[Tensor] = []
        for entry in listed:
            members = entry["params"] if isinstance(entry, dict) else [entry[1] if isinstance(entry, tuple) else entry]
            members = list(members)
            if isinstance(entry, dict):
                entry["params"] = members
            flat += [m[1] if isinstance(m, tuple) else m for m in members]
        tails: list[Tensor] = [p.detach().clone() for p in flat]
        for p in flat:
            if p.dtype == torch.float32 and id(p) not in kept:
                p.data = p.data.to(narrow)
        optimizer = cls(listed, **settings)
        optimizer.load_masters(tails)
        return optimizer

    # Steps -------------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch leaves it unannotated
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Raises ConfigError with nonfinite="raise" if a gradient is not finite, before anything has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        release = self.__dict__.get("_release")
        if release is not None:
            release.finish()
            return loss
        ready = [(i, p, g) for i, p, g in self._places() if p.grad is not None]
        self._refuse_nonfinite(ready)
        step_parameters(self, ready)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as torch does."""
        super().zero_grad(set_to_none)
        release = self.__dict__.get("_release")
        if release is not None:
            release.forget()

    def take_held(self) -> bool:
        """Whether an element was left alone since the last call, its update not being finite. Waits for the GPU."""
        held = False
        for flag in self._flags().values():
            held |= bool(flag.item())
            flag.zero_()
        return held

    def _flags(self) -> dict[torch.device, Tensor]:
        flags: dict[torch.device, Tensor] = self.__dict__.setdefault("_held", {})
        return flags

    def _flag(self, device: torch.device) -> Tensor:
        flags = self._flags()
        if device not in flags:
            flags[device] = torch.zeros((), dtype=torch.bool, device=device)
        return flags[device]

    def _refuse_nonfinite(self, ready: list[tuple[int, Tensor, Group]]) -> None:
        checked = [p for _, p, g in ready if g["nonfinite"] == "raise" and p.numel()]
        if not checked:
            return
        finite = torch.stack([shards.local(gradient_of(p)).isfinite().all() for p in checked]).tolist()
        for param, fine in zip(checked, finite, strict=True):
            if not fine:
                raise ConfigError(
                    f"the gradient of a parameter of shape {tuple(param.shape)} holds NaN or infinity; it was not "
                    "stepped. Look for it with torch.autograd.set_detect_anomaly(True), or leave such elements alone "
                    "with nonfinite='hold'"
                )

    # Copies and checkpoints --------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        if self.__dict__.get("_release") is not None:
            raise UnsupportedError(
                "an optimizer that releases gradients is tied to its model by hooks and cannot be copied or pickled; "
                "call remove() on the handle first"
            )
        return super().__getstate__()

    def state_dict(self) -> dict[str, Any]:
        """Codes, scales and counts as they are, in torch's form; no two of its tensors share memory."""
        packed = super().state_dict()
        # Parameters that step together share one count between steps (`stepping`).
        packed["state"] = {
            key: state | {"step": state["step"].clone()} if "step" in state else state
            for key, state in packed["state"].items()
        }
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave, of this class with any storage settings, or of the torch.optim class.

        Storage settings, backend and non-finite rule stay those of this optimizer and the states are converted; the
        numbers (lr, betas, ...) and the seed come from the checkpoint, as in torch. Load the model's weights first:
        converting a residual reads them. A checkpoint without residuals keeps those that are there.
        Raises CheckpointError if it does not fit; the optimizer is then as it was.
        """
        from outpace.optim.transfer import load

        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        load(self, state_dict)
        self.__dict__.pop("_plans", None)  # they hold the states that were replaced
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)


def _filled(param: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the parameter's shape, contiguous, placed as it is."""
    whole = shards.local(param)
    return shards.like(param, torch.zeros(whole.shape, dtype=dtype, device=whole.device), tuple(param.shape))


def _scales(param: Tensor, storage: Storage) -> Tensor:
    """One zero scale per group: a row of groups per row of the parameter."""
    from outpace.optim.compand import SCALE_DTYPES

    def shape(tensor: Tensor) -> tuple[int, ...]:
        row = row_length(tensor, storage)
        outer = () if storage.layout == "flat" else tuple(tensor.shape[:-1])
        return (*outer, -(-row // GROUP))

    whole = shards.local(param)
    part = torch.zeros(shape(whole), dtype=SCALE_DTYPES[storage.scales], device=whole.device)
    return shards.like(param, part, shape(param))


def _bytes(tensor: Tensor) -> int:
    part = shards.local(tensor)
    return part.numel() * part.element_size()
