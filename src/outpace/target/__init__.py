"""The target: a Hugging Face causal language model that can run a block of rows behind a ragged cache."""

from outpace.target.adapters import GatedLoRA
from outpace.target.behind import Kernel, Reading, Spans, choose_kernel, read, run_behind
from outpace.target.block import Block, Readout, Scouts
from outpace.target.cache import STRICT_ALIGN, BlockCache, CacheIntegrityError
from outpace.target.families import FAMILIES, Family
from outpace.target.loading import Tokenizer
from outpace.target.model import Passing, PathName, Target
from outpace.target.packed import run_packed
from outpace.target.tuned import save_target, tuned_by, tuned_copy

__all__ = [
    "FAMILIES",
    "STRICT_ALIGN",
    "Block",
    "BlockCache",
    "CacheIntegrityError",
    "Family",
    "GatedLoRA",
    "Kernel",
    "Passing",
    "PathName",
    "Reading",
    "Readout",
    "Scouts",
    "Spans",
    "Target",
    "Tokenizer",
    "choose_kernel",
    "read",
    "run_behind",
    "run_packed",
    "save_target",
    "tuned_by",
    "tuned_copy",
]
