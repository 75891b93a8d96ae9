"""outpace: several tokens per forward pass, and the same text."""

from __future__ import annotations

__version__ = "0.1.0.dev0"
