"""Spec-Bench's own counting, from an answer file in its format, to 1e-6 against figures worked out by hand."""

import json

import pytest

from outpace.bench import BenchConfig, bench
from outpace.bench.published import PublishedAnswer, published_figures, read_answers
from outpace.bench.suites import Question, Suite
from outpace.errors import ResultError


def line(question, category, turns, new_tokens, wall_time, accept_lengths):
    choice = {"index": 0, "turns": turns, "new_tokens": new_tokens, "wall_time": wall_time}
    choice |= {"decoding_steps": [len(accept_lengths)], "accept_lengths": accept_lengths}
    return json.dumps({"question_id": question, "category": category, "model_id": "m", "choices": [choice]})


@pytest.fixture
def files(tmp_path):
    """Two subtasks; a word is a token, with a BOS in front."""
    method = [
        line(81, "writing", ["one two three", "four five"], [4, 3], [0.5, 0.25], [2, 2, 3]),
        line(161, "translation", ["six seven"], [3], [0.2], [1, 2]),
    ]
    baseline = [
        line(81, "writing", ["one two three", "four five"], [4, 3], [1.0, 1.0], [1] * 7),
        line(161, "translation", ["six seven"], [3], [0.4], [1] * 3),
    ]
    paths = []
    for name, lines in (("method", method), ("baseline", baseline)):
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


def encode(text):
    return ["<s>", *text.split()]


def test_a_recorded_file_gives_its_published_numbers(files):
    """The baseline loses its eos and its bos, the method keeps its eos: 5 of 7 and 2 of 3 tokens are counted."""
    method, baseline = (read_answers(path) for path in files)
    figures = published_figures(
        method, baseline, encode, lambda answer: "multi_turn" if answer.category == "writing" else answer.category
    )
    first = figures["multi_turn"]
    assert first.tokens_per_second == pytest.approx(7 / 0.75, abs=1e-6)
    assert first.baseline_tokens_per_second == pytest.approx(5 / 2.0, abs=1e-6)
    assert first.speedup == pytest.approx((7 / 0.75) / 2.5, abs=1e-6)
    assert first.mean_accepted_tokens == pytest.approx(7 / 3, abs=1e-6)
    second = figures["translation"]
    assert second.speedup == pytest.approx(15.0 / 5.0, abs=1e-6)
    overall = figures["overall"]
    assert overall.tokens_per_second == pytest.approx((7 / 0.75 + 15.0) / 2, abs=1e-6)
    assert overall.baseline_tokens_per_second == pytest.approx((2.5 + 5.0) / 2, abs=1e-6)
    assert overall.mean_accepted_tokens == pytest.approx(10 / 5, abs=1e-6)
    assert overall.questions == 2


def test_questions_the_baseline_did_not_answer_do_not_count():
    answer = PublishedAnswer("1", "qa", ("a",), (2,), (1.0,), (2,))
    assert published_figures([answer], [], encode, lambda a: a.category) == {}


@pytest.mark.parametrize("text", ["{", '{"question_id": 1}', '{"question_id": 1, "category": "x", "choices": []}'])
def test_what_is_no_answer_file_is_refused(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(ResultError, match="not an answer file of Spec-Bench"):
        read_answers(path)


def test_a_run_in_compatibility_mode_prints_both_countings(spoken):
    questions = tuple(Question(i, str(i), "qa", (text,), "qa") for i, text in enumerate(("abc", "xyz", "hello")))
    config = BenchConfig(
        drafters=("suffix",), stock=("transformers",), max_new_tokens=12, repetitions=1, compat="spec-bench",
        template="vicuna", turns="own", replays=0, warm_up_runs=0,
    )  # fmt: skip
    result = bench(spoken, config, Suite("spec-bench", questions, "", ""))
    found = result["published"]
    assert found["baseline"] == "transformers"
    assert set(found["methods"]) == {"plain", "suffix"}
    assert found["methods"]["suffix"]["overall"]["questions"] == 3
    assert found["methods"]["suffix"]["overall"]["mean_accepted_tokens"] >= 1.0
    assert result["cells"][0]["methods"][1]["measured"] is not None
