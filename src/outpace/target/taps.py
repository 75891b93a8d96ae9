"""Names of the hidden states that can be captured in a pass.

Never a bare layer number: two conventions coexist in the field (the state that enters layer k, the state that leaves
it), and a drafter trained with one and fed with the other is silently bad.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from outpace.errors import ConfigError

TOP_TAPS: Final = frozenset({"embed", "pre_norm", "post_norm"})


def check_taps(taps: Collection[str], layers: int) -> frozenset[str]:
    """The taps as a set.

    Raises:
        ConfigError: on a name that is not "embed", "in:k", "out:k" (0 <= k < layers), "pre_norm" or "post_norm".
    """
    for tap in taps:
        side, _, number = tap.partition(":")
        if tap in TOP_TAPS or (side in ("in", "out") and number.isdigit() and int(number) < layers):
            continue
        raise ConfigError(
            f"unknown tap {tap!r}; taps are 'embed', 'in:k' and 'out:k' with 0 <= k < {layers} (what enters and what "
            "leaves layer k), 'pre_norm' and 'post_norm'"
        )
    return frozenset(taps)
