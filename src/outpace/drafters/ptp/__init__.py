"""Parallel Token Prediction: several dependent tokens from one pass, because their random numbers are known.

A path is decided by its numbers u_t. Fed to the model as the input of rows behind the text ("slots"), the numbers of
the next N positions make the next N tokens one function of what the model sees, and an adapter that applies to those
rows only learns it. Verification and drafting share one pass: slots are scouts.

Source: Draxler, Will, et al. 2025, "Parallel Token Prediction for Language Models" (arXiv 2512.21323). The mask-token
baseline (the same slots without numbers) is a mode of the same drafter.
"""

from outpace.drafters.ptp.drafter import Ptp
from outpace.drafters.ptp.encodings import ENCODINGS, Encoding, NumberEmbedding
from outpace.drafters.ptp.modes import MODES, Mode, ModeName
from outpace.drafters.ptp.reference import two_pass

__all__ = ["ENCODINGS", "MODES", "Encoding", "Mode", "ModeName", "NumberEmbedding", "Ptp", "two_pass"]
