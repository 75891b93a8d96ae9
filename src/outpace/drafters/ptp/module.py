"""The weights of a parallel token predictor: embedding of numbers, adapter of slots, and its calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from outpace.drafters.ptp.calibration import Agreement, Calibration
from outpace.drafters.ptp.encodings import NumberEmbedding
from outpace.target import GatedLoRA

if TYPE_CHECKING:
    from outpace.drafters.ptp.modes import Mode
    from outpace.target import Target


class PtpModule(nn.Module):
    """Everything that is learned or counted, for one target.

    Attributes:
        embedding: number -> input embedding of a slot. adapter: low-rank part of every linear layer, for slots only.
        calibration, agreement: counts behind the decisions of decoding.
    """

    def __init__(self, target: Target, mode: Mode, *, slots: int, encoding: str, rank: int, scale: float) -> None:
        super().__init__()
        some = torch.linspace(0, target.vocabulary - 1, 4096, device=target.device).long()
        like = target.embed(some)  # as the first layer gets them, scaled where a family scales
        self.embedding = NumberEmbedding(target.hidden_size, encoding if mode.reads else None, like=like)
        self.adapter = GatedLoRA.for_all_layers(target.model, rank, scale * rank)
        self.calibration = Calibration(slots - mode.silent)
        self.agreement = Agreement()
