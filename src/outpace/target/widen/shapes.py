"""Sizes of Llama-type models, and those known by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from outpace.errors import ConfigError, suggestion


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


def find_shape(like: str) -> Shape:
    """A shape by name.

    Raises:
        ConfigError: naming the known ones.
    """
    if like not in SHAPES:
        raise ConfigError(f"unknown shape {like!r}; {suggestion(like, SHAPES)}")
    return SHAPES[like]
