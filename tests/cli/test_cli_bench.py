"""`outpace bench` and `outpace widen` on a tiny model: files, exit codes, going on after a stop."""

import dataclasses
import inspect
import json

import pytest

from outpace import Engine
from outpace.bench import BenchConfig
from outpace.cli.bench import run

SMALL = (
    "--dtype", "float32", "--device", "cpu", "-n", 8, "--repetitions", 1, "--warm-up-runs", 0, "--replays", 1,
    "--stock", "none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _small_floor(monkeypatch):
    monkeypatch.setattr("outpace.bench.machine._READ_BYTES", {"cpu": 1 << 20, "cuda": 1 << 20})


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "own.jsonl"
    lines = [{"task": task, "prompt": f"{task} {i}"} for task in ("chat", "code") for i in ("abc", "xyz")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_a_run_writes_its_files_and_prints_its_tables(outpace, model_dir, questions, tmp_path):
    out = tmp_path / "r.html"
    result = outpace(
        "bench", model_dir, "--drafters", "prompt_lookup:min_ngram=1,suffix", "--suite", questions, "--out", out, *SMALL
    )
    assert result.exit_code == 0, result.stderr
    assert sorted(file.name for file in tmp_path.glob("r.*")) == ["r.html", "r.json", "r.jsonl", "r.md"]
    assert "| prompt_lookup:min_ngram=1 |" in result.stdout
    assert "| suffix |" in result.stdout
    assert "4 of 4 questions measured" in result.stdout
    assert "4/4 blocks" in result.stderr
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["coverage"]["complete"]
    assert document["target"]["path"].startswith(("fast", "readable"))


def test_the_same_command_again_measures_nothing_anew(outpace, model_dir, questions, tmp_path):
    out = tmp_path / "r.json"
    command = ("bench", model_dir, "--drafters", "suffix", "--suite", questions, "--out", out, "--json", *SMALL)
    first = outpace(*command)
    lines = (tmp_path / "r.jsonl").read_text().count('"kind":"trial"')
    again = outpace(*command)
    assert first.exit_code == again.exit_code == 0
    assert "going on with" in again.stderr
    assert (tmp_path / "r.jsonl").read_text().count('"kind":"trial"') == lines == 8
    assert json.loads(first.stdout)["cells"] == json.loads(again.stdout)["cells"]
    other = outpace(*command, "--seed", 5)
    assert other.exit_code == 1
    assert "--fresh to start anew" in other.stderr
    fresh = outpace(*command, "--seed", 5, "--fresh")
    assert fresh.exit_code == 0
    assert (tmp_path / "r.1.jsonl").exists()


def test_an_interrupt_keeps_what_was_measured(outpace, model_dir, questions, tmp_path, monkeypatch):
    step, count = Engine.step, iter(range(1000))

    def stop(self):
        if next(count) == 30:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(Engine, "step", stop)
    out = tmp_path / "r.json"
    command = ("bench", model_dir, "--drafters", "suffix", "--suite", questions, "--out", out, *SMALL)
    result = outpace(*command)
    assert result.exit_code == 130
    assert "the same command goes on from here" in result.stderr
    assert not json.loads(out.read_text())["coverage"]["complete"]
    assert outpace(*command).exit_code == 0
    assert json.loads(out.read_text())["coverage"]["complete"]


def test_a_text_that_differs_exits_3(outpace, model_dir, questions, tmp_path, monkeypatch):
    from outpace.target import Target

    whole = Target.run

    def shifted(self, block, cache, *, taps=(), logits=True):
        if logits and block.rows > 1:
            block = dataclasses.replace(block, positions=block.positions + 3)
        return whole(self, block, cache, taps=taps, logits=logits)

    monkeypatch.setattr(Target, "run", shifted)
    result = outpace(
        "bench", model_dir, "-d", "prompt_lookup:min_ngram=1", "--suite", questions, "--modes", "fixed", "--out",
        tmp_path / "r.json", *SMALL, "-n", 24, "--no-stand-down",
    )  # fmt: skip
    assert result.exit_code == 3, result.stderr
    assert "beyond near ties" in result.stdout


def test_several_cells_and_a_budget(outpace, model_dir, questions, tmp_path):
    result = outpace(
        "bench", model_dir, "-d", "suffix", "--suite", questions, "--temperatures", "0,0.8", "--batch-sizes", "1,2",
        "--budget-s", 600, "--ceilings", "--out", tmp_path / "r.md", *SMALL,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    for cell in ("Batch 1, temperature 0,", "Batch 2, temperature 0,", "Batch 1, temperature 0.8,"):
        assert cell in result.stdout
    assert "ceiling: always right" in result.stdout


def test_a_dry_run_loads_nothing(outpace, questions, tmp_path):
    result = outpace(
        "bench", "/no/such/model", "--suite", questions, "--dry-run", "--share", 0.5, "--out", tmp_path / "r.html"
    )
    assert result.exit_code == 0
    assert "2 questions" in result.stdout
    assert "6 blocks of up to 5 methods" in result.stdout
    assert not list(tmp_path.glob("r.*"))
    quick = outpace("bench", "smollm2", "--quick", "--dry-run")
    assert "6 questions" in quick.stdout
    assert "budget: 60 s" in quick.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--drafters", "sufix"), "did you mean 'suffix'"),
        (("--suite", "minni"), "did you mean 'mini'"),
        (("--tasks", "chess"), "has no task 'chess'"),
        (("--out", "r.pdf"), "must end in"),
        (("--temperatures", "hot"), "expected numbers"),
        (("--batch-sizes", "99"), "a batch of 99 needs"),
        (("--state", "tepid"), "unknown state"),
        (("--path", "slow"), "unknown path 'slow'"),
        (("--compat", "mt-bench"), "did you mean 'spec-bench'"),
    ],
)
def test_bad_input_is_refused_in_words(outpace, model_dir, tmp_path, arguments, says):
    result = outpace("bench", model_dir, *SMALL, "--out", tmp_path / "r.json", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr


def test_compare_and_report(outpace, model_dir, questions, tmp_path):
    for name, seed in (("a", 0), ("b", 0)):
        out = tmp_path / f"{name}.json"
        assert (
            outpace(
                "bench", model_dir, "-d", "suffix", "--suite", questions, "--seed", seed, "--out", out, *SMALL
            ).exit_code
            == 0
        )
    result = outpace("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert result.exit_code == 0
    assert "| suffix |" in result.stdout
    assert json.loads(outpace("bench", "compare", tmp_path / "a.json", tmp_path / "b.json", "--json").stdout)["cells"]
    assert outpace("bench", "compare", tmp_path / "a.json", tmp_path / "none.json").exit_code == 1
    for source in ("a.json", "a.jsonl"):
        page = tmp_path / f"{source}.html"
        assert outpace("bench", "report", tmp_path / source, "--out", page).exit_code == 0
        assert "js-plotly-plot" in page.read_text() or "Plotly" in page.read_text()
    assert outpace("bench", "report", tmp_path / "none.jsonl", "--out", tmp_path / "x.html").exit_code == 1


def test_parts_become_one_report(outpace, model_dir, questions, tmp_path):
    parts = [tmp_path / f"{k}.jsonl" for k in (1, 2)]
    for k, part in enumerate(parts, start=1):
        options = ["-d", "suffix", "--suite", questions, "--part", f"{k}/2", "--out", part.with_suffix(".json")]
        assert outpace("bench", model_dir, *options, *SMALL).exit_code == 0
    assert outpace("bench", "report", *parts, "--out", tmp_path / "whole.json").exit_code == 0
    coverage = json.loads((tmp_path / "whole.json").read_text())["coverage"]
    assert coverage["complete"]
    assert coverage["questions"] == coverage["questions_of_suite"]
    mixed = outpace("bench", "report", parts[0], tmp_path / "whole.json", "--out", tmp_path / "x.json")
    assert mixed.exit_code == 1
    assert "joined from their .jsonl files" in mixed.stderr


def test_every_setting_has_a_flag():
    flags = set(inspect.signature(run).parameters)
    settings = {field.name for field in dataclasses.fields(BenchConfig)} - {"max_failures", "bootstrap"}
    assert settings <= flags


def test_widen_writes_a_model_that_says_the_same(outpace, model_dir, tmp_path, monkeypatch):
    from outpace.target import widen as module

    shape = module.Shape(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, vocab_size=50,
    )  # fmt: skip
    monkeypatch.setitem(module.SHAPES, "tiny-64", shape)
    dry = outpace("widen", model_dir, "--like", "tiny-64", "--dry-run")
    assert dry.exit_code == 0
    assert "parameters" in dry.stdout
    folder = tmp_path / "wide"
    result = outpace("widen", model_dir, "--like", "tiny-64", "--out", folder, "--dtype", "float32")
    assert result.exit_code == 0, result.stderr
    said = [
        outpace("generate", "hello abc", "--model", m, "-d", "none", "-n", 12, "--dtype", "float32").stdout
        for m in (model_dir, folder)
    ]
    assert said[0] == said[1]
    assert outpace("widen", model_dir, "--like", "tiny-64", "--out", folder, "--dtype", "float32").exit_code == 1
    assert "did you mean 'tiny-64'" in outpace("widen", model_dir, "--like", "tiny64").stderr


def test_bench_widens_in_memory_and_says_so(outpace, model_dir, questions, tmp_path, monkeypatch):
    from outpace.target import widen as module

    shape = module.Shape(
        hidden_size=64, intermediate_size=96, num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=4,
        head_dim=16, vocab_size=50,
    )  # fmt: skip
    monkeypatch.setitem(module.SHAPES, "tiny-64", shape)
    out = tmp_path / "r.html"
    result = outpace(
        "bench", model_dir, "-d", "suffix", "--widen", "tiny-64", "--suite", questions, "--out", out, *SMALL
    )
    assert result.exit_code == 0, result.stderr
    assert "WIDENED" in result.stdout
    assert "widened to the shape of tiny-64" in out.read_text()
    assert json.loads((tmp_path / "r.json").read_text())["target"]["hidden_size"] == 64
