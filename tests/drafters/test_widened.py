"""Learned drafters, widened with their target: the same text, and as many tokens accepted."""

import pytest
import torch

from outpace import Engine, Target
from outpace.drafters import make_drafter
from outpace.target.widen import Shape, Widening, widen
from tiny import PROMPTS, make_model

LARGE = Shape(
    hidden_size=96, intermediate_size=112, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=3,
    head_dim=16, vocab_size=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def targets():
    """A small target, the widening, and the large one."""
    small = Target(make_model("llama", sharpness=3.0))
    return small, Widening(small.model, LARGE), Target(widen(small.model, LARGE, torch.float32, "cpu"))


@pytest.mark.parametrize(
    "spec",
    [
        "medusa",
        "mtp",
        "mtp_heads",
        "eagle",
        "eagle3",
        "ptp:slots=4,any_temperature=true",
        "ptp:slots=4,mode=mask,sampler=chain,vocabulary=32",
        "ptp:slots=4,mode=mask,sampler=eagle,vocabulary=32,branches=2,nodes=6",
        "medusa:vocabulary=0,projection=low_rank",
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_widened_drafter_guesses_what_it_guessed(targets, spec, temperature):
    small, widening, large = targets
    drafter = make_drafter(spec)
    if getattr(drafter, "vocabulary", 0):
        drafter.vocabulary = 32
    drafter.initialise(small, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in drafter.module.parameters():  # away from where nothing has been learned yet
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    found = []
    for target, one in ((small, drafter.for_decoding()), (large, drafter.widened(widening, target=large))):
        engine = Engine(target, one, stand_down=False)
        outputs = engine.generate(PROMPTS, max_new_tokens=32, temperature=temperature, seed=5, ignore_eos=True)
        found.append(
            ([o.tokens for o in outputs], [o.stats.accepted for o in outputs], [o.stats.drafted for o in outputs])
        )
        engine.close()
    texts, accepted = zip(*((one[0], sum(one[1])) for one in found), strict=True)
    assert texts[0] == texts[1]
    assert accepted[1] == pytest.approx(accepted[0], rel=0.1, abs=2)  # norms are exact up to eps: a guess may flip
    assert sum(found[0][2]) > 0
