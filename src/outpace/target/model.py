"""A Hugging Face causal language model that can run a block of rows behind a ragged cache.

Knows no drafters, no requests and no text. The model's modules are used as they are; nothing is patched for good.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import nn

from outpace.errors import ConfigError, UnsupportedError, suggestion
from outpace.target import attention
from outpace.target.adapters import Gate, GatedLoRA, attach
from outpace.target.block import Block, Readout
from outpace.target.cache import ALIGN, BlockCache
from outpace.target.families import (
    Family,
    angles,
    cache_keyword,
    find_family,
    layer_types,
    part,
    refuse_what_cannot_rewind,
)
from outpace.target.generic import GenericRunner
from outpace.target.masks import additive_mask, block_visibility
from outpace.target.taps import check_taps

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.fast.cpu import CpuPass
    from outpace.target.fast.graphs import FastPass
    from outpace.target.loading import Tokenizer

PREFILL_CHUNK = 512  # rows of one prefill pass: bounds the memory of masks and activations

PathName = Literal["auto", "readable", "fast"]
"""How passes run: through the model's own modules, through fused kernels, or the fastest that works here."""


@dataclass(slots=True)
class Passing:
    """A pass that has been begun and not finished: hidden states between two layers."""

    block: Block
    cache: BlockCache
    hidden: Tensor
    next_layer: int
    taps: dict[str, Tensor]
    wanted: frozenset[str]


class _FastState:
    """The fast path of a model, shared by every view of it: made when first wanted, or the reason why there is none."""

    def __init__(self) -> None:
        self.made: FastPass | CpuPass | None = None
        self.reason: str | None = None


class Target:
    """A model whose text is to be produced faster.

    Args:
        model: any decoder-only `transformers` model; used in place, its weights, dtype and device are the caller's.
        tokenizer: its tokenizer, or None for work on token ids.
        name: what reports call it.
        path: "auto" takes fused kernels and captured graphs where they work and the model's own modules elsewhere;
            "readable" always takes the modules; "fast" refuses to take them.

    Attributes:
        family: row of the family table, or None (the model's own `forward` runs the pass).
        layer_ids: indices of the layers that run; fewer than all in a `view`.
        vocabulary: width of the logits. context: most positions the model was made for.
        eos: ids that end a sequence, from the generation config.

    Raises:
        UnsupportedError: for models that cannot take back a rejected token, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        name: str | None = None,
        path: PathName = "auto",
    ) -> None:
        refuse_what_cannot_rewind(model)
        attention.register()
        self.model: Any = model.eval()
        self.tokenizer = tokenizer
        config: Any = model.config
        self.config = config
        self.name = name or getattr(self.config, "_name_or_path", "") or type(model).__name__
        self.family: Family | None = find_family(self.config)
        self.layers_total = int(config.num_hidden_layers)
        self.layer_ids: tuple[int, ...] = tuple(range(self.layers_total))
        self.layer_types = layer_types(self.config, self.family)
        self.window: int | None = getattr(self.config, "sliding_window", None)
        self.vocabulary = int(config.vocab_size)
        self.hidden_size = int(config.hidden_size)
        self.context = int(getattr(self.config, "max_position_embeddings", 0) or 1 << 30)
        self.eos = _eos_ids(model)
        self._gate = Gate()
        self._fast = _FastState()
        self._attached: list[GatedLoRA] = []
        self.path: PathName = _checked_path(path)
        self._generic: GenericRunner | None = None
        if self.family is None:
            self._generic = GenericRunner(self)
            self._generic.probe()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        gguf_file: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Target:
        """Load a model and its tokenizer by alias (`smollm2`), hub name, local directory or `.gguf` file.

        Args:
            name_or_path: what to load.
            dtype: weights' dtype; None: bfloat16 where the device computes in it, else float32.
            device: where to put it; None: CUDA if there is one, else CPU.
            gguf_file: name of a GGUF file inside a hub repository or directory.
            revision: hub revision.
            trust_remote_code: run code that comes with the model; off unless asked for.

        Raises:
            CheckpointError: if nothing is there, with what to type instead.
            MissingExtraError: for a GGUF file without the `gguf` extra.
            UnsupportedError: for models outpace cannot decode.
        """
        from outpace.target.loading import load

        model, tokenizer, name = load(
            os.fspath(name_or_path),
            dtype=dtype,
            device=device,
            gguf_file=gguf_file,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        return cls(model, tokenizer, name=name)

    def __repr__(self) -> str:
        family = self.family.name if self.family else "own forward"
        layers = f"{len(self.layer_ids)}/{self.layers_total} layers"
        return f"Target({self.name!r}, {family}, {layers}, {self.dtype}, {self.device})"

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the model's first parameter."""
        return next(self.model.parameters()).dtype  # type: ignore[no-any-return]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights one pass reads: tied weights once; of an untied input embedding, next to nothing."""
        total: int = sum(p.numel() * p.element_size() for p in self.model.parameters())
        table, head = self.model.get_input_embeddings().weight, self.model.get_output_embeddings()
        tied = head is None or head.weight is table
        return total if tied else total - int(table.numel() * table.element_size())

    @property
    def compiled(self) -> bool:
        """Whether passes that decode are one compiled call (`target.native`).

        A row's logits are then the same bits whatever else is in the pass: other rows of a chain or a tree, other
        requests, scouts.
        """
        return getattr(self.fast, "native", None) is not None

    @property
    def pairs_rows(self) -> bool:
        """Whether a row's logits are the same bits in any pass of two rows or more that reads as many entries.

        So it is with PyTorch's bfloat16 kernels on a CPU, where passes are not compiled. A pass of one row takes other
        kernels there, so plain decoding runs two (the second is padding and costs nothing).
        """
        return self.device.type == "cpu" and self.dtype == torch.bfloat16 and not self.compiled

    def new_cache(self, *, slots: int = 1, capacity: int = 1, align: int = ALIGN) -> BlockCache:
        """An empty cache for this model (and for every view of it)."""
        return BlockCache(self.layers_total, slots=slots, capacity=capacity, align=align)

    def view(self, layers: Collection[int]) -> Target:
        """The same model with some layers only: shares weights, adapters and caches.

        What a view writes into a shared cache belongs under `BlockCache.scratch()`: it is computed from other hidden
        states than the target's own, and is overwritten when the target verifies.

        Raises:
            UnsupportedError: for a model outside the family table.
            ConfigError: on layers the model does not have.
        """
        if self.family is None:
            raise UnsupportedError(
                f"{self.config.model_type} is outside the family table, so its layers cannot be skipped one by one; "
                "see outpace.target.families to add a row"
            )
        chosen = tuple(sorted(set(layers)))
        if not chosen or not set(chosen) <= set(range(self.layers_total)):
            raise ConfigError(f"view wants layers {list(layers)}; {self.name} has layers 0 to {self.layers_total - 1}")
        other = object.__new__(Target)
        other.__dict__.update(self.__dict__)
        other.layer_ids = chosen
        return other

    def through(self, path: PathName) -> Target:
        """The same model with its passes run another way; shares weights, adapters and caches.

        Raises:
            ConfigError: on an unknown path. UnsupportedError: for "fast", where there is none, with the reason.
        """
        other = object.__new__(Target)
        other.__dict__.update(self.__dict__)
        other.path = _checked_path(path)
        if path == "fast" and other.fast is None:
            raise UnsupportedError(f"no fast path for {self.name} on {self.device}: {self.path_reason}")
        return other

    @property
    def fast(self) -> FastPass | CpuPass | None:
        """The fast passes of this model, or None (`path_reason` says why)."""
        state = self._fast
        if self.path == "readable":
            return None
        if state.made is not None and not state.made.plan.still_holds(self):
            state.made, state.reason = None, None  # the model was moved or converted
        if state.made is None and state.reason is None:
            state.made, state.reason = _make_fast(self)
        return state.made

    @property
    def captured(self) -> FastPass | None:
        """The fast passes, where they are captured graphs on a device."""
        fast = self.fast
        return cast("FastPass", fast) if fast is not None and fast.captured else None

    @property
    def path_reason(self) -> str:
        """Why passes run as they do, in words."""
        if self.path == "readable":
            return "asked for: path='readable'"
        fast = self.fast
        if fast is not None:
            return "fused kernels in captured graphs" if fast.captured else "joined weights, fewer steps per layer"
        return self._fast.reason or ""

    @contextmanager
    def adapted(self, adapter: GatedLoRA) -> Iterator[None]:
        """Attach a row-gated adapter for the duration of the block; only scouts that name it feel it.

        Raises:
            CheckpointError: if the adapter does not fit the model.
        """
        handles = attach(self.model, adapter, self._gate)
        self._attached.append(adapter)
        try:
            yield
        finally:
            self._attached.remove(adapter)
            for handle in handles:
                handle.remove()

    def embed(self, tokens: Tensor) -> Tensor:
        """Input embeddings of token ids, scaled as the family does: [...] int64 -> [..., H]."""
        return self.model.get_input_embeddings()(tokens)  # type: ignore[no-any-return]

    def run(self, block: Block, cache: BlockCache, *, taps: Collection[str] = (), logits: bool = True) -> Readout:
        """One pass over a block: writes its keys and values into the cache (open until committed or dropped).

        Args:
            block: rows to run.
            cache: the cache of the requests in slots block.first .. block.first + B - 1.
            taps: named hidden states to capture: "embed", "in:k", "out:k", "pre_norm", "post_norm".
            logits: whether main rows need logits (prefill does not).

        Raises:
            ConfigError: on an unknown tap. UnsupportedError: on a tap or scout the model cannot give.
        """
        if self._generic is not None:
            return self._generic.run(block, cache, taps=taps, logits=logits)
        fast = None if torch.is_grad_enabled() else self.fast  # fused passes have no gradients
        if fast is not None and fast.fits(block, cache):
            scouts = block.scouts
            if scouts is not None and scouts.adapter is not None and scouts.adapter not in self._attached:
                block = replace(block, scouts=replace(scouts, adapter=None))  # no hook would apply it either
            wanted = check_taps(taps, self.layers_total)
            return fast.run(block, cache, layer_ids=self.layer_ids, taps=wanted, logits=logits)
        return self.finish(self.begin(block, cache, upto=self.layers_total, taps=taps), logits=logits)

    def begin(self, block: Block, cache: BlockCache, *, upto: int, taps: Collection[str] = ()) -> Passing:
        """Run a block through the layers below `upto` and stop there; `finish` does the rest.

        Raises:
            UnsupportedError: for a model outside the family table.
        """
        if self.family is None:
            raise UnsupportedError(
                f"{self.config.model_type} runs through its own forward and cannot stop in the middle"
            )
        wanted = check_taps(taps, self.layers_total)
        rows = block.rows + (block.scouts.count if block.scouts else 0)
        cache.open(block.first, block.tokens.shape[0], rows)
        hidden = self.embed(block.tokens)
        passing = Passing(block, cache, hidden, 0, {}, wanted)
        if block.scouts is not None and block.scouts.enter == 0:
            scouts = block.scouts
            new = scouts.embeds if scouts.embeds is not None else self.embed(scouts.tokens)  # type: ignore[arg-type]
            passing.hidden = torch.cat([hidden, new.to(hidden.dtype)], 1)
        if "embed" in wanted:
            passing.taps["embed"] = passing.hidden
        return self._advance(passing, upto)

    def finish(self, passing: Passing, *, logits: bool = True) -> Readout:
        """Complete a pass: remaining layers, norm and head."""
        assert self.family is not None  # begin refused otherwise
        passing = self._advance(passing, self.layers_total)
        hidden, taps, rows = passing.hidden, passing.taps, passing.block.rows
        scouts = passing.block.scouts
        if "pre_norm" in passing.wanted:
            taps["pre_norm"] = hidden
        wants_scouts = scouts is not None and scouts.logits
        if not logits and not wants_scouts and "post_norm" not in passing.wanted:
            return Readout(None, None, taps)
        normed = part(self.model, self.family.norm)(hidden)
        if "post_norm" in passing.wanted:
            taps["post_norm"] = normed
        head = part(self.model, self.family.head)
        if logits and wants_scouts:
            both = head(normed)
            return Readout(both[:, :rows], both[:, rows:], taps)
        return Readout(
            head(normed[:, :rows]) if logits else None, head(normed[:, rows:]) if wants_scouts else None, taps
        )

    def _advance(self, passing: Passing, upto: int) -> Passing:
        """Run the layers of this view from where the pass stands up to (not including) `upto`."""
        assert self.family is not None
        block, cache = passing.block, passing.cache
        stages = self._stages(block, passing.next_layer, upto)
        layers = part(self.model, self.family.layers)
        for start, end, with_scouts in stages:
            if start == end:
                continue
            if with_scouts and block.scouts is not None and passing.hidden.shape[1] == block.rows:
                build = block.scouts.build
                assert build is not None  # scouts entering at 0 joined in begin
                passing.hidden = torch.cat([passing.hidden, build(passing.hidden).to(passing.hidden.dtype)], 1)
            self._run_layers(passing, layers, range(start, end), cache)
        passing.next_layer = upto
        return passing

    def _stages(self, block: Block, start: int, upto: int) -> list[tuple[int, int, bool]]:
        """Ranges of layers with a constant set of rows."""
        if block.scouts is None:
            return [(start, upto, False)]
        enter = min(max(block.scouts.enter, start), upto)
        return [(start, enter, False), (enter, upto, True)]

    def _run_layers(self, passing: Passing, layers: Any, ids: range, cache: BlockCache) -> None:
        assert self.family is not None
        block, hidden, wanted = passing.block, passing.hidden, passing.wanted
        joined = hidden.shape[1] > block.rows
        sees, positions = block_visibility(block) if joined else (block.sees, block.positions)
        lengths = cache.lengths[block.first : block.first + block.tokens.shape[0]]
        groups = int(self.config.num_attention_heads) // int(getattr(self.config, "num_key_value_heads", 0) or 1)
        width = cache.attended(max(lengths) + hidden.shape[1])
        masks: dict[str, Tensor] = {}
        kinds = {self.layer_types[layer] for layer in self.layer_ids}
        for kind in kinds:
            window = self.window if kind == "sliding_attention" else None
            masks[kind] = attention.tile(additive_mask(sees, positions, lengths, width, hidden.dtype, window), groups)
        turned = angles(self.model, self.family, hidden, positions, kinds)
        keyword = cache_keyword(layers[0])
        adapter = block.scouts.adapter if joined and block.scouts is not None else None
        with self._gate.open(adapter, block.rows), attention.use_attention(self.config):
            for layer in ids:
                if layer not in self.layer_ids:
                    continue
                if f"in:{layer}" in wanted:
                    passing.taps[f"in:{layer}"] = hidden
                kind = self.layer_types[layer]
                hidden = layers[layer](
                    hidden,
                    attention_mask=masks[kind],
                    position_embeddings=turned[kind],
                    position_ids=positions,
                    **{keyword: cache},
                    use_cache=True,
                )
                if f"out:{layer}" in wanted:
                    passing.taps[f"out:{layer}"] = hidden
        passing.hidden = hidden

    def prefill(
        self, tokens: Sequence[int], cache: BlockCache, *, slot: int = 0, taps: Collection[str] = ()
    ) -> dict[str, Tensor]:
        """Read tokens into a slot, behind what it holds, in chunks; returns the taps over all of them, [1, L, H]."""
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = list(tokens[start : start + PREFILL_CHUNK])
            block = Block.chain([chunk], [cache.lengths[slot]], self.device, first=slot)
            read = self.run(block, cache, taps=taps, logits=False)
            cache.commit([range(len(chunk))])
            for name, value in read.taps.items():
                parts.setdefault(name, []).append(value)
        return {name: torch.cat(values, 1) if len(values) > 1 else values[0] for name, values in parts.items()}


def _checked_path(path: str) -> PathName:
    for known in get_args(PathName):
        if path == known:
            return known  # type: ignore[no-any-return]
    raise ConfigError(f"unknown path {path!r}; {suggestion(path, get_args(PathName))}")


def _make_fast(target: Target) -> tuple[FastPass | CpuPass | None, str | None]:
    """The fast path, or why there is none."""
    device = target.device.type
    if device not in ("cpu", "cuda"):
        return None, f"no fast path on {device}"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed (pip install triton)"
    try:
        with torch.inference_mode(False), torch.no_grad():
            if device == "cpu":
                from outpace.target.fast.cpu import CpuPass

                return CpuPass(target), None
            from outpace.target.fast.graphs import FastPass

            return FastPass(target), None
    except UnsupportedError as error:
        return None, str(error)


def _eos_ids(model: nn.Module) -> tuple[int, ...]:
    """End-of-sequence ids, from the generation config first: instruct models often name several there."""
    for source in (getattr(model, "generation_config", None), model.config):
        found = getattr(source, "eos_token_id", None)
        if found is not None:
            return tuple(found) if isinstance(found, list | tuple) else (int(found),)
    return ()
