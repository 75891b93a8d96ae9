"""Which options of parallel token prediction go together: every refusal says what to pass instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from outpace.drafters.ptp.sampler import SamplerName
from outpace.errors import ConfigError
from outpace.target import Kernel

if TYPE_CHECKING:
    from outpace.drafters.ptp.drafter import Ptp

ReadMode = Literal["auto", "argmax", "path"]


def check_options(drafter: Ptp) -> None:
    """Refuse options that cannot be, or not together.

    Raises:
        ConfigError: saying which, and what to pass instead.
    """
    if drafter.slots < 2 or drafter.rank < 1:
        raise ConfigError(f"slots must be at least 2 and rank at least 1, got {drafter.slots} and {drafter.rank}")
    if drafter.temperature <= 0:
        raise ConfigError(
            "temperature of the preset must be above 0: greedy tokens do not depend on numbers, so nothing can be "
            "learned from them; mode='mask' drafts for greedy decoding"
        )
    if drafter.branches < 1 or min(drafter.budget, drafter.nodes, drafter.draft_len) < 0:
        raise ConfigError(
            f"branches must be at least 1, budget, nodes and draft_len at least 0; got {drafter.branches}, "
            f"{drafter.budget}, {drafter.nodes} and {drafter.draft_len}"
        )
    if drafter.draft_len > drafter.slots - drafter.shape.silent:
        raise ConfigError(
            f"draft_len={drafter.draft_len} goes beyond what {drafter.slots} slots were trained for; pass at most "
            f"{drafter.slots - drafter.shape.silent}, or train with slots={drafter.draft_len + drafter.shape.silent}"
        )
    if drafter.density <= 0 or drafter.beta <= 0:
        raise ConfigError(f"density and beta must be above 0, got {drafter.density} and {drafter.beta}")
    if drafter.inverse and drafter.mode != "categorical":
        raise ConfigError(f"inverse training needs mode='categorical', whose slots have laws; got {drafter.mode!r}")
    if min(drafter.sampler_size, drafter.vocabulary, drafter.bare) < 0:
        raise ConfigError(
            "sampler_size and vocabulary are 0 (the target's) or more, bare 0 or more; got "
            f"{drafter.sampler_size}, {drafter.vocabulary} and {drafter.bare}"
        )
    if drafter.sampler not in get_args(SamplerName):
        raise ConfigError(
            f"sampler must be one of {', '.join(get_args(SamplerName))}, got {drafter.sampler!r} (true was the chain)"
        )
    if drafter.sampler == "none" and (drafter.sampler_size or drafter.vocabulary or drafter.bare):
        raise ConfigError(
            "sampler_size, vocabulary and bare belong to a sampler; pass sampler=chain with them, or sampler=eagle "
            "with the first two"
        )
    if drafter.sampler != "none" and drafter.inverse:
        raise ConfigError("inverse training finds numbers under laws of slots without a sampler; leave one away")
    if drafter.sampler == "eagle" and (drafter.mode == "one_hot" or drafter.bare):
        raise ConfigError(
            "sampler='eagle' has a law of its own at every depth and asks none of the slots: pass mode=mask or "
            "mode=categorical, and leave bare away"
        )
    if drafter.attention not in ("auto", *get_args(Kernel)):
        raise ConfigError(f"attention must be auto, dense or fused, got {drafter.attention!r}")
    if drafter.read not in get_args(ReadMode):
        raise ConfigError(f"read must be one of {', '.join(get_args(ReadMode))}, got {drafter.read!r}")
    if drafter.read == "path" and not drafter.shape.law:
        raise ConfigError("read='path' draws from laws, but slots of mode 'one_hot' predict no law; use 'argmax'")
    _ = drafter.preset  # which checks itself
