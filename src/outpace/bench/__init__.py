"""Benchmarks: suites, paired runs, measures, reports. Knows no method; whatever is registered can be measured."""

from outpace.bench.config import STOCK, BenchConfig
from outpace.bench.derive import derive
from outpace.bench.ledger import Ledger, set_aside
from outpace.bench.runner import Watch
from outpace.bench.session import Widened, bench, bench_endpoints
from outpace.bench.suites import Question, Suite, load_suite, select
from outpace.bench.watchdog import LastResort

__all__ = [
    "STOCK",
    "BenchConfig",
    "LastResort",
    "Ledger",
    "Question",
    "Suite",
    "Watch",
    "Widened",
    "bench",
    "bench_endpoints",
    "derive",
    "load_suite",
    "select",
    "set_aside",
]
