"""Lookahead decoding: Jacobi iterates run beside the verification and leave n-grams to try.

Source: Fu et al. 2024, "Break the sequential dependency of LLM inference using lookahead decoding". The window's rows
are scouts, so verification never sees them; candidates share prefixes in a tree; a full match earns the bonus token;
the window moves on by all emitted tokens where it foresaw them.
"""

from outpace.drafters.lookahead.drafter import Lookahead
from outpace.drafters.lookahead.window import NgramPool, Window

__all__ = ["Lookahead", "NgramPool", "Window"]
