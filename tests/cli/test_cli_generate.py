"""`outpace generate` on a tiny model: what is printed where, and with which exit code."""

import inspect
import json

import pytest

from outpace import Engine, Settings
from outpace.cli.generate import generate

SMALL = ("--max-new-tokens", 20, "--dtype", "float32", "--device", "cpu")
SAMPLED = (*SMALL, "--temperature", 0.9, "--seed", 5)


@pytest.fixture(scope="module")
def engine(model_dir):
    import torch

    return Engine.from_pretrained(model_dir, None, dtype=torch.float32, device="cpu")


@pytest.fixture(autouse=True)
def _no_end_of_sequence(monkeypatch):
    """A random model ends its texts at random; let them run to their length, so that there is something to see."""
    monkeypatch.setattr("outpace.target.model._eos_ids", lambda model: ())


@pytest.fixture(scope="module")
def said(engine):
    """Text of plain decoding, by prompt."""

    def say(prompt, **settings):
        return engine.generate(prompt, max_new_tokens=20, ignore_eos=True, **settings)[0].text

    return say


@pytest.mark.parametrize(
    "drafter", ["none", "prompt_lookup", "suffix", "layer_skip", "lookahead", "prompt_lookup+suffix"]
)
def test_the_stream_is_the_text(outpace, model_dir, said, drafter):
    result = outpace("generate", "hello abc", "--model", model_dir, "--drafter", drafter, *SAMPLED)
    assert result.exit_code == 0
    assert result.stdout == said("hello abc", temperature=0.9, seed=5) + "\n"
    assert "guarantee: path" in result.stderr


def test_json_is_one_document_and_holds_the_same_text(outpace, model_dir, said):
    result = outpace("generate", "hello abc", "--model", model_dir, "--json", *SAMPLED)
    document = json.loads(result.stdout)
    assert document["outputs"][0]["text"] == said("hello abc", temperature=0.9, seed=5)
    assert document["settings"]["temperature"] == 0.9
    assert document["outputs"][0]["stats"]["num_emitted_tokens"] == 20


def test_several_prompts_are_answered_in_order(outpace, model_dir, said):
    result = outpace("generate", "hello abc", "xyz", "--model", model_dir, *SMALL)
    assert result.stdout == f"{said('hello abc')}\n\n{said('xyz')}\n"
    assert result.stderr.index("[1/2] hello abc") < result.stderr.index("[2/2] xyz")


def test_a_dash_reads_stdin(outpace, model_dir, said):
    result = outpace("generate", "-", "--model", model_dir, *SMALL, stdin="hello abc")
    assert result.stdout == said("hello abc") + "\n"


def test_raw_leaves_the_chat_template_out(outpace, model_dir, engine):
    ids = engine.target.tokenizer.encode("hello abc")
    want = engine.generate([ids], max_new_tokens=20, ignore_eos=True)[0].text
    result = outpace("generate", "hello abc", "--raw", "--model", model_dir, *SMALL)
    assert result.stdout == want + "\n"


def test_stop_strings_end_the_text_and_are_not_shown(outpace, model_dir, said):
    whole = said("hello abc", temperature=0.9, seed=5)
    first, second = whole[6], whole[9]
    result = outpace("generate", "hello abc", "--model", model_dir, "--stop", first, "--stop", second, *SAMPLED)
    cut = min(whole.find(first), whole.find(second))
    assert result.stdout == whole[:cut] + "\n"
    assert "ended by stop" in result.stderr


def test_strict_says_the_same(outpace, model_dir, said):
    result = outpace("generate", "hello abc", "--strict", "--model", model_dir, *SMALL)
    assert result.stdout == said("hello abc") + "\n"


@pytest.mark.parametrize("extra", [(), ("--temperature", 0.9)], ids=["greedy", "sampled"])
def test_compare_finds_equal_tokens(outpace, model_dir, said, extra):
    drafter = "prompt_lookup:min_ngram=1"
    result = outpace(
        "generate", "abcabcabc", "xyz", "--compare", "--drafter", drafter, "--model", model_dir, *SMALL, *extra
    )
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("same 20 tokens as plain decoding") == 2
    assert "«" in result.stdout  # no terminal: markers instead of colours
    assert "\x1b[" not in result.stdout + result.stderr
    document = json.loads(
        outpace(
            "generate", "abcabcabc", "--compare", "--json", "-d", drafter, "--model", model_dir, *SMALL, *extra
        ).stdout
    )
    assert document["comparisons"][0]["tokens_equal"] is True
    assert document["comparisons"][0]["audit"]["verdict"] == "equal"


def test_compare_of_several_prompts_uses_the_numbers_of_the_batch(outpace, model_dir):
    arguments = ("generate", "abcabcabc", "xyz", "--model", model_dir, "--json", *SAMPLED)
    batch = json.loads(outpace(*arguments).stdout)["outputs"]
    race = json.loads(outpace(*arguments, "--compare").stdout)["comparisons"]
    assert [one["drafted"]["tokens"] for one in race] == [one["tokens"] for one in batch]


def test_compare_shows_the_audit_where_tokens_differ(outpace, model_dir, monkeypatch):
    import dataclasses

    from outpace.target import Target

    run = Target.run

    def shifted(self, block, cache, *, taps=(), logits=True):
        if logits and block.rows > 1:
            block = dataclasses.replace(block, positions=block.positions + 3)
        return run(self, block, cache, taps=taps, logits=logits)

    monkeypatch.setattr(Target, "run", shifted)
    monkeypatch.setattr("outpace.engine.pace._ALLOWANCE", float("inf"))  # whatever a tiny model's rounds seem to cost
    result = outpace(
        "generate", "abcabcabc", "--compare", "-d", "prompt_lookup:min_ngram=1", "--model", model_dir, *SMALL
    )
    assert result.exit_code == 0
    assert "NOT a near tie: a bug" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--drafter", "sufix"), 2, "did you mean 'suffix'?"),
        (("--drafter", "suffix:draft_length=3"), 2, "has no option"),
        (("--temperature", -1), 2, "temperature must be"),
        (("--temperature", 0.5, "--top-p", 1.5), 2, "top_p must be in (0, 1]"),
        (("--top-k", 5), 2, "no effect at temperature=0"),
        (("--seed", -1), 2, "seed must be"),
        (("--rule", "tokn"), 2, "token"),
        (("--rule", "token"), 2, "rule='path'"),
        (("--dtype", "float33"), 2, "did you mean 'float32'?"),
        (("--device", "quantum"), 2, "--device cpu"),
        (("--compare", "--drafter", "none"), 2, "--compare"),
        (("--max-new-tokens", 0), 2, "max_new_tokens must be"),
        (("--model", "/no/such/place"), 1, "no directory or file"),
        (("--model", "smollm3"), 1, "did you mean 'smollm2'?"),
        (("--temprature", 1), 2, "No such option"),
        (("--temperature", "warm"), 2, "temperature"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_mistakes_become_one_message_and_an_exit_code(outpace, model_dir, arguments, code, words):
    named = () if "--model" in arguments else ("--model", model_dir)
    result = outpace("generate", "hello abc", *named, *arguments)
    assert result.exit_code == code
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("prompt", ["", "   ", "-"])
def test_an_empty_prompt_is_refused_before_anything_is_loaded(outpace, prompt):
    result = outpace("generate", prompt, "--model", "/no/such/place", stdin="")
    assert result.exit_code == 2
    assert "outpace generate" in result.stderr


def test_debug_lets_the_error_through(outpace):
    from outpace.errors import CheckpointError

    result = outpace("generate", "hello", "--model", "/no/such/place", "--debug")
    assert isinstance(result.exception, CheckpointError)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Press Ctrl-C in the n-th step of any engine."""

    def arm(steps):
        step, count = Engine.step, iter(range(10_000))

        def interrupted(self):
            if next(count) >= steps:
                raise KeyboardInterrupt
            return step(self)

        monkeypatch.setattr(Engine, "step", interrupted)

    return arm


def test_an_interrupt_keeps_the_text_so_far(outpace, model_dir, said, interrupt_after):
    whole = said("hello abc")
    interrupt_after(5)
    result = outpace("generate", "hello abc", "--model", model_dir, "--drafter", "none", *SMALL)
    assert result.exit_code == 130
    assert result.stdout.endswith("\n")
    text = result.stdout[:-1]
    assert 0 < len(text) < len(whole)
    assert whole.startswith(text)
    assert "interrupted" in result.stderr


def test_an_interrupt_keeps_every_answer_of_a_batch(outpace, model_dir, said, interrupt_after):
    whole = [said("hello abc"), said("xyz")]
    interrupt_after(5)
    result = outpace("generate", "hello abc", "xyz", "--json", "--model", model_dir, "--drafter", "none", *SMALL)
    assert result.exit_code == 130
    outputs = json.loads(result.stdout)["outputs"]
    assert [output["finish_reason"] for output in outputs] == ["interrupted"] * 2
    assert all(0 < len(o["text"]) < len(text) for text, o in zip(whole, outputs, strict=True))
    assert all(text.startswith(o["text"]) for text, o in zip(whole, outputs, strict=True))


def test_an_interrupt_outside_decoding_exits_alike(outpace, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("outpace.target.Target.from_pretrained", interrupted)
    result = outpace("generate", "hello")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr


def test_flags_default_to_the_settings():
    flags = {name: p.default for name, p in inspect.signature(generate).parameters.items()}
    settings = Settings()
    for name in ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed"):
        assert flags[name] == getattr(settings, name), name
    assert flags["presence_penalty"] == settings.presence_penalty
    assert flags["frequency_penalty"] == settings.frequency_penalty
    assert tuple(flags["stop"] or ()) == settings.stop
    assert flags["trust_remote_code"] is False
