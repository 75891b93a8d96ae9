"""A widened model in memory, on the device it will run on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from outpace.target.widen.shapes import Shape
from outpace.target.widen.widening import Widening

if TYPE_CHECKING:
    from torch import nn


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
