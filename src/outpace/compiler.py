"""C sources compiled for the processor at hand, once, into the user's cache, and loaded.

The C compiler of the machine is asked (`CC`, else gcc or cc), as Triton asks it. Nothing is lost without one: whoever
has a source has operations of PyTorch or numpy for the same, and `outpace doctor` says why they are taken.
`OUTPACE_NATIVE=off` does that on purpose. Knows nothing of what the sources compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import torch

from outpace.caches import cache_folder
from outpace.errors import UnsupportedError

_LOG: Final = logging.getLogger("outpace")
_FLAGS: Final = ("-O3", "-march=native", "-ffp-contract=off", "-std=gnu11", "-fPIC", "-fopenmp")
_PATIENCE: Final = 300.0  # seconds a compiler may take; it needs four


def load(source: Path, dtype: torch.dtype = torch.float32) -> ctypes.CDLL:
    """The functions of a C source, compiled with HALF=1 for bfloat16 and HALF=0 for float32.

    Raises:
        UnsupportedError: saying why there are none.
    """
    library, reason = _attempt(source, dtype, os.environ.get("OUTPACE_NATIVE", "on"))
    if library is None:
        raise UnsupportedError(str(reason))
    return library


def why_not(source: Path, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `load` would refuse; None where it would not."""
    return _attempt(source, dtype, os.environ.get("OUTPACE_NATIVE", "on"))[1]


@functools.cache
def has_bfloat16_products() -> bool:
    """Whether the processor multiplies bfloat16 numbers (AVX-512), which PyTorch's products of few rows use."""
    return "avx512_bf16" in _processor().split()


@functools.cache
def _attempt(source: Path, dtype: torch.dtype, asked: str) -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none: asked once a process."""
    try:
        return _loaded(source, dtype, asked), None
    except UnsupportedError as error:
        return None, str(error)
    except OSError as error:
        return None, f"what was compiled cannot be written or loaded: {error}"


def _loaded(source: Path, dtype: torch.dtype, asked: str) -> ctypes.CDLL:
    if asked == "off":
        raise UnsupportedError("compiled code is switched off (OUTPACE_NATIVE=off)")
    if dtype not in (torch.float32, torch.bfloat16):
        raise UnsupportedError(f"compiled code is for float32 and bfloat16, not {dtype}")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise UnsupportedError(f"compiled code is for Linux on x86_64, not {sys.platform} on {platform.machine()}")
    compiler = next((c for c in (os.environ.get("CC"), "gcc", "cc") if c and shutil.which(c)), None)
    if compiler is None:
        raise UnsupportedError("compiled code needs a C compiler (apt install gcc, or name one in CC)")
    half = dtype == torch.bfloat16
    flags = (*_FLAGS, f"-DHALF={int(half)}", f"-DMATRIX={int(half and _may_use_matrix_units())}")
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted(source.parent.glob("*.h")):
        digest.update(header.read_bytes())
    for fact in (_said(compiler, "--version"), _processor(), *flags):
        digest.update(fact.encode())
    name = f"{source.stem}-{str(dtype).removeprefix('torch.')}-{digest.hexdigest()[:16]}.so"
    folder = cache_folder()
    if folder is not None:
        return ctypes.CDLL(str(_compiled(compiler, flags, source, folder / "native", name)))
    with tempfile.TemporaryDirectory() as temporary:
        return ctypes.CDLL(str(_compiled(compiler, flags, source, Path(temporary), name)))


def _compiled(compiler: str, flags: tuple[str, ...], source: Path, folder: Path, name: str) -> Path:
    """The library in a folder, made if it is not there; it appears whole or not at all."""
    made = folder / name
    if made.is_file():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    _LOG.info("compiling %s for this processor, once (%s)", source.stem, made)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        unit, library = Path(temporary) / "pass.o", Path(temporary) / name
        _said(compiler, *flags, "-c", str(source), "-o", str(unit))
        # Linked without -fopenmp: threads are those of the OpenMP runtime that PyTorch has loaded.
        _said(compiler, "-shared", str(unit), "-o", str(library), "-lm")
        library.replace(made)
    return made


def _may_use_matrix_units() -> bool:
    """Ask Linux for the tile registers of this process (AMX); they are given to whoever asks, where there are some."""
    ask, tile_data, arch_prctl = 0x1023, 18, 158
    return "amx_bf16" in _processor().split() and ctypes.CDLL(None).syscall(arch_prctl, ask, tile_data) == 0


def _said(compiler: str, *arguments: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603  # the user's own compiler
            [compiler, *arguments], capture_output=True, text=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        raise UnsupportedError(f"{compiler} took longer than {_PATIENCE:.0f} s") from None
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
        raise UnsupportedError(f"{compiler} cannot compile the C sources of outpace: {first}")
    return done.stdout


def _processor() -> str:
    """What -march=native looks at."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags"))}))
