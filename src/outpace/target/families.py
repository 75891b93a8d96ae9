"""Which part of a model is where: one row per family of architectures.

A family in the table is run layer by layer with its own, unmodified modules, which gives taps, row-gated adapters,
shallower views and rows that enter in the middle. A model outside it runs through its own `forward`, which gives
everything that needs no look below the top.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from outpace.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Family:
    """Names of the parts of a decoder, as attribute paths from the causal language model.

    Attributes:
        name: what reports call it.
        model_types: values of `config.model_type` it covers.
        embed: token embedding (its module applies the family's scaling, if any).
        layers: list of decoder layers, each (hidden, attention_mask, position_embeddings, ...) -> hidden.
        norm: final norm. rotary: module giving (cos, sin) for position ids. head: hidden -> logits.
        rotary_by_type: rotary takes the layer's type as a third argument (Gemma 3: local and global bases).
        norms: names of a layer's norms: before attention, of its output, before the feed-forward part, of its output.
        norm_adds_one: norms multiply by 1 + weight.
        window: "types" if `config.layer_types` says which layers slide, "all" if `config.sliding_window` slides every
            layer when set.
    """

    name: str
    model_types: tuple[str, ...]
    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"
    rotary_by_type: bool = False
    norms: tuple[str, str, str, str] = ("input_layernorm", "", "post_attention_layernorm", "")
    norm_adds_one: bool = False
    window: str = "types"


FAMILIES: Final[tuple[Family, ...]] = (
    Family("llama", ("llama",)),
    Family("mistral", ("mistral",), window="all"),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family(
        "gemma3",
        ("gemma3_text",),
        rotary_by_type=True,
        norms=(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        norm_adds_one=True,
    ),
    Family("olmo2", ("olmo2",), norms=("", "post_attention_layernorm", "", "post_feedforward_layernorm")),
    Family("phi3", ("phi3",), window="all"),
)

_REWINDABLE: Final = frozenset({"full_attention", "sliding_attention"})


def find_family(config: Any) -> Family | None:
    """The table's row for a model config, or None."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), None)


def part(model: nn.Module, path: str) -> Any:
    """The module at a dotted attribute path."""
    found: Any = model
    for name in path.split("."):
        found = getattr(found, name)
    return found


def angles(
    model: nn.Module, family: Family, hidden: Tensor, positions: Tensor, kinds: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Rotary cos and sin of positions [B, R] for layers of some kinds, in the dtype of `hidden`."""
    rotary = part(model, family.rotary)
    if family.rotary_by_type:
        return {kind: rotary(hidden, positions, kind) for kind in kinds}
    return dict.fromkeys(kinds, rotary(hidden, positions))


def cache_keyword(module: Any) -> str:
    """What `forward` of a model or layer calls the cache: "cache" since transformers 5.24, "past_key_values" before."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def layer_types(config: Any, family: Family | None) -> list[str]:
    """For each layer, "full_attention" or "sliding_attention"."""
    count = int(config.num_hidden_layers)
    declared = getattr(config, "layer_types", None)
    if declared is not None and (family is None or family.window == "types"):
        return list(declared)
    slides = getattr(config, "sliding_window", None) is not None and (family is None or family.window == "all")
    return ["sliding_attention" if slides else "full_attention"] * count


def refuse_what_cannot_rewind(model: nn.Module) -> None:
    """Refuse, at load, models whose state cannot be taken back after a rejected token.

    Raises:
        UnsupportedError: saying which part and what would be needed.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(f"{kind} is an encoder-decoder; outpace decodes decoder-only language models")
    declared = set(getattr(config, "layer_types", None) or ()) - _REWINDABLE
    stateful = bool(getattr(model, "_is_stateful", False))
    if declared or stateful:
        what = f"layers of type {', '.join(sorted(declared))}" if declared else "recurrent state"
        raise UnsupportedError(
            f"{kind} has {what}: a state that has absorbed a rejected token cannot take it back, and a tree of drafts "
            "would need one state per branch. outpace needs attention layers with a key-value cache; decode this "
            "model with transformers.generate"
        )
    if getattr(config, "alibi", False):
        raise UnsupportedError(
            f"{kind} adds ALiBi biases that depend on cache slots; tree drafts need explicit positions"
        )
