"""Weights of drafters in eight bits on a CPU: near what they were, never in training, never a target's; same text."""

import platform

import pytest
import torch

from outpace import Engine
from outpace.drafters.eagle import Eagle3
from outpace.drafters.heads import DraftHead
from outpace.drafters.medusa import Medusa
from outpace.drafters.mtp import MTP
from outpace.target import Target
from outpace.target.native.build import why_not
from outpace.target.skinny import Eight, Linear, round_weights, takes_eight
from tiny import PROMPTS, learned, make_model

pytestmark = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64") or not hasattr(torch, "_weight_int8pack_mm"),
    reason="products in eight bits are taken on x86 CPUs only",
)
LARGE = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "intermediate_size": 640, "vocab_size": 600}
MAKERS = {
    "eagle3": lambda: Eagle3(draft_len=3, branches=1, nodes=3, vocabulary=500),
    "mtp": lambda: MTP(draft_len=3, branches=1, nodes=3, vocabulary=500),
    "medusa": lambda: Medusa(heads=2, nodes=3, vocabulary=500),
}


@pytest.fixture(scope="module")
def large():
    return Target(make_model(**LARGE))


def rounded(module):
    return [m for m in module.modules() if getattr(m, "eight", None) is not None]


@pytest.mark.parametrize("native", ["on", "off"])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 40])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_in_eight_bits_is_near_the_product(rows, bias, native, monkeypatch):
    monkeypatch.setenv("OUTPACE_NATIVE", native)
    torch.manual_seed(rows)
    layer = Linear(384, 300, bias=bias)
    x = torch.randn(2, rows, 384)
    wanted = layer(x).detach()
    round_weights(layer)
    assert torch.equal(layer(x), wanted), "gradients are asked for"
    with torch.no_grad():
        found = layer(x)
    assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    apart = float((found - wanted).norm() / wanted.norm())
    few = 2 * rows <= (16 if why_not(torch.float32) is None else 8)
    assert 1e-3 < apart < 0.02 if few else apart < 1e-5, "many rows are quicker as they were"


def test_small_weights_other_dtypes_and_a_switch_keep_their_bits(monkeypatch):
    assert takes_eight(torch.zeros(256, 256))
    assert not takes_eight(torch.zeros(100, 100))
    assert not takes_eight(torch.zeros(256, 256, dtype=torch.float64))
    assert takes_eight(torch.zeros(256, 256, dtype=torch.bfloat16)) == (why_not(torch.float32) is None)
    monkeypatch.setenv("OUTPACE_INT8", "off")
    assert not takes_eight(torch.zeros(256, 256))


def test_a_row_of_zeros_is_a_row_of_zeros():
    weight = torch.randn(300, 256)
    weight[7] = 0
    found = Eight(weight, None)(torch.randn(2, 256))
    assert torch.isfinite(found).all()
    assert not found[:, 7].any()


@pytest.mark.parametrize("name", MAKERS)
def test_what_decodes_is_rounded_and_what_trains_is_not(large, name):
    drafter = learned(large, MAKERS[name]())
    assert not rounded(drafter.module)
    copy = drafter.for_decoding()
    layers = rounded(copy.module)
    assert any(isinstance(layer, DraftHead) for layer in layers)
    assert not rounded(large.model), "a target keeps its bits"
    assert copy.module.state_dict().keys() == drafter.module.state_dict().keys(), "and checkpoints theirs"


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", MAKERS)
def test_the_text_is_that_of_plain_decoding(large, name, temperature):
    options = {"max_new_tokens": 20, "temperature": temperature, "seed": 4, "ignore_eos": True}
    wanted = Engine(large).generate(PROMPTS[:3], **options)
    drafter = learned(large, MAKERS[name]()).for_decoding()
    ours = Engine(large, drafter, stand_down=False, check_integrity=True).generate(PROMPTS[:3], **options)
    assert [o.tokens for o in ours] == [o.tokens for o in wanted]
    assert sum(o.stats.drafted for o in ours) > 0
