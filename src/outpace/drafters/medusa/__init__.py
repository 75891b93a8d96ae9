"""Medusa: small heads on the target's top state, one per token ahead (Cai et al. 2024, arXiv 2401.10774)."""

from outpace.drafters.medusa.drafter import Medusa
from outpace.drafters.medusa.heads import MedusaHeads

__all__ = ["Medusa", "MedusaHeads"]
