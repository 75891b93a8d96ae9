"""outpace: several tokens per forward pass from any Hugging Face causal language model, and the same text.

    from outpace import Engine
    engine = Engine.from_pretrained("smollm2", drafter="suffix")
    print(engine.generate("Why is the sky blue?", temperature=0.8, seed=7)[0].text)

Importing this package loads nothing heavy: torch and transformers come with the first name that needs them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

__version__ = "0.1.0.dev0"

_HOMES: Final = {
    "Chunk": "outpace.engine",
    "Draft": "outpace.laws",
    "Drafter": "outpace.drafters",
    "Engine": "outpace.engine",
    "Noise": "outpace.laws",
    "Output": "outpace.engine",
    "Settings": "outpace.laws",
    "Target": "outpace.target",
    "Tree": "outpace.laws",
}

if TYPE_CHECKING:
    from outpace.drafters import Drafter
    from outpace.engine import Chunk, Engine, Output
    from outpace.laws import Draft, Noise, Settings, Tree
    from outpace.target import Target

__all__ = ["Chunk", "Draft", "Drafter", "Engine", "Noise", "Output", "Settings", "Target", "Tree", "__version__"]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'outpace' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
