import json

import pytest

from outpace.errors import ConfigError, MissingExtraError
from outpace.train.prompts import read_prompts


def write(path, rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_every_form_of_a_prompt_is_read(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        [
            {"id": "x", "prompt": "Why?", "domain": "general"},
            {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
            {"turns": ["first", "second"]},
            {"tokens": [3, 4]},
        ],
    )
    (tmp_path / "b.txt").write_text("one line\n\nanother\n")
    report = read_prompts([file, tmp_path / "b.txt"])
    contents = [line.content for line in report.prompts]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert contents == ["Why?", messages, "first", [3, 4], "one line", "another"]
    assert [line.id for line in report.prompts] == ["x", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.txt:1", "b.txt:3"]
    assert read_prompts([tmp_path]).prompts == report.prompts[:4], "a folder is its .jsonl files"


BAD = ["not json", "[1]", {"prompt": "  "}, {"other": 1}, {"tokens": ["a"]}, {"messages": [{"role": "user"}]},
       {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]  # fmt: skip


def test_malformed_lines_are_counted_with_file_and_line(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"prompt": "good"}, *BAD])
    report = read_prompts([file])
    assert len(report.prompts) == 1
    assert [line.split(":")[1] for line in report.malformed] == [str(i) for i in range(2, 2 + len(BAD))]
    assert report.malformed[0].startswith("a.jsonl:2: not JSON")
    assert "must end with the user's turn" in report.malformed[-1]
    with pytest.raises(ConfigError, match=r"malformed prompt at a.jsonl:2.*or leave --strict away"):
        read_prompts([file], strict=True)


def test_repeated_and_evaluation_prompts_are_left_out(tmp_path):
    file = write(
        tmp_path / "a.jsonl",
        [
            {"prompt": "What is 2+2?"},
            {"prompt": "what is 2 + 2"},
            {"prompt": "Name a river!"},
            {"messages": [{"role": "user", "content": "NAME a river"}]},
            {"prompt": "Name a lake."},
        ],
    )
    exam = write(tmp_path / "exam.jsonl", [{"turns": ["Tell me", "name a RIVER?"]}])
    report = read_prompts([file], exclude=[exam])
    assert [line.content for line in report.prompts] == ["What is 2+2?", "Name a lake."]
    assert (report.repeated, report.excluded) == (1, 2)


def test_a_domain_may_be_wrapped_and_a_limit_takes_a_fixed_choice(tmp_path):
    rows = [{"id": str(i), "prompt": f"def f{i}():", "domain": "code", "language": "python"} for i in range(50)]
    file = write(tmp_path / "a.jsonl", rows)
    report = read_prompts([file], wrap={"code": "Complete this {language}:\n{prompt}"}, limit=10)
    assert len(report.prompts) == 10
    assert report.prompts[0].content.startswith("Complete this python:\ndef f")
    again = read_prompts([file], limit=10)
    assert [line.id for line in again.prompts] == [line.id for line in report.prompts]
    assert any(line.held_out for line in read_prompts([file]).prompts)


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match="cannot read prompts"):
        read_prompts([tmp_path / "missing.jsonl"])
    with pytest.raises(ConfigError, match=r"no \.jsonl file"):
        read_prompts([tmp_path])
    with pytest.raises(ConfigError, match="no prompt left"):
        read_prompts([write(tmp_path / "a.jsonl", ["{"])])
    with pytest.raises(ConfigError, match="cannot read evaluation prompts"):
        read_prompts([write(tmp_path / "b.jsonl", [{"prompt": "x"}])], exclude=[tmp_path / "a.jsonl"])


def test_data_sets_need_the_library(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"outpace\[train\]"):
        read_prompts(["datasets:name"])
