"""What to tell somebody who decodes otherwise than a drafter's numbers were made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from outpace.drafters.ptp.calibration import Agreement
    from outpace.laws import Settings

_NAMES: Final = ("temperature", "top_k", "top_p", "min_p")


def mismatch(
    asked: Settings, preset: Settings, *, reads: bool, alone: bool, any_temperature: bool, agreement: Agreement
) -> str | None:
    """A warning, or None where nothing is amiss.

    asked: of a request. preset: of training. reads: whether slots carry numbers. alone: whether drafts come from slots
    alone. any_temperature: whether they learned from text of all of them.
    """
    if asked.noise == "gumbel" and asked.temperature > 0 and reads:
        cost = "hardly a draft will hit" if alone else "no slots are run, and EAGLE-3's network drafts without them"
        return (
            "drafter 'ptp' reads numbers of the inverse CDF, and noise='gumbel' decides tokens otherwise: "
            f"{cost} (the text is not affected). Use noise='uniform', or another drafter"
        )
    wanted = {name: getattr(asked, name) for name in _NAMES}
    trained = {name: getattr(preset, name) for name in _NAMES}
    if any_temperature:
        trained["temperature"] = asked.temperature
    if wanted == trained:
        return None
    truncated = asked.top_k or asked.top_p or asked.min_p
    share = None if truncated else agreement.share(asked.temperature)
    cost = (
        "how many was not measured"
        if share is None
        else f"a number decides the same token under both {100 * share:.0f} % of the time"
    )
    told = ", ".join(f"{name}={value}" for name, value in wanted.items() if value is not None)
    made = ", ".join(f"{name}={value}" for name, value in trained.items() if value is not None)
    return (
        f"drafter 'ptp' was trained for sampling with {made}, and is asked to draft for {told}: fewer drafts will hit "
        f"({cost}); the text is not affected. Train one for these settings, or sample as it was trained"
    )
