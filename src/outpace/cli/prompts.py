"""Prompts that come with outpace: a summary, a code edit and a free question. Our own words; short on purpose."""

from __future__ import annotations

from typing import Final, NamedTuple


class Sample(NamedTuple):
    """A prompt and the kind of work it stands for."""

    kind: str
    text: str


_ARTICLE: Final = (
    "The town of Lower Marsh has reopened its tidal mill after eleven years of repair. The mill, built in 1790, "
    "grinds flour with the power of the ebb: a pond fills at high water, and its gates let the water out through a "
    "wheel when the sea has fallen. Volunteers rebuilt the wheel from larch and replaced four hundred stones of the "
    "dam. The miller, Ada Finch, says that the mill can grind for about three hours after each high tide, which is "
    "enough for two hundred kilograms of flour a day. The flour is sold in the town's bakery, and the money pays for "
    "the upkeep of the dam. School classes may visit the mill on Thursdays."
)

_CODE: Final = """def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

def variance(values):
    center = mean(values)
    total = 0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)"""

SAMPLES: Final[tuple[Sample, ...]] = (
    Sample("summary", f"Summarize this article in three sentences.\n\n{_ARTICLE}"),
    Sample("code edit", f"Rename `values` to `numbers` everywhere in this code. Answer with the code only.\n\n{_CODE}"),
    Sample("free question", "Why does the sea look blue on some days and grey on others?"),
)
