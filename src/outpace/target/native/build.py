"""The two C sources of this folder, compiled for the processor at hand (`outpace.compiler`)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from outpace import compiler
from outpace.target.native.structs import Source, declare

if TYPE_CHECKING:
    import ctypes

_PLACE: Final = Path(__file__).parent


def load(dtype: torch.dtype, source: Source = "pass") -> ctypes.CDLL:
    """The compiled functions of `pass.c` for weights of a dtype, or those of `rows.c`, which are for float32.

    Raises:
        UnsupportedError: saying why there are none.
    """
    return _declared(compiler.load(_PLACE / f"{source}.c", dtype), source)


def why_not(dtype: torch.dtype, source: Source = "pass") -> str | None:
    """Why there are no compiled functions for a dtype; None where there are."""
    return compiler.why_not(_PLACE / f"{source}.c", dtype)


@functools.cache
def _declared(library: ctypes.CDLL, source: Source) -> ctypes.CDLL:
    return declare(library, source)
