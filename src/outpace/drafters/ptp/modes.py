"""The three ways slots can be read, and what stands where in a window of them.

A window starts at index i, the index of the first token it has to guess. Its slots j = 0, 1, ... see the tokens before
i and the slots before and including j.

| mode        | slot j carries | and predicts  | as                 | read by             | paper       |
| ----------- | -------------- | ------------- | ------------------ | ------------------- | ----------- |
| one_hot     | u of i + j     | token i + j   | a function's value | arg-max             | O-PTP, th. 1 |
| categorical | u of i + j     | token i + j+1 | a law              | draw with u of i+j+1 | C-PTP, th. 2 |
| mask        | nothing        | token i + j+1 | a law (a marginal) | arg-max or draw      | baseline    |

The law of token i itself is the model's own, at the last real row; when a window is used, token i is therefore known,
and drafts begin with token i + 1. A slot's position is that of the row that would predict its token in plain decoding:
the token's index less one. Source: Draxler et al. 2025, "Parallel Token Prediction for Language Models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from outpace.errors import ConfigError, suggestion

ModeName = Literal["one_hot", "categorical", "mask"]


@dataclass(frozen=True, slots=True)
class Mode:
    """What distinguishes the modes.

    Attributes:
        lead: slot j predicts token i + j + lead.
        reads: whether slots carry random numbers.
        law: whether predictions are laws; otherwise values of a function, and their softmax a confidence.
    """

    lead: int
    reads: bool
    law: bool

    @property
    def silent(self) -> int:
        """Slots at the head of a group that give no draft: the one that predicts token i, known by then."""
        return 1 - self.lead


MODES: Final[dict[str, Mode]] = {
    "one_hot": Mode(lead=0, reads=True, law=False),
    "categorical": Mode(lead=1, reads=True, law=True),
    "mask": Mode(lead=1, reads=False, law=True),
}


def find_mode(name: str) -> Mode:
    """The mode of that name.

    Raises:
        ConfigError: on an unknown name.
    """
    if name not in MODES:
        raise ConfigError(f"unknown mode {name!r} of parallel token prediction; {suggestion(name, MODES)}")
    return MODES[name]
