"""Laws: noise, the law of the next token, drafts, and the rules that turn drafts into tokens.

Imports torch and numpy. Knows no models, caches or text (beyond a `decode` function it is handed).
"""

from outpace.laws.dice import NOISES, Dice, Key, NoiseDice, NoiseKind, draw
from outpace.laws.inverse import infer_numbers, intervals, place_numbers
from outpace.laws.noise import Noise, Stream
from outpace.laws.rules import GUARANTEES, RULES, Guarantee, Rule, RuleName, Walk, find_rule
from outpace.laws.settings import Processor, Settings, check_names
from outpace.laws.stopping import Decode, IncrementalText, Stopping, StopReason, Verdict
from outpace.laws.tree import Draft, DraftKind, Tree
from outpace.laws.warp import Sampler, warp

__all__ = [
    "GUARANTEES",
    "NOISES",
    "RULES",
    "Decode",
    "Dice",
    "Draft",
    "DraftKind",
    "Guarantee",
    "IncrementalText",
    "Key",
    "Noise",
    "NoiseDice",
    "NoiseKind",
    "Processor",
    "Rule",
    "RuleName",
    "Sampler",
    "Settings",
    "StopReason",
    "Stopping",
    "Stream",
    "Tree",
    "Verdict",
    "Walk",
    "check_names",
    "draw",
    "find_rule",
    "infer_numbers",
    "intervals",
    "place_numbers",
    "warp",
]
