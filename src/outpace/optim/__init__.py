"""Optimizers that store 7 bytes a parameter instead of 16, and train as if they stored all of them.

Independent of the rest of outpace. `FlashAdamW`, `FlashLion` and `FlashSGD` are drop-in `torch.optim.Optimizer`s; what
they keep between steps is set by `Storage`. `release_gradients` steps inside the backward pass; `save` and `load` write
and read a safetensors file; `export_portable` gives what the torch.optim class would have saved.
Source: FlashOptim (arXiv 2602.23349), with the changes docs/optim.md lists.
"""

from __future__ import annotations

from outpace.optim.adamw import FlashAdamW
from outpace.optim.base import FlashOptimizer
from outpace.optim.checkpoint import flatten, load, save, unflatten
from outpace.optim.lion import FlashLion
from outpace.optim.release import GradientRelease, release_gradients
from outpace.optim.settings import Storage
from outpace.optim.sgd import FlashSGD
from outpace.optim.transfer import export_portable

__all__ = [
    "FlashAdamW",
    "FlashLion",
    "FlashOptimizer",
    "FlashSGD",
    "GradientRelease",
    "Storage",
    "export_portable",
    "flatten",
    "load",
    "release_gradients",
    "save",
    "unflatten",
]
