"""The engine: the round, ragged batches, streaming, statistics."""

from outpace.engine.audit import Auditor, AuditReport, Difference, Finding, audit
from outpace.engine.engine import Engine, Progress
from outpace.engine.output import Chunk, Output, Round, Stats, total
from outpace.engine.pace import Pace
from outpace.engine.prompts import Prompt, encode
from outpace.engine.round import Timing, play_round

__all__ = [
    "AuditReport",
    "Auditor",
    "Chunk",
    "Difference",
    "Engine",
    "Finding",
    "Output",
    "Pace",
    "Progress",
    "Prompt",
    "Round",
    "Stats",
    "Timing",
    "audit",
    "encode",
    "play_round",
    "total",
]
