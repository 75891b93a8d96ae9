"""Drafters: one folder per method, one line each in the registry table."""

from outpace.drafters.base import Context, Drafter, Needs, RequestContext, TokenDrafter
from outpace.drafters.registry import DRAFTERS, drafter_names, make_drafter

__all__ = [
    "DRAFTERS",
    "Context",
    "Drafter",
    "Needs",
    "RequestContext",
    "TokenDrafter",
    "drafter_names",
    "make_drafter",
]
