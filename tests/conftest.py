"""Everything here runs on CPU without a network. torch gets one thread per worker; results do not depend on it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings as hypothesis_settings

torch.set_num_threads(1)
hypothesis_settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis_settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_stray_randomness():
    """Nothing may depend on torch's global generator: give every test another state."""
    torch.seed()
