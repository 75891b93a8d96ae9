"""Proof by exhaustion that a rule leaves the target's law alone.

Every draft, every answer of chance and every round is enumerated in float64 on a small vocabulary, with the very code
that decodes; the law of what comes out is compared with the target's. No sampling, no tolerance beyond rounding.
"""

from outpace.laws.certificate.cases import CASES, Case, Finding, certify, certify_broken, expected_emitted
from outpace.laws.certificate.explore import Explorer, explore
from outpace.laws.certificate.models import TableModel

__all__ = [
    "CASES",
    "Case",
    "Explorer",
    "Finding",
    "TableModel",
    "certify",
    "certify_broken",
    "expected_emitted",
    "explore",
]
