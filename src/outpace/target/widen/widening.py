"""Real text at the cost of a large model: a Llama-type model widened into a larger shape, same function.

Every weight of the large shape is read and multiplied; those that were added are random numbers whose products meet a
zero. What a drafter accepts on real text can thus be timed at the price of a model nobody had to download. The idea is
that of function-preserving growth (Chen et al. 2016, Net2Net), with these pieces for a Llama block:

* The residual stream is [x, c .. c, 0 .. 0]. Whatever reads the zeros may be random; whatever writes them is zero.
* RMSNorm over H' numbers instead of H: its weight shrinks by sqrt(H / H'). The m constants do the work of half of eps,
  exactly: m c^2 = H eps / 2 and eps' = eps H / (2 H'). Norms inside the layers give them a weight of zero.
* Rotary frequencies: a base of theta^(D' / D) gives the first D / 2 of D' / 2 pairs the frequencies of the small head.
  Queries grow by sqrt(D' / D), because attention divides by the root of the head size.
* A key head whose group is larger than the new groups is copied to several.
* Added units, heads and layers get values of zero (up_proj, v_proj), so what follows them (down_proj, o_proj) is free.
* Added vocabulary never has mass: the last norm lets the constants through, faintly, and the head multiplies them by so
  much that the logit overflows to minus infinity. They are many so that each can be small: a drafter that norms the
  last norm's output must not find it full of them. A tied shape gets a head of its own: more memory, the same pass.

Knows no drafters. Tensors come one by one, so that a shape larger than memory can be written to disk.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

import torch

from outpace.errors import ConfigError, UnsupportedError
from outpace.target.widen.shapes import SHAPES, Shape, find_shape

if TYPE_CHECKING:
    from torch import Tensor, nn

_STD: Final = 0.02
_CONSTANTS: Final = 128  # entries of the residual stream that stay as they are
_NEVER: Final = -3e38  # summed over the constants behind the last norm, times 1.13 or more: minus infinity
_OVERFLOW: Final = 1.5
_HEADROOM: Final = 10.0  # times the largest state seen in a probe: up to there the logits overflow
_PROBE: Final = 64  # tokens


class Widening:
    """How one model's weights lie inside a larger shape.

    Args:
        model: a Llama-type causal language model, on any device.
        shape: name in `SHAPES`, or a `Shape`. A vocabulary smaller than the model's is kept at the model's.
        seed: of the added weights.

    Attributes:
        shape: what will be built. label: what reports call the result.
        constants: how many entries of the residual stream, behind the model's own, are constant.
        constant: their value c.
        copies: how many key heads of the shape one of the model's becomes.

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
        self.copies = math.ceil((heads // key_heads) / (large.num_attention_heads // large.num_key_value_heads))
        self._refuse_what_does_not_fit()
        eps = float(config.rms_norm_eps)
        self.constants = min(_CONSTANTS, large.hidden_size - small.hidden_size)
        self.constant = math.sqrt(small.hidden_size * eps / 2 / self.constants) if self._grown else 0.0
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
            "num_key_value_heads": small.num_key_value_heads * self.copies,
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
            widened_vocabulary=self.small.vocab_size,  # ids from here on never occur: no drafter need look at them
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
        gain = self._gain() if large.vocab_size > small.vocab_size else 0.0
        yield "model.norm.weight", self._norm(get("model.norm.weight"), noise("norm", width), gain)
        if not large.tie_word_embeddings:
            name = "model.embed_tokens.weight" if small.tie_word_embeddings else "lm_head.weight"
            head = noise("head", large.vocab_size, width)
            head[: small.vocab_size, :hidden] = get(name).to(dtype)
            head[: small.vocab_size, hidden : hidden + self.constants] = 0
            head[small.vocab_size :, hidden : hidden + self.constants] = _NEVER
            yield "lm_head.weight", head

    def _table(self, source: Tensor, out: Tensor) -> Tensor:
        vocabulary, hidden = source.shape
        out[:vocabulary, :hidden] = source.to(out.dtype)
        out[:vocabulary, hidden:] = 0
        out[:vocabulary, hidden : hidden + self.constants] = self.constant
        return out

    @torch.inference_mode()
    def _gain(self) -> float:
        """Weight of the constants in the last norm: just enough for the logits of added vocabulary to overflow."""
        found: list[Tensor] = []
        hook = self.model.model.norm.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        device = next(self.model.parameters()).device
        try:
            ids = torch.linspace(0, self.small.vocab_size - 1, _PROBE, device=device).long()
            self.model(ids[None], use_cache=False)
        finally:
            hook.remove()
        top = float(found[0][0, 1:].float().pow(2).mean(-1).sqrt().max())  # the first token's state may be a sink
        largest = _HEADROOM * top * math.sqrt(self.small.hidden_size / self.shape.hidden_size)
        return _OVERFLOW * largest / (self.constants * self.constant)

    def _norm(self, source: Tensor | None, out: Tensor, constant_gain: float) -> Tensor:
        small, large = self.small, self.shape
        out += 1
        if source is not None:
            out[: small.hidden_size] = (source * math.sqrt(small.hidden_size / large.hidden_size)).to(out.dtype)
        out[small.hidden_size : small.hidden_size + self.constants] = constant_gain
        return out

    def query_slots(self) -> list[int]:
        """Where each query head goes."""
        small, large = self.small, self.shape
        group, room = (s.num_attention_heads // s.num_key_value_heads for s in (small, large))
        return [
            (head // group * self.copies + head % group // room) * room + head % group % room
            for head in range(small.num_attention_heads)
        ]

    def rotary_rows(self, head: int) -> list[int]:
        """Rows of a head's dimensions: pairs (i, i + D/2) stay pairs of the same frequency."""
        half, start = self.small.head_dim // 2, head * self.shape.head_dim
        return [start + i for i in range(half)] + [start + self.shape.head_dim // 2 + i for i in range(half)]

    def live_outputs(self) -> set[int]:
        """Attention outputs that are not zero: those of every query head, old or added, that sees real values."""
        small, large = self.small, self.shape
        room = large.num_attention_heads // large.num_key_value_heads
        heads = range(small.num_key_value_heads * self.copies * room)
        return {head * large.head_dim + i for head in heads for i in range(small.head_dim)}

    def _query(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small, large = self.small, self.shape
        scaled = (source * math.sqrt(large.head_dim / small.head_dim)).to(out.dtype)
        for head, slot in enumerate(self.query_slots()):
            out[slot * large.head_dim : (slot + 1) * large.head_dim, : small.hidden_size] = 0
            rows = scaled[head * small.head_dim : (head + 1) * small.head_dim]
            out[self.rotary_rows(slot), : small.hidden_size] = rows
        return out

    def _key(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small = self.small
        for head in range(small.num_key_value_heads):
            rows = source[head * small.head_dim : (head + 1) * small.head_dim].to(out.dtype)
            for copy in range(self.copies):
                out[self.rotary_rows(head * self.copies + copy), : small.hidden_size] = rows
        return out

    def _value(self, source: Tensor | None, out: Tensor) -> Tensor:
        small, large = self.small, self.shape
        out[:, : small.hidden_size] = 0
        if source is None:
            return out
        for head in range(small.num_key_value_heads):
            rows = source[head * small.head_dim : (head + 1) * small.head_dim].to(out.dtype)
            for copy in range(self.copies):
                start = (head * self.copies + copy) * large.head_dim
                out[start : start + small.head_dim, : small.hidden_size] = rows
        return out

    def _output(self, source: Tensor | None, out: Tensor) -> Tensor:
        if source is None:
            return out
        small, large = self.small, self.shape
        out[:, sorted(self.live_outputs())] = 0
        for head, slot in enumerate(self.query_slots()):
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
