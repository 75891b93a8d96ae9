import itertools
import json

import numpy as np
import pytest

from outpace import Engine
from outpace.errors import CheckpointError, ConfigError
from outpace.target import Target
from outpace.train import Corpus, CorpusSettings, write_corpus
from outpace.train.prompts import PromptLine, PromptReport
from tiny import EOS, PROMPTS, make_model, target
from train.corpora import HELD_OUT, LINES, corpus


def by_request(documents):
    return {int(r): ids for r, (ids, _) in zip(documents.request, documents.documents(), strict=True)}


def test_documents_are_prompts_and_what_plain_decoding_says_to_them(tmp_path):
    """Ids end to end: the stored request and seed reproduce every answer."""
    documents = corpus(tmp_path, temperatures=(0.0, 0.8), max_new_tokens=12, seed=5)
    assert len(documents) == 2 * len(PROMPTS)
    engine = Engine(target())
    for i, (ids, prompt) in enumerate(documents.documents()):
        assert ids[:prompt] in PROMPTS
        again = engine.generate(
            [ids[:prompt]], max_new_tokens=12, temperature=float(documents.temperature[i]), seed=5,
            request=int(documents.request[i]),
        )[0]  # fmt: skip
        assert list(again.tokens) == ids[prompt:]
    counts = documents.answer_counts(40)
    answers = [t for ids, prompt in documents.documents() for t in ids[prompt:]]
    assert counts.tolist() == np.bincount(answers, minlength=40).tolist()
    assert documents.origin.seed == 5


def test_a_stopped_run_goes_on_and_writes_no_shard_twice(tmp_path, monkeypatch):
    lines = [PromptLine(f"p{i}", "", [*PROMPTS[i % 8], i % 40]) for i in range(24)]
    prompts = PromptReport(prompts=lines)
    settings = CorpusSettings(temperatures=(0.0, 1.0), max_new_tokens=6, shard=6, max_batch=8)
    whole = write_corpus(target(), prompts, tmp_path / "whole", settings)
    assert (whole.written, whole.left, whole.answers) == (8, 0, 48)

    def stop(report, total):
        if report.written >= 2:
            raise KeyboardInterrupt

    ticks = itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr("outpace.train.corpus.time.perf_counter", lambda: next(ticks))  # every step shows progress
        with pytest.raises(KeyboardInterrupt):
            write_corpus(target(), prompts, tmp_path / "parts", settings, progress=stop)
    rest = write_corpus(target(), prompts, tmp_path / "parts", settings)
    assert rest.found >= 2
    assert rest.found + rest.written == 8
    ours, want = (by_request(Corpus.load(tmp_path / name)) for name in ("parts", "whole"))
    assert ours == want
    assert write_corpus(target(), prompts, tmp_path / "parts", settings).answers == 0


def test_a_time_limit_leaves_a_corpus(tmp_path):
    report = write_corpus(
        target(), PromptReport(prompts=LINES), tmp_path, CorpusSettings(shard=1, max_batch=1, max_new_tokens=4),
        minutes=1e-9,
    )  # fmt: skip
    assert report.left > 0


def test_held_out_prompts_are_kept_and_not_answered(tmp_path):
    assert HELD_OUT.held_out
    documents = corpus(tmp_path, lines=[*LINES, HELD_OUT], max_new_tokens=3)
    assert documents.held_out == [[9, 9, 4, 9]]
    assert all(ids[:prompt] != [9, 9, 4, 9] for ids, prompt in documents.documents())


def test_long_prompts_and_empty_answers_are_counted(tmp_path):
    settings = CorpusSettings(temperatures=(0.0,), max_prompt=10, max_new_tokens=4)
    report = write_corpus(target(), PromptReport(prompts=LINES), tmp_path / "a", settings)
    assert report.long_prompts == sum(len(p) > 10 for p in PROMPTS) > 0
    model = make_model()
    model.generation_config.eos_token_id = list(range(40))
    report = write_corpus(Target(model), PromptReport(prompts=LINES), tmp_path / "b", settings)
    assert report.empty == report.answers
    assert len(Corpus.load(tmp_path / "b")) == 0


def test_another_target_or_sampling_needs_another_folder(tmp_path):
    corpus(tmp_path, max_new_tokens=3)
    prompts = PromptReport(prompts=LINES)
    with pytest.raises(CheckpointError, match=r"sampling has seed = 0, and 1 is asked for"):
        write_corpus(target(), prompts, tmp_path, CorpusSettings(temperatures=(0.0,), max_new_tokens=3, seed=1))
    other = Target(make_model(num_hidden_layers=2))
    with pytest.raises(CheckpointError, match="target has num_hidden_layers"):
        write_corpus(other, prompts, tmp_path, CorpusSettings(temperatures=(0.0,), max_new_tokens=3))
    with pytest.raises(CheckpointError, match="run outpace corpus for this target"):
        Corpus.load(tmp_path).check_fit(other)


def test_more_temperatures_join_a_corpus_and_equal_answers_are_not_made_twice(tmp_path):
    corpus(tmp_path, max_new_tokens=3)
    settings = CorpusSettings(temperatures=(0.0, 0.9), max_new_tokens=3, max_batch=8)
    report = write_corpus(target(), PromptReport(prompts=LINES), tmp_path, settings)
    assert (report.found, report.written) == (1, 1)
    assert Corpus.load(tmp_path).meta["temperatures"] == [0.0, 0.9]


@pytest.mark.parametrize("damage", ["missing", "meta", "shard", "none"])
def test_damage_is_told(tmp_path, damage):
    if damage != "missing":
        corpus(tmp_path, max_new_tokens=3)
    if damage == "meta":
        (tmp_path / "corpus.json").write_text("{")
    for file in tmp_path.glob("*.safetensors"):
        if damage == "shard":
            file.write_bytes(b"x" * 30)
        if damage == "none":
            file.unlink()
    words = {"missing": "write one with outpace corpus", "meta": "no corpus", "shard": "is damaged", "none": "no shard"}
    with pytest.raises(CheckpointError, match=words[damage]):
        Corpus.load(tmp_path)


def test_end_of_turn_belongs_to_the_answer(tmp_path):
    documents = corpus(tmp_path)
    ended = [ids for ids, _ in documents.documents() if ids[-1] == EOS]
    meta = json.loads((tmp_path / "corpus.json").read_text())
    assert meta["sampling"]["max_new_tokens"] == 40
    assert ended or all(len(ids) - prompt == 40 for ids, prompt in documents.documents())


def test_impossible_settings_are_refused():
    for bad in ({"temperatures": ()}, {"shard": 0}, {"temperatures": (-1.0,)}, {"top_p": 2.0}):
        with pytest.raises(ConfigError):
            CorpusSettings(**bad)
