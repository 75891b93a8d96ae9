"""The weights of a parallel token predictor: embedding of numbers, adapter of slots, and its calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from outpace.drafters.eagle import Eagle3
from outpace.drafters.heads import DraftHead
from outpace.drafters.ptp.calibration import Agreement, Calibration
from outpace.drafters.ptp.eagle import SlotJoin
from outpace.drafters.ptp.encodings import NumberEmbedding
from outpace.drafters.ptp.sampler import ChainedSampler
from outpace.target import GatedLoRA

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.eagle import FusedNet
    from outpace.drafters.ptp.modes import Mode
    from outpace.drafters.ptp.sampler import SamplerName
    from outpace.target import Target

HEATS: Final = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5)


class PtpModule(nn.Module):
    """Everything that is learned or counted, for one target.

    Attributes:
        embedding: number -> input embedding of a slot. adapter: low-rank part of every linear layer, for slots only.
        heat: what is added to a slot's embedding at each of `HEATS`, between which it is interpolated; None if slots
            are not told the temperature.
        sampler: the chain behind the slots that reads the token before, or None. head: its head over a reduced draft
            vocabulary, or None for the target's own.
        net, join: EAGLE-3's network behind the slots, and how it hears them, or None.
        calibration, agreement: counts behind the decisions of decoding.
    """

    def __init__(
        self,
        target: Target,
        mode: Mode,
        *,
        slots: int,
        encoding: str,
        rank: int,
        scale: float,
        any_temperature: bool,
        sampler: SamplerName = "none",
        sampler_size: int = 0,
        vocabulary: int = 0,
        ids: Tensor | None = None,
    ) -> None:
        super().__init__()
        some = torch.linspace(0, target.vocabulary - 1, 4096, device=target.device).long()
        like = target.embed(some)  # as the first layer gets them, scaled where a family scales
        self.embedding = NumberEmbedding(target.hidden_size, encoding if mode.reads else None, like=like)
        self.heat = nn.Parameter(torch.zeros(len(HEATS), target.hidden_size)) if any_temperature else None
        self.adapter = GatedLoRA.for_all_layers(target.model, rank, scale * rank)
        size, eps = target.hidden_size, float(getattr(target.config, "rms_norm_eps", 1e-6))
        inner = sampler_size or size
        self.sampler = ChainedSampler(size, inner, eps) if sampler == "chain" else None
        head = DraftHead(target, vocabulary, "target", ids) if sampler == "chain" else None
        self.head = head if head is not None and head.reduced else None
        self.net: FusedNet | None = None
        self.join: SlotJoin | None = None
        if sampler == "eagle":
            self.net = Eagle3(vocabulary=vocabulary).network(target, ids)
            self.join = SlotJoin(size, inner, eps)
        self.heats: Tensor
        self.register_buffer("heats", torch.tensor(HEATS), persistent=False)
        self.calibration = Calibration(slots - mode.silent)
        self.agreement = Agreement()

    def embed(self, u: Tensor, temperature: Tensor) -> Tensor:
        """Input embeddings of slots that carry u [..., n] at a temperature [...]: [..., n, H] float32."""
        embedded: Tensor = self.embedding(u)
        if self.heat is None:
            return embedded
        at = self.heats.float()
        place = temperature.float().clamp(HEATS[0], HEATS[-1])
        above = torch.searchsorted(at, place.contiguous()).clamp_min(1)
        share = ((place - at[above - 1]) / (at[above] - at[above - 1]))[..., None]
        heat = self.heat.float()
        added: Tensor = heat[above - 1] * (1 - share) + heat[above] * share
        return embedded + added[..., None, :]
