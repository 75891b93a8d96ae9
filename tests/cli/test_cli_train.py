"""corpus, train and inspect on a tiny model, as a stranger would type them."""

import itertools
import json
from pathlib import Path

import pytest

from outpace.train import Corpus

CPU = ("--device", "cpu", "--dtype", "float32")
QUICK = ("--steps", 6, "--tokens-per-step", 256, "--row-length", 128, "--rows", 1, "--depths", 2, "--eval-tokens", 8)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "some.jsonl"
    names = ["".join(pair) for pair in itertools.product("abcdefgh", "stuvwxyz")][:60]
    rows = [{"id": f"p{i}", "prompt": f"tell me of {name}", "domain": "x"} for i, name in enumerate(names)]
    rows.append({"prompt": "tell me of as:8"})
    rows.append({"prompt": "tell me of as:9"})  # the tokenizer knows neither digit: the same ids
    path.write_text("\n".join(["{broken", *map(json.dumps, rows)]) + "\n")
    return path


@pytest.fixture
def corpus(outpace, model_dir, prompts, tmp_path):
    result = outpace(
        "corpus", model_dir, "--prompts", prompts, "--out", tmp_path / "corpus", "-n", 12, "-t", "0,1", *CPU
    )
    assert result.exit_code == 0, result.stderr
    return tmp_path / "corpus"


def test_corpus_says_what_it_did_and_continues(outpace, model_dir, prompts, corpus):
    again = outpace("corpus", model_dir, "-p", prompts, "-o", corpus, "-n", 12, "-t", "0,1", "--json", *CPU)
    document = json.loads(again.stdout)
    assert again.exit_code == 0, again.stderr
    assert document["answers"] == 0
    assert document["repeated_in_ids"] == 1
    assert document["shards"]["found"] == 2
    assert document["prompts"]["malformed"] == 1
    assert "some.jsonl:1: not JSON" in again.stderr
    written = Corpus.load(corpus)
    assert len(written.held_out) + (len(written) + document["empty"]) / 2 <= 61
    assert len(written) > 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--strict",), "malformed prompt at some.jsonl:1"),
        (("-t", "warm"), "takes numbers separated by commas"),
        (("--wrap", "x=no place"), "DOMAIN=TEXT with {prompt}"),
        (("-t", ""), "at least one temperature"),
    ],
)
def test_corpus_refuses_mistakes_before_a_model_is_loaded(outpace, prompts, tmp_path, flags, words):
    result = outpace("corpus", "no-such-model", "-p", prompts, "-o", tmp_path / "c", *flags)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "loading" not in result.stderr


def test_dry_runs_say_what_it_costs_and_write_nothing(outpace, model_dir, prompts, corpus, tmp_path):
    result = outpace("corpus", model_dir, "-p", prompts, "-o", tmp_path / "none", "--dry-run", "--json", *CPU)
    estimate = json.loads(result.stdout)
    assert estimate["answers"] == 186
    assert estimate["hours_at_most"] > 0
    assert not (tmp_path / "none").exists()
    result = outpace(
        "train", model_dir, "-d", "mtp:vocabulary=0", "-c", corpus, "-o", tmp_path / "none", "--dry-run", "--json",
        *QUICK, *CPU,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    estimate = json.loads(result.stdout)
    assert estimate["steps"] == 6
    assert {"memory_gib", "disk_mib", "features_gib", "hours", "tokens_per_second"} <= estimate.keys()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("drafter", ["eagle3:vocabulary=30,draft_len=3", "medusa:heads=2"])
def test_train_inspect_generate(outpace, model_dir, corpus, tmp_path, drafter):
    out = tmp_path / "drafter"
    result = outpace("train", model_dir, "--drafter", drafter, "--corpus", corpus, "--out", out, *QUICK, *CPU)
    assert result.exit_code == 0, result.stderr
    assert "learned from, in brackets: [tell" in result.stderr.replace("\n", "")
    assert "trained for 6 steps" in result.stdout
    shown = outpace("inspect", out)
    assert shown.exit_code == 0, shown.stderr
    assert f"{drafter.partition(':')[0]}: " in shown.stdout
    assert "made by:" in shown.stdout
    document = json.loads(outpace("inspect", out, "--json").stdout)
    assert document["provenance"]["steps"] == 6
    assert document["target"]["hidden_size"] == 32
    answers = [
        outpace("generate", "tell me", "-m", model_dir, "-d", spec, "-n", 10, *CPU).stdout for spec in (out, "none")
    ]
    assert answers[0] == answers[1]


def test_inspect_tunes_the_shape_of_drafts_and_keeps_it(outpace, model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "drafter"
    assert outpace("train", model_dir, "-d", "medusa:heads=2", "-c", corpus, "-o", out, *QUICK, *CPU).exit_code == 0
    plain = outpace("generate", "tell me", "-m", model_dir, "-d", out, "-n", 10, *CPU).stdout
    result = outpace("inspect", out, "--tune", model_dir, "--questions", 1, "-n", 8, "--json", *CPU)
    assert result.exit_code == 0, result.stderr
    tuned = json.loads(result.stdout)
    assert tuned["options"] == tuned["tried"][0]["options"]
    assert tuned["speedup"] == max(one["speedup"] for one in tuned["tried"])
    assert json.loads(Path(tuned["kept"]).read_text())["options"] == tuned["options"]
    assert outpace("generate", "tell me", "-m", model_dir, "-d", out, "-n", 10, *CPU).stdout == plain
    shown = outpace("inspect", out, "--tune", model_dir, "--questions", 1, "-n", 4, *CPU)
    assert "times plain decoding" in shown.stdout.replace("\n", " ")
    assert "used from now on" in shown.stdout.replace("\n", " ")


def test_a_run_is_continued_unless_asked_to_start_anew(outpace, model_dir, corpus, tmp_path):
    arguments = ("train", model_dir, "-d", "medusa:heads=2", "-c", corpus, "-o", tmp_path / "d", "--save-every", 2)
    assert outpace(*arguments, *QUICK, *CPU).exit_code == 0
    assert "continuing" in outpace(*arguments, *QUICK, *CPU).stderr
    assert "continuing" not in outpace(*arguments, "--fresh", *QUICK, *CPU).stderr
    other = outpace(*arguments, "--lr", 1.0, *QUICK, *CPU)
    assert other.exit_code == 2
    assert "another recipe" in other.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("-d", "suffix"), "nothing to train"),
        (("-d", "eagle4"), "did you mean"),
        (("-d", "eagle3:layer=2"), "did you mean 'layers'"),
        (("-d", "mtp", "--loss", "softy"), "did you mean 'soft'"),
        (("-d", "mtp", "--steps", 3, "--minutes", 1), "not both"),
        (("-d", "mtp", "--optimizer", "sgd"), "flash or adamw"),
        (("-d", "mtp", "--corpus", "nowhere"), "write one with outpace corpus"),
    ],
)
def test_train_refuses_mistakes_before_a_model_is_loaded(outpace, corpus, tmp_path, flags, words):
    given = () if "--corpus" in flags else ("--corpus", corpus)
    result = outpace("train", "no-such-model", "--out", tmp_path / "d", *given, *flags)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert "loading" not in result.stderr


def test_missing_trackers_are_told(outpace, model_dir, corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "trackio", None)
    result = outpace(
        "train", model_dir, "-d", "medusa", "-c", corpus, "-o", tmp_path, "--track", "trackio", *QUICK, *CPU
    )
    assert result.exit_code == 1
    assert "pip install 'outpace[train]'" in result.stderr


def test_inspect_of_nothing(outpace, tmp_path):
    result = outpace("inspect", tmp_path / "nothing")
    assert result.exit_code == 1
    assert "neither a folder nor one that ships" in result.stderr


def test_a_target_trained_along_is_saved_named_and_decodes_with_its_heads(outpace, model_dir, corpus, tmp_path):
    out = tmp_path / "joint"
    arguments = (
        "train",
        model_dir,
        "-d",
        "medusa:heads=2,tune_rank=4,rise=sine",
        "-c",
        corpus,
        "-o",
        out,
        *QUICK,
        *CPU,
    )
    result = outpace(*arguments)
    assert result.exit_code == 0, result.stderr
    said = result.stdout.replace("\n", " ")
    assert f"--model {out / 'target'} --drafter {out}" in said
    assert "says something else than before (KL " in said
    assert "kl 0." in result.stderr
    assert f"its target was trained along, from {model_dir}, KL " in outpace("inspect", out).stdout
    drafted, plain = (
        outpace("generate", "tell me", "-m", out / "target", "-d", spec, "-n", 10, *CPU) for spec in (out, "none")
    )
    assert drafted.exit_code == 0, drafted.stderr
    assert "accepted less often" not in drafted.stderr
    assert drafted.stdout == plain.stdout
    again = json.loads(outpace(*arguments, "--json").stdout)
    assert again["target"] == str(out / "target")
    assert again["drift"][0]["tokens"] > 0
