import json
from collections import Counter

import pytest

from outpace.bench.dialogue import VICUNA_SYSTEM, messages, prompt_ids, vicuna
from outpace.bench.suites import load_suite, select, stratified_units
from outpace.errors import ConfigError

GOOD = '{"task": "chat", "turns": ["Why?"]}'


def written(tmp_path, *lines, name="own.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_mini_has_six_kinds_of_eight():
    suite = load_suite("mini")
    assert Counter(q.task for q in suite.questions) == dict.fromkeys(
        ("chat", "code", "summarisation", "translation", "maths", "retrieval"), 8
    )
    assert sum(len(q.turns) == 2 for q in suite.questions) == 12
    assert len({q.turns for q in suite.questions}) == 48
    assert all(turn == turn.strip() for q in suite.questions for turn in q.turns)


def test_own_files_may_leave_out_ids_and_tasks(tmp_path):
    suite = load_suite(written(tmp_path, '{"prompt": "Why?"}', "", '{"turns": ["a", "b"], "category": "x", "id": 7}'))
    assert [(q.id, q.task, q.turns) for q in suite.questions] == [("0", "all", ("Why?",)), ("7", "x", ("a", "b"))]
    assert suite.as_dict()["tasks"] == {"all": 1, "x": 1}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2 .* is not JSON"),
        ("[1]", "line 2 .* is not an object"),
        ('{"task": "x"}', 'needs "turns"'),
        ('{"turns": []}', 'needs "turns"'),
        ('{"turns": ["  "]}', 'needs "turns"'),
        ('{"turns": [3]}', 'needs "turns"'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, says):
    with pytest.raises(ConfigError, match=says):
        load_suite(written(tmp_path, GOOD, line))


def test_what_is_no_suite_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'mini'"):
        load_suite("minni")
    with pytest.raises(ConfigError, match="has no questions"):
        load_suite(written(tmp_path, ""))
    with pytest.raises(ConfigError, match="two questions with id '1'"):
        load_suite(written(tmp_path, '{"id": 1, "prompt": "a"}', '{"id": 1, "prompt": "b"}'))
    with pytest.raises(ConfigError, match=r"get them from https://github.com/hemingkx/Spec-Bench"):
        load_suite("spec-bench")
    with pytest.raises(ConfigError, match="no file 'nowhere'"):
        load_suite("spec-bench:nowhere")


def test_spec_bench_groups_the_mt_bench_categories(tmp_path):
    lines = [
        json.dumps({"question_id": 81, "category": "writing", "turns": ["a", "b"]}),
        json.dumps({"question_id": 111, "category": "math", "turns": ["c", "d"]}),
        json.dumps({"question_id": 401, "category": "math_reasoning", "turns": ["e"], "reference": ["f"]}),
    ]
    suite = load_suite("spec-bench:" + written(tmp_path, *lines, name="question.jsonl"))
    assert [q.task for q in suite.questions] == ["multi_turn", "multi_turn", "math_reasoning"]
    assert [q.category for q in suite.questions] == ["writing", "math", "math_reasoning"]
    assert "MODIFIED" in suite.note


def test_a_subsample_takes_the_same_share_of_every_task_and_says_so():
    half = select(load_suite("mini"), share=0.5, seed=3)
    assert set(half.as_dict()["tasks"].values()) == {4}
    assert "24 of 48 questions, drawn per task with seed 3" in half.note
    assert half == select(load_suite("mini"), share=0.5, seed=3)
    assert half != select(load_suite("mini"), share=0.5, seed=4)
    two = select(load_suite("mini"), tasks=("code", "maths"), per_task=2)
    assert two.as_dict()["tasks"] == {"code": 2, "maths": 2}
    with pytest.raises(ConfigError, match="did you mean 'maths'"):
        select(load_suite("mini"), tasks=("math",))


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_of_the_order_is_stratified(seed):
    order = stratified_units(load_suite("mini"), 1, seed)
    assert len(order) == 48
    for length in range(1, 49):
        counts = Counter(unit[0].task for unit in order[:length])
        assert max(counts.values()) - min(counts.get(t, 0) for t in load_suite("mini").tasks) <= 1


def test_batches_hold_one_task_and_one_number_of_turns():
    units = stratified_units(load_suite("mini"), 4, 0)
    assert all(len({(q.task, len(q.turns)) for q in unit}) == 1 and len(unit) == 4 for unit in units)
    with pytest.raises(ConfigError, match="a batch of 16 needs as many questions of one task"):
        stratified_units(load_suite("mini"), 16, 0)


def test_vicuna_is_spec_benchs_prompt():
    assert vicuna(["a"], []) == f"{VICUNA_SYSTEM} USER: a ASSISTANT:"
    assert vicuna(["a", "b"], ["x"]) == f"{VICUNA_SYSTEM} USER: a ASSISTANT: x</s> USER: b ASSISTANT:"


def test_a_later_turn_holds_the_answers_before_it(spoken):
    assert messages(["a", "b"], ["x"]) == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "b"},
    ]

    def read(ids):
        return spoken.tokenizer.decode(ids)

    assert read(prompt_ids(spoken, ["a", "b"], ["x"], "chat")) == "[a][x][b]"
    assert read(prompt_ids(spoken, ["a"], [], "none")) == "a"
