"""EAGLE: a layer that continues the target's features, one token ahead of itself.

Source: Li et al. 2024 (EAGLE, EAGLE-2: arXiv 2401.15077, 2406.16858), 2025 (EAGLE-3: 2503.01840), and the
normalisation flags of EAGLE 3.1 (2605.09992).
"""

from outpace.drafters.eagle.drafter import Eagle, Eagle2, Eagle3
from outpace.drafters.eagle.nets import EagleNet, FusedNet

__all__ = ["Eagle", "Eagle2", "Eagle3", "EagleNet", "FusedNet"]
