"""Dense copies of GGUF models: found by content, whole or absent, never needed."""

import shutil

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from outpace.target import dense
from tiny import make_model


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.setenv("OUTPACE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"weights")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))  # noqa: S106
    return file, make_model(), tokenizer


def test_a_copy_holds_the_same_numbers_and_is_found_by_content(parts):
    file, model, tokenizer = parts
    copy = dense.copy_of(file, torch.float32, "5")
    assert not dense.is_whole(copy)
    dense.keep(copy, model, tokenizer)
    assert dense.is_whole(copy)
    again = AutoModelForCausalLM.from_pretrained(copy)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    renamed = shutil.copy(file, file.with_name("other"))
    assert dense.copy_of(file, torch.float32, "5") == copy
    assert dense.copy_of(file, torch.bfloat16, "5") != copy
    assert dense.copy_of(file, torch.float32, "6") != copy
    assert dense.copy_of(file.with_name("other"), torch.float32, "5").name[-16:] == copy.name[-16:], renamed
    file.write_bytes(b"other weights")
    assert dense.copy_of(file, torch.float32, "5") != copy


def test_the_second_writer_leaves_the_first_ones(parts):
    file, model, tokenizer = parts
    copy = dense.copy_of(file, torch.float32, "5")
    dense.keep(copy, model, tokenizer)
    before = (copy / "config.json").stat().st_mtime_ns
    dense.keep(copy, model, tokenizer)
    assert (copy / "config.json").stat().st_mtime_ns == before
    assert [one.name for one in copy.parent.iterdir()] == [copy.name]


@pytest.mark.parametrize(
    "problem", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_what_cannot_be_written_leaves_nothing_behind(parts, problem):
    file, model, _ = parts
    copy = dense.copy_of(file, torch.float32, "5")

    class Full:
        def save_pretrained(self, folder):
            raise problem

    dense.keep(copy, model, Full())
    assert not dense.is_whole(copy)
    assert not list(copy.parent.iterdir())


def test_a_full_disk_keeps_no_copy(parts, monkeypatch):
    file, model, tokenizer = parts
    copy = dense.copy_of(file, torch.float32, "5")
    usage = shutil.disk_usage(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    dense.keep(copy, model, tokenizer)
    assert not dense.is_whole(copy)


@pytest.mark.parametrize("word", ["off", "0", "none", "OFF"])
def test_it_can_be_turned_off(parts, monkeypatch, word):
    file, model, tokenizer = parts
    monkeypatch.setenv("OUTPACE_CACHE", word)
    assert dense.copy_of(file, torch.float32, "5") is None
    dense.keep(None, model, tokenizer)
