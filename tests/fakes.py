"""Methods of a benchmark that take scripted time and say scripted things, on a clock nobody waits for. Not a test."""

from outpace.bench.methods import Method
from outpace.bench.trials import Answer, Trial


class FakeClock:
    """Seconds that pass when told to; every look costs a microsecond, as a real one's would."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Scripted(Method):
    """Answers with a fixed text in a fixed time.

    ms(request) -> milliseconds per token; tokens(request) -> ids; rounds: tokens of each round, cyclically.
    """

    kind = "engine"

    def __init__(self, name, clock, *, ms=lambda request: 10.0, tokens=lambda request: range(20, 30), per_round=1):
        self.name, self.clock, self.ms, self.tokens, self.per_round = name, clock, ms, tokens, per_round
        self.calls = 0
        self.forgotten = 0

    def forget(self):
        self.forgotten += 1

    def answer(self, jobs, clock=None):
        self.calls += 1
        answers = []
        started = self.clock.now
        for job in jobs:
            request = job.settings.request
            tokens = tuple(self.tokens(request))[: job.settings.max_new_tokens]
            self.clock.sleep(len(tokens) * self.ms(request) / 1e3)
            total = 1e3 * (self.clock.now - started)
            passes = -(-len(tokens) // self.per_round)
            rounds = tuple(
                (self.per_round, self.per_round - 1, self.per_round - 1, self.per_round - 1) for _ in range(passes)
            )
            answers.append(
                Answer(
                    tokens=tokens, emitted=len(tokens), prompt_tokens=len(job.ids), text="hi", finish_reason="length",
                    ttft_ms=self.ms(request), total_ms=total, rounds=rounds, passes=passes, guarantee="path",
                )
            )  # fmt: skip
        total = 1e3 * (self.clock.now - started)
        rounds = sum(a.passes for a in answers)
        split = {"prefill": 0.0, "draft": 0.1 * total, "pass": 0.8 * total, "walk": 0.05 * total, "other": 0.05 * total}
        return Trial(answers=tuple(answers), total_ms=total, split_ms=split, rounds=rounds)


def row(result, name, cell=0):
    return next(method for method in result["cells"][cell]["methods"] if method["name"] == name)
