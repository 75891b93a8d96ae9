"""The contract of a drafter that learns: batches come in, losses per depth go out, weights are kept in one module.

    options     what the constructor was called with; written into a checkpoint, read back by `from_pretrained`
    build       the module for a target, with initial weights
    objective   batch -> losses; it may read taps, or run the target itself with rows of its own
    tune        what training changes of the target along with the drafter; nothing, for most
    recipe      how training is done unless the user says otherwise

Knows no loop, no corpus and no file layout: `outpace.train` feeds batches, `drafters.checkpoint` writes files.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import nn

from outpace.drafters.base import Drafter
from outpace.drafters.checkpoint import find_shipped, load_checkpoint, read_config, save_checkpoint
from outpace.drafters.shapes import read_shape
from outpace.errors import CheckpointError, ConfigError, UnsupportedError, suggestion
from outpace.laws import Settings
from outpace.target.adapters import whole
from outpace.target.skinny import round_weights
from outpace.target.tuned import tuned_copy

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.shapes import Grown
    from outpace.target import GatedLoRA, Target
    from outpace.target.widen import Widening

LossKind = Literal["soft", "hard", "kl", "reverse_kl", "total_variation", "overlap", "hybrid", "race"]
Schedule = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """How the answers of a corpus were sampled; temperatures and noise keys are per token, in the batch.

    Attributes:
        seed: of the noise every answer was drawn with.
        top_k, top_p, min_p: truncation, None for none.
    """

    seed: int = 0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(eq=False, kw_only=True)
class Batch:
    """Packed rows of dialogues the target wrote.

    Documents stand one after the other in a row; none crosses a row's end. Everything is on the target's device.

    Attributes:
        tokens: [B, T] int64.
        documents: [B, T] int64: 1, 2, ... within a row; 0 is padding.
        positions: [B, T] int64, from 0 in every document: a token's absolute position in its request.
        answer: [B, T] bool: the token was written by the target as assistant, end of turn included.
        temperature: [B, T] float32: temperature its document was sampled at (0: greedy).
        request: [B, T] int64: its document's request in the noise key, so that the number behind an answer token is
            `Noise(origin.seed).grid(request, positions)`.
        target: the frozen target: embedding, head, and passes for objectives that run it.
        taps: [B, T, H] each, in the target's dtype, without gradient: what `training_taps` asked for.
        origin: how the corpus was sampled.
        bounds: [D + 1] int32: where documents start in the flattened batch, padding counted as such; ends in B * T.
        longest: length of the longest of them.
        answers: answer tokens of the whole optimiser step, over accumulated batches and ranks, per rank: sums divided
            by it and averaged over ranks give the step's mean whatever the packing.
        share: of the run that is done, 0 at its first step, 1 outside a run: for losses whose weights change.
        rows: numbers of its rows in the packing of the corpus; empty where there is none.
        slots: for a shift s, flat indices [n] of the slots whose token s further on is an answer token of the same
            document; see `slots_before`.
    """

    tokens: Tensor
    documents: Tensor
    positions: Tensor
    answer: Tensor
    temperature: Tensor
    request: Tensor
    target: Target
    taps: Mapping[str, Tensor] = field(default_factory=dict)
    origin: Origin = Origin()
    bounds: Tensor
    longest: int
    answers: float
    share: float = 1.0
    rows: tuple[int, ...] = ()
    slots: dict[int, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        return self.tokens.shape[0], self.tokens.shape[1]

    def slots_before(self, shift: int) -> Tensor:
        """[n] int64 flat indices of slots whose label, `shift` tokens further on, counts; label = slot + shift.

        The label is an answer token, and slot, label and all between lie in one document. Prepared by the packer for
        the shifts a drafter names (`LearnedDrafter.shifts`); any other costs a wait for the device.
        """
        if shift not in self.slots:
            counts = self.answer & (self.positions >= shift)
            self.slots[shift] = torch.nonzero(counts.flatten())[:, 0] - shift
        return self.slots[shift]


@dataclass(eq=False, kw_only=True)
class Losses:
    """What an objective found, per depth k = 0 .. K - 1.

    Attributes:
        total: scalar with gradient: the weighted sum of depths over `Batch.answers`.
        sums: [K] summed loss of the counted slots. counts: [K] how many those are.
        hits: [K] in how many of them the drafter's most likely token is the corpus's. All three without gradient.
        hit_map: [K, B * T] bool: the same per slot (False where nothing counts), to simulate decoding.
        extra: further figures by name, means over the batch, scalars without gradient, shown beside the loss.
    """

    total: Tensor
    sums: Tensor
    counts: Tensor
    hits: Tensor
    hit_map: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        batch: Batch,
        sums: Sequence[Tensor],
        slots: Sequence[Tensor],
        hits: Sequence[Tensor],
        weights: Sequence[float],
    ) -> Self:
        """From per-depth loss sums (scalars with gradient), counted slots [n_k] and their hits [n_k] bool."""
        total = torch.stack([w * s.float() for w, s in zip(weights, sums, strict=True)]).sum() / batch.answers
        hit_map = torch.zeros(len(sums), batch.tokens.numel(), dtype=torch.bool, device=batch.tokens.device)
        for depth, (where, hit) in enumerate(zip(slots, hits, strict=True)):
            hit_map[depth, where] = hit
        return cls(
            total=total,
            sums=torch.stack([s.detach().float() for s in sums]),
            counts=torch.stack([total.new_full((), float(s.shape[0])) for s in slots]),  # no copy from the host
            hits=torch.stack([h.sum().float() for h in hits]),
            hit_map=hit_map,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Defaults of training; every field is a flag of `outpace train`.

    Attributes:
        lr: peak learning rate. warmup: share of the run it rises over. schedule: what it does afterwards.
        final_lr: share of the peak it ends at.
        betas, weight_decay, clip: AdamW's, and the bound on the gradient's norm (0: none).
        tokens_per_step: tokens of an optimiser step, over accumulated batches and ranks.
        row_length: tokens of a packed row. rows: rows of one batch on one device.
        epochs: passes over the corpus, unless steps or minutes are given.
        loss: what is compared with the target's law. depths: how many tokens ahead are trained.
        decay: weight of depth k is decay^k. noise: amplitude of uniform noise on the features a drafter reads.
    """

    lr: float = 1e-3
    warmup: float = 0.03
    schedule: Schedule = "cosine"
    final_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 0.5
    tokens_per_step: int = 32_768
    row_length: int = 2048
    rows: int = 8
    epochs: float = 1.0
    loss: LossKind = "soft"
    depths: int = 5
    decay: float = 0.8
    noise: float = 0.0

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some fields changed.

        Raises:
            ConfigError: on an unknown field, with the closest known one.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown recipe field {name!r}; {suggestion(name, known)}")
        return dataclasses.replace(self, **changes)

    @property
    def weights(self) -> list[float]:
        """Weight of each depth."""
        return [self.decay**k for k in range(self.depths)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What training changes of the target along with the drafter: an adapter on every row.

    It is trained like the module, and merged into a copy of the target wherever the drafter decodes: that tuned target
    is what the drafter is for from then on.

    Attributes:
        adapter: its weights, float32, on the target's device; fresh, it changes nothing.
        lr: its learning rate, as a share of the recipe's.
    """

    adapter: GatedLoRA
    lr: float = 1.0


class LearnedDrafter(Drafter):
    """A drafter with weights of its own.

    A subclass takes keyword-only options and keeps each in an attribute of the same name. Those named in `decoding`
    may change between training and use (draft length, tree); the others shape the weights and are part of a
    checkpoint.

    Attributes:
        module: the weights, once `fit` or `initialise` has run. All its parameters that require gradients are
            trained; its state dict is what a checkpoint holds (frozen tensors of the target must not be in it).
        target: what it was fitted to.
        tuning: what its training changes of that target; None for nothing, and for every drafter that only decodes.
        recipe: defaults of training; replace it to train otherwise.
        provenance: what made the weights (command, commit, corpus, curves), JSON data, kept in the checkpoint.
    """

    decoding: ClassVar[frozenset[str]] = frozenset()
    default_recipe: ClassVar[Recipe] = Recipe()
    module: nn.Module
    target: Target
    tuning: Tuning | None

    def __init__(self) -> None:
        self.tuning = None
        self.recipe: Recipe = self.default_recipe
        self.provenance: dict[str, Any] = {}
        self._source: Path | None = None
        self._force = False
        self._fitted: Target | None = None
        self._chosen: dict[str, Any] = {}

    @abstractmethod
    def build(self, target: Target) -> nn.Module:
        """The module for a target, on its device, float32, with initial weights (torch's generator).

        Raises:
            CheckpointError: if this drafter cannot serve that target.
        """

    @abstractmethod
    def objective(self, batch: Batch) -> Losses:
        """Losses of a batch under `self.recipe`, by `self.module`. Must not wait for the device.

        Called with gradients on (evaluation turns them off), under autocast where the loop wants it.
        """

    def tune(self, target: Target) -> Tuning | None:
        """What training changes of the target, with initial weights (torch's generator); None: it stays frozen.

        An objective that tunes runs the target itself, under `self.tuning.adapter` (`target.run_packed`); `Batch.taps`
        are those of the target as it was.
        """
        del target
        return None

    @property
    def training_taps(self) -> frozenset[str]:
        """Taps of the target as it was that the objective reads in `Batch.taps`; empty if it needs none."""
        return self.needs.taps

    @property
    def evaluation(self) -> Settings:
        """Sampling with which training decodes held-out prompts: what the drafter is made for."""
        return Settings()

    @property
    def shifts(self) -> tuple[int, ...]:
        """Distances from slot to label the objective will ask `Batch.slots_before` for."""
        return tuple(range(1, self.recipe.depths + 2))

    def ready(self, target: Target) -> None:
        """The module has its weights: make what decoding needs (caches, tables). Called at the end of `fit`."""
        del target

    def prepare(self, counts: Tensor, target: Target) -> None:
        """Before `build`, in training only: counts [V] int64 of answer tokens in the corpus (draft vocabularies)."""
        del counts, target

    def calibrate(self, batches: Iterable[Batch]) -> None:
        """After training: choose decoding options on text of the target (fixed trees), taps as in training.

        The text was sampled as `evaluation` says.
        """
        del batches

    def grown(self, batch: Batch, start: int) -> list[Grown]:
        """The full trees this drafter can grow, at every place of a text from slot `start` on, without noise.

        batch: one document, with `training_taps`. One entry per growth whose smaller shapes may be chosen.

        Raises:
            UnsupportedError: if its drafts have no shape to choose.
        """
        del batch, start
        raise UnsupportedError(f"drafter {self.name!r} has no tree whose shape could be tuned")

    def reshaped(self, options: Mapping[str, Any]) -> Self:
        """A copy that decodes with these options."""
        copy = self.for_decoding()
        for name, value in options.items():
            setattr(copy, name, _like(getattr(copy, name), value))
        copy.ready(copy.target)
        return copy

    def own_weights(self, target: Target) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """(options that shape them, tensors of the module) that the target's own files hold for it, or None.

        Raises:
            CheckpointError: if they hold some that do not fit.
        """
        del target
        return None

    def initialise(self, target: Target, *, seed: int = 0) -> None:
        """Take initial weights for a target instead of loading any; for training."""
        with torch.random.fork_rng(devices=_cuda_devices(target)):
            torch.manual_seed(seed)
            self.module = self.build(target)
            self.tuning = self.tune(target)
        self._take(target)

    def begin_with(self, source: str | os.PathLike[str]) -> None:
        """Go on from weights that were trained before, instead of from initial ones; after `initialise`.

        The draft vocabulary may be another one where no weight has its size (rows of the target's head say what is
        drafted): this drafter keeps its own.

        source: folder of a checkpoint, or the name of a drafter that ships for the target.

        Raises:
            CheckpointError: if there is none, it is for another target, or this drafter has no such weights.
        """
        folder = Path(source) if Path(source).is_dir() else find_shipped(os.fspath(source), self.target)
        if folder is None:
            raise CheckpointError(
                f"nothing to begin with: {os.fspath(source)!r} is no folder of a drafter, and none of that name ships "
                f"for {self.target.name}"
            )
        config = read_config(folder)
        name, found = config["drafter"], self.part_for(config["drafter"])
        if found is None:
            raise CheckpointError(f"{str(folder)!r} holds drafter {name!r}, which {self.name!r} cannot begin with")
        part, options = found
        _, tensors = load_checkpoint(folder, name, self.target)
        odd = {k: v for k, v in options.items() if k in config["options"] and config["options"][k] != v}
        if "vocabulary" in odd and (moved := _other_vocabulary(tensors, part.state_dict())) is not None:
            del odd["vocabulary"]
            tensors = moved
        if odd:
            theirs = ", ".join(f"{k}={config['options'][k]}" for k in odd)
            ours = ", ".join(f"{k}={v}" for k, v in odd.items())
            raise CheckpointError(
                f"{str(folder)!r} was trained with {theirs}, and this {self.name!r} has {ours}; begin with weights of "
                "the same options, or give these where this drafter has them"
            )
        try:
            part.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(
                f"the weights in {str(folder)!r} are not those its config speaks of: {error}"
            ) from error

    def part_for(self, name: str) -> tuple[nn.Module, dict[str, Any]] | None:
        """The part of the module that weights of a drafter of that name are for, and options that shape it; or None."""
        return (self.module, self.shaping()) if name == self.name else None

    def fit(self, target: Target) -> None:
        """Load the weights this drafter was made from, or those shipped for that target, with outpace or with it.

        Raises:
            CheckpointError: if there are none, or they do not fit.
        """
        if self._fitted is not None and self._fitted.model is target.model:
            return
        if self._fitted is not None:
            raise CheckpointError(
                f"drafter {self.name!r} holds weights for {self._fitted.name}; make another one for {target.name}"
            )
        source = self._source or find_shipped(self.name, target)
        own = None if source is not None else self.own_weights(target)
        if own is not None:
            self._take_shipped({**self.options(), **own[0]}, target.device)
            self.restore(own[1], target)
            self._take(target)
            return
        if source is None:
            raise CheckpointError(
                f"drafter {self.name!r} has to be trained for {target.name}, and no weights for it are shipped. Train "
                f"it (outpace corpus, then outpace train --drafter {self.name}) and pass its folder as the drafter"
            )
        tuned = read_shape(source, target)
        if self._source is None:
            self._take_shipped(read_config(source)["options"], target.device, tuned)
        elif tuned is not None and not tuned.keys() & self._chosen.keys():
            for name, value in tuned.items():
                setattr(self, name, _like(getattr(self, name), value))
        options, tensors = load_checkpoint(source, self.name, target, force=self._force)
        del options
        self.restore(tensors, target)
        self._take(target)

    @classmethod
    def suited(cls, options: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        """Options of weights that ship, those that only decode as they pay on that kind of device, until measured."""
        del device
        return dict(options)

    def choose(self, options: Mapping[str, Any]) -> None:
        """Remember which options were asked for by name, so that weights made with others are refused."""
        self._chosen = dict(options)

    def _take_shipped(
        self, options: Mapping[str, Any], device: torch.device, tuned: Mapping[str, Any] | None = None
    ) -> None:
        """Options of the weights that ship; of those that only decode, the ones nobody asked for."""
        suited = self.suited(options, device) if tuned is None else {**options, **tuned}
        if not any(suited[name] != options[name] for name in self._chosen if name in options):
            options = suited
        for name, value in options.items():
            value = _like(getattr(self, name), value)
            asked = self._chosen.get(name, value)
            if name in self.decoding:
                setattr(self, name, asked)
                continue
            if asked != value:
                raise ConfigError(
                    f"{self.name}:{name}={asked} was asked for, and the weights that ship were trained with {value}; "
                    f"leave it away, or train your own (outpace train --drafter {self.name}:{name}={asked})"
                )
            setattr(self, name, value)

    def restore(self, tensors: Mapping[str, Tensor], target: Target) -> None:
        """Build the module and load a checkpoint's tensors into it.

        Raises:
            CheckpointError: on missing, unknown or misshapen tensors, or numbers that are not finite.
        """
        module = self.build(target)
        wanted = module.state_dict()
        missing, unknown = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
        if missing or unknown:
            raise CheckpointError(
                f"weights of drafter {self.name!r} do not match its options: missing {sorted(missing) or 'none'}, "
                f"unknown {sorted(unknown) or 'none'}"
            )
        for name, value in tensors.items():
            if value.shape != wanted[name].shape:
                raise CheckpointError(
                    f"tensor {name!r} of drafter {self.name!r} has shape {tuple(value.shape)}, its options ask for "
                    f"{tuple(wanted[name].shape)}"
                )
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise CheckpointError(f"tensor {name!r} of drafter {self.name!r} holds numbers that are not finite")
        module.load_state_dict(tensors)
        self.module = module.to(target.dtype).eval()
        round_weights(self.module)

    def weights(self) -> dict[str, Tensor]:
        """The module's tensors, whole (every process of a sharded run must ask at once)."""
        return {name: whole(value.detach()) for name, value in self.module.state_dict().items()}

    def tuned_target(self, name: str) -> Target:
        """What it drafts for as it is now: a tuned copy of its target, called `name`, or the target if it tunes none.

        Every process of a sharded run must ask at once.
        """
        return self.target if self.tuning is None else tuned_copy(self.target, self.tuning.adapter, name)

    def for_decoding(self, weights: Mapping[str, Tensor] | None = None, target: Target | None = None) -> Self:
        """A copy of this drafter as it is now, in the target's dtype, with caches of its own.

        target: what it decodes for, if not its own: one that was tuned along with it.
        """
        target = self.target if target is None else target
        copy = type(self)(**{name: getattr(self, name) for name in self.options()})
        copy.restore(self.weights() if weights is None else weights, target)
        copy._take(target)
        copy.recipe, copy.provenance = self.recipe, self.provenance
        return copy

    def widened(self, widening: Widening, target: Target) -> Self:
        """These weights in modules of the widened target's sizes (see `Drafter.widened`)."""
        from outpace.target.widen import widen_module

        wide = type(self)(**{name: getattr(self, name) for name in self.options()})
        module = wide.build(target)
        if isinstance(getattr(module, "taps", None), tuple):
            module.taps = self.module.taps  # layers were added on top: the same ones are read
        widen_module(widening, self.module, module)
        wide.module = module.to(target.dtype).eval()
        round_weights(wide.module)
        wide._take(target)
        return wide

    def _take(self, target: Target) -> None:
        self.target = target
        self._fitted = target
        self.ready(target)

    def options(self) -> dict[str, Any]:
        """Constructor options by name, JSON data."""
        parameters = inspect.signature(type(self).__init__).parameters
        return {name: _plain(getattr(self, name)) for name in list(parameters)[1:]}

    def shaping(self) -> dict[str, Any]:
        """Those of `options` that shape the weights."""
        return {name: value for name, value in self.options().items() if name not in self.decoding}

    def take_options(self, other: Self) -> None:
        """Decode as another drafter of this class does."""
        for name in self.decoding:
            setattr(self, name, getattr(other, name))
        self.ready(self.target)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], *, force: bool = False, **changes: Any) -> Self:
        """A drafter saved by `save_pretrained`; its weights are read when an engine fits it to a target.

        Args:
            folder: the checkpoint.
            force: load even where tokenizer or chat template differ.
            **changes: decoding options to change.

        Raises:
            CheckpointError: if there is none. ConfigError: on an option that shapes the weights, or an unknown one.
        """
        config = read_config(folder)
        if config["drafter"] != cls.name:
            raise CheckpointError(f"{os.fspath(folder)!r} holds drafter {config['drafter']!r}, not {cls.name!r}")
        for name in changes:
            if name not in cls.decoding:
                known = suggestion(name, cls.decoding)
                raise ConfigError(f"option {name!r} of a trained {cls.name!r} cannot be changed; {known}")
        made = cls(**{**config["options"], **changes})
        made._source = Path(folder)
        made.choose(changes)
        made._force = force
        made.provenance = config.get("provenance", {})
        return made

    @classmethod
    def as_stored(cls, folder: str | os.PathLike[str]) -> Self:
        """A drafter saved by `save_pretrained` that decodes as its config says, whatever was tuned on this device."""
        made = cls.from_pretrained(folder)
        made.choose({name: getattr(made, name) for name in cls.decoding})
        return made

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        dtype: torch.dtype = torch.bfloat16,
        weights: Mapping[str, Tensor] | None = None,
        target: Target | None = None,
    ) -> None:
        """Write weights (floating-point ones in `dtype`) and a config that says what they belong to.

        target: what they belong to, if not its own: one that was tuned along with it.

        Raises:
            CheckpointError: if it cannot be written, or holds numbers that are not finite.
        """
        state = self.weights() if weights is None else weights
        bad = [k for k, v in state.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
        if bad:
            raise CheckpointError(f"not saved: tensors {bad} of drafter {self.name!r} hold numbers that are not finite")
        tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        save_checkpoint(folder, self.name, self.options(), tensors, target or self.target, provenance=self.provenance)


def _other_vocabulary(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Their weights with our draft vocabulary, or None if a weight has its size."""
    (weights, _), (own, ids) = (_split(tensors) for tensors in (theirs, ours))
    fits = weights.keys() == own.keys() and all(weights[name].shape == own[name].shape for name in own)
    return {**weights, **ids} if fits else None


def _split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights, and offsets of draft vocabularies (`heads.DraftHead`)."""
    ids = {name: value for name, value in tensors.items() if name.rpartition(".")[2] == "d2t"}
    return {name: value for name, value in tensors.items() if name not in ids}, ids


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _like(old: Any, value: Any) -> Any:
    return tuple(value) if isinstance(old, tuple) else value


def _cuda_devices(target: Target) -> list[int]:
    return [target.device.index or 0] if target.device.type == "cuda" else []
