"""The CPU's fast pass is the modules' arithmetic in fewer steps: the same numbers, for every family and setting."""

import dataclasses

import pytest
import torch

from outpace import Engine
from outpace.errors import ConfigError, UnsupportedError
from outpace.laws import Tree
from outpace.target import Block, GatedLoRA, Scouts, Target
from tiny import FAMILIES, GENERIC, PROMPTS, make_model

TAPS = ("embed", "in:1", "out:2", "pre_norm", "post_norm")
TREES = [Tree([1, 2, 3, 4, 5], [-1, 0, 0, -1, 2]), Tree([7, 8], [-1, 0])]


@pytest.fixture(autouse=True, params=["on", "off"])
def compiled(request, monkeypatch):
    """Both ways: with compiled kernels (where there is a compiler), and without."""
    monkeypatch.setenv("OUTPACE_NATIVE", request.param)


def filled(target):
    cache = target.new_cache(slots=2)
    for slot, prompt in enumerate([PROMPTS[0], PROMPTS[4]]):
        target.through("readable").prefill(prompt, cache, slot=slot)
    return cache


def gap(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


@torch.inference_mode()
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.float64, 1e-14), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_tree_gives_the_modules_numbers(name, dtype, most):
    target = Target(make_model(name, dtype=dtype), path="fast")
    cache = filled(target)
    block = Block.of([9, 11], TREES, cache.lengths, target.device)
    wanted = target.through("readable").run(block, cache, taps=TAPS)
    cache.drop()
    found = target.run(block, cache, taps=TAPS)
    assert gap(found.logits, wanted.logits) <= most
    assert max(gap(found.taps[tap], wanted.taps[tap]) for tap in TAPS) <= most


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_scouts_with_an_adapter_give_the_modules_numbers(name):
    target = Target(make_model(name), path="fast")
    cache = filled(target)
    block = Block.of([9, 11], TREES, cache.lengths, target.device)
    rows, count = block.rows, 3
    sees = torch.zeros(2, count, rows + count, dtype=torch.bool)
    sees[:, :, 0] = True
    sees[:, :, rows:] = torch.ones(count, count, dtype=torch.bool).tril()
    adapter = GatedLoRA.for_all_layers(target.model, 4)
    for up in adapter.up.values():
        torch.nn.init.normal_(up, std=0.5)
    positions = block.positions[:, :1] + 1 + torch.arange(count)
    scouts = Scouts(positions, sees, embeds=torch.randn(2, count, target.hidden_size), adapter=adapter)
    plain = target.run(block, cache).logits
    cache.drop()
    with target.adapted(adapter):
        wanted = target.through("readable").run(dataclasses.replace(block, scouts=scouts), cache)
        cache.drop()
        found = target.run(dataclasses.replace(block, scouts=scouts), cache)
    assert torch.allclose(found.scout_logits, wanted.scout_logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found.scout_logits[:, :1], plain[:, :1])
    assert torch.allclose(found.logits, plain, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_view_runs_its_own_layers_only():
    target = Target(make_model())
    cache = filled(target)
    block = Block.of([9, 11], TREES, cache.lengths, target.device)
    view = target.view([0, 3])
    wanted = view.through("readable").run(block, cache).logits
    cache.drop()
    assert gap(view.run(block, cache).logits, wanted) <= 2e-6


def test_joined_weights_are_the_models_own_and_are_joined_once():
    model = make_model("qwen2")  # with biases
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = Target(model, path="fast"), Target(model, path="fast")
    qkv = [target.fast.plan.layers[0].qkv for target in (first, second)]
    assert (
        qkv[0].weight.data_ptr() == qkv[1].weight.data_ptr() == model.model.layers[0].self_attn.q_proj.weight.data_ptr()
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.zero_()
    assert not qkv[0].weight[-1].any()  # one storage: what changes in the model changes in the plan


@torch.inference_mode()
def test_a_model_that_was_converted_gets_a_new_plan():
    target = Target(make_model())
    assert target.fast.plan.dtype == torch.float32
    target.model.to(torch.float64)
    assert target.fast.plan.dtype == torch.float64
    cache = filled(target)
    block = Block.of([9, 11], TREES, cache.lengths, target.device)
    wanted = target.through("readable").run(block, cache).logits
    cache.drop()
    assert gap(target.run(block, cache).logits, wanted) <= 1e-14


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_both_paths_emit_the_same_tokens(temperature):
    target = Target(make_model())
    options = {"max_new_tokens": 24, "temperature": temperature, "seed": 3}
    wanted = Engine(target, "suffix", path="readable").generate(PROMPTS[:3], **options)
    assert [o.tokens for o in Engine(target, "suffix", path="fast").generate(PROMPTS[:3], **options)] == [
        o.tokens for o in wanted
    ]


def test_the_path_is_named_and_refused_in_words():
    with pytest.raises(ConfigError, match=r"unknown path 'quick'.*readable"):
        Target(make_model(), path="quick")
    name = next(iter(GENERIC))
    target = Target(make_model(name))
    assert target.fast is None
    assert "outside the family table" in target.path_reason
    with pytest.raises(UnsupportedError, match=r"no fast path .* outside the family table"):
        Engine(target, path="fast")
    assert Target(make_model(), path="readable").path_reason.startswith("asked for")


def test_what_the_fused_kernels_cannot_do_is_refused_with_the_reason():
    scaled = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
    target = Target(make_model(**scaled))
    assert target.fast is None
    assert "dynamic" in target.path_reason
