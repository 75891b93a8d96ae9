"""What a fast pass needs of a model: its weights, fewer and larger, and the few facts in which families differ.

Query, key and value weights of a layer become one matrix, gate and up another. No weight is held twice: the model's
own parameters are made to point into the joined storage, so the readable pass through the model's modules keeps
running on the very same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from outpace.errors import UnsupportedError
from outpace.target.families import angles, part

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.target.model import Target

ACTIVATIONS: Final = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_STATIC_ROTARY: Final = frozenset({"default", "linear", "llama3", "yarn", "proportional"})


Joined = tuple[tuple[str, int], ...]
"""Modules that one joined product stands for: (name in the model, output width) each."""


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer: weight [N, K], bias [N] or None.

    scales: [N] float32, where the weight is int8 and its rows are to be multiplied by them; never of a target's.
    """

    weight: Tensor
    bias: Tensor | None = None
    scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer. Norms that a family does not have are None.

    Attributes:
        kind: "full_attention" or "sliding_attention": which rotary table and window it uses.
        qkv: [(heads + 2 * key heads) * head size, hidden]. out: attention output. gate_up: [2 * inner, hidden], gate
            first. down: [hidden, inner].
        norm_attention, norm_mlp: norms before a block. norm_attention_out, norm_mlp_out: norms of its output.
        norm_query, norm_key: norms of queries and keys, see `Plan.query_key_norm`.
    """

    kind: str
    qkv: Projection
    out: Projection
    gate_up: Projection
    down: Projection
    norm_attention: Tensor | None
    norm_mlp: Tensor | None
    norm_attention_out: Tensor | None
    norm_mlp_out: Tensor | None
    norm_query: Tensor | None
    norm_key: Tensor | None


@dataclass(frozen=True, slots=True)
class Plan:
    """A model as a fast pass sees it.

    Attributes:
        hidden, inner, heads, key_heads, head_size, vocabulary: sizes.
        eps: of every RMS norm. norm_shift: 1.0 where norms multiply by (1 + weight), as Gemma does, else 0.0.
        scaling: of attention scores. activation: "silu" or "gelu_tanh".
        query_key_norm: "none", "head" (each head apart) or "all" (all heads together).
        window: positions a sliding layer looks back, or None.
        rotary: by layer kind, cos and sin [positions, head size / 2] in the model's dtype.
        layers, norm, head: the rest.
    """

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    eps: float
    norm_shift: float
    scaling: float
    activation: str
    query_key_norm: str
    window: int | None
    rotary: dict[str, tuple[Tensor, Tensor]]
    layers: tuple[LayerPlan, ...]
    norm: Tensor
    head: Projection

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and hidden states."""
        return self.norm.dtype

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.norm.device

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.heads // self.key_heads

    def still_holds(self, target: Target) -> bool:
        """Whether the model's weights are where the plan left them (they are not after `model.to(...)`)."""
        first = part(target.model, target.family.layers)[0].mlp if target.family is not None else None
        module = getattr(first, "gate_up_proj", None) or getattr(first, "gate_proj", None)
        return module is not None and module.weight.data_ptr() == self.layers[0].gate_up.weight.data_ptr()


def make_plan(target: Target) -> Plan:
    """Read a target's model into a plan, joining weights in place.

    Raises:
        UnsupportedError: saying what of the model a fast pass cannot run; nothing has been changed then.
    """
    family = target.family
    if family is None:
        raise UnsupportedError(f"{target.config.model_type} is outside the family table (outpace.target.families)")
    model, config = target.model, target.config
    layers = part(model, family.layers)
    heads = int(config.num_attention_heads)
    key_heads = int(getattr(config, "num_key_value_heads", 0) or heads)
    head_size = int(getattr(config, "head_dim", 0) or config.hidden_size // heads)
    activation = ACTIVATIONS.get(str(getattr(config, "hidden_act", getattr(config, "hidden_activation", ""))))
    activation = ACTIVATIONS.get(str(getattr(config, "hidden_activation", ""))) or activation
    if activation is None:
        raise UnsupportedError(f"activation {getattr(config, 'hidden_act', None)!r} has no fast kernel")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            raise UnsupportedError(f"{name} has no fast kernel")
    for module in layers.modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            raise UnsupportedError(f"a layer is a {type(module).__name__}, not a plain linear one")
        if "Linear" in type(module).__name__ and not isinstance(module, nn.Linear):
            raise UnsupportedError(f"a layer is a {type(module).__name__}, not a plain linear one")
    sizes = {(p.dtype, p.device) for p in layers.parameters()}
    if len(sizes) != 1:
        raise UnsupportedError("the layers' weights differ in dtype or device")
    rotary = _rotary_tables(target, head_size)
    first = layers[0].self_attn
    query_key_norm = "none"
    if hasattr(first, "q_norm"):
        query_key_norm = "head" if first.q_norm.weight.shape[0] == head_size else "all"
    norm = part(model, family.norm)
    return Plan(
        hidden=int(config.hidden_size),
        inner=int(config.intermediate_size),
        heads=heads,
        key_heads=key_heads,
        head_size=head_size,
        vocabulary=int(part(model, family.head).weight.shape[0]),
        eps=float(config.rms_norm_eps),
        norm_shift=1.0 if family.norm_adds_one else 0.0,
        scaling=float(first.scaling),
        activation=activation,
        query_key_norm=query_key_norm,
        window=target.window,
        rotary=rotary,
        layers=tuple(_layer(layer, target.layer_types[index], family.norms) for index, layer in enumerate(layers)),
        norm=norm.weight.detach(),
        head=_single(part(model, family.head)),
    )


def _layer(layer: Any, kind: str, norms: tuple[str, str, str, str]) -> LayerPlan:
    attention, mlp = layer.self_attn, layer.mlp
    if hasattr(attention, "qkv_proj"):
        qkv = _single(attention.qkv_proj)
    else:
        qkv = _joined([attention.q_proj, attention.k_proj, attention.v_proj])
    gate_up = _single(mlp.gate_up_proj) if hasattr(mlp, "gate_up_proj") else _joined([mlp.gate_proj, mlp.up_proj])
    before, after, before_mlp, after_mlp = (getattr(layer, name).weight.detach() if name else None for name in norms)
    return LayerPlan(
        kind=kind,
        qkv=qkv,
        out=_single(attention.o_proj),
        gate_up=gate_up,
        down=_single(mlp.down_proj),
        norm_attention=before,
        norm_attention_out=after,
        norm_mlp=before_mlp,
        norm_mlp_out=after_mlp,
        norm_query=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        norm_key=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
    )


def _single(module: Any) -> Projection:
    return Projection(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _joined(modules: Sequence[Any]) -> Projection:
    weight = join_parameters([module.weight for module in modules])
    biases = [module.bias for module in modules]
    return Projection(weight, None if biases[0] is None else join_parameters(biases))


def join_parameters(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor holding these parameters along dimension 0; they become views of it.

    Parameters that already lie one behind the other in one storage are returned as they lie, so joining twice (two
    targets around one model) copies nothing.
    """
    first = parameters[0]
    rows = sum(p.shape[0] for p in parameters)
    shape = (rows, *first.shape[1:])
    end = first.data_ptr()
    adjacent = all(p.is_contiguous() for p in parameters)
    for p in parameters:
        same = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent = adjacent and same and p.data_ptr() == end
        end = p.data_ptr() + p.numel() * p.element_size()
    with torch.inference_mode(first.is_inference()), torch.no_grad():
        if adjacent:
            return first.detach().as_strided(shape, first.stride(), first.storage_offset())
        whole = torch.cat([p.detach() for p in parameters])
        at = 0
        for p in parameters:
            p.data = whole[at : at + p.shape[0]]
            at += p.shape[0]
    return whole


def _rotary_tables(target: Target, head_size: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Cos and sin of every position, per kind of layer, from the model's own module."""
    assert target.family is not None
    kinds = sorted(set(target.layer_types))
    parameters = getattr(target.config, "rope_parameters", None) or {}
    types = {
        str(value.get("rope_type", "default"))
        for value in (parameters, *parameters.values())
        if isinstance(value, dict)
    }
    if not types <= _STATIC_ROTARY:
        raise UnsupportedError(
            f"rotary embedding of type {', '.join(sorted(types - _STATIC_ROTARY))} changes with length"
        )
    count = min(target.context, 1 << 17)
    positions = torch.arange(count, device=target.device)[None]
    like = torch.zeros(1, 1, dtype=target.dtype, device=target.device)
    tables = {}
    with torch.no_grad():
        for kind, (cos, sin) in angles(target.model, target.family, like, positions, kinds).items():
            if cos.shape[-1] != head_size:
                raise UnsupportedError(f"rotary embedding turns {cos.shape[-1]} of {head_size} dimensions of a head")
            half = head_size // 2
            tables[kind] = (cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous())
    return tables


def joined_names(target: Target) -> list[dict[str, Joined]]:
    """Which modules of the model each joined product of a layer stands for, with their widths."""
    assert target.family is not None
    model = target.model
    known = {id(module): name for name, module in model.named_modules()}

    def named(modules: Sequence[Any]) -> Joined:
        return tuple((known[id(module)], int(module.weight.shape[0])) for module in modules)

    result = []
    for layer in part(model, target.family.layers):
        attention, mlp = layer.self_attn, layer.mlp
        qkv = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [
            attention.q_proj, attention.k_proj, attention.v_proj
        ]  # fmt: skip
        gate_up = [mlp.gate_up_proj] if hasattr(mlp, "gate_up_proj") else [mlp.gate_proj, mlp.up_proj]
        result.append(
            {
                "qkv": named(qkv),
                "out": named([attention.o_proj]),
                "gate_up": named(gate_up),
                "down": named([mlp.down_proj]),
            }
        )
    return result
