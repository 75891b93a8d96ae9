"""The run as a whole on scripted methods: figures by hand, broken methods, interruptions, bad disks."""

import json
import random
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace

import pytest

from fakes import Scripted, row
from outpace import Engine
from outpace.bench import BenchConfig, Ledger, bench, derive
from outpace.bench.config import STOCK
from outpace.bench.ledger import set_aside
from outpace.bench.methods import PLAIN, EngineMethod
from outpace.bench.runner import RETAKES, plan
from outpace.bench.watchdog import LastResort, Overdue, deadline
from outpace.drafters import TokenDrafter, make_drafter
from outpace.drafters.shapes import keep_shape
from outpace.errors import ConfigError, ResultError
from outpace.laws import Tree
from tiny import learned

CONFIG = BenchConfig(drafters=(), stock=(), max_new_tokens=10, repetitions=2, bootstrap=200, warm_up_runs=0)


def changed(**values):
    return BenchConfig(**{**CONFIG.as_dict(), "drafters": (), "stock": (), **_tuples(values)})


def _tuples(values):
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


class TestFigures:
    def test_by_hand(self, play, suite, clock):
        """Chat runs at twice, code at four times plain's speed; one text is emitted two tokens a round."""
        code = {3, 4, 5}
        plain = Scripted(PLAIN, clock)
        fast = Scripted("fast", clock, ms=lambda r: 2.5 if r in code else 5.0, per_round=2)
        result = play([plain, fast], CONFIG, suite, clock)
        found = row(result, "fast")
        speeds = {task["task"]: task["speedup"]["ratio"] for task in found["tasks"]}
        assert speeds == pytest.approx({"chat": 2.0, "code": 4.0})
        # four chat prompts (one has two turns) and three of code: the geometric mean over seven
        assert found["headline"]["ratio"] == pytest.approx((2.0**4 * 4.0**3) ** (1 / 7))
        assert found["headline"]["low"] < found["headline"]["ratio"] < found["headline"]["high"]
        assert found["headline"]["claim"] == "faster"
        assert found["emitted_per_round"] == 2.0
        assert found["accepted_per_drafted"] == 1.0
        # 40 chat tokens and 30 of code: 0.7 s plainly, 0.2 + 0.075 s fast
        assert found["speedup_of_totals"] == pytest.approx(0.7 / 0.275)
        assert found["tokens_per_s"] == pytest.approx(70 / 0.275)
        assert found["round_ms"] == pytest.approx(2 * 275 / 70)
        assert found["split_ms_per_round"]["pass"] == pytest.approx(0.8 * found["round_ms"])
        assert found["cost"] == pytest.approx(found["round_ms"] / 10.0)
        assert row(result, PLAIN)["headline"]["ratio"] == 1.0
        assert result["coverage"]["complete"]
        assert result["coverage"]["questions"] == 6

    def test_the_same_twice_is_no_difference(self, play, suite, clock):
        result = play([Scripted(PLAIN, clock), Scripted("again", clock)], CONFIG, suite, clock)
        found = row(result, "again")["headline"]
        assert (found["low"], found["high"]) == pytest.approx((1.0, 1.0), abs=1e-3)

    def test_a_drafter_that_sleeps_loses_what_it_sleeps(self, play, suite, clock):
        result = play([Scripted(PLAIN, clock), Scripted("sleepy", clock, ms=lambda r: 12.5)], CONFIG, suite, clock)
        found = row(result, "sleepy")["headline"]
        assert found["ratio"] == pytest.approx(0.8)
        assert found["claim"] == "slower"

    def test_the_median_of_repetitions_counts(self, play, suite, clock):
        """One hiccup in three repetitions changes nothing."""
        fast = Scripted("fast", clock)
        fast.ms = lambda r: 500.0 if fast.calls % 3 == 1 and fast.calls < 8 else 5.0
        result = play([Scripted(PLAIN, clock), fast], changed(repetitions=3), suite, clock)
        assert row(result, "fast")["headline"]["ratio"] == pytest.approx(2.0)

    def test_cold_forgets_before_every_trial_and_warm_never(self, play, suite, clock):
        for state, times in (("cold", 14), ("warm", 0)):
            method = Scripted("learner", clock)
            play([Scripted(PLAIN, clock), method], changed(state=state), suite, clock)
            assert method.forgotten == times

    def test_a_trial_that_captures_graphs_is_taken_again(self, play, suite, clock):
        class Capturing(Scripted):
            def answer(self, jobs, clock=None):
                trial = super().answer(jobs, clock)
                return replace(trial, captures=self.left.pop() if self.left else 0)

        slow_at_first = Capturing("b", clock, ms=lambda request: 50.0 if slow_at_first.left else 5.0)
        slow_at_first.left = [1, 2]
        never_steady = Capturing("c", clock)
        never_steady.left = [1] * 1000
        result = play([Scripted(PLAIN, clock), slow_at_first, never_steady], changed(repetitions=1), suite, clock)
        prompts = sum(len(question.turns) for question in suite.questions)
        assert slow_at_first.calls == prompts + 2
        assert slow_at_first.forgotten == slow_at_first.calls
        assert row(result, "b")["measured"]["ratio"] == pytest.approx(2.0)
        assert never_steady.calls == prompts * (1 + RETAKES)
        assert result["harness"]["retakes"] == 2 + RETAKES * prompts
        assert result["harness"]["capturing"] == prompts

    def test_texts_that_loop_are_no_part_of_the_headline(self, play, suite, clock):
        def tokens(request):
            return [7, 8] * 20 if request == 1 else range(20, 37)

        plain = Scripted(PLAIN, clock, tokens=tokens)
        fast = Scripted("fast", clock, tokens=tokens, ms=lambda r: 0.1 if r == 1 else 5.0)
        result = play([plain, fast], changed(max_new_tokens=40), suite, clock)
        assert result["cells"][0]["looping"] == 1
        assert row(result, "fast")["headline"]["ratio"] == pytest.approx(2.0)
        assert row(result, "fast")["headline"]["prompts"] == 6
        looped = Scripted(PLAIN, clock, tokens=lambda r: [7, 8] * 20)
        result = play(
            [looped, Scripted("x", clock, tokens=lambda r: [7, 8] * 20)], changed(max_new_tokens=40), suite, clock
        )
        assert row(result, "x")["headline"] is None
        assert row(result, "x")["refusal"] == "every text loops"


class TestBroken:
    def test_another_text_is_found_and_gets_no_headline(self, play, suite, clock, spoken):
        """Plain says what the model says; the other method says a token the model would never take."""
        engine = Engine(spoken)

        def right(request):
            return said[request]

        def wrong(request):
            return [*said[request][:4], (said[request][4] + 1) % 40, *said[request][5:]]

        config = changed(modes=["fixed"])
        from outpace.bench.parity import settings_of
        from outpace.bench.suites import select

        cell = plan(config, suite)[0].cell
        said = {
            q.number: engine.generate([{"role": "user", "content": q.turns[0]}], settings_of(cell, config, q.number))[
                0
            ].tokens
            for q in select(suite).questions
        }
        one_turn = type(suite)(suite.name, tuple(q for q in suite.questions if len(q.turns) == 1), "", "")
        methods = [Scripted(PLAIN, clock, tokens=right), Scripted("wrong", clock, tokens=wrong, ms=lambda r: 1.0)]
        result = play([*methods, Scripted("short", clock, tokens=lambda r: right(r)[:9])], config, one_turn, clock)
        for name in ("wrong", "short"):
            found = row(result, name)
            assert found["headline"] is None
            assert "10 of 10 answers differ from plain decoding beyond near ties" in found["refusal"]
            assert found["measured"]["ratio"] > 0
        assert row(result, "wrong")["parity"]["examples"][0]["difference"]["position"] == 4
        assert row(result, "short")["parity"]["examples"][0]["difference"]["test"] == "ending"
        assert row(result, PLAIN)["parity"]["equal"] == 10

    def test_a_drafter_that_crashes_at_round_50(self, spoken, suite):
        class Crashing(TokenDrafter):
            name = "crashing"
            rounds = 0

            def guess(self, request):
                self.rounds += 1
                if self.rounds == 50:
                    raise ValueError("round 50 is one too many")
                return Tree.chain([request.root])

        config = changed(max_new_tokens=20, modes=["fixed"])
        result, told = run_real(spoken, config, suite, {"crashing": Crashing, "echo": Echo})
        found = row(result, "crashing")
        assert found["failures"]["kinds"] == ["crashed"]
        assert found["failures"]["reason"] == "ValueError: round 50 is one too many"
        assert 1 <= found["failures"]["count"] <= 3
        assert found["headline"] is None
        assert "trials failed: ValueError" in found["refusal"]
        assert found["measured"] is not None  # what it finished before is kept
        assert row(result, "echo")["failures"]["count"] == 0
        assert row(result, "echo")["trials"] == 14
        assert any("round 50" in line for line in told)

    @pytest.mark.parametrize("stubborn", [False, True])
    def test_a_drafter_that_hangs_is_cut(self, spoken, suite, stubborn, monkeypatch):
        monkeypatch.setattr("outpace.bench.watchdog.AGAIN_S", 0.2)

        class Hanging(TokenDrafter):
            name = "hanging"

            def guess(self, request):
                while True:
                    try:
                        time.sleep(60)
                    except Overdue:
                        if not stubborn or random.random() < 0.5:
                            raise

        config = changed(max_new_tokens=5, limit_s=0.3, max_failures=2, modes=["fixed"])
        result, _ = run_real(spoken, config, suite, {"hanging": Hanging, "echo": Echo})
        found = row(result, "hanging")
        assert found["failures"] == {
            "count": 2, "of": 2, "kinds": ["cut"], "skipped": 0, "reason": "cut after 0 s, the limit of a trial",
        }  # fmt: skip
        assert found["refusal"].startswith("no trial ended")
        assert row(result, "echo")["headline"] is not None

    def test_a_drafter_that_cannot_be_made_is_reported(self, spoken, suite):
        def broken():
            raise ConfigError("no weights here")

        result, _ = run_real(spoken, changed(modes=["fixed"]), suite, {"broken": broken})
        assert "no weights here" in row(result, "broken")["refusal"]
        assert row(result, PLAIN)["trials"] == 14

    def test_without_a_baseline_the_run_ends(self, play, suite, clock):
        class Dead(Scripted):
            def answer(self, jobs, clock=None):
                raise RuntimeError("out of memory")

        result = play([Dead(PLAIN, clock), Scripted("other", clock)], CONFIG, suite, clock)
        assert result["coverage"]["words"] == "stopped because plain decoding itself failed"
        assert "no trial ended: RuntimeError: out of memory" in row(result, PLAIN)["refusal"]

    def test_a_prompt_too_long_for_the_model_is_skipped(self, spoken, write_suite):
        suite = write_suite({"chat": [["a" * 3000], ["abc"]]})
        result, _ = run_real(spoken, changed(modes=["fixed"]), suite, {"echo": Echo})
        assert row(result, "echo")["failures"] == {"count": 0, "of": 2, "kinds": [], "reason": None, "skipped": 2}
        assert row(result, "echo")["trials"] == 2


class Echo(TokenDrafter):
    name = "echo"

    def guess(self, request):
        return Tree.chain([request.root])


def run_real(target, config, suite, drafters):
    """Plain decoding and some drafter classes in real engines."""
    from outpace.bench.runner import Watch
    from outpace.bench.session import _Run

    told = []
    methods = [EngineMethod(target, PLAIN, lambda: None, config)]
    methods += [EngineMethod(target, name, make, config) for name, make in drafters.items()]
    return _Run(target, methods, config, suite, Ledger(), Watch(tell=told.append), None).result(), told


class TestReal:
    def test_registered_drafters_stock_and_ceilings(self, spoken, suite):
        config = BenchConfig(
            drafters=("prompt_lookup:min_ngram=1", "suffix"), stock=STOCK, ceilings=True, temperatures=(0.0, 0.9),
            batch_sizes=(1, 2), modes=("fixed",), max_new_tokens=12, repetitions=1, bootstrap=100, replays=2,
            warm_up_runs=0,
        )  # fmt: skip
        result = bench(spoken, config, suite)
        assert len(result["cells"]) == 4
        for cell in result["cells"]:
            names = {method["name"] for method in cell["methods"]}
            assert (STOCK[1] in names) == (cell["batch"] == 1)
            for method in cell["methods"]:
                assert method["parity"]["differs"] == method["parity"]["not audited"] == 0
                if method["kind"] == "engine":
                    assert method["parity"]["not comparable"] == 0
                    assert method["guarantee"] == "path"
                assert method["emitted"] == 12 * cell["batch"] * method["trials"]
                assert method["finish_reasons"] == {"length": method["trials"] * cell["batch"]}
        best = row(result, "ceiling: always right")
        worst = row(result, "ceiling: never right")
        assert worst["emitted_per_round"] == 1.0
        assert best["emitted_per_round"] > 3
        assert {r["temperature"] for r in result["replays"]} <= {0.0, 0.9}
        assert len(result["replays"]) == 2
        for shown in result["replays"][0]["answers"]:
            assert shown["rounds"]

    def test_a_result_says_how_a_learned_drafter_drafted(self, spoken, suite, tmp_path, monkeypatch):
        """A shape tuned for this device would otherwise be nowhere in it."""
        monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
        learned(spoken, "eagle3:draft_len=3,branches=2,nodes=5,vocabulary=0").save_pretrained(tmp_path / "mine")
        chosen = {"branches": 1, "draft_len": 2, "nodes": 2}
        keep_shape(tmp_path / "mine", spoken, {"options": chosen})
        config = BenchConfig(drafters=(), stock=(), max_new_tokens=6, repetitions=1, modes=("fixed",), replays=0)
        made = {"mine": lambda: make_drafter(str(tmp_path / "mine"))}
        result, _ = run_real(spoken, config, suite, made)
        assert result["decoding"]["mine"] == {**chosen, "draw": "path", "coupling": 0.6}

    def test_replays_say_what_the_timed_run_said(self, spoken, suite):
        config = BenchConfig(
            drafters=("prompt_lookup:min_ngram=1",), stock=(), max_new_tokens=20, repetitions=1, modes=("fixed",)
        )
        ledger = Ledger()
        result = bench(spoken, config, suite, ledger)
        for shown in result["replays"]:
            timed = next(r for r in ledger.records if r.unit == (shown["question"],) and r.turn == 0)
            answer = timed.trial.answers[0]
            for replayed in shown["answers"]:
                assert tuple(replayed["tokens"]) == answer.tokens
                text = "".join(one["accepted"] + one["own"] for one in replayed["rounds"])
                assert text == answer.text
                assert any(one["drafted"] for one in replayed["rounds"])

    def test_later_turns_hold_plain_decodings_answer_or_ones_own(self, spoken, suite):
        for turns in ("plain", "own"):
            ledger = Ledger()
            config = BenchConfig(
                drafters=("suffix",), stock=(), max_new_tokens=8, repetitions=2, turns=turns, replays=0, warm_up_runs=0
            )
            bench(spoken, config, suite, ledger)
            names = {name for name in ledger.prompts if "/1" in name}
            assert len(names) == (1 if turns == "plain" else 2)
            said = next(r for r in ledger.records if r.method == PLAIN and len(r.unit) == 1 and r.unit[0] == "0")
            ids = ledger.prompts[next(iter(names))]
            assert spoken.tokenizer.decode(ids) == f"[hello][{said.trial.answers[0].text}][again]"


class Stopping(Scripted):
    """Raises at its n-th answer, once."""

    def __init__(self, *arguments, at, error=KeyboardInterrupt, **options):
        super().__init__(*arguments, **options)
        self.at, self.error = at, error

    def answer(self, jobs, clock=None):
        trial = super().answer(jobs, clock)
        if self.calls == self.at:
            raise self.error
        return trial


class TestInterruption:
    @pytest.mark.parametrize("at", [1, 4, 9])
    def test_a_run_goes_on_where_it_was_stopped(self, play, suite, clock, tmp_path, at):
        path = tmp_path / "r.jsonl"
        whole = play([Scripted(PLAIN, clock), Scripted("fast", clock, ms=lambda r: 5.0)], CONFIG, suite, clock)
        stopping = Stopping("fast", clock, ms=lambda r: 5.0, at=at)
        part = play([Scripted(PLAIN, clock), stopping], CONFIG, suite, clock, Ledger(path))
        assert not part["coverage"]["complete"]
        assert "interrupted" in part["coverage"]["words"]
        plain = Scripted(PLAIN, clock)
        result = play([plain, Scripted("fast", clock, ms=lambda r: 5.0)], CONFIG, suite, clock, Ledger(path))
        assert plain.calls < 14  # what was there is not run again
        assert result["coverage"]["complete"]
        assert row(result, "fast")["trials"] == row(whole, "fast")["trials"] == 14
        assert row(result, "fast")["headline"] == pytest.approx(row(whole, "fast")["headline"])
        keys = [record.key for record in Ledger(path).records]
        assert len(keys) == len(set(keys))

    def test_the_tables_come_from_the_file_alone(self, play, suite, clock, tmp_path):
        path = tmp_path / "r.jsonl"
        result = play([Scripted(PLAIN, clock), Scripted("fast", clock)], CONFIG, suite, clock, Ledger(path))
        assert json.loads(json.dumps(derive(Ledger(path)))) == json.loads(json.dumps(result))

    def test_a_torn_last_line_is_dropped(self, play, suite, clock, tmp_path):
        path = tmp_path / "r.jsonl"
        play([Scripted(PLAIN, clock), Scripted("fast", clock)], CONFIG, suite, clock, Ledger(path))
        lines = path.read_text().splitlines(keepends=True)
        trials = [i for i, line in enumerate(lines) if '"kind":"trial"' in line]
        path.write_text("".join(lines[: trials[5]]) + lines[trials[5]][:40])
        ledger = Ledger(path)
        assert len(ledger.records) == 5
        result = play([Scripted(PLAIN, clock), Scripted("fast", clock)], CONFIG, suite, clock, ledger)
        assert row(result, "fast")["trials"] == 14

    def test_a_full_disk_is_said_and_earlier_results_stay(self, play, suite, clock, tmp_path, monkeypatch):
        import os

        path = tmp_path / "r.jsonl"
        real, count = os.fsync, iter(range(100))

        def full(descriptor):
            if next(count) == 12:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(ResultError, match=r"No space left on device.*run the same command again"):
            play([Scripted(PLAIN, clock), Scripted("fast", clock)], CONFIG, suite, clock, Ledger(path))
        monkeypatch.setattr("os.fsync", real)
        kept = Ledger(path)
        assert kept.records
        result = play([Scripted(PLAIN, clock), Scripted("fast", clock)], CONFIG, suite, clock, kept)
        assert row(result, "fast")["trials"] == 14

    def test_another_run_in_the_file_is_refused_and_kept(self, play, suite, clock, tmp_path):
        path = tmp_path / "r.jsonl"
        play([Scripted(PLAIN, clock)], CONFIG, suite, clock, Ledger(path))
        before = path.read_bytes()
        with pytest.raises(ResultError, match=r"max_new_tokens \(10 there, 12 now\).*--fresh"):
            play([Scripted(PLAIN, clock)], changed(max_new_tokens=12), suite, clock, Ledger(path))
        assert path.read_bytes() == before
        aside = set_aside(path)
        assert aside.read_bytes() == before
        assert not path.exists()
        assert set_aside(path) is None

    @pytest.mark.parametrize("text", ["hello\n", '{"kind":"header","format":99}\n', '{"kind":"what"}\n'])
    def test_what_is_no_ledger_is_refused(self, tmp_path, text):
        path = tmp_path / "r.jsonl"
        path.write_text(text)
        with pytest.raises(ResultError, match=r"line 1 .* is not a benchmark's record"):
            Ledger(path)

    def test_a_budget_ends_the_run_at_a_stratified_subsample(self, play, clock, write_suite):
        suite = write_suite({"a": [[f"a{i}"] for i in range(3)], "b": [[f"b{i}"] for i in range(3)]})
        config = changed(budget_s=0.75, repetitions=5)
        result = play([Scripted(PLAIN, clock), Scripted("x", clock)], config, suite, clock)
        assert result["coverage"]["seconds"] <= 0.75
        assert result["coverage"]["blocks"] == 3
        assert "stopped by the time budget after 3 of 30 blocks" in result["coverage"]["words"]
        tasks = {t["task"]: t for t in row(result, "x")["tasks"]}
        assert set(tasks) == {"a", "b"}
        longer = changed(budget_s=100.0, repetitions=5)
        assert longer.identity() == config.identity()  # a larger budget goes on with the same file


class TestParts:
    CONFIG = changed(temperatures=[0.0, 1.0], repetitions=1)

    def measured(self, play, suite, clock, tmp_path, part, **changes):
        path = tmp_path / f"{part[0]}.jsonl"
        config = replace(self.CONFIG, part=part, **changes)
        play(self.methods(clock), config, suite, clock, Ledger(path))
        return path

    def methods(self, clock):
        return [Scripted(PLAIN, clock), Scripted("fast", clock, ms=lambda r: 5.0 + r)]

    def test_joined_they_are_the_whole_run(self, play, suite, clock, tmp_path, monkeypatch):
        monkeypatch.setattr("sys.argv", ["outpace", "bench", "smollm2", "--part", "1/3"])
        whole = play(self.methods(clock), self.CONFIG, suite, clock)
        paths = [self.measured(play, suite, clock, tmp_path, (k, 3)) for k in (1, 2, 3)]
        joined = derive(Ledger.joined(paths))
        for mine, theirs in zip(joined["cells"], whole["cells"], strict=True):
            assert mine["temperature"] == theirs["temperature"]
            for one, other in zip(mine["methods"], theirs["methods"], strict=True):
                for figure in ("trials", "tokens_per_s", "emitted_per_round", "round_ms", "speedup_of_totals"):
                    assert one[figure] == pytest.approx(other[figure])
                assert one["headline"]["ratio"] == pytest.approx(other["headline"]["ratio"])
                assert one["parity"] == other["parity"]
        assert joined["command"] == "outpace bench smollm2 --part K/3"
        assert joined["coverage"]["complete"]
        assert joined["coverage"]["questions"] == 6
        assert joined["coverage"]["planned_blocks"] == joined["coverage"]["blocks"] == 12
        assert "complete; 3 of 3 parts" in joined["coverage"]["words"]
        some = derive(Ledger.joined(paths[:2]))["coverage"]
        alone = derive(Ledger(paths[0]))["coverage"]
        assert not some["complete"]
        assert "all of it measured; 2 of 3 parts" in some["words"]
        assert "1 of 3 parts" in alone["words"]

    @pytest.mark.parametrize("parts", [2, 3, 4])
    def test_every_part_has_questions_of_every_task_at_every_temperature(self, write_suite, parts):
        suite = write_suite({task: [[f"{task}{i}"] for i in range(8)] for task in "abcd"})
        blocks = [plan(replace(self.CONFIG, part=(k + 1, parts)), suite) for k in range(parts)]
        assert len({(b.cell, b.unit) for one in blocks for b in one}) == sum(map(len, blocks)) == 64
        assert max(map(len, blocks)) - min(map(len, blocks)) <= 2
        for one in blocks:
            assert {(b.cell.temperature, b.unit[0].task) for b in one} == {(t, k) for t in (0.0, 1.0) for k in "abcd"}

    def test_a_part_that_was_stopped_is_said(self, play, suite, clock, tmp_path):
        paths = [
            self.measured(play, suite, clock, tmp_path, (1, 2)),
            self.measured(play, suite, clock, tmp_path, (2, 2), budget_s=0.3),
        ]
        found = derive(Ledger.joined(paths))["coverage"]
        assert "stopped by the time budget after" in found["words"]
        assert found["words"].endswith("2 of 2 parts, each a process of its own, which may have run side by side")

    def test_what_is_no_part_is_refused(self, play, suite, clock, tmp_path):
        one = self.measured(play, suite, clock, tmp_path, (1, 2))
        with pytest.raises(ResultError, match="pass each part of a run once"):
            Ledger.joined([one, one])
        other = self.measured(play, suite, clock, tmp_path, (2, 3))
        with pytest.raises(ResultError, match=r"how many parts there are \(3 there, 2 in the first\)"):
            Ledger.joined([one, other])
        longer = self.measured(play, suite, clock, tmp_path, (3, 3), max_new_tokens=12)
        with pytest.raises(ResultError, match=r"is no part of the run .* max_new_tokens \(12 there, 10 now\)"):
            Ledger.joined([other, longer])


class TestWatchdog:
    def test_a_block_in_time_is_left_alone(self):
        with deadline(5.0):
            done = True
        time.sleep(0)
        assert done

    def test_a_loop_is_cut_on_the_main_thread(self):
        def spin():
            with deadline(0.1):
                while True:
                    pass

        with pytest.raises(Overdue):
            spin()

    def test_a_loop_is_cut_on_another_thread(self):
        found = []

        def work():
            try:
                with deadline(0.1):
                    while True:
                        pass
            except Overdue:
                found.append("cut")

        thread = threading.Thread(target=work)
        thread.start()
        thread.join(10)
        assert found == ["cut"]

    def test_overdue_is_no_exception_that_code_catches_by_accident(self):
        assert not issubclass(Overdue, Exception)

    def test_native_code_that_never_returns_ends_the_process_and_is_remembered(self, tmp_path):
        """`sum` over an endless C iterator holds the interpreter and looks at no signal: the worst there is."""
        program = textwrap.dedent("""
            import itertools, sys
            from pathlib import Path
            from outpace.bench.watchdog import LastResort, deadline
            last = LastResort(Path(sys.argv[1]))
            with deadline(0.2, last_resort=last.mark("bad on q1, turn 1"), grace_s=0.3):
                sum(itertools.repeat(0))
        """)
        path = tmp_path / "r.stuck"
        done = subprocess.run([sys.executable, "-c", program, path], timeout=60, capture_output=True)
        assert done.returncode == 1
        name, trace = LastResort(path).found
        assert name == "bad on q1, turn 1"
        assert 'File "<string>", line 7' in trace

    def test_a_method_that_was_stuck_is_left_out_of_the_next_session(self, play, suite, clock, tmp_path):
        path = tmp_path / "r.stuck"
        path.write_text('bad on 1, turn 1\nTimeout (0:00:50)!\n  File "drafter.py", line 3 in guess\n')
        bad = Scripted("bad", clock)
        result = play([Scripted(PLAIN, clock), bad], CONFIG, suite, clock, last_resort=LastResort(path))
        assert bad.calls == 0
        found = row(result, "bad")
        assert "never came back from native code" in found["refusal"]
        assert "drafter.py" in found["refusal"]
        assert not path.exists()

    def test_a_mark_without_a_trace_blames_nobody(self, tmp_path):
        path = tmp_path / "r.stuck"
        path.write_text("bad on 1, turn 1\n")
        assert LastResort(path).found is None


class TestConfig:
    @pytest.mark.parametrize(
        ("values", "says"),
        [
            ({"temperatures": [-1.0]}, "temperatures must be 0"),
            ({"batch_sizes": []}, "batch_sizes must be one or more"),
            ({"repetitions": 0}, "repetitions must be at least 1"),
            ({"share": 0.0}, r"share must be in \(0, 1\]"),
            ({"budget_s": 0}, "budget_s must be above 0"),
            ({"part": (3, 2)}, r"part must be \(k, n\)"),
            ({"part": (1, 2), "compat": "spec-bench"}, "counts a whole run"),
            ({"state": "warmish"}, "did you mean 'warm'"),
            ({"modes": ["fixd"]}, "did you mean 'fixed'"),
            ({"template": "vicunia"}, "did you mean 'vicuna'"),
            ({"rule": "pth"}, "rule"),
            ({"drafters": ["suffix", "suffix"]}, "without repetition"),
        ],
    )
    def test_what_cannot_be_is_refused(self, values, says):
        with pytest.raises(ConfigError, match=says):
            BenchConfig(**_tuples(values))

    def test_a_config_survives_a_file(self):
        config = BenchConfig(temperatures=(0.0, 1.0), tasks=("chat",), budget_s=5.0)
        assert BenchConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
        with pytest.raises(ConfigError, match="did you mean 'share'"):
            BenchConfig.from_dict({"shares": 1})

    def test_unknown_drafters_are_refused_before_anything_runs(self, spoken, suite):
        with pytest.raises(ConfigError, match="did you mean 'suffix'"):
            bench(spoken, BenchConfig(drafters=("sufix",)), suite)

    def test_methods_are_shuffled_by_seed(self, play, suite, clock):
        orders = []
        for seed in (1, 1, 2):
            ledger = Ledger()
            play(
                [Scripted(PLAIN, clock), Scripted("a", clock), Scripted("b", clock)],
                changed(seed=seed),
                suite,
                clock,
                ledger,
            )
            orders.append([record.method for record in ledger.records])
        assert orders[0] == orders[1] != orders[2]
        assert {order[0] for order in orders} <= {PLAIN, "a", "b"}
