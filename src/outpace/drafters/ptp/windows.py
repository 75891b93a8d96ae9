"""Windows of slots behind packed documents, for training: where they start, what their slots carry, see and predict.

B rows of T tokens, W windows of N slots in each row; slot j of window w is row w * N + j behind the T real ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from outpace.target import Spans

if TYPE_CHECKING:
    from torch import Tensor

    from outpace.drafters.ptp.modes import Mode


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of one batch.

    Attributes:
        starts: [B, W] int64, index in its row of the first token a window has to guess, rising.
        real: [B, W] bool; False where a row had fewer places to start than windows.
        slots: N.
        mode: what slots carry and predict.
    """

    starts: Tensor
    real: Tensor
    slots: int
    mode: Mode

    @classmethod
    def sample(
        cls, places: Tensor, count: int, slots: int, mode: Mode, generator: torch.Generator | None = None
    ) -> Windows:
        """`count` starts per row without replacement, uniform over places [B, T] bool. Does not wait for the device."""
        chance = torch.rand(places.shape, device=places.device, generator=generator).masked_fill(~places, -1.0)
        drawn, starts = chance.topk(min(count, places.shape[1]), dim=1)
        starts, order = starts.sort(dim=1)
        return cls(starts, (drawn >= 0).gather(1, order), slots, mode)

    def indices(self, shift: int, longest: int) -> Tensor:
        """[B, W, N] index of the token `shift` places behind the one that slot j stands for, kept within the row."""
        ahead = torch.arange(self.slots, device=self.starts.device) + shift
        return (self.starts[..., None] + ahead).clamp(0, longest - 1)

    def fronts(self, length: int) -> Tensor:
        """[B, W] the row in front of each window, numbered through a batch of rows of `length` tokens.

        The last row where there is no real window: none begins behind it.
        """
        row = torch.where(self.real, self.starts - 1, length - 1)
        return row + length * torch.arange(row.shape[0], device=row.device)[:, None]

    def positions(self, positions: Tensor) -> Tensor:
        """[B, W * N] position ids of the slots; positions: [B, T], of the real rows."""
        ahead = torch.arange(self.slots, device=positions.device) + self.mode.lead - 1
        return (positions.gather(1, self.starts)[..., None] + ahead).clamp_min(0).flatten(1)

    def lives(self, documents: Tensor, counts: Tensor) -> Tensor:
        """[B, W, N] bool: slots whose own token and all tokens of the window up to the predicted one count.

        counts: [B, T] bool, tokens that may be targets and have a number. What comes after a token without a number, or
        after the document's end, depends on things no slot has seen.
        """
        longest = documents.shape[1]
        document = documents.gather(1, self.starts)[..., None]

        def good(shift: int) -> Tensor:
            index = self.indices(shift, longest)
            flat = index.flatten(1)
            inside = self.starts[..., None] + torch.arange(self.slots, device=index.device) + shift < longest
            same = documents.gather(1, flat).view_as(index) == document
            return inside & same & counts.gather(1, flat).view_as(index)

        here = good(0) & good(self.mode.lead) & self.real[..., None]
        return torch.cumprod(here.to(torch.int8), 2).bool()

    def spans(self, documents: Tensor) -> Spans:
        """What slots see: real rows of their document before the start, and their own window up to themselves."""
        return Spans.of(self.starts, documents)
