"""Everything here runs on CPU without a network. torch gets one thread per worker; results do not depend on it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings as hypothesis_settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny import make_model

torch.set_num_threads(1)
hypothesis_settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis_settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _no_stray_randomness():
    """Nothing may depend on torch's global generator: give every test another state."""
    torch.seed()


TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """A tiny random model with a tokenizer of its own, saved as a directory: what `--model` takes, without a network.

    40 tokens: <s>, </s>, and characters one by one; the chat template puts brackets around a turn.
    """
    path = tmp_path_factory.mktemp("model")
    characters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "[", "]", ".", "?", "0", "1", "2", "3", "é"]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", *characters])}
    assert len(vocabulary) <= 40
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="never")
    tokenizer.decoder = decoders.Metaspace(replacement="Ġ", prepend_scheme="never")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")  # noqa: S106
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    make_model(tie_word_embeddings=False, max_position_embeddings=2048).save_pretrained(path)
    return str(path)
