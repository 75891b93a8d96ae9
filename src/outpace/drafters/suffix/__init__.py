"""Suffix decoding: draft along the most frequent continuation of the longest matching suffixes, as far as it pays.

Source: Oliaro et al. 2024, "SuffixDecoding". Counts live in a trie of bounded depth over the request's own text and,
if asked for, over the texts of earlier requests.
"""

from outpace.drafters.suffix.drafter import Suffix
from outpace.drafters.suffix.trie import SuffixTrie

__all__ = ["Suffix", "SuffixTrie"]
