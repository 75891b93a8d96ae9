"""What every kernel of the fast pass does first: wait for the kernel before it, and let the next one start early.

Programmatic dependent launch (Hopper and later) starts a kernel while its predecessor still drains. Nothing that a
predecessor writes may be read, and nothing it reads may be written, before `enter_kernel`.
"""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def enter_kernel(PDL: tl.constexpr):  # noqa: ANN201  # Triton's language
    """Wait until everything before this kernel is in memory; allow the next kernel to be launched."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def launch_options(pdl: bool) -> dict[str, Any]:
    """Keyword arguments of a launch."""
    return {"launch_pdl": True} if pdl else {}


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether the device can launch dependent kernels early."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
