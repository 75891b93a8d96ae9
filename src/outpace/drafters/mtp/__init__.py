"""Multi-token prediction: a module applied once per token ahead, or one head layer per token ahead.

Source: DeepSeek-V3 technical report (arXiv 2412.19437, section 2.2) for the sequential module, FastMTP (2509.18362) for
training it recursively with shared weights; Gloeckle et al. 2024 (2404.19737) for the parallel heads.
"""

from outpace.drafters.mtp.parallel import HeadLayers, MTPHeads
from outpace.drafters.mtp.sequential import MTP, MTPNet

__all__ = ["MTP", "HeadLayers", "MTPHeads", "MTPNet"]
