import errno
import json

import pytest
import torch

from outpace.drafters import checkpoint
from outpace.drafters.checkpoint import load_checkpoint, save_checkpoint
from outpace.errors import CheckpointError
from outpace.target import Target
from tiny import make_model, target

TENSORS = {"head": torch.randn(4, 3, dtype=torch.bfloat16)}


class Words:
    chat_template = None

    def __init__(self, words, template=None):
        self.words, self.chat_template = words, template

    def get_vocab(self):
        return {word: i for i, word in enumerate(self.words)}


def test_what_is_saved_is_loaded(tmp_path):
    save_checkpoint(tmp_path, "x", {"draft_len": 3}, TENSORS, target())
    options, tensors = load_checkpoint(tmp_path, "x", target())
    assert options == {"draft_len": 3}
    assert torch.equal(tensors["head"], TENSORS["head"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("fails", ["save_file", "replace"])
def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch, fails):
    save_checkpoint(tmp_path, "x", {"draft_len": 3}, TENSORS, target())

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(CheckpointError, match=r"No space left.*unchanged"):
        save_checkpoint(tmp_path, "x", {"draft_len": 9}, {"head": torch.zeros(1)}, target())
    monkeypatch.undo()
    options, tensors = load_checkpoint(tmp_path, "x", target())
    assert options == {"draft_len": 3}
    assert torch.equal(tensors["head"], TENSORS["head"])
    assert len(list(tmp_path.iterdir())) == 2, "no temporary file is left behind"


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"hidden_size": 64}, "with hidden size 32, but .* has 64"),
        ({"num_hidden_layers": 2}, "number of layers 4"),
        ({"vocab_size": 41}, "vocabulary size 40"),
    ],
)
def test_a_drafter_for_another_shape_is_refused_in_words(tmp_path, other, words):
    save_checkpoint(tmp_path, "x", {}, TENSORS, target())
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(tmp_path, "x", Target(make_model(**other)))


def test_a_drafter_for_another_tokenizer_is_refused(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path, "x", {}, TENSORS, Target(model, Words(["a", "b"])))
    with pytest.raises(CheckpointError, match="gives other ids"):
        load_checkpoint(tmp_path, "x", Target(model, Words(["b", "a"])))


def test_another_template_is_refused_unless_forced_and_other_weights_are_warned_about(tmp_path):
    model = make_model()
    save_checkpoint(tmp_path, "x", {}, TENSORS, Target(model, Words(["a"], "one")))
    with pytest.raises(CheckpointError, match=r"writes conversations differently.*force=true"):
        load_checkpoint(tmp_path, "x", Target(model, Words(["a"], "two")))
    load_checkpoint(tmp_path, "x", Target(model, Words(["a"], "two")), force=True)
    other = Target(make_model(sharpness=9.0), Words(["a"], "one"))
    with pytest.warns(UserWarning, match="other weights"):
        load_checkpoint(tmp_path, "x", other)


@pytest.mark.parametrize("damage", ["missing", "not json", "weights"])
def test_unreadable_checkpoints_are_refused_in_words(tmp_path, damage):
    save_checkpoint(tmp_path, "x", {}, TENSORS, target())
    if damage == "missing":
        (tmp_path / "config.json").unlink()
    elif damage == "not json":
        (tmp_path / "config.json").write_text("{")
    else:
        (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="no readable drafter"):
        load_checkpoint(tmp_path, "x", target())


def test_a_template_is_what_it_writes_not_how_it_is_spelt(tmp_path):
    class Chat(Words):
        def apply_chat_template(self, messages, **options):
            return "|".join(message["content"] for message in messages) + self.chat_template.strip()

    model = make_model()
    save_checkpoint(tmp_path, "x", {}, TENSORS, Target(model, Chat(["a"], "end")))
    load_checkpoint(tmp_path, "x", Target(model, Chat(["a"], " end\n")))
    with pytest.raises(CheckpointError, match="conversations differently"):
        load_checkpoint(tmp_path, "x", Target(model, Chat(["a"], "over")))


def test_another_drafters_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path, "x", {}, TENSORS, target())
    with pytest.raises(CheckpointError, match="holds drafter 'x'"):
        load_checkpoint(tmp_path, "y", target())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["target"]["hidden_size"] == 32
