"""What `pass.c` is told, as ctypes sees it; names and order are those of the C source."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar, Final

_Pointer, _Count, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
MOST_PARTS: Final = 3
MOST_ROWS: Final = 512  # of a pass
MOST_GROUP: Final = 64  # query heads that share a key head


class Part(ctypes.Structure):
    """A low-rank tail of some weight rows of a product."""

    _fields_: ClassVar[Any] = [
        ("down", _Pointer),
        ("up", _Pointer),
        ("end", _Count),
        ("rank", _Count),
        ("scale", _Real),
    ]


class Product(ctypes.Structure):
    """A linear layer, with the tails of up to three modules it stands for."""

    _fields_: ClassVar[Any] = [
        ("weight", _Pointer),
        ("bias", _Pointer),
        ("width", _Count),
        ("depth", _Count),
        ("parts", Part * MOST_PARTS),
    ]


class Layer(ctypes.Structure):
    """A decoder layer; norms it does not have are None."""

    _fields_: ClassVar[Any] = [
        *((name, Product) for name in ("qkv", "out", "gate_up", "down")),
        *(
            (name, _Pointer)
            for name in (
                "norm_attention",
                "norm_mlp",
                "norm_attention_out",
                "norm_mlp_out",
                "norm_query",
                "norm_key",
            )
        ),
        ("window", _Count),
        ("kind", _Count),
    ]


class Model(ctypes.Structure):
    """What all passes of a model share."""

    _fields_: ClassVar[Any] = [
        *((name, _Count) for name in ("hidden", "inner", "heads", "key_heads", "size", "gelu", "norm_all")),
        *((name, _Real) for name in ("eps", "shift", "scaling")),
        ("norm", _Pointer),
        ("head", Product),
    ]


class Run(ctypes.Structure):
    """One pass."""

    _fields_: ClassVar[Any] = [
        *((name, _Count) for name in ("threads", "batch", "main", "rows", "first", "capacity", "layers", "longest")),
        *((name, _Pointer) for name in ("layer", "keys", "values", "lengths", "positions", "sees")),
        ("cos", _Pointer * 2),
        ("sin", _Pointer * 2),
        *((name, _Pointer) for name in ("hidden", "before", "behind", "pre_norm", "post_norm", "logits")),
        *((name, _Count) for name in ("head_from", "head_to", "ranks")),
        ("space", _Pointer),
    ]


class Weight(ctypes.Structure):
    """A weight of a drafter: in eight bits with scales, or float32 numbers."""

    _fields_: ClassVar[Any] = [
        *((name, _Pointer) for name in ("bytes", "scales", "numbers", "bias")),
        ("width", _Count),
        ("depth", _Count),
    ]


def check_sizes(library: ctypes.CDLL) -> None:
    """Assert that C and Python mean the same bytes."""
    for index, struct in enumerate((Part, Product, Layer, Model, Run)):
        assert library.outpace_sizes(index) == ctypes.sizeof(struct), struct.__name__
    assert [library.outpace_sizes(5 + index) for index in range(2)] == [MOST_ROWS, MOST_GROUP]
