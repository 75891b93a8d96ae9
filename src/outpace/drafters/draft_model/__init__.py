"""A smaller language model drafts for the target, through a cache of its own.

Source: Leviathan et al. 2023; Chen et al. 2023. Vocabularies that differ are joined token by token (Timor et al. 2025).
"""

from outpace.drafters.draft_model.drafter import DraftModel
from outpace.drafters.draft_model.vocabulary import VocabularyMap

__all__ = ["DraftModel", "VocabularyMap"]
