"""What `pass.c` and `rows.c` are told, as ctypes sees it; names and order are those of the C sources."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

if TYPE_CHECKING:
    from torch import Tensor

_Pointer, _Count, _Real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
Source = Literal["pass", "rows"]
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
    """A weight of a drafter: in eight bits with scales, or float32 numbers; of width 0 there is none."""

    _fields_: ClassVar[Any] = [
        *((name, _Pointer) for name in ("bytes", "scales", "numbers", "bias")),
        ("width", _Count),
        ("depth", _Count),
    ]


class RowBlock(ctypes.Structure):
    """A block of a network that follows rows."""

    _fields_: ClassVar[Any] = [
        *((name, Weight) for name in ("qkv", "out", "gate_up", "down")),
        ("norm_attention", _Pointer),
        ("norm_mlp", _Pointer),
    ]


class RowNetwork(ctypes.Structure):
    """A network that follows rows, see `drafters.device.plan.RowPlan`."""

    _fields_: ClassVar[Any] = [
        *((name, _Count) for name in ("hidden", "inner", "heads", "key_heads", "size", "layers", "taps")),
        *((name, _Count) for name in ("embedding_first", "residual", "feeds_normed")),
        ("eps", _Real),
        ("scaling", _Real),
        *((name, _Pointer) for name in ("tap_norms", "fuse_norm", "norm_embedding", "norm_state", "norm")),
        *((name, Weight) for name in ("fuse", "join", "head")),
        ("blocks", _Pointer),
        ("offsets", _Pointer),
    ]


class Level(ctypes.Structure):
    """Rows it reads in one call."""

    _fields_: ClassVar[Any] = [
        *((name, _Count) for name in ("threads", "batch", "rows", "chain", "ahead", "offset", "scratch")),
        *((name, _Count) for name in ("capacity", "longest")),
        *((name, _Pointer) for name in ("at", "slots", "sees", "cos", "sin", "keys", "values")),
        *((name, _Pointer) for name in ("embedded", "features", "states", "out", "space")),
    ]


class Choice(ctypes.Structure):
    """Rows whose best next tokens are asked for."""

    _fields_: ClassVar[Any] = [
        *((name, _Count) for name in ("threads", "rows", "each", "count", "stride")),
        *((name, _Pointer) for name in ("y", "heat", "race", "values", "ids", "space")),
    ]


def place(tensor: Tensor | None) -> int | None:
    """Where a tensor's numbers are; None for none."""
    return None if tensor is None else tensor.data_ptr()


def declare(library: ctypes.CDLL, source: Source) -> ctypes.CDLL:
    """Say what the functions of a library take, and assert that C and Python mean the same bytes."""
    at, count = ctypes.c_void_p, ctypes.c_int64
    structs: tuple[type[ctypes.Structure], ...]
    if source == "pass":
        model, run = ctypes.POINTER(Model), ctypes.POINTER(Run)
        library.outpace_space.argtypes = library.outpace_pass.argtypes = [model, run]
        library.outpace_product.argtypes = [at] * 4 + [count] * 4
        structs, limits, sizes = (Part, Product, Layer, Model, Run), [MOST_ROWS, MOST_GROUP], library.outpace_sizes
        spaces, calls = [library.outpace_space], [library.outpace_pass]
    else:
        net, level, choice = (ctypes.POINTER(struct) for struct in (RowNetwork, Level, Choice))
        library.outpace_apply.argtypes = [ctypes.POINTER(Weight), at, at, count, count]
        library.outpace_rows_space.argtypes = library.outpace_rows.argtypes = [net, level]
        library.outpace_best_space.argtypes = library.outpace_best.argtypes = [net, choice]
        structs, limits, sizes = (Weight, RowBlock, RowNetwork, Level, Choice), [MOST_GROUP], library.outpace_rows_sizes
        spaces = [library.outpace_rows_space, library.outpace_best_space]
        calls = [library.outpace_apply, library.outpace_rows, library.outpace_best]
    sizes.argtypes = [count]
    for function in (sizes, *spaces):
        function.restype = count
    for function in calls:
        function.restype = None
    for index, struct in enumerate(structs):
        assert sizes(index) == ctypes.sizeof(struct), struct.__name__
    assert [sizes(len(structs) + index) for index in range(len(limits))] == limits
    return library
