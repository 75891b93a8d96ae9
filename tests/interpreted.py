"""For tests that run CUDA kernels without CUDA. Not a test."""

import os

import pytest
import torch


def require_interpreter():
    """Skip the calling module unless Triton's interpreter runs kernels on this CPU."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is there: tests/gpu runs the compiled kernels", allow_module_level=True)
    pytest.importorskip("triton", reason="needs Triton (in the dev extra on Linux)")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported (tests/conftest.py)", allow_module_level=True)
