"""A tiny random model with a tokenizer of its own, saved as a directory: what `--model` takes, without a network."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from outpace.cli.app import app
from tiny import make_model

TEMPLATE = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """40 tokens: <s>, </s>, and characters one by one; the chat template puts brackets around a turn."""
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


@pytest.fixture
def outpace():
    """Run a command line: `outpace("generate", ...)` -> result with exit_code, stdout, stderr."""
    runner = CliRunner()

    def run(*arguments, stdin=None):
        return runner.invoke(app, [str(a) for a in arguments], input=stdin)

    return run
