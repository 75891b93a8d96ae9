"""Drafting in rounds that stay on a CUDA device: the contract, and what drafters share that fulfil it.

`contract` needs torch alone; everything else imports Triton and is imported where a fast pass is there.
"""

from outpace.drafters.device.contract import DeviceDraft, DraftKey

__all__ = ["DeviceDraft", "DraftKey"]
