"""Real text at the cost of a large model: a Llama-type model widened into a larger shape, same function.

Every weight of the large shape is read and multiplied; those that were added are random numbers whose products meet a
zero. What a drafter accepts on real text can thus be timed at the price of a model nobody had to download. The idea is
that of function-preserving growth (Chen et al. 2016, Net2Net), with these pieces for a Llama block:

* The residual stream is [x, c, 0, ..., 0]. Whatever reads the zeros may be random; whatever writes them is zero.
* RMSNorm over H' numbers instead of H: its weight shrinks by sqrt(H / H'). The constant c does the work of half of
  eps, exactly: c^2 = H eps / 2 and eps' = eps H / (2 H').
* Rotary frequencies: a base of theta^(D' / D) gives the first D / 2 of D' / 2 pairs the frequencies of the small head.
  Queries grow by sqrt(D' / D), because attention divides by the root of the head size.
* A key head whose group is larger than the new groups is copied to several.
* Added units, heads and layers get values of zero (up_proj, v_proj), so what follows them (down_proj, o_proj) is free.
* Added vocabulary never has mass: c times a huge number overflows to a logit of minus infinity. A tied shape gets a
  head of its own for that: more memory, the same pass.

Knows no drafters. Tensors come one by one, so that a shape larger than memory can be written to disk.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from outpace.errors import CheckpointError, ConfigError, UnsupportedError, suggestion

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama-type model."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool = False

    @property
    def parameters(self) -> int:
        """Number of weights."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size
        tables = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_hidden_layers * layer + tables + self.hidden_size


SHAPES: Final[dict[str, Shape]] = {
    "smollm2-360m": Shape(
        hidden_size=960, intermediate_size=2560, num_hidden_layers=32, num_attention_heads=15,
        num_key_value_heads=5, head_dim=64, vocab_size=49152, tie_word_embeddings=True,
    ),
    "llama-3.2-3b": Shape(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True,
    ),
    "llama-2-7b": Shape(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, vocab_size=32000,
    ),
    "mistral-7b": Shape(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=32768,
    ),
    "llama-3.1-8b": Shape(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256,
    ),
    "llama-3.1-70b": Shape(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, vocab_size=128256,
    ),
}  # fmt: skip
"""Shapes known by name, from the published configs."""

_SHARD_BYTES: Final = 2 << 30
_STD: Final = 0.02
_GAIN: Final = 1e6  # of the constant in the last norm
_NEVER: Final = -3e38  # times the constant after that norm: minus infinity in float32 and bfloat16


def find_shape(like: str) -> Shape:
    """A shape by name.

    Raises:
        ConfigError: naming the known ones.
    """
    if like not in SHAPES:
        raise ConfigError(f"unknown shape {like!r}; {suggestion(like, SHAPES)}")
    return SHAPES[like]


class Widening:
    """How one model's weights lie inside a larger shape.

    Args:
        model: a Llama-type causal language model, on any device.
        shape: name in `SHAPES`, or a `Shape`. A vocabulary smaller than the model's is kept at the model's.
        seed: of the added weights.

    Attributes:
        shape: what will be built. label: what reports call the result.
        constant: the value c of the constant entry of the residual stream (0.0 without one).

    Raises:
        UnsupportedError: for a model of another type, or with parts that have no room in the shape.
        ConfigError: on an unknown shape.
    """

    def __init__(self, model: nn.Module, shape: Shape | str, *, seed: int = 0) -> None:
        self.like = shape if isinstance(shape, str) else f"{shape.parameters / 1e9:.1f}B parameters"
        wanted = find_shape(shape) if isinstance(shape, str) else shape
        self.model: Any = model
        self.seed = seed
        config: Any = model.config
        self.config = config
        _refuse_other_types(config)
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        self.small = Shape(
            hidden_size=int(config.hidden_size),
            intermediate_size=int(config.intermediate_size),
            num_hidden_layers=int(config.num_hidden_layers),
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
            vocab_size=int(config.vocab_size),
            tie_word_embeddings=bool(config.tie_word_embeddings),
        )
        small, large = self.small, wanted
        self._grown = large.hidden_size > small.hidden_size
        vocabulary = max(large.vocab_size, small.vocab_size) if self._grown else small.vocab_size
        tied = large.tie_word_embeddings and small.tie_word_embeddings and vocabulary == small.vocab_size
        self.shape = large = replace(large, vocab_size=vocabulary, tie_word_embeddings=tied)
        self._copies = math.ceil((heads // key_heads) / (large.num_attention_heads // large.num_key_value_heads))
        self._refuse_what_does_not_fit()
        eps = float(config.rms_norm_eps)
        self.constant = math.sqrt(small.hidden_size * eps / 2) if self._grown else 0.0
        self.eps = eps * small.hidden_size / (2 * large.hidden_size) if self._grown else eps

    @property
    def label(self) -> str:
        """What reports call the result."""
        return f"widened to the shape of {self.like}"

    def _refuse_what_does_not_fit(self) -> None:
        small, large = self.small, self.shape
        needs = {
            "hidden_size": small.hidden_size,
            "intermediate_size": small.intermediate_size,
            "num_hidden_layers": small.num_hidden_layers,
            "num_key_value_heads": small.num_key_value_heads * self._copies,
            "head_dim": small.head_dim,
        }
        for name, need in needs.items():
            room = getattr(large, name)
            if room < need:
                fitting = [k for k, shape in SHAPES.items() if all(getattr(shape, n) >= v for n, v in needs.items())]
                raise UnsupportedError(
                    f"cannot widen into {self.like}: it has {name} {room}, and this model needs {need}; shapes with "
                    f"room for it: {', '.join(fitting) or 'none of the known ones'}"
                )

    def large_config(self) -> Any:
        """Configuration of the widened model (a `LlamaConfig`)."""
        from transformers import LlamaConfig

        source = self.config
        rotary = dict(source.rope_parameters)
        rotary["rope_theta"] = float(rotary["rope_theta"]) ** (self.shape.head_dim / self.small.head_dim)
        return LlamaConfig(
            **asdict(self.shape),
            rope_parameters=rotary,
            rms_norm_eps=self.eps,
            hidden_act=source.hidden_act,
            max_position_embeddings=source.max_position_embeddings,
            bos_token_id=source.bos_token_id,
            eos_token_id=source.eos_token_id,
            pad_token_id=source.pad_token_id,
            widened_from=f"{getattr(source, '_name_or_path', '') or 'a model'}, {self.label}",
        )

    def tensors(self, *, dtype: torch.dtype, device: torch.device | str) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the widened model's parameters, one at a time.

        Raises:
            ConfigError: for float16, which cannot hold the head of an added vocabulary.
        """
        if dtype not in (torch.bfloat16, torch.float32, torch.float64):
            raise ConfigError(f"widening needs bfloat16 or float32, got {dtype}: float16 has too little range")
        small, large = self.small, self.shape
        state = dict(self.model.named_parameters())

        def get(name: str) -> Tensor:
            tensor: Tensor = state[name].detach().to(device=device, dtype=torch.float32)
            return tensor

        def noise(name: str, *size: int) -> Tensor:
            generator = torch.Generator(device).manual_seed(self.seed ^ zlib.crc32(name.encode()))
            return torch.randn(size, generator=generator, dtype=dtype, device=device).mul_(_STD)

        hidden, width = small.hidden_size, large.hidden_size
        table = self._table(get("model.embed_tokens.weight"), noise("embed", large.vocab_size, width))
        yield "model.embed_tokens.weight", table
        for layer in range(large.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            exists = layer < small.num_hidden_layers
            for norm in ("input_layernorm", "post_attention_layernorm"):
                name = f"{prefix}{norm}.weight"
                yield name, self._norm(get(name) if exists else None, noise(name, width), 0.0)
            for name, build, size in (
                ("self_attn.q_proj", self._query, (large.num_attention_heads * large.head_dim, width)),
                ("self_attn.k_proj", self._key, (large.num_key_value_heads * large.head_dim, width)),
                ("self_attn.v_proj", self._value, (large.num_key_value_heads * large.head_dim, width)),
                ("self_attn.o_proj", self._output, (width, large.num_attention_heads * large.head_dim)),
                ("mlp.gate_proj", self._gate, (large.intermediate_size, width)),
                ("mlp.up_proj", self._up, (large.intermediate_size, width)),
                ("mlp.down_proj", self._down, (width, large.intermediate_size)),
            ):
                full = f"{prefix}{name}.weight"
                yield full, build(get(full) if exists else None, noise(full, *size))
        gain = _GAIN if large.vocab_size > small.vocab_size else 0.0
        yield "model.norm.weight", self._norm(get("model.norm.weight"), noise("norm", width), gain)
        if not large.tie_word_embeddings:
            name = "model.embed_tokens.weight" if small.tie_word_embeddings else "lm_head.weight"
            head = noise("head", large.vocab_size, width)
            head[: small.vocab_size, :hidden] = get(name).to(dtype)
            if self._grown:
                head[: small.vocab_size, hidden] = 0
                head[small.vocab_size :, hidden] = _NEVER
            yield "lm_head.weight", head

    def _table(self, source: Tensor, out: Tensor) -> Tensor:
        vocabulary, hidden = source.shape
        out[:vocabulary, :hidden] = source.to(out.dtype)
        out[:vocabulary, hidden:] = 0
        if self._grown:
            out[:vocabulary, hidden] = self.constant
        return out

    def _norm(self, source: Tensor | None, out: Tensor, constant_gain: float) -> Tensor:
        small, large = self.small, self.shape
        out += 1
        if source is not None:
            out[: small.hidden_size] = (source * math.sqrt(small.hidden_size / large.hidden_size)).to(out.dtype)
        if self._grown:
            out[small.hidden_size] = constant_gain
        return out

    def _query_slots(self) -> list[int]:
        """Where each query head goes."""
        small, large = self.small, self.shape
        group, room = (s.num_attention_heads // s.num_key_value_heads for s in (small, large))
        return [
            (head // group * self._copies + head % group // room) * room + head % group % room
            for head in range(small.num_attention_heads)
        ]

    def _rotary_rows(self, head: int) -> list[int]:
        """Rows of a head's dimensions: pairs (i, i + D/2) stay pairs of the same frequency."""
        half, start = self.small.head_dim // 2, head * self.shape.head_dim
        return [start + i for i in range(half)] + [start + self.shape.head_dim // 2 + i for i in range(half)]

    def _query(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small, large = self.small, self.shape
        scaled = (source * math.sqrt(large.head_dim / small.head_dim)).to(out.dtype)
        for head, slot in enumerate(self._query_slots()):
            out[slot * large.head_dim : (slot + 1) * large.head_dim, : small.hidden_size] = 0
            rows = scaled[head * small.head_dim : (head + 1) * small.head_dim]
            out[self._rotary_rows(slot), : small.hidden_size] = rows
        return out

    def _key(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small = self.small
        for head in range(small.num_key_value_heads):
            rows = source[head * small.head_dim : (head + 1) * small.head_dim].to(out.dtype)
            for copy in range(self._copies):
                out[self._rotary_rows(head * self._copies + copy), : small.hidden_size] = rows
        return out

    def _value(self, source: Tensor | None, out: Tensor) -> Tensor:
        small, large = self.small, self.shape
        out[:, : small.hidden_size] = 0
        if source is None:
            return out
        for head in range(small.num_key_value_heads):
            rows = source[head * small.head_dim : (head + 1) * small.head_dim].to(out.dtype)
            for copy in range(self._copies):
                start = (head * self._copies + copy) * large.head_dim
                out[start : start + small.head_dim, : small.hidden_size] = rows
        return out

    def _output(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small, large = self.small, self.shape
        room = large.num_attention_heads // large.num_key_value_heads
        for head in range(small.num_key_value_heads * self._copies * room):  # query heads that see real values
            out[:, head * large.head_dim : head * large.head_dim + small.head_dim] = 0
        for head, slot in enumerate(self._query_slots()):
            columns = source[:, head * small.head_dim : (head + 1) * small.head_dim].to(out.dtype)
            start = slot * large.head_dim
            out[: small.hidden_size, start : start + small.head_dim] = columns
        return out

    def _gate(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is not None:
            out[: source.shape[0], : source.shape[1]] = source.to(out.dtype)
        return out

    def _up(self, source: Tensor | None, out: Tensor) -> Tensor:
        out[:, : self.small.hidden_size] = 0
        return self._gate(source, out)

    def _down(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is not None:
            out[:, : source.shape[1]] = 0
        return self._gate(source, out)


def _refuse_other_types(config: Any) -> None:
    reason = None
    if config.model_type not in ("llama", "mistral"):
        reason = f"it is of type {config.model_type!r}"
    elif getattr(config, "sliding_window", None):
        reason = "its attention slides"
    elif getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        reason = "its projections have biases"
    elif (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default") not in (
        "default",
        "linear",
        "llama3",
    ):
        reason = f"its rotary scaling {config.rope_parameters['rope_type']!r} depends on the head size"
    if reason is not None:
        raise UnsupportedError(
            f"this model cannot be widened: {reason}. Widening takes Llama-type models (full attention, no biases), "
            "such as smollm2"
        )


def widen(
    model: nn.Module,
    shape: Shape | str,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    seed: int = 0,
) -> nn.Module:
    """A larger model with the same logits, built in place on a device.

    Args:
        model: a Llama-type causal language model, left as it is.
        shape: name in `SHAPES` ("llama-3.1-8b"), or a `Shape`.
        dtype: of the weights: bfloat16 or float32.
        device: where to build it; nothing of its size is allocated anywhere else.
        seed: of the added weights.

    Returns:
        A `LlamaForCausalLM` in evaluation mode; `config.widened_from` says what it is. Logits of added vocabulary are
        minus infinity.

    Raises:
        UnsupportedError, ConfigError: see `Widening`.
    """
    from transformers import LlamaForCausalLM

    widening = Widening(model, shape, seed=seed)
    config = widening.large_config()
    config.dtype = dtype
    where = torch.device(device)
    with torch.device("meta"):
        large: Any = LlamaForCausalLM(config)
    large.model.rotary_emb = _rotary(model, large.model.rotary_emb, config, where)
    with torch.no_grad():
        for name, tensor in widening.tensors(dtype=dtype, device=where):
            owner, _, leaf = name.rpartition(".")
            setattr(large.get_submodule(owner), leaf, torch.nn.Parameter(tensor, requires_grad=False))
    large.tie_weights()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        large.generation_config = generation
    return large.eval()  # type: ignore[no-any-return]


def _rotary(model: Any, like: Any, config: Any, device: torch.device) -> Any:
    """A rotary module on the device, with the small model's very frequencies (a power of the base is off by an ulp)."""
    rotary = type(like)(config).to(device)
    for name in ("inv_freq", "original_inv_freq"):
        small = getattr(model.model.rotary_emb, name, None)
        if small is not None:
            getattr(rotary, name)[: small.shape[0]] = small.to(device)
    return rotary


def save_widened(
    model: nn.Module,
    shape: Shape | str,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype,
    tokenizer: Any = None,
    seed: int = 0,
    shard_bytes: int = _SHARD_BYTES,
) -> list[Path]:
    """Write the widened model as sharded safetensors, one shard in memory at a time; `Target.from_pretrained` reads it.

    Returns the files written. An unfinished folder has no config.json, so that nothing takes it for a model.

    Raises:
        CheckpointError: if the folder already holds a model, or the disk is too small or fails.
        UnsupportedError, ConfigError: see `Widening`.
    """
    widening = Widening(model, shape, seed=seed)
    path = Path(folder)
    if (path / "config.json").exists():
        raise CheckpointError(f"{str(path)!r} already holds a model; pass another folder")
    config = widening.large_config()
    config.dtype = dtype
    need = widening.shape.parameters * torch.empty(0, dtype=dtype).element_size()
    try:
        path.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path).free
        if free < need:
            raise CheckpointError(
                f"the widened model takes {need / 1e9:.1f} GB, and {str(path)!r} has {free / 1e9:.1f} GB left; free "
                "some space, pass another folder, or build it in memory: outpace bench MODEL --widen SHAPE"
            )
        return _write_shards(widening, config, path, dtype, tokenizer, shard_bytes)
    except OSError as error:
        raise CheckpointError(
            f"cannot write the widened model to {str(path)!r}: {error}; the folder is left without a config.json"
        ) from error


def _write_shards(
    widening: Widening, config: Any, path: Path, dtype: torch.dtype, tokenizer: Any, shard_bytes: int
) -> list[Path]:
    from safetensors.torch import save_file

    shards: list[tuple[Path, list[str]]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        if held:
            file = path / f"shard-{len(shards) + 1:05d}.tmp"
            save_file(held, file, metadata={"format": "pt"})
            shards.append((file, list(held)))
            held.clear()
            size = 0

    for name, tensor in widening.tensors(dtype=dtype, device="cpu"):
        count = tensor.numel() * tensor.element_size()
        if size + count > shard_bytes:
            flush()
        held[name] = tensor.contiguous()
        size += count
        total += count
    flush()
    files, where = [], {}
    for number, (file, names) in enumerate(shards, 1):
        final = path / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.replace(final)
        files.append(final)
        where.update(dict.fromkeys(names, final.name))
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
    generation = getattr(widening.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(path)
    return [*files, index, path / "config.json"]
